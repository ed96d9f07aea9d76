"""Sparse L1 attention as plain formulas: the specification of the private forward and backward.

Rows are gathered by edge and sums scattered by index, all of it differentiable by PyTorch. Tensors
are of the compute dtype. Sums on CUDA are deterministic where PyTorch's `index_add` is.

Letters: B batch, H query heads, Hk key/value heads, M queries, N keys, L edges, D, E widths.
  row_start [M+1], row_keys [L]: edges sorted by (query, key); col_start [N+1], col_queries [L]:
  sorted by (key, query); col_edges [L]: the place of such an edge among the former.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attn_ops._heads import per_kv_head, per_query_head


def owners(start: Tensor, num_edges: int) -> Tensor:
    """[L]: the row (or column) that each of the sorted edges belongs to."""
    places = torch.arange(num_edges, device=start.device)
    return torch.searchsorted(start, places, right=True) - 1


def gather(x: Tensor, index: Tensor) -> Tensor:
    """[B, H, N, ...] -> [B, H, L, ...]."""
    return x.index_select(2, index)


def scatter(x: Tensor, index: Tensor, size: int) -> Tensor:
    """The adjoint of `gather`: sums of the edges of each index."""
    total = x.new_zeros(*x.shape[:2], size, *x.shape[3:])
    return total.index_add(2, index, x)


def row_max(score: Tensor, rows: Tensor, size: int, sink: bool) -> Tensor:
    """[B, H, M]: the largest score of each row, the sink's 0 among them, without gradient."""
    score = score.detach()
    lowest = score.new_full((*score.shape[:2], size), 0.0 if sink else -torch.inf)
    return lowest.scatter_reduce(2, rows.expand_as(score), score, "amax")


def scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """z = -scale |q - k| of gathered rows; a distance beyond all numbers is the largest of them."""
    largest = torch.finfo(query.dtype).max
    distance = (query - key).abs().sum(-1).clamp(max=largest)
    return (-scale * distance).clamp(-largest, largest)


def weights(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    row_keys: Tensor,
    softmax: bool,
    sink: bool,
    scale: float,
) -> Tensor:
    """A [B, H, L] = exp(z) over the row's sum of exp(z), and of 1 with a sink; z = -scale |q-k|."""
    key = per_query_head(key, query.shape[1])
    score = scores(gather(query, rows), gather(key, row_keys), scale)
    if not softmax:
        return score.exp()
    size = query.shape[2]
    largest = row_max(score, rows, size, sink)
    raised = (score - gather(largest, rows)).exp()
    total = scatter(raised, rows, size)
    if sink:
        total = total + (-largest).exp()
    return raised / gather(total, rows)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    value_reverse: Tensor | None,
    row_start: Tensor,
    row_keys: Tensor,
    col_start: Tensor,
    col_queries: Tensor,
    col_edges: Tensor,
    softmax: bool,
    sink: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out [B, H, M, E], weight [B, H, L]: out[query] += A value[key], reversed too if given."""
    heads, num_queries = query.shape[1:3]
    rows = owners(row_start, row_keys.shape[0])
    weight = weights(query, key, rows, row_keys, softmax, sink, scale)
    terms = weight.unsqueeze(-1) * gather(per_query_head(value, heads), row_keys)
    out = scatter(terms, rows, num_queries)
    if value_reverse is not None:
        terms = weight.unsqueeze(-1) * gather(per_query_head(value_reverse, heads), rows)
        out = out + scatter(terms, row_keys, num_queries)
    return out, weight


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    value_reverse: Tensor | None,
    row_start: Tensor,
    row_keys: Tensor,
    col_start: Tensor,
    col_queries: Tensor,
    col_edges: Tensor,
    softmax: bool,
    sink: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and value_reverse."""
    heads, num_queries = query.shape[1:3]
    kv_heads, num_keys = key.shape[1:3]
    rows = owners(row_start, row_keys.shape[0])
    weight = weights(query, key, rows, row_keys, softmax, sink, scale)
    grad_rows = gather(grad_out, rows)
    grad_weight = (grad_rows * gather(per_query_head(value, heads), row_keys)).sum(-1)
    grad_value_reverse = None
    if value_reverse is not None:
        grad_keys = gather(grad_out, row_keys)
        reverse = gather(per_query_head(value_reverse, heads), rows)
        grad_weight = grad_weight + (grad_keys * reverse).sum(-1)
        terms = weight.unsqueeze(-1) * grad_keys
        grad_value_reverse = per_kv_head(scatter(terms, rows, num_queries), kv_heads)
    grad_score = weight * grad_weight
    if softmax:
        delta = scatter(grad_score, rows, num_queries)
        grad_score = grad_score - weight * gather(delta, rows)
    difference = gather(query, rows) - gather(per_query_head(key, heads), row_keys)
    terms = -scale * grad_score.unsqueeze(-1) * difference.sign()
    grad_query = scatter(terms, rows, num_queries)
    grad_key = per_kv_head(scatter(-terms, row_keys, num_keys), kv_heads)
    terms = weight.unsqueeze(-1) * grad_rows
    grad_value = per_kv_head(scatter(terms, row_keys, num_keys), kv_heads)
    return grad_query, grad_key, grad_value, grad_value_reverse
