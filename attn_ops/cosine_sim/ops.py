"""`attn::cosine_sim`: public ops, and the private forward and backward that carry all the rest.

The public ops check their arguments and fold them (masks.py, _arguments.py); compiled graphs keep
the private ones. schemas.txt has the schemas.

What the private ops read beside the shared arguments (see _softmax_ops.py):
  head_scale [H]; query_gain [H, D]; key_gain [Hk, D];
  groups: 0 takes query and key as they are, else the number of slices that are normalised.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attn_ops import _autograd, _library, _softmax_ops, _vmap
from attn_ops._arguments import check_scale, fold
from attn_ops._checks import (
    check_floating,
    check_parameter,
    check_rank,
    check_shape,
    compute_dtype,
    fail,
    shape,
)
from attn_ops.cosine_sim import cuda
from attn_ops.cosine_sim.in_blocks import ATTENTION, FORWARD_MODE, unit_tangents
from attn_ops.cosine_sim.normalize import unit_slices
from attn_ops.masks import UNBOUNDED

_library.define("cosine_sim")


def _attention(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: float = 8.0,
    normalize: bool = True,
    groups: int = 1,
    head_scale: Tensor | None = None,
    query_gain: Tensor | None = None,
    key_gain: Tensor | None = None,
    **shared: Any,
) -> tuple[Tensor, Tensor]:
    args = fold(op, query, key, value, mask, bias, **shared)
    parameters = (bias, args.relative_bias, args.sink, head_scale, query_gain, key_gain)
    _autograd.check_forward_mode(op, query, key, value, *parameters)
    heads = args.query.shape[1]
    check_scale(op, scale, args.query)
    _check_groups(op, groups, args.query.shape[3])
    if not normalize and (query_gain is not None or key_gain is not None):
        name = "key_gain" if query_gain is None else "query_gain"
        raise ValueError(f"{op}: {name} must come with normalize=True, got normalize=False")
    if head_scale is not None:
        check_parameter(op, "head_scale", head_scale, args.query)
        check_shape(op, "head_scale", head_scale, (heads,), "[H]")
        head_scale = head_scale.to(compute_dtype(args.query.dtype))
    out, lse = _forward(
        args.query,
        args.key,
        args.value,
        args.mask,
        args.bias,
        args.relative_bias,
        head_scale,
        _fold_gain(op, "query_gain", query_gain, args.query, "H"),
        _fold_gain(op, "key_gain", key_gain, args.key, "Hk"),
        args.sink,
        args.start,
        args.stop,
        args.left,
        args.right,
        scale,
        groups if normalize else 0,
    )
    return args.unfold(out), args.unfold(lse)


def plain(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, groups: int
) -> tuple[Tensor, Tensor]:
    """out and lse of a plain call (_plain.py)."""
    check_scale("cosine_sim", scale, query)
    if groups != 1:
        _check_groups("cosine_sim", groups, query.shape[3])
    return _plain(query, key, value, (UNBOUNDED, 0 if causal else UNBOUNDED, scale, groups))


def _fold_gain(op: str, name: str, gain: Tensor | None, x: Tensor, letter: str) -> Tensor | None:
    """[D] or [heads, D] as [heads, D] in the dtype of sums."""
    if gain is None:
        return None
    check_parameter(op, name, gain, x)
    heads, width = x.shape[1], x.shape[3]
    law = f"[D] or [{letter}, D]"
    check_rank(op, name, gain, (1, 2), law)
    if gain.shape[-1] != width or (gain.dim() == 2 and gain.shape[0] != heads):
        raise fail(op, name, f"have shape {law}={(heads, width)}", shape(gain))
    return gain.to(compute_dtype(x.dtype)).expand(heads, width)


def _cosine_sim(*args: Any, **kwargs: Any) -> Tensor:
    return _attention("cosine_sim", *args, **kwargs)[0]


def _cosine_sim_with_lse(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return _attention("cosine_sim_with_lse", *args, **kwargs)


def _check_groups(op: str, groups: int, width: int) -> None:
    if groups < 1 or width % groups != 0:
        raise fail(op, "groups", f"be at least 1 and divide D={width}", groups)


def _l2_normalize(x: Tensor, groups: int = 1) -> Tensor:
    check_floating("l2_normalize", "x", x)
    if x.dim() == 0:
        raise fail("l2_normalize", "x", "have shape [..., D]", shape(x))
    _check_groups("l2_normalize", groups, x.shape[-1])
    return unit_slices(x, groups)


_library.decompose("l2_normalize", _l2_normalize)
cosine_sim = _autograd.composite("cosine_sim", _cosine_sim)
cosine_sim_with_lse = _autograd.composite("cosine_sim_with_lse", _cosine_sim_with_lse)


# --- kernels


def _forward_cuda(*args: Any) -> tuple[Tensor, Tensor]:
    return _library.triton_room("cosine_sim").forward(*args)


def _backward_cuda(*args: Any) -> tuple[Tensor, ...]:
    return _library.triton_room("cosine_sim").backward(*args)


def _jvp_cuda(*args: Any) -> tuple[Tensor, Tensor]:
    return _library.triton_room("cosine_sim", "triton_jvp").jvp(*args)


def _unit_jvp_cuda(*args: Any) -> tuple[Tensor, Tensor]:
    return _library.triton_room("cosine_sim", "triton_jvp").unit_jvp(*args)


def _unit_jvp_backward(ctx: Any, *cotangents: Tensor | None) -> list[Tensor | None]:
    args = (*ctx.saved_tensors, *ctx.options)
    return _autograd.vjp_of_formula(unit_tangents, args, cotangents, (0, 1))


@_library.fake("_cosine_sim_unit_jvp")
def _unit_jvp_fake(x: Tensor, tangent: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


_autograd.differentiable(
    "_cosine_sim_unit_jvp", _autograd.saving(2), _unit_jvp_backward, unit_tangents, plain=True
)
_vmap.register("_cosine_sim_unit_jvp", [_vmap.BATCH_HEADS] * 2, [_vmap.BATCH_HEADS] * 2)
_softmax_ops.implement("_cosine_sim_unit_jvp", unit_tangents, _unit_jvp_cuda)
_forward, _plain = _softmax_ops.register(
    "cosine_sim", ATTENTION, FORWARD_MODE, _forward_cuda, _backward_cuda, _jvp_cuda, cuda.plain
)
