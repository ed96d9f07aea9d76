"""Cosine-sim attention as plain PyTorch formulas: the specification, for every dtype and device.

Every kernel is compared with `forward` and `backward` in float64. Both are differentiable, so they
also give the derivatives of higher order. They hold [M, N] scores; `in_blocks.py` bounds that.

Letters: B batch, H query heads, Hk key/value heads, M queries, N keys, D query/key width,
E value width. Arguments are those of the private ops (see ops.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from attn_ops import masks
from attn_ops._heads import per_kv_head, per_query_head
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


def diagonal(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """[M, N]: the entry of `relative_bias` that query m and key n share, n - m + M - 1."""
    query = torch.arange(num_queries, device=device)
    return torch.arange(num_keys, device=device) - query.unsqueeze(1) + (num_queries - 1)


def sum_diagonals(x: Tensor) -> Tensor:
    """[H, M, N] -> [H, M+N-1]: entry o is the sum over n - m + M - 1 = o."""
    heads, num_queries, num_keys = x.shape
    # Rows of length N + M read as rows of length N + M - 1: each moves one column to the right.
    padded = torch.nn.functional.pad(x.flip(1), (0, num_queries)).flatten(1)
    length = num_queries + num_keys - 1 if num_queries or num_keys else 0
    return padded[:, : num_queries * length].unflatten(1, (num_queries, length)).sum(1)


def row_scale(scale: float, head_scale: Tensor | None) -> float | Tensor:
    """What multiplies q̂·k̂: a number, or one per head."""
    return scale if head_scale is None else scale * head_scale[:, None, None]


def scores(
    query: Tensor,  # prepared [B, H, M, D]
    key: Tensor,  # prepared [B, Hk, N, D]
    mask: Tensor | None,
    bias: Tensor | None,
    relative_bias: Tensor | None,
    head_scale: Tensor | None,
    start: Tensor | None,
    stop: Tensor | None,
    left: int,
    right: int,
    scale: float,
) -> Tensor:
    """[B, H, M, N]: scale * q̂·k̂ + bias, -inf where the query may not see the key."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    score = query @ per_query_head(key, query.shape[1]).mT * row_scale(scale, head_scale)
    if bias is not None:
        score = score + bias
    if relative_bias is not None and num_queries and num_keys:
        score = score + relative_bias[:, diagonal(num_queries, num_keys, score.device)]
    seen = masks.visible(num_queries, num_keys, mask, start, stop, left, right, score.device)
    return score.masked_fill(~seen, -torch.inf)


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
    batch, heads, num_queries, _ = query.shape
    unit_query, unit_key = prepare(query, query_gain, groups), prepare(key, key_gain, groups)
    score = scores(
        unit_query, unit_key, mask, bias, relative_bias, head_scale, start, stop, left, right, scale
    )
    # The sink is one extra key with that score and no value; without a sink nobody sees it.
    sink_score = score.new_full((heads,), -torch.inf) if sink is None else sink.to(score.dtype)
    sink_score = sink_score[:, None, None].expand(batch, heads, num_queries, 1)
    score = torch.cat([score, sink_score], -1)
    row_max = score.amax(-1, keepdim=True).detach()
    # -inf where nothing is visible: subtracting it would give NaN.
    row_max = torch.where(row_max == -torch.inf, 0, row_max)
    weight = (score - row_max).exp()
    total = weight.sum(-1, keepdim=True)
    seen = total > 0
    total = torch.where(seen, total, 1)
    lse = torch.where(seen, total.log() + row_max, -torch.inf).squeeze(-1)
    return (weight[..., :-1] / total).to(value.dtype) @ per_query_head(value, heads), lse


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
    score = scores(
        unit_query, unit_key, mask, bias, relative_bias, head_scale, start, stop, left, right, scale
    )
    finite_lse = torch.where(
        lse == -torch.inf, 0, lse
    )  # such a row sees nothing: its score is -inf
    weight = (score - finite_lse.unsqueeze(-1)).exp()  # [B, H, M, N]
    delta = (out * grad_out).sum(-1)
    delta = delta if grad_lse is None else delta - grad_lse
    grad_weight = grad_out @ per_query_head(value, heads).mT
    grad_score = weight * (grad_weight - delta.unsqueeze(-1))

    scaled = grad_score * row_scale(scale, head_scale)
    grad_query, grad_query_gain = prepare_backward(
        scaled @ per_query_head(unit_key, heads), query, query_gain, groups
    )
    grad_key, grad_key_gain = prepare_backward(
        per_kv_head(scaled.mT @ unit_query, kv_heads), key, key_gain, groups
    )
    grad_value = per_kv_head(weight.mT @ grad_out, kv_heads)
    grad_bias = None if bias is None else grad_score.sum_to_size(bias.shape)
    grad_relative_bias = grad_head_scale = grad_sink = None
    if relative_bias is not None:
        grad_relative_bias = sum_diagonals(grad_score.sum(0))
    if head_scale is not None:
        raw = grad_score @ per_query_head(unit_key, heads)
        grad_head_scale = scale * (raw * unit_query).sum((0, 2, 3))
    if sink is not None:
        sink_weight = (sink[:, None] - finite_lse).exp()
        grad_sink = -(sink_weight * delta).sum((0, 2))
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
