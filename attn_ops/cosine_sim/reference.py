"""Cosine-sim attention as plain PyTorch formulas: the specification, for every dtype and device.

Every kernel is compared with `forward` and `backward` in float64. Both are differentiable, so they
also give the derivatives of higher order. They hold [M, N] scores; `in_blocks.py` bounds that.

Letters: B batch, H query heads, Hk key/value heads, M queries, N keys, D query/key width,
E value width. Arguments are those of the private ops (see ops.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from attn_ops._heads import per_kv_head, per_query_head
from attn_ops._softmax import attend, attend_backward, attend_tangent, biased, biases_tangent
from attn_ops.cosine_sim.normalize import EPSILON, unit_slices


def prepare(x: Tensor, gain: Tensor | None, groups: int) -> Tensor:
    """x [B, H, M, D] as it enters the dot product: unit slices, times the gain."""
    unit = unit_slices(x, groups) if groups else x
    return unit if gain is None else unit * gain.unsqueeze(1)


def prepare_backward(
    grad: Tensor, x: Tensor, gain: Tensor | None, groups: int
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and of the gain, from the gradient of `prepare(x, gain, groups)`."""
    if not groups:
        return grad, None
    unit = unit_slices(x, groups)
    grad_gain = None if gain is None else (grad * unit).sum((0, 2))
    grad = grad if gain is None else grad * gain.unsqueeze(1)
    grad, unit, slices = (t.unflatten(-1, (groups, -1)) for t in (grad, unit, x.to(unit.dtype)))
    squared = slices.square().sum(-1, keepdim=True)
    inverse = torch.where(squared > 0, squared, 1).rsqrt().clamp_max(1 / EPSILON)
    # Below the floor of the norm the divisor is a constant: nothing to project out.
    along = torch.where(squared > EPSILON**2, (unit * grad).sum(-1, keepdim=True), 0)
    return (torch.where(squared > 0, inverse, 0) * (grad - unit * along)).flatten(-2), grad_gain


def row_scale(scale: float, head_scale: Tensor | None) -> float | Tensor:
    """What multiplies q̂·k̂: a number, or one per head."""
    return scale if head_scale is None else scale * head_scale[:, None, None]


def scores(unit_query: Tensor, unit_key: Tensor, scale: float, head_scale: Tensor | None) -> Tensor:
    """[B, H, M, N]: scale * q̂·k̂, of what `prepare` returns."""
    products = unit_query @ per_query_head(unit_key, unit_query.shape[1]).mT
    return products * row_scale(scale, head_scale)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    relative_bias: Tensor | None,
    head_scale: Tensor | None,
    query_gain: Tensor | None,
    key_gain: Tensor | None,
    sink: Tensor | None,
    start: Tensor | None,
    stop: Tensor | None,
    left: int,
    right: int,
    scale: float,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """out [B, H, M, E] = softmax(score) @ value; lse [B, H, M] = log of the sum of exp(score)."""
    unit_query, unit_key = prepare(query, query_gain, groups), prepare(key, key_gain, groups)
    score = scores(unit_query, unit_key, scale, head_scale)
    score = biased(score, mask, bias, relative_bias, start, stop, left, right)
    return attend(score, value, sink)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    relative_bias: Tensor | None,
    head_scale: Tensor | None,
    query_gain: Tensor | None,
    key_gain: Tensor | None,
    sink: Tensor | None,
    start: Tensor | None,
    stop: Tensor | None,
    out: Tensor,
    lse: Tensor,
    left: int,
    right: int,
    scale: float,
    groups: int,
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, bias, relative_bias, head_scale, both gains and sink."""
    heads, kv_heads = query.shape[1], key.shape[1]
    unit_query, unit_key = prepare(query, query_gain, groups), prepare(key, key_gain, groups)
    score = scores(unit_query, unit_key, scale, head_scale)
    score = biased(score, mask, bias, relative_bias, start, stop, left, right)
    grad_score, grad_value, grad_bias, grad_relative_bias, grad_sink = attend_backward(
        grad_out, grad_lse, score, value, bias, relative_bias, sink, out, lse
    )
    scaled = grad_score * row_scale(scale, head_scale)
    grad_query, grad_query_gain = prepare_backward(
        scaled @ per_query_head(unit_key, heads), query, query_gain, groups
    )
    grad_key, grad_key_gain = prepare_backward(
        per_kv_head(scaled.mT @ unit_query, kv_heads), key, key_gain, groups
    )
    grad_head_scale = None
    if head_scale is not None:
        raw = grad_score @ per_query_head(unit_key, heads)
        grad_head_scale = scale * (raw * unit_query).sum((0, 2, 3))
    return (
        grad_query,
        grad_key,
        grad_value,
        grad_bias,
        grad_relative_bias,
        grad_head_scale,
        grad_query_gain,
        grad_key_gain,
        grad_sink,
    )


def tangent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    relative_bias: Tensor | None,
    sink: Tensor | None,
    start: Tensor | None,
    stop: Tensor | None,
    out: Tensor,
    lse: Tensor,
    tangent_query: Tensor | None,
    tangent_key: Tensor | None,
    tangent_value: Tensor | None,
    tangent_bias: Tensor | None,
    tangent_relative_bias: Tensor | None,
    tangent_sink: Tensor | None,
    left: int,
    right: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Tangents of out and lse, where scores are scale * q·k."""
    heads, num_queries, num_keys = query.shape[1], query.shape[2], key.shape[2]
    columns, query = per_query_head(key, heads).mT, scale * query
    score = biased(query @ columns, mask, bias, relative_bias, start, stop, left, right)
    moved = None if tangent_query is None else scale * tangent_query @ columns
    if tangent_key is not None:
        by_key = query @ per_query_head(tangent_key, heads).mT
        moved = by_key if moved is None else moved + by_key
    moved = biases_tangent(moved, tangent_bias, tangent_relative_bias, num_queries, num_keys)
    return attend_tangent(score, moved, value, sink, lse, tangent_value, tangent_sink)


def score_operands(
    query: Tensor,
    key: Tensor,
    head_scale: Tensor | None,
    query_gain: Tensor | None,
    key_gain: Tensor | None,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """Query and key whose products, times scale, are the scores before any bias."""
    unit_query, unit_key = prepare(query, query_gain, groups), prepare(key, key_gain, groups)
    return unit_query * row_scale(1.0, head_scale), unit_key


def score_tangents(
    query: Tensor, key: Tensor, tangent_query: Tensor | None, tangent_key: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """What `tangent` reads: the tangents as they are."""
    return tangent_query, tangent_key
