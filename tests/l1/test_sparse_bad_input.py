"""Wrong arguments of sparse L1 attention and of its edge lists, and what is said about them."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline

import attn_ops
from attn_ops import EdgeList
from tests.errors import (
    Cases,
    assert_compiling_raises_the_same_words,
    case,
    error_of,
    layout_cases,
    ones,
    texts,
)

Q, K, V = ones(2, 4, 5, 8), ones(2, 2, 7, 8), ones(2, 2, 7, 6)
MERGED = (ones(4, 5, 8), ones(4, 7, 8), ones(4, 7, 6))
EDGES = torch.tensor([[0, 6], [4, 0], [3, 3]])
SQUARE = (ones(2, 4, 7, 8), K, V)
op = torch.ops.attn.l1_sparse
function = attn_ops.l1_sparse_attention

WRONG: Cases = {
    "edges of floats": case(Q, K, V, EDGES.float()),
    "edges of 16 bits": case(Q, K, V, EDGES.short()),
    "edges of rank 1": case(Q, K, V, EDGES[0]),
    "edges of three columns": case(Q, K, V, torch.zeros(2, 3, dtype=torch.int64)),
    "edges on another device": case(Q, K, V, EDGES.to("meta")),
    "edges sparse": case(Q, K, V, EDGES.to_sparse()),
    "a query that is not there": case(Q, K, V, torch.tensor([[0, 0], [5, 0]])),
    "a key that is not there": case(Q, K, V, torch.tensor([[0, 7]])),
    "a query below zero": case(Q, K, V, torch.tensor([[-1, 0]])),
    "no queries and an edge": case(Q[:, :, :0], K, V, EDGES[:1]),
    "reverse without as many queries": case(Q, K, V, EDGES, value_reverse=V),
    "reverse of another shape": case(*SQUARE, EDGES, value_reverse=V[..., :5]),
    "reverse of another rank": case(*SQUARE, EDGES, value_reverse=V[:, 0]),
    "reverse of another dtype": case(*SQUARE, EDGES, value_reverse=V.half()),
    "reverse of integers": case(*SQUARE, EDGES, value_reverse=V.int()),
    "a scale that is not finite": case(Q, K, V, EDGES, scale=float("nan")),
    "a scale that float32 cannot hold": case(Q, K, V, EDGES, scale=1e39),
}
WRONG_TYPES: Cases = {
    "edges of a list": case(Q, K, V, [[0, 1]]),
    "query of a list": case([1.0], K, V, EDGES),
    "reverse of a list": case(*SQUARE, EDGES, value_reverse=[1.0]),
    "softmax of an int": case(Q, K, V, EDGES, softmax=1),
    "sink of a tensor": case(Q, K, V, EDGES, sink=ones(4)),
    "scale of a tensor": case(Q, K, V, EDGES, scale=ones(1)),
    "an edge list for other lengths": case(Q, K, V, EdgeList(EDGES, 5, 9)),
    "an edge list on another device": case(Q, K, V, EdgeList(EDGES.to("meta"), 5, 7)),
}
WRONG_LISTS: Cases = {
    "edges of a list": case([[0, 1]], 5, 7),
    "edges of floats": case(EDGES.float(), 5, 7),
    "edges of three columns": case(torch.zeros(2, 3, dtype=torch.int64), 5, 7),
    "a number of queries that is a float": case(EDGES, 5.0, 7),
    "a number of keys below zero": case(EDGES, 5, -1),
    "a key that is not there": case(EDGES, 5, 6),
    "a query that is not there": case(EDGES, 4, 7),
}


def test_op() -> None:
    assert_expected_inline(
        texts(op, WRONG),
        """\
edges of floats
    TypeError: l1_sparse: edges must be int32 or int64, got torch.float32
edges of 16 bits
    TypeError: l1_sparse: edges must be int32 or int64, got torch.int16
edges of rank 1
    ValueError: l1_sparse: edges must have shape [L, 2], got (2,)
edges of three columns
    ValueError: l1_sparse: edges must have shape [L, 2], got (2, 3)
edges on another device
    ValueError: l1_sparse: edges must be on cpu like query, got meta
edges sparse
    NotImplementedError: l1_sparse: edges must be a dense tensor, got torch.sparse_coo; pack
    sequences of several lengths with cu_seqlens
a query that is not there
    ValueError: l1_sparse: edges must be queries from 0 to 4 and keys from 0 to 6, got (5, 0) in
    row 1
a key that is not there
    ValueError: l1_sparse: edges must be queries from 0 to 4 and keys from 0 to 6, got (0, 7) in
    row 0
a query below zero
    ValueError: l1_sparse: edges must be queries from 0 to 4 and keys from 0 to 6, got (-1, 0)
    in row 0
no queries and an edge
    ValueError: l1_sparse: edges must be queries from 0 to -1 and keys from 0 to 6, got (0, 6)
    in row 0
