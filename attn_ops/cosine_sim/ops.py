"""`attn::cosine_sim`: public ops, and the private forward and backward that carry all the rest.

The public ops check their arguments and fold them (masks.py, _arguments.py); compiled graphs keep
the private ones. schemas.txt has the schemas.

What the private ops read, beside query, key and value [B, H, M, D], [B, Hk, N, D], [B, Hk, N, E]:
  mask bool, bias [B, H, M, N], each size 1 or full; relative_bias [H, M+N-1]; head_scale, sink [H];
  query_gain [H, D]; key_gain [Hk, D]; start, stop [1 or B, M]; left, right: the band of masks.py;
  groups: 0 takes query and key as they are, else the number of slices that are normalised.
All outputs are contiguous.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attn_ops import _autograd, _library, _vmap
from attn_ops._arguments import fold
from attn_ops._checks import (
    check_floating,
    check_parameter,
    check_rank,
    check_shape,
    compute_dtype,
    fail,
    shape,
)
from attn_ops.cosine_sim import in_blocks
from attn_ops.cosine_sim.normalize import unit_slices

_library.define("cosine_sim")

# Arguments of the private forward: 12 tensors, then left, right, scale, groups.
_NUM_TENSORS = 12
# Its differentiable tensors, in the order in which the private backward returns their gradients.
_DIFFERENTIABLE = (0, 1, 2, 4, 5, 6, 7, 8, 9)


def _attention(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float = 8.0,
    normalize: bool = True,
    groups: int = 1,
    relative_bias: Tensor | None = None,
    window: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    sink: Tensor | None = None,
    head_scale: Tensor | None = None,
    query_gain: Tensor | None = None,
    key_gain: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    args = fold(
        op,
        query,
        key,
        value,
        mask,
        bias,
        relative_bias,
        sink,
        causal,
        window,
        cu_seqlens_q,
        cu_seqlens_k,
    )
    parameters = (bias, relative_bias, sink, head_scale, query_gain, key_gain)
    _autograd.check_forward_mode(op, query, key, value, *parameters)
    heads = args.query.shape[1]
    if isinstance(scale, float):
        _check_scale(op, scale, args.query)
    _check_groups(op, groups, args.query.shape[3])
    if not normalize and (query_gain is not None or key_gain is not None):
        name = "key_gain" if query_gain is None else "query_gain"
        raise ValueError(f"{op}: {name} must come with normalize=True, got normalize=False")
    if head_scale is not None:
        check_parameter(op, "head_scale", head_scale, args.query)
        check_shape(op, "head_scale", head_scale, (heads,), "[H]")
        head_scale = head_scale.to(compute_dtype(args.query.dtype))
    out, lse = torch.ops.attn._cosine_sim_fwd(
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


def _check_scale(op: str, scale: float, query: Tensor) -> None:
    if not math.isfinite(scale):
        raise fail(op, "scale", "be finite", scale)
    dtype = compute_dtype(query.dtype)
    if abs(scale) > torch.finfo(dtype).max:
        raise fail(op, "scale", f"be finite in {dtype}", scale)


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
_library.decompose("cosine_sim", _cosine_sim)
_library.decompose("cosine_sim_with_lse", _cosine_sim_with_lse)


# --- shapes


@_library.fake("_cosine_sim_fwd")
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, heads, num_queries, _width = query.shape
    out = query.new_empty(batch, heads, num_queries, value.shape[3])
    return out, query.new_empty(batch, heads, num_queries, dtype=compute_dtype(query.dtype))


@_library.fake("_cosine_sim_bwd")
def _(grad_out: Tensor, grad_lse: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    query, output_mask = args[0], args[-1]
    inputs = [args[i] for i in _DIFFERENTIABLE]
    return tuple(
        x.new_empty(x.shape) if needed else query.new_empty(0)
        for x, needed in zip(inputs, output_mask, strict=True)
    )


# --- derivatives


def _save_forward(ctx: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*args[:_NUM_TENSORS], *output)
    ctx.options = args[_NUM_TENSORS:]
    ctx.set_materialize_grads(False)


def _forward_backward(
    ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    *tensors, out, lse = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * (_NUM_TENSORS + len(ctx.options))
    if grad_out is None and grad_lse is None:
        return tuple(grads)
    needed = _autograd.needed(ctx)
    output_mask = [needed[i] for i in _DIFFERENTIABLE]
    results = torch.ops.attn._cosine_sim_bwd(
        torch.zeros_like(out) if grad_out is None else grad_out,
        grad_lse,
        *tensors,
        out,
        lse,
        *ctx.options,
        output_mask,
    )
    for i, result, need in zip(_DIFFERENTIABLE, results, output_mask, strict=True):
        grads[i] = result if need else None
    return tuple(grads)


# The backward op is a function of grad_out, grad_lse, the forward's tensors, out and lse.
_BACKWARD_DIFFERENTIABLE = (0, 1, *(i + 2 for i in _DIFFERENTIABLE), 14, 15)


def _save_backward(ctx: Any, args: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.options = args[16:]
    ctx.save_for_backward(*args[:16])
    ctx.set_materialize_grads(False)


def _backward_backward(ctx: Any, *cotangents: Tensor | None) -> list[Tensor | None]:
    args = (*ctx.saved_tensors, *ctx.options)
    return _autograd.vjp_of_formula(
        in_blocks.backward_formula, args, cotangents, _BACKWARD_DIFFERENTIABLE
    )


_autograd.differentiable(
    "_cosine_sim_fwd", _save_forward, _forward_backward, in_blocks.forward_formula
)
_autograd.differentiable(
    "_cosine_sim_bwd", _save_backward, _backward_backward, in_blocks.backward_formula
)


# --- batching: where the heads stand in every tensor

_FORWARD_PLACES = (
    *[_vmap.BATCH_HEADS] * 3,  # query, key, value
    *[_vmap.SCORES] * 2,  # mask, bias
    *[_vmap.HEADS] * 5,  # relative_bias, head_scale, query_gain, key_gain, sink
    *[_vmap.NOWHERE] * 2,  # start, stop
)
_vmap.register("_cosine_sim_fwd", _FORWARD_PLACES, [_vmap.BATCH_HEADS] * 2)
_vmap.register(
    "_cosine_sim_bwd",
    (*[_vmap.BATCH_HEADS] * 2, *_FORWARD_PLACES, *[_vmap.BATCH_HEADS] * 2),
    [_FORWARD_PLACES[i] for i in _DIFFERENTIABLE],
    gradient_of=[i + 2 for i in _DIFFERENTIABLE],
)


# --- kernels


def _forward_cuda(query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    if query.dtype == torch.float64:
        return in_blocks.forward(query, *args)
    return _library.triton_room("cosine_sim").forward(query, *args)


def _backward_cuda(grad_out: Tensor, *args: Any) -> tuple[Tensor, ...]:
    if args[1].dtype == torch.float64:
        return in_blocks.backward(grad_out, *args)
    return _library.triton_room("cosine_sim").backward(grad_out, *args)


for _op, _blocks, _cuda in (
    ("_cosine_sim_fwd", in_blocks.forward, _forward_cuda),
    ("_cosine_sim_bwd", in_blocks.backward, _backward_cuda),
):
    _library.implement(_op, _blocks, "CompositeExplicitAutograd")
    _library.implement(_op, _cuda, "CUDA")
