"""The Triton kernels of sparse L1 attention against the formula in float64; see kernels.py."""

import os

import pytest
import torch

from attn_ops import _library
from attn_ops.l1 import triton_sparse
from tests.conformance.evaluate import assert_agrees, cotangents, with_gradients
from tests.conftest import DEVICE
from tests.l1.sparse_spec import BOTH_WAYS, CASES, DENSE, HUB, SPARSE
from tests.strategies import Case

if DEVICE == "cpu":
    assert os.environ["TRITON_INTERPRET"] == "1" and not _library.loaded_libraries
    _library.implement("_l1_sparse_fwd", triton_sparse.forward, "CPU")
    _library.implement("_l1_sparse_bwd", triton_sparse.backward, "CPU")

ONE = Case(batch=1, heads=1, kv_heads=1)
# Nothing here gets further than a piece of 16 edges unless it is cut.
CUT = {
    "hubs": ONE.but(queries=12, keys=18, options={"edges": HUB}),
    "hubs, both ways": ONE.but(queries=7, keys=7, options={"edges": HUB, **BOTH_WAYS}),
    "hubs, without sink": ONE.but(queries=9, keys=11, options={"edges": HUB, "sink": False}),
    "hubs, without softmax": ONE.but(queries=9, keys=11, options={"edges": HUB, "softmax": False}),
    "every row is long": ONE.but(queries=5, keys=40, options={"edges": DENSE}),
    "every column is long": ONE.but(queries=40, keys=5, options={"edges": DENSE}),
    "one row": ONE.but(queries=1, keys=3, options={"edges": 100}),
    "rows as long as a piece": ONE.but(queries=6, keys=16, options={"edges": DENSE}),
    "grouped, both ways": Case(
        batch=1, heads=2, kv_heads=1, queries=8, keys=8, options={"edges": HUB, **BOTH_WAYS}
    ),
    "a negative scale": ONE.but(queries=9, keys=11, options={"edges": HUB, "scale": -0.5}),
}
SHORT = torch.float16 if DEVICE == "cpu" else torch.bfloat16


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_sparse, "CHUNK", 16)


@pytest.mark.parametrize("name", [name for name in CASES if name != "longer than a block"])
def test_kernels_agree_with_the_formula(name: str, device: torch.device) -> None:
    # A batch is only another place in memory, and the interpreter takes a second for a few edges.
    case = CASES[name].but(batch=min(CASES[name].batch, 2 if DEVICE == "cuda" else 1))
    assert_agrees(SPARSE, case, torch.float32, device)


@pytest.mark.parametrize("name", CUT)
def test_rows_in_pieces_agree_with_the_formula(
    name: str, device: torch.device, short_pieces: None
) -> None:
    assert_agrees(SPARSE, CUT[name], torch.float32, device)


@pytest.mark.parametrize("name", ("hubs", "hubs, both ways", "grouped, both ways"))
def test_kernels_agree_in_16_bits(name: str, device: torch.device, short_pieces: None) -> None:
    assert_agrees(SPARSE, CUT[name], SHORT, device)


@pytest.mark.parametrize("wanted", ("query", "key", "value", "value_reverse"))
def test_each_gradient_alone_is_the_same(
    wanted: str, device: torch.device, short_pieces: None
) -> None:
    arguments = SPARSE.build(CUT["hubs, both ways"], torch.float32, device)
    grads = cotangents(*SPARSE.run(**arguments))
    expected = with_gradients(SPARSE, SPARSE.run, arguments, *grads)[wanted]
    leaf = arguments[wanted].detach().requires_grad_()
    out = SPARSE.out(**(arguments | {wanted: leaf}))
    (actual,) = torch.autograd.grad(out, [leaf], grads[0].to(out.dtype))
    assert torch.equal(actual, expected)


def test_order_of_the_edges_does_not_matter(device: torch.device, short_pieces: None) -> None:
    arguments = SPARSE.build(CUT["hubs, both ways"], torch.float32, device)
    grads = cotangents(*SPARSE.run(**arguments))
    edges = arguments["edges"]
    shuffled = edges[torch.randperm(edges.shape[0], device=device)]
    first = with_gradients(SPARSE, SPARSE.run, arguments, *grads)
    second = with_gradients(SPARSE, SPARSE.run, arguments | {"edges": shuffled}, *grads)
    assert all(torch.equal(second[name], result) for name, result in first.items())


def test_far_and_near_edges_stay_finite(device: torch.device, short_pieces: None) -> None:
    arguments = SPARSE.build(CUT["hubs, without sink"], torch.float32, device)
    arguments["query"][..., 4:, :] = 1e38
    arguments["key"][..., :5, :] = -1e38
    grads = cotangents(*SPARSE.run(**arguments))
    for name, result in with_gradients(SPARSE, SPARSE.run, arguments, *grads).items():
        assert result.isfinite().all(), name