reverse without as many queries
    ValueError: l1_sparse: value_reverse must come with as many keys as queries, M = N, got 5
    queries, 7 keys
reverse of another shape
    ValueError: l1_sparse: value_reverse must have shape [B, Hk, N, E] like value=(2, 2, 7, 6),
    got (2, 2, 7, 5)
reverse of another rank
    ValueError: l1_sparse: value_reverse must have shape [B, Hk, N, E] like value=(2, 2, 7, 6),
    got (2, 7, 6)
reverse of another dtype
    TypeError: l1_sparse: value_reverse must be torch.float32 like query, got torch.float16
reverse of integers
    TypeError: l1_sparse: value_reverse must be float64, float32, bfloat16 or float16, got
    torch.int32
a scale that is not finite
    ValueError: l1_sparse: scale must be finite, got nan
a scale that float32 cannot hold
    ValueError: l1_sparse: scale must be finite in torch.float32, got 1e+39""",
    )


def test_function() -> None:
    assert_expected_inline(
        texts(function, WRONG_TYPES),
        """\
edges of a list
    TypeError: l1_sparse_attention: edges must be a Tensor or an EdgeList, got list
query of a list
    TypeError: l1_sparse_attention: query must be a Tensor, got list
reverse of a list
    TypeError: l1_sparse_attention: value_reverse must be a Tensor or None, got list
softmax of an int
    TypeError: l1_sparse_attention: softmax must be a bool, got int
sink of a tensor
    TypeError: l1_sparse_attention: sink must be a bool, got Tensor
scale of a tensor
    TypeError: l1_sparse_attention: scale must be a float, got Tensor
an edge list for other lengths
    ValueError: l1_sparse: edges must be made for 5 queries and 7 keys, got 5 queries and 9 keys
an edge list on another device
    ValueError: l1_sparse: edges must be on cpu like query, got meta""",
    )


def test_edge_list() -> None:
    assert_expected_inline(
        texts(EdgeList, WRONG_LISTS),
        """\
edges of a list
    TypeError: EdgeList: edges must be a Tensor, got list
edges of floats
    TypeError: EdgeList: edges must be int32 or int64, got torch.float32
edges of three columns
    ValueError: EdgeList: edges must have shape [L, 2], got (2, 3)
a number of queries that is a float
    TypeError: EdgeList: num_queries must be an int, got float
a number of keys below zero
    ValueError: EdgeList: num_keys must be at least 0, got -1
a key that is not there
    ValueError: EdgeList: edges must be queries from 0 to 4 and keys from 0 to 5, got (0, 6) in
    row 0
a query that is not there
    ValueError: EdgeList: edges must be queries from 0 to 3 and keys from 0 to 6, got (4, 0) in
    row 1""",
    )
    text = str(error_of(EdgeList.from_edge_index, EDGES, 5, 7))
    assert_expected_inline(
        text, """EdgeList.from_edge_index: edge_index must have shape [2, L], got (3, 2)"""
    )


@pytest.mark.parametrize("name", layout_cases(Q, K, V, MERGED))
def test_query_key_and_value_that_do_not_fit_are_refused(name: str) -> None:
    args, _ = layout_cases(Q, K, V, MERGED)[name]
    assert str(error_of(op, *args, EDGES)).startswith("l1_sparse: ")


# What edges hold is looked at as a program runs, all else as it is compiled.
OUT_OF_RANGE = [n for n in WRONG if "not there" in n or "below" in n or "no queries" in n]


@pytest.mark.parametrize("name", [name for name in WRONG if name not in OUT_OF_RANGE])
def test_compiling_raises_the_same_words(name: str) -> None:
    args, options = WRONG[name]
    assert_compiling_raises_the_same_words(op, args, options)


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_edges_out_of_range_are_refused_as_a_compiled_program_runs(name: str) -> None:
    args: Any = WRONG[name][0]
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    expected = error_of(op, *args)
    with pytest.raises(ValueError) as caught:
        compiled(*args)
    assert str(caught.value) == str(expected)


ASSERTS = """
import torch, attn_ops
q = torch.ones(1, 1, 5, 8, device="cuda")
edges = torch.tensor([[0, 0], [5, 0]], device="cuda")
try:
    attn_ops.EdgeList(edges, 5, 5)
except ValueError as error:
    print(error)
attn_ops.l1_sparse_attention(q, q, q, edges)
torch.cuda.synchronize()
print("unreachable")
"""


def test_raw_edges_out_of_range_are_an_assertion_of_a_gpu(device: torch.device) -> None:
    """In a process of its own, whose CUDA context does not survive it."""
    if device.type != "cuda":
        pytest.skip("an assertion of the device")
    done = subprocess.run([sys.executable, "-c", ASSERTS], capture_output=True, text=True)
    assert done.returncode != 0 and "unreachable" not in done.stdout
    assert "EdgeList: edges must be queries from 0 to 4" in done.stdout
    assert "assert" in done.stderr.lower()
