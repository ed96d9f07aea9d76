"""L1 attention as plain PyTorch formulas: the specification, for every dtype and device.

Every kernel is compared with `forward` and `backward` in float64. Both are differentiable, so they
also give the derivatives of higher order. They hold [M, N] scores; `in_blocks.py` bounds that.

Letters: B batch, H query heads, Hk key/value heads, M queries, N keys, D query/key width,
E value width. Arguments are those of the private ops (see ops.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attn_ops._heads import per_kv_head, per_query_head
from attn_ops._softmax import attend, attend_backward, attend_tangent, biased, biases_tangent

# Differences q - k that exist at a time, unless one width has more: 4 MiB of float32.
DIFFERENCES = 1 << 20


def differences(query: Tensor, key: Tensor) -> Iterator[Tensor]:
    """q - k as [B, H, a few widths, M, N], until there was every width."""
    query, key = query.mT, per_query_head(key, query.shape[1]).mT  # [B, H, D, M], [B, H, D, N]
    pairs = query.shape[0] * query.shape[1] * query.shape[3] * key.shape[3]
    widths = max(1, DIFFERENCES // max(1, pairs))
    for first in range(0, query.shape[2], widths):
        part = slice(first, first + widths)
        yield query[:, :, part, :, None] - key[:, :, part, None, :]


def scores(query: Tensor, key: Tensor, scale: float, eps: float | None) -> Tensor:
    """[B, H, M, N]: -dist, or 1 / (eps + dist), where dist is scale * sum_d |q - k|."""
    parts = [difference.abs().sum(2) for difference in differences(query, key)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    dist = scale * total
    return -dist if eps is None else 1 / (eps + dist)


def slope(score: Tensor, scale: float, eps: float | None) -> float | Tensor:
    """The derivative of a score by sum_d |q - k|."""
    return -scale if eps is None else -scale * score.square()


def sign_sums(weight: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """sum_n weight * sign(q - k) [B, H, M, D], and sum_m weight * sign(k - q) [B, Hk, N, D].

    The sign of zero is zero: a query and an equal key do not move each other.
    """
    weight = weight.unsqueeze(2)
    signed = (weight * difference.sign() for difference in differences(query, key))
    of_queries, of_keys = zip(*((part.sum(4), -part.sum(3)) for part in signed), strict=True)
    return torch.cat(of_queries, 2).mT, per_kv_head(torch.cat(of_keys, 2).mT, key.shape[1])


def scores_backward(
    grad: Tensor, query: Tensor, key: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of query and key from that of scale * sum_d |q - k|."""
    return sign_sums(scale * grad, query, key)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    relative_bias: Tensor | None,
    sink: Tensor | None,
    start: Tensor | None,
    stop: Tensor | None,
    left: int,
    right: int,
    scale: float,
    eps: float | None,
) -> tuple[Tensor, Tensor]:
    """out [B, H, M, E] = softmax(score) @ value; lse [B, H, M] = log of the sum of exp(score)."""
    score = scores(query, key, scale, eps)
    return attend(biased(score, mask, bias, relative_bias, start, stop, left, right), value, sink)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
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
    left: int,
    right: int,
    scale: float,
    eps: float | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, bias, relative_bias and sink."""
    raw = scores(query, key, scale, eps)
    score = biased(raw, mask, bias, relative_bias, start, stop, left, right)
    grad_score, *others = attend_backward(
        grad_out, grad_lse, score, value, bias, relative_bias, sink, out, lse
    )
    return *sign_sums(grad_score * slope(raw, scale, eps), query, key), *others


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
    eps: float | None,
) -> tuple[Tensor, Tensor]:
    """Tangents of out and lse. The sign of zero is zero, as in the gradient."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    raw = scores(query, key, scale, eps)
    score = biased(raw, mask, bias, relative_bias, start, stop, left, right)
    moved = None
    if tangent_query is not None and tangent_key is not None:
        pairs = zip(differences(query, key), differences(tangent_query, tangent_key), strict=True)
        moved = torch.zeros_like(raw)
        for difference, its_tangent in pairs:
            moved = moved + (difference.sign() * its_tangent).sum(2)
        moved = moved * slope(raw, scale, eps)
    moved = biases_tangent(moved, tangent_bias, tangent_relative_bias, num_queries, num_keys)
    return attend_tangent(score, moved, value, sink, lse, tangent_value, tangent_sink)


def score_operands(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """What the scores are made of: query and key as they are."""
    return query, key


def score_tangents(
    query: Tensor, key: Tensor, tangent_query: Tensor | None, tangent_key: Tensor | None
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Both tangents, or none."""
    if tangent_query is None and tangent_key is None:
        return None, None
    return (
        torch.zeros_like(query) if tangent_query is None else tangent_query,
        torch.zeros_like(key) if tangent_key is None else tangent_key,
    )
