"""`attn::l1` and `attn::l1_scores`: public ops, and the private ops that carry all the rest.

The public ops check their arguments and fold them (masks.py, _arguments.py); compiled graphs keep
the private ones. schemas.txt has the schemas.

What the private ops read beside the shared arguments (see _softmax_ops.py):
  scale: any finite number; eps: None for scores -dist, else scores are 1 / (eps + dist).
`_l1_scores_bwd` reads the gradient of scale * sum_d |q - k|, in query's dtype or that of sums.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attn_ops import _ahead, _autograd, _library, _softmax_ops, _vmap
from attn_ops._arguments import autocast, check_scale, fold, fold_tensors
from attn_ops._checks import compute_dtype, fail
from attn_ops.l1 import cuda, in_blocks
from attn_ops.masks import UNBOUNDED

_library.define("l1")


def _attention(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    score: str = "negative",
    eps: float = 1e-3,
    **shared: Any,
) -> tuple[Tensor, Tensor]:
    args = fold(op, query, key, value, mask, bias, **shared)
    _autograd.check_forward_mode(op, query, key, value, bias, args.relative_bias, args.sink)
    out, lse = _forward(
        args.query,
        args.key,
        args.value,
        args.mask,
        args.bias,
        args.relative_bias,
        args.sink,
        args.start,
        args.stop,
        args.left,
        args.right,
        *_fold_score(op, args.query, scale, score, eps, compute_dtype(args.query.dtype)),
    )
    return args.unfold(out), args.unfold(lse)


def plain(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """out and lse of a plain call (_plain.py)."""
    options = _fold_score("l1", query, scale, "negative", 1e-3, query.dtype)
    return _plain(query, key, value, (UNBOUNDED, 0 if causal else UNBOUNDED, *options))


def _fold_score(
    op: str, query: Tensor, scale: float | None, score: str, eps: float, dtype: torch.dtype
) -> tuple[float, float | None]:
    """scale and eps as the private ops take them. dtype: of the scores."""
    if scale is None:
        scale = int(query.shape[3]) ** -0.5
    check_scale(op, scale, query)
    if score not in ("negative", "inverse"):
        raise fail(op, "score", "be negative or inverse", repr(score))
    if score == "negative":
        return scale, None
    if isinstance(scale, float) and scale < 0:
        raise fail(op, "scale", "be at least 0 with score='inverse'", scale)
    # 1 / eps is the largest score, and the slope there is its square.
    limits = torch.finfo(compute_dtype(dtype))
    smallest = max(1 / torch.finfo(dtype).max, limits.max**-0.5)
    if isinstance(eps, float) and not (math.isfinite(eps) and smallest <= eps <= limits.max):
        raise fail(op, "eps", f"be finite and at least {smallest:.3g} in {dtype}", eps)
    return scale, eps


def _l1(*args: Any, **kwargs: Any) -> Tensor:
    return _attention("l1", *args, **kwargs)[0]


def _l1_with_lse(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return _attention("l1_with_lse", *args, **kwargs)


def _l1_scores(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    score: str = "negative",
    eps: float = 1e-3,
) -> Tensor:
    op = "l1_scores"
    query, key = autocast(query, key)
    merged = query.dim() == 3
    query, key, _ = fold_tensors(op, query, key, key)
    _autograd.check_forward_mode(op, query, key)
    folded = _fold_score(op, query, scale, score, eps, query.dtype)
    scores = _scores_forward(query, key, *folded)
    return scores.squeeze(1) if merged else scores


l1 = _autograd.composite("l1", _l1)
l1_with_lse = _autograd.composite("l1_with_lse", _l1_with_lse)
l1_scores = _autograd.composite("l1_scores", _l1_scores)


# --- l1_scores: shapes


@_library.fake("_l1_scores_fwd")
def _fake_scores(query: Tensor, key: Tensor, scale: float, eps: float | None) -> Tensor:
    return query.new_empty(*query.shape[:3], key.shape[2])


@_library.fake("_l1_scores_bwd")
def _(grad: Tensor, query: Tensor, key: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(
        x.new_empty(x.shape) if needed else query.new_empty(0)
        for x, needed in zip((query, key), args[-1], strict=True)
    )


# --- l1_scores: derivatives


def _save_scores(ctx: Any, args: tuple[Any, ...], output: Tensor) -> None:
    query, key, ctx.scale, ctx.eps = args
    ctx.save_for_backward(query, key, *(() if ctx.eps is None else (output,)))
    ctx.set_materialize_grads(False)


def _scores_backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    query, key, *score = ctx.saved_tensors
    output_mask = [*_autograd.needed(ctx)[:2]]
    slope = -ctx.scale
    if score:
        # The slope 1 / eps**2 may be beyond what 16 bits hold.
        wide = score[0].to(compute_dtype(query.dtype))
        grad = grad * wide.square()
    grads = _call_scores_backward(grad, query, key, slope, output_mask)
    return *(x if need else None for x, need in zip(grads, output_mask, strict=True)), None, None


def _scores_backward_backward(ctx: Any, *cotangents: Tensor | None) -> list[Tensor | None]:
    # The sign of q - k has no derivative: these are linear in the gradient alone.
    args = (*ctx.saved_tensors, *ctx.options)
    return _autograd.vjp_of_formula(in_blocks.scores_backward_formula, args, cotangents, (0,))


_scores_forward = _autograd.differentiable(
    "_l1_scores_fwd", _save_scores, _scores_backward, in_blocks.scores_formula
)
_call_scores_backward = _autograd.differentiable(
    "_l1_scores_bwd",
    _autograd.saving(3),
    _scores_backward_backward,
    in_blocks.scores_backward_formula,
)
_vmap.register("_l1_scores_fwd", [_vmap.BATCH_HEADS] * 2, [_vmap.BATCH_HEADS])
_vmap.register("_l1_scores_bwd", [_vmap.BATCH_HEADS] * 3, [_vmap.BATCH_HEADS] * 2)


# --- kernels

_forward, _plain = _softmax_ops.register(
    "l1",
    in_blocks.ATTENTION,
    in_blocks.FORWARD_MODE,
    cuda.kernel("_l1_fwd", in_blocks.ATTENTION.forward),
    cuda.kernel("_l1_bwd", in_blocks.ATTENTION.backward),
)
for _op, _blocks in (
    ("_l1_scores_fwd", in_blocks.scores),
    ("_l1_scores_bwd", in_blocks.scores_backward),
):
    _softmax_ops.implement(_op, _blocks, cuda.kernel(_op, _blocks))
_ahead.trace_into("_l1_scores_fwd", cuda.kernel("_l1_scores_fwd", in_blocks.scores))
_library.fake_cuda("_l1_scores_fwd_cuda", _fake_scores)
