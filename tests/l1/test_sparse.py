"""What is particular to sparse L1 attention: graphs, their order, and the dense op as a limit."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attn_ops
from attn_ops import EdgeList
from attn_ops.l1 import edge_list
from tests.comparison import assert_same
from tests.conformance.evaluate import (
    DTYPES,
    assert_arguments_agree,
    cotangents,
    with_gradients,
)
from tests.l1.sparse_spec import BOTH_WAYS, CASES, DENSE, HUB, SPARSE
from tests.strategies import Case

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
GRAPH = Case(heads=4, kv_heads=2, queries=40, keys=40, options={"edges": HUB, **BOTH_WAYS})


def results_of(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The result and all gradients."""
    return with_gradients(SPARSE, SPARSE.run, arguments, *cotangents(SPARSE.out(**arguments)))


def shuffled(edges: Tensor) -> Tensor:
    return edges[torch.randperm(edges.shape[0], device=edges.device)]


@every_dtype
@pytest.mark.parametrize("softmax", (True, False), ids=("softmax", "no softmax"))
def test_order_of_the_edges_does_not_matter_bit_by_bit(
    softmax: bool, dtype: torch.dtype, device: torch.device
) -> None:
    arguments = SPARSE.build(GRAPH.but(options={"softmax": softmax}), dtype, device)
    expected = results_of(arguments)
    for _ in range(3):
        again = results_of(arguments | {"edges": shuffled(arguments["edges"])})
        assert all(torch.equal(again[name], result) for name, result in expected.items())


@every_dtype
@pytest.mark.parametrize("kv_heads", (1, 2, 4))
def test_all_pairs_are_dense_attention_with_a_sink_of_zero(
    kv_heads: int, dtype: torch.dtype, device: torch.device
) -> None:
    case = Case(heads=4, kv_heads=kv_heads, queries=33, keys=35, options={"edges": DENSE})
    arguments = SPARSE.build(case, dtype, device)
    tensors = {name: arguments[name].requires_grad_() for name in ("query", "key", "value")}
    sink = torch.zeros(4, dtype=dtype, device=device)
    for with_sink in (True, False):
        dense = attn_ops.l1_attention(**tensors, sink=sink if with_sink else None)
        sparse = attn_ops.l1_sparse_attention(**arguments, sink=with_sink)
        grad = torch.randn_like(dense)
        close = 64 * torch.finfo(dtype).eps
        torch.testing.assert_close(sparse, dense, rtol=0, atol=close)
        grads = (torch.autograd.grad(out, [*tensors.values()], grad) for out in (sparse, dense))
        for actual, expected in zip(*grads):
            torch.testing.assert_close(actual, expected, rtol=0, atol=close)


@every_dtype
def test_an_edge_that_is_there_twice_counts_twice(dtype: torch.dtype, device: torch.device) -> None:
    """Two equal edges are the edges to two equal keys."""
    arguments = SPARSE.build(Case(batch=1, heads=1, kv_heads=1, queries=1, keys=3), dtype, device)
    for name in ("key", "value"):
        arguments[name] = arguments[name].contiguous()
        arguments[name][:, :, 2] = arguments[name][:, :, 1]
    twice = torch.tensor([[0, 1], [0, 0], [0, 1]], device=device)
    other = torch.tensor([[0, 1], [0, 0], [0, 2]], device=device)
    assert torch.equal(*(SPARSE.out(**(arguments | {"edges": e})) for e in (twice, other)))
    once = SPARSE.out(**(arguments | {"edges": twice[:2]}))
    assert not torch.equal(SPARSE.out(**(arguments | {"edges": twice})), once)


