"""A graph's edges, sorted once: `EdgeList`, and the check and the sort behind it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_ops._checks import check_dense, check_int, check_rank, check_tensor, fail, shape

FIELDS = ("row_start", "row_keys", "col_start", "col_queries", "col_edges")


def check_edges(op: str, argument: str, edges: Tensor) -> None:
    """Integers [L, 2]; their values are looked at where they are sorted."""
    check_dense(op, argument, edges)
    if edges.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {argument} must be int32 or int64, got {edges.dtype}")
    check_rank(op, argument, edges, (2,), "[L, 2]")
    if edges.shape[1] != 2:
        raise fail(op, argument, "have shape [L, 2]", shape(edges))


def _inside(edges: Tensor, num_queries: int, num_keys: int) -> Tensor:
    """[L] bool."""
    queries, keys = edges.unbind(1)
    return (queries >= 0) & (queries < num_queries) & (keys >= 0) & (keys < num_keys)


def _check_range(op: str, edges: Tensor, num_queries: int, num_keys: int) -> None:
    """Looks at the values, which on CUDA waits for the device."""
    inside = _inside(edges, num_queries, num_keys)
    if inside.all():
        return
    place = int(inside.logical_not().nonzero()[0])
    expected = f"be queries from 0 to {num_queries - 1} and keys from 0 to {num_keys - 1}"
    raise fail(op, "edges", expected, f"{tuple(edges[place].tolist())} in row {place}")


def sort(edges: Tensor, num_queries: int, num_keys: int) -> tuple[Tensor, ...]:
    """`attn::_l1_edges` where there is no kernel: the tensors of FIELDS, int64.

    The order depends on the set of edges alone. Out of range: ValueError on the CPU, an assertion
    of the device elsewhere, for which nobody waits.
    """
    if edges.device.type == "cpu":
        _check_range("l1_sparse", edges, num_queries, num_keys)
    else:
        message = "l1_sparse: edges must be queries below M and keys below N, not negative"
        torch._assert_async(_inside(edges, num_queries, num_keys).all(), message)
    return both_orders(edges, num_queries, num_keys)


def both_orders(edges: Tensor, num_queries: int, num_keys: int) -> tuple[Tensor, ...]:
    """The same of indices that are in range."""
    queries, keys = edges.to(torch.int64).unbind(1)
    places = (queries * num_keys + keys).sort().indices
    queries, row_keys = queries[places], keys[places]
    row_start = torch.searchsorted(queries, torch.arange(num_queries + 1, device=edges.device))
    # Stable: among the edges of a key the queries stay sorted.
    col_keys, col_edges = row_keys.sort(stable=True)
    col_start = torch.searchsorted(col_keys, torch.arange(num_keys + 1, device=edges.device))
    return row_start, row_keys, col_start, queries[col_edges], col_edges


@dataclass(frozen=True, init=False, eq=False)
class EdgeList:
    """The edges of a graph in both orders, for `l1_sparse_attention`: sorted once, used often.

    Args:
        edges: int32 or int64 [L, 2], rows (query index, key index) in any order; an edge that is
            there twice counts twice.
        num_queries: M; query indices are below it.
        num_keys: N; key indices are below it.

    Attributes:
        row_start [M+1], row_keys [L]: the keys of query m are row_keys[row_start[m] : row_start[m +
            1]], sorted.
        col_start [N+1], col_queries [L]: the queries of key n likewise.
        col_edges [L]: the place among row_keys of each edge of col_queries.

    All are int64 on the device of `edges`. An EdgeList passes through `torch.compile` and
    `torch.export` as an input, and all its tensors are of dynamic length.

    Raises:
        ValueError: a wrong shape, or an index out of range (on CUDA this waits for the device,
            unless the constructor itself is compiled, when the device asserts).
        TypeError: a dtype that is not an integer of 32 or 64 bits.
    """

    row_start: Tensor
    row_keys: Tensor
    col_start: Tensor
    col_queries: Tensor
    col_edges: Tensor

    def __init__(self, edges: Tensor, num_queries: int, num_keys: int) -> None:
        op = "EdgeList"
        check_tensor(op, "edges", edges)
        check_edges(op, "edges", edges)
        for name, size in (("num_queries", num_queries), ("num_keys", num_keys)):
            check_int(op, name, size)
            if size < 0:
                raise fail(op, name, "be at least 0", size)
        if not torch.compiler.is_compiling() and edges.device.type != "meta":
            _check_range(op, edges, num_queries, num_keys)
        lists = torch.ops.attn._l1_edges(edges, num_queries, num_keys)
        for name, tensor in zip(FIELDS, lists, strict=True):
            object.__setattr__(self, name, tensor)

    @classmethod
    def from_edge_index(cls, edge_index: Tensor, num_queries: int, num_keys: int) -> EdgeList:
        """From [2, L] in the order of PyTorch Geometric: row 0 is the source of a message and thus
        the key, row 1 the target and thus the query.
        """
        op = "EdgeList.from_edge_index"
        check_tensor(op, "edge_index", edge_index)
        check_rank(op, "edge_index", edge_index, (2,), "[2, L]")
        if edge_index.shape[0] != 2:
            raise fail(op, "edge_index", "have shape [2, L]", shape(edge_index))
        return cls(edge_index.flip(0).t(), num_queries, num_keys)

    @property
    def num_queries(self) -> int:
        """M."""
        return self.row_start.shape[0] - 1

    @property
    def num_keys(self) -> int:
        """N."""
        return self.col_start.shape[0] - 1

    @property
    def num_edges(self) -> int:
        """L."""
        return self.row_keys.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the private ops read."""
        return self.row_start, self.row_keys, self.col_start, self.col_queries, self.col_edges

    def __repr__(self) -> str:
        sizes = f"{self.num_queries} queries, {self.num_keys} keys, {self.num_edges} edges"
        return f"EdgeList({sizes}, {self.row_start.device})"


def _unflatten(tensors: Iterable[Any], _: Any) -> EdgeList:
    edges = object.__new__(EdgeList)
    for name, tensor in zip(FIELDS, tensors, strict=True):
        object.__setattr__(edges, name, tensor)
    return edges


torch.utils._pytree.register_pytree_node(
    EdgeList,
    lambda edges: (list(edges.tensors), None),
    _unflatten,
    serialized_type_name="attn_ops.EdgeList",
    flatten_with_keys_fn=lambda edges: (
        [(torch.utils._pytree.GetAttrKey(name), getattr(edges, name)) for name in FIELDS],
        None,
    ),
)
# Saved programs hold the inputs that they were exported with, and graphs are data.
torch.serialization.add_safe_globals([EdgeList])
