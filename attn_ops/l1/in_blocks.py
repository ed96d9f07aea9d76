"""The private ops by the reference formulas, a block of queries at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attn_ops._checks import compute_dtype
from attn_ops._forward_mode import ForwardMode
from attn_ops._in_blocks import InBlocks, query_blocks
from attn_ops.l1 import reference

# 4 MiB of float32, as many as there are differences at a time.
BLOCK_SCORES = 1 << 20

ATTENTION = InBlocks(
    reference.forward,
    reference.backward,
    "query key value bias relative_bias sink",
    block_scores=BLOCK_SCORES,
)
FORWARD_MODE = ForwardMode(reference.tangent, reference.score_operands, reference.score_tangents)


def scores_formula(query: Tensor, key: Tensor, scale: float, eps: float | None) -> Tensor:
    """`attn::_l1_scores_fwd` as one differentiable formula."""
    dtype = compute_dtype(query.dtype)
    return reference.scores(query.to(dtype), key.to(dtype), scale, eps).to(query.dtype)


def scores_backward_formula(
    grad: Tensor, query: Tensor, key: Tensor, scale: float, output_mask: Sequence[bool]
) -> tuple[Tensor, ...]:
    """`attn::_l1_scores_bwd` likewise."""
    dtype = compute_dtype(query.dtype)
    grads = reference.scores_backward(grad.to(dtype), query.to(dtype), key.to(dtype), scale)
    return tuple(
        x.to(query.dtype) if needed else query.new_empty(0)
        for x, needed in zip(grads, output_mask, strict=True)
    )


def scores(query: Tensor, key: Tensor, scale: float, eps: float | None) -> Tensor:
    """`attn::_l1_scores_fwd`."""
    score = query.new_empty(*query.shape[:3], key.shape[2])
    with torch.autocast(query.device.type, enabled=False):
        for first, last in query_blocks(query, key, BLOCK_SCORES):
            score[:, :, first:last] = scores_formula(query[:, :, first:last], key, scale, eps)
    return score


def scores_backward(
    grad: Tensor, query: Tensor, key: Tensor, scale: float, output_mask: Sequence[bool]
) -> tuple[Tensor, ...]:
    """`attn::_l1_scores_bwd`."""
    dtype = compute_dtype(query.dtype)
    grad_query = torch.zeros(query.shape, dtype=dtype, device=query.device)
    grad_key = torch.zeros(key.shape, dtype=dtype, device=query.device)
    with torch.autocast(query.device.type, enabled=False):
        wide_key = key.to(dtype)
        for first, last in query_blocks(query, key, BLOCK_SCORES):
            rows, of_rows = (x[:, :, first:last].to(dtype) for x in (query, grad))
            of_queries, of_keys = reference.scores_backward(of_rows, rows, wide_key, scale)
            grad_query[:, :, first:last] = of_queries
            grad_key += of_keys
    return tuple(
        x.to(query.dtype) if needed else query.new_empty(0)
        for x, needed in zip((grad_query, grad_key), output_mask, strict=True)
    )