@every_dtype
@pytest.mark.parametrize("sink", (True, False), ids=("sink", "no sink"))
@pytest.mark.parametrize("softmax", (True, False), ids=("softmax", "no softmax"))
def test_query_without_edges_gives_zeros(
    softmax: bool, sink: bool, dtype: torch.dtype, device: torch.device
) -> None:
    arguments = SPARSE.build(GRAPH.but(options={"value_reverse": False}), dtype, device)
    arguments |= {"softmax": softmax, "sink": sink}
    arguments["edges"] = arguments["edges"][(arguments["edges"] != 7).all(1)]
    results = results_of(arguments)
    assert not results["out"][:, :, 7].any() and results["out"][:, :, 8].any()
    assert not results["query"][:, :, 7].any() and not results["key"][:, :, 7].any()
    nothing = results_of(arguments | {"edges": arguments["edges"][:0]})
    assert not any(result.any() for result in nothing.values())


@every_dtype
def test_equal_coordinates_do_not_move(dtype: torch.dtype, device: torch.device) -> None:
    """sign(0) = 0: widths that are the same number in all tokens have zero gradients."""
    arguments = SPARSE.build(GRAPH.but(width=20), dtype, device)
    for name in ("query", "key"):
        arguments[name] = (2 * arguments[name]).round() / 2
        arguments[name][..., 3:7] = 0.375
        arguments[name][..., 19] = -1.5
    results = assert_arguments_agree(SPARSE, arguments)
    for name in ("query", "key"):
        assert not results[name][..., 3:7].any() and not results[name][..., 19].any()
        assert results[name][..., :3].any() and results[name][..., 7:19].any()


@pytest.mark.parametrize("sink", (True, False), ids=("sink", "no sink"))
@pytest.mark.parametrize("scale", (1.0, -1.0))
@pytest.mark.parametrize("far", (1e3, 1e38))
def test_far_tokens_are_never_nan(
    far: float, scale: float, sink: bool, device: torch.device
) -> None:
    """Rows whose every weight underflows without a maximum; distances beyond all numbers."""
    arguments = SPARSE.build(GRAPH, torch.float32, device)
    arguments |= {"sink": sink, "scale": scale}
    arguments["query"][..., 10:, :] = far
    arguments["key"][..., :30, :] = -far
    for name, result in results_of(arguments).items():
        assert result.isfinite().all(), name
    if not sink and scale > 0:
        ones = arguments | {"value": torch.ones_like(arguments["value"]), "value_reverse": None}
        out = SPARSE.out(**ones)
        there = arguments["edges"][:, 0].unique().to(torch.int64)
        torch.testing.assert_close(out[:, :, there], torch.ones_like(out[:, :, there]))


# --- EdgeList


def list_of(arguments: dict[str, Any]) -> EdgeList:
    return EdgeList(arguments["edges"], arguments["query"].shape[-2], arguments["key"].shape[-2])


@pytest.mark.parametrize("name", CASES)
def test_edge_list_takes_the_place_of_edges(name: str, device: torch.device) -> None:
    arguments = SPARSE.build(CASES[name], torch.float32, device)
    prepared = arguments | {"edges": list_of(arguments)}
    expected = results_of(arguments)
    function = attn_ops.l1_sparse_attention
    grads = cotangents(expected["out"])
    actual = with_gradients(SPARSE, lambda **kw: (function(**kw),), prepared, *grads)
    assert all(torch.equal(actual[name], result) for name, result in expected.items())


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64), ids=str)
@pytest.mark.parametrize("count", (0, 1, 500))
def test_edge_list_holds_both_orders(count: int, dtype: torch.dtype, device: torch.device) -> None:
    edges = torch.randint(0, 9, (count, 2), dtype=dtype, device=device)
    made = EdgeList(edges, 9, 12)
    assert (made.num_queries, made.num_keys, made.num_edges) == (9, 12, count)
    pairs = sorted(map(tuple, edges.tolist()))
    rows = made.row_start.diff().tolist()
    queries = [m for m, length in enumerate(rows) for _ in range(length)]
    assert list(zip(queries, made.row_keys.tolist())) == pairs
    columns = made.col_start.diff().tolist()
    keys = [n for n, length in enumerate(columns) for _ in range(length)]
    by_key = list(zip(made.col_queries.tolist(), keys))
    assert by_key == sorted(pairs, key=lambda pair: pair[::-1])
    assert [pairs[i] for i in made.col_edges.tolist()] == by_key
    assert sorted(made.col_edges.tolist()) == list(range(count))
    assert {x.dtype for x in made.tensors} == {torch.int64}
    for actual, expected in zip(made.tensors, edge_list.sort(edges, 9, 12)):
        assert torch.equal(actual, expected)


