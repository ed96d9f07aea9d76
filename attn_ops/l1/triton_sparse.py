"""`attn::_l1_sparse_fwd` and `_l1_sparse_bwd` on CUDA.

A warp takes one row, or column, of one head and walks over its edges; long ones are cut into pieces
(triton_sparse_core.py). Nothing is added atomically: every sum has one order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from attn_ops._ahead import known
from attn_ops._heads import per_kv_head
from attn_ops._triton.launch import Launch, launch
from attn_ops.l1.triton_sparse_backward import columns_kernel, rows_kernel
from attn_ops.l1.triton_sparse_forward import forward_kernel, weights_kernel

# Edges that a program walks over at most.
CHUNK = 512
# Elements of a tile of gathered rows, of which a warp holds several; and its fewest edges. Small
# ones measure best on an H200: many warps hide latencies better than many rows in flight of each.
TILE = 256
FEWEST = 4
WARP = Launch(rows=1, columns=1, warps=1, stages=1)


class _Sizes:
    """What all launches of a call share."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, num_edges: int) -> None:
        self.batch, self.heads, self.num_queries, self.width = query.shape
        self.num_keys, self.columns = value.shape[2:]
        self.group = self.heads // max(1, key.shape[1])
        self.num_edges = num_edges
        self.matrices = self.batch * self.heads
        self.chunk = CHUNK
        # No row is longer than all edges: then there are no pieces.
        self.slots = 0 if known(num_edges <= CHUNK) else 2 * triton.cdiv(num_edges, CHUNK)

    def constants(self) -> dict[str, Any]:
        padded = [max(4, triton.next_power_of_2(x)) for x in (self.width, self.columns)]
        edges = max(FEWEST, min(32, TILE // max(padded)))
        return {
            "D": self.width, "E": self.columns, "PD": padded[0], "PE": padded[1], "EDGES": edges,
            "CHUNK": self.chunk,
        }  # fmt: skip

    def parts(self, like: Tensor, width: int) -> Tensor:
        """What pieces leave for their rows."""
        return like.new_empty(self.matrices, self.slots, width, dtype=torch.float32)

    def run(self, kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
        """`programs` programs per head."""
        launch(kernel, self.matrices * programs, WARP, *args, **self.constants(), **constants)


def _dense_rows(x: Tensor | None) -> tuple[Any, ...]:
    """The flat kernel arguments for [B, H, rows, columns]: elements of a row are neighbours."""
    if x is None:
        return None, 0, 0, 0
    x = x if known(x.stride(3) == 1) or known(x.shape[3] == 1) else x.contiguous()
    return x, *x.stride()[:3]


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
    """`attn::_l1_sparse_fwd`."""
    s = _Sizes(query, key, value, row_keys.shape[0])
    shape = (s.batch, s.heads, s.num_queries, s.columns)
    out = query.new_empty(shape)
    weight = query.new_empty(s.batch, s.heads, s.num_edges, dtype=torch.float32)
    # Rounded once, when both directions are added.
    of_rows = out if value_reverse is None else query.new_empty(shape, dtype=torch.float32)
    q, k, v = _dense_rows(query), _dense_rows(key), _dense_rows(value)
    parts = s.parts(query, s.columns + 2)
    with torch.cuda.device_of(query):
        for programs, pieces in ((s.slots, True), (s.num_queries, False)):
            s.run(
                forward_kernel, programs, *q, *k, *v, row_start, row_keys, weight, of_rows, parts,
                s.num_queries, programs, s.num_edges, s.heads, s.group, scale,
                SOFTMAX=softmax, SINK=sink, PIECES=pieces, writes=(weight, of_rows, parts),
            )  # fmt: skip
        launch(
            weights_kernel, s.matrices * s.slots, WARP, row_start, weight, parts, s.num_queries,
            s.slots, s.num_edges, E=s.columns, CHUNK=s.chunk, writes=(weight,),
        )  # fmt: skip
        if value_reverse is not None:
            lists = col_start, col_queries, col_edges
            _columns(s, q, k, _dense_rows(value_reverse), s.group, lists, weight, None, None, out,
                     of_rows, scale)  # fmt: skip
    return out, weight


def _columns(
    s: _Sizes,
    q: tuple[Any, ...],
    k: tuple[Any, ...],
    x: tuple[Any, ...],
    x_group: int,
    lists: tuple[Tensor, ...],
    weight: Tensor,
    grad_score: Tensor | None,
    grad_key: Tensor | None,
    sums: Tensor | None,
    added: Tensor | None,
    scale: float,
) -> None:
    """grad_key and sums, those that are given, over the edges of every key."""
    key_parts = None if grad_key is None else s.parts(weight, s.width)
    sum_parts = None if sums is None else s.parts(weight, s.columns)
    for programs, pieces in ((s.slots, True), (s.num_keys, False)):
        s.run(
            columns_kernel, programs, *q, *k, *x, *lists, weight, grad_score, grad_key, sums, added,
            key_parts, sum_parts, s.num_keys, programs, s.num_edges, s.heads, s.group, x_group,
            scale, PIECES=pieces, writes=(grad_key, sums, key_parts, sum_parts),
        )  # fmt: skip


def _new_grad(x: Tensor | None, s: _Sizes, wanted: bool) -> Tensor | None:
    """Per query head; float32 where heads of a group are added later."""
    if x is None or not wanted:
        return None
    dtype = x.dtype if s.group == 1 else torch.float32
    return x.new_empty(s.batch, s.heads, *x.shape[2:], dtype=dtype)


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
    weight: Tensor,
    softmax: bool,
    sink: bool,
    scale: float,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    """`attn::_l1_sparse_bwd`."""
    s = _Sizes(query, key, value, row_keys.shape[0])
    inputs = (query, key, value, value_reverse)
    grads = [_new_grad(x, s, wanted) for x, wanted in zip(inputs, output_mask, strict=True)]
    if grads[0] is not None:
        grads[0] = query.new_empty(query.shape)
    grad_query, grad_key, grad_value, grad_reverse = grads
    q, k, v, g, r = map(_dense_rows, (query, key, value, grad_out, value_reverse))
    weight = weight.contiguous()
    with_scores = grad_query is not None or grad_key is not None
    grad_score = torch.empty_like(weight) if with_scores else None
    with torch.cuda.device_of(query):
        if with_scores or grad_reverse is not None:
            parts = [s.parts(weight, width) for width in (1, s.width, s.columns)]
            for programs, step in ((s.slots, 1), (s.slots, 2), (s.num_queries, 3)):
                s.run(
                    rows_kernel, programs, *q, *k, *v, *g, *r, row_start, row_keys, weight,
                    grad_score, grad_query, grad_reverse, *parts, s.num_queries, programs,
                    s.num_edges, s.heads, s.group, scale, SOFTMAX=softmax, STEP=step,
                )  # fmt: skip
        if grad_key is not None or grad_value is not None:
            lists = col_start, col_queries, col_edges
            _columns(s, q, k, g, 1, lists, weight, grad_score, grad_key, grad_value, None, scale)
    return tuple(
        query.new_empty(0) if grad is None or x is None else _added(grad, x)
        for grad, x in zip(grads, inputs, strict=True)
    )


def _added(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x from that of every query head."""
    if grad.shape == x.shape:
        return grad.to(x.dtype)
    if grad.shape[1] == 0:
        return x.new_zeros(x.shape)
    return per_kv_head(grad, x.shape[1]).to(x.dtype)
