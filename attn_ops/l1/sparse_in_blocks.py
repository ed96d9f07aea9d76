"""The private sparse ops in plain PyTorch, a block of edges at a time: memory does not grow with L.

They serve wherever there is no kernel: CPUs without the native library, float64 on CUDA, and the
devices of other backends. 16-bit inputs are computed in float32. Sums over the edges of a row go
through `segment_reduce`, which adds them in their sorted order: no atomics.

Letters as in sparse_reference.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attn_ops._checks import compute_dtype
from attn_ops._heads import per_kv_head, per_query_head
from attn_ops.l1 import sparse_reference
from attn_ops.l1.sparse_reference import gather, owners, scores

# Gathered numbers of one block: 16 MiB of float32.
BLOCK_NUMBERS = 1 << 22

_FORWARD = (
    "query key value value_reverse row_start row_keys col_start col_queries col_edges softmax sink "
    "scale"
).split()
_BACKWARD = ["grad_out", *_FORWARD[:9], "weight", *_FORWARD[9:]]
_FLOATING = ("grad_out", "query", "key", "value", "value_reverse")
_GRADS = ("query", "key", "value", "value_reverse")


def _in_compute_dtype(names: list[str], values: tuple[Any, ...]) -> dict[str, Any]:
    args = dict(zip(names, values, strict=True))
    dtype = compute_dtype(args["query"].dtype)
    for name in _FLOATING:
        if args.get(name) is not None:
            args[name] = args[name].to(dtype)
    return args


def forward_formula(*values: Any) -> tuple[Tensor, Tensor]:
    """`attn::_l1_sparse_fwd` as one differentiable formula that does gather all edges."""
    out, weight = sparse_reference.forward(**_in_compute_dtype(_FORWARD, values))
    return out.to(values[0].dtype), weight


def backward_formula(*values: Any) -> tuple[Tensor, ...]:
    """`attn::_l1_sparse_bwd` likewise; it computes the weights again."""
    inputs = dict(zip(_BACKWARD, values[:-1], strict=True))
    args = _in_compute_dtype(_BACKWARD, values[:-1])
    del args["weight"]
    grads = sparse_reference.backward(**args)
    return _as_wanted(grads, inputs, values[-1])


def _as_wanted(
    grads: tuple[Tensor | None, ...], inputs: dict[str, Any], output_mask: list[bool]
) -> tuple[Tensor, ...]:
    return tuple(
        inputs["query"].new_empty(0)
        if grad is None or not needed
        else grad.to(inputs[name].dtype).contiguous()
        for name, grad, needed in zip(_GRADS, grads, output_mask, strict=True)
    )


class _Edges:
    """Both orders of the edges, and the sums over each."""

    def __init__(self, args: dict[str, Any]) -> None:
        self.count = args["row_keys"].shape[0]
        self.row_start, self.col_start = args["row_start"], args["col_start"]
        self.row_keys, self.col_queries = args["row_keys"], args["col_queries"]
        self.rows = owners(self.row_start, self.count)
        self.cols = owners(self.col_start, self.count)
        batch, heads, _, width = args["query"].shape
        numbers = max(1, batch * heads * max(width, args["value"].shape[3]))
        # Every block writes sums for all rows: it has as many edges as there are.
        longest = max(self.row_start.shape[0], self.col_start.shape[0])
        self.block = max(BLOCK_NUMBERS // numbers, longest)

    def per_edge(self, terms: Callable[[slice], Tensor]) -> Tensor:
        """[B, H, L] of terms(edges) [B, H, edges]."""
        return torch.cat([terms(edges) for edges in self.blocks()], 2)

    def blocks(self) -> list[slice]:
        starts = range(0, max(self.count, 1), self.block)
        return [slice(first, min(first + self.block, self.count)) for first in starts]

    def row_sums(self, terms: Callable[[slice], Tensor]) -> Tensor:
        """[B, H, M, X] of terms(edges) [B, H, edges, X], edges in row order."""
        return self._sums(self.row_start, terms)

    def col_sums(self, terms: Callable[[slice], Tensor]) -> Tensor:
        """[B, H, N, X] likewise, edges in column order."""
        return self._sums(self.col_start, terms)

    def _sums(self, start: Tensor, terms: Callable[[slice], Tensor]) -> Tensor:
        total: Any = 0
        for edges in self.blocks():
            data = terms(edges).permute(2, 0, 1, 3).contiguous()
            offsets = start.clamp(edges.start, edges.stop) - edges.start
            total = total + torch.segment_reduce(
                data, "sum", offsets=offsets, axis=0, unsafe=True, initial=0
            )
        return total.permute(1, 2, 0, 3)

    def row_max(self, score: Tensor) -> Tensor:
        """[B, H, M] of score [B, H, L]; -inf where there is no edge."""
        data = score.permute(2, 0, 1).contiguous()
        offsets = self.row_start
        largest = torch.segment_reduce(data, "max", offsets=offsets, axis=0, unsafe=True)
        return largest.permute(1, 2, 0)


def _weights(args: dict[str, Any], key: Tensor, edges: _Edges) -> Tensor:
    query = args["query"]

    score = edges.per_edge(
        lambda e: scores(
            gather(query, edges.rows[e]), gather(key, edges.row_keys[e]), args["scale"]
        )
    )
    if not args["softmax"]:
        return score.exp()
    largest = edges.row_max(score)
    if args["sink"]:
        largest = largest.clamp_min(0)
    raised = (score - gather(largest, edges.rows)).exp()
    total = edges.row_sums(lambda e: raised[:, :, e, None]).squeeze(-1)
    if args["sink"]:
        total = total + (-largest).exp()
    return raised / gather(total, edges.rows)


def forward(*values: Any) -> tuple[Tensor, Tensor]:
    """`attn::_l1_sparse_fwd`."""
    with torch.autocast(values[0].device.type, enabled=False):
        args = _in_compute_dtype(_FORWARD, values)
        edges, heads = _Edges(args), args["query"].shape[1]
        key, value = (per_query_head(args[name], heads) for name in ("key", "value"))
        weight = _weights(args, key, edges)
        out = edges.row_sums(lambda e: weight[:, :, e, None] * gather(value, edges.row_keys[e]))
        if args["value_reverse"] is not None:
            reverse = per_query_head(args["value_reverse"], heads)
            of_columns = gather(weight, args["col_edges"])
            out = out + edges.col_sums(
                lambda e: of_columns[:, :, e, None] * gather(reverse, edges.col_queries[e])
            )
    return out.to(values[0].dtype).contiguous(), weight.contiguous()


def _grad_scores(args: dict[str, Any], edges: _Edges) -> Tensor:
    """The gradient of every score [B, H, L]."""
    heads, grad_out, weight = args["query"].shape[1], args["grad_out"], args["weight"]
    value, reverse = per_query_head(args["value"], heads), args["value_reverse"]
    if reverse is not None:
        reverse = per_query_head(reverse, heads)

    def of_weight(e: slice) -> Tensor:
        rows, keys = edges.rows[e], edges.row_keys[e]
        terms = (gather(grad_out, rows) * gather(value, keys)).sum(-1)
        if reverse is None:
            return terms
        return terms + (gather(grad_out, keys) * gather(reverse, rows)).sum(-1)

    grad_weight = edges.per_edge(of_weight)
    if not args["softmax"]:
        return weight * grad_weight
    delta = edges.row_sums(lambda e: (weight * grad_weight)[:, :, e, None]).squeeze(-1)
    return weight * (grad_weight - gather(delta, edges.rows))


def _by_rows(
    args: dict[str, Any], key: Tensor, grad_score: Tensor, edges: _Edges
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """The gradients of query and value_reverse."""
    query, weight, grad_out = args["query"], args["weight"], args["grad_out"]

    def of_query(e: slice) -> Tensor:
        sign = (gather(query, edges.rows[e]) - gather(key, edges.row_keys[e])).sign()
        return -args["scale"] * grad_score[:, :, e, None] * sign

    def of_reverse(e: slice) -> Tensor:
        return weight[:, :, e, None] * gather(grad_out, edges.row_keys[e])

    return lambda: edges.row_sums(of_query), lambda: edges.row_sums(of_reverse)


def _by_columns(
    args: dict[str, Any], key: Tensor, grad_score: Tensor, edges: _Edges
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """The gradients of key and value, per query head."""
    query, grad_out, order = args["query"], args["grad_out"], args["col_edges"]

    def of_key(e: slice) -> Tensor:
        sign = (gather(query, edges.col_queries[e]) - gather(key, edges.cols[e])).sign()
        return args["scale"] * gather(grad_score, order[e]).unsqueeze(-1) * sign

    def of_value(e: slice) -> Tensor:
        weight = gather(args["weight"], order[e]).unsqueeze(-1)
        return weight * gather(grad_out, edges.col_queries[e])

    return lambda: edges.col_sums(of_key), lambda: edges.col_sums(of_value)


def backward(*values: Any) -> tuple[Tensor, ...]:
    """`attn::_l1_sparse_bwd`."""
    inputs, output_mask = dict(zip(_BACKWARD, values[:-1], strict=True)), values[-1]
    with torch.autocast(values[0].device.type, enabled=False):
        args = _in_compute_dtype(_BACKWARD, values[:-1])
        edges, heads, kv_heads = _Edges(args), args["query"].shape[1], args["key"].shape[1]
        key = per_query_head(args["key"], heads)
        needs_scores = output_mask[0] or output_mask[1]
        grad_score = _grad_scores(args, edges) if needs_scores else args["weight"]
        of_query, of_reverse = _by_rows(args, key, grad_score, edges)
        of_key, of_value = _by_columns(args, key, grad_score, edges)
        grads = [
            make() if needed else None
            for make, needed in zip((of_query, of_key, of_value, of_reverse), output_mask)
        ]
        shared = [None if grad is None else per_kv_head(grad, kv_heads) for grad in grads[1:]]
    return _as_wanted((grads[0], *shared), inputs, output_mask)