def test_edge_index_of_pytorch_geometric_flows_from_key_to_query(device: torch.device) -> None:
    index = torch.tensor([[5, 6, 5], [0, 1, 2]], device=device)  # sources, targets
    made = EdgeList.from_edge_index(index, 3, 7)
    expected = EdgeList(torch.tensor([[0, 5], [1, 6], [2, 5]], device=device), 3, 7)
    assert all(torch.equal(a, e) for a, e in zip(made.tensors, expected.tensors))
    assert repr(made) == f"EdgeList(3 queries, 7 keys, 3 edges, {index.device})"


def test_edge_list_does_not_change(device: torch.device) -> None:
    made = EdgeList(torch.zeros(1, 2, dtype=torch.int64, device=device), 1, 1)
    with pytest.raises(AttributeError):
        made.row_keys = made.col_queries  # type: ignore[misc]


@pytest.mark.parametrize("dynamic", (True, False))
def test_compiled_function_takes_an_edge_list(dynamic: bool, device: torch.device) -> None:
    compiled = torch.compile(
        attn_ops.l1_sparse_attention, backend="aot_eager", fullgraph=True, dynamic=dynamic
    )
    for queries, keys in ((21, 27), (23, 29)):
        case = SPARSE.resized(CASES["plain"], queries, keys, 3)
        arguments = SPARSE.build(case, torch.float32, device)
        arguments["edges"] = list_of(arguments)
        expected = attn_ops.l1_sparse_attention(**arguments)
        assert_same("out", compiled(**arguments), expected)


def test_edge_list_is_made_inside_of_a_compiled_function(device: torch.device) -> None:
    arguments = SPARSE.build(CASES["plain"], torch.float32, device)

    def function(query: Tensor, key: Tensor, value: Tensor, edges: Tensor) -> Tensor:
        made = EdgeList(edges, query.shape[2], key.shape[2])
        first = attn_ops.l1_sparse_attention(query, key, value, made)
        return first + attn_ops.l1_sparse_attention(query, key, 2 * value, made)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_same("out", compiled(**arguments), 3 * SPARSE.out(**arguments))


class Layer(nn.Module):
    """Attention over a prepared graph."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, edges: EdgeList) -> Tensor:
        return attn_ops.l1_sparse_attention(query, key, value, edges)


@pytest.mark.parametrize("strict", (True, False), ids=("strict", "not strict"))
def test_exported_program_takes_an_edge_list_of_other_lengths(
    strict: bool, tmp_path: Any, device: torch.device
) -> None:
    def inputs(queries: int, keys: int) -> tuple[Any, ...]:
        case = SPARSE.resized(CASES["plain"], queries, keys, 3)
        arguments = SPARSE.build(case, torch.float32, device)
        tensors = (arguments[name] for name in ("query", "key", "value"))
        return (*tensors, list_of(arguments))

    dynamic = torch.export.Dim.DYNAMIC
    shapes = ({2: dynamic}, {2: dynamic}, {2: dynamic}, [{0: dynamic}] * 5)
    program = torch.export.export(Layer(), inputs(11, 14), dynamic_shapes=shapes, strict=strict)
    nodes = [str(n.target) for n in program.graph.nodes if "attn" in str(n.target)]
    assert nodes == ["attn._l1_sparse_fwd.default"]
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    other = inputs(37, 22)
    assert_same("out", loaded.module()(*other), Layer()(*other))
