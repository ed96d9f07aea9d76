"""The reference in blocks of queries, which serves where there is no kernel, equals the whole."""

from importlib import import_module
from typing import Any

import pytest
import torch

from attn_ops._in_blocks import InBlocks, query_blocks
from tests.comparison import assert_same
from tests.conformance.capture import Calls
from tests.conformance.evaluate import cotangents, with_gradients
from tests.conformance.spec import OpSpec

SOFTMAX_LIKE = True


@pytest.fixture
def blocks(spec: OpSpec) -> InBlocks:
    return import_module(f"attn_ops.{spec.room}.in_blocks").ATTENTION


@pytest.fixture(params=(1, 200, 1 << 23), ids=("row by row", "some rows", "all at once"))
def block_scores(
    request: pytest.FixtureRequest, blocks: InBlocks, monkeypatch: pytest.MonkeyPatch
) -> int:
    monkeypatch.setattr(blocks, "block_scores", request.param)
    return request.param


def private_arguments(
    spec: OpSpec, name: str, device: torch.device
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    arguments = spec.build(spec.cases[name], torch.float64, device)
    grads = cotangents(*spec.formula(**arguments))
    with Calls() as calls:
        with_gradients(spec, spec.run, arguments, *grads)
    return calls.of(spec.forward), calls.of(spec.backward)


def test_forward_in_blocks_equals_the_formula(
    spec: OpSpec, named: str, blocks: InBlocks, block_scores: int, device: torch.device
) -> None:
    args, _ = private_arguments(spec, named, device)
    for part, actual, expected in zip(
        spec.results, blocks.forward(*args), blocks.forward_formula(*args)
    ):
        assert_same(part, actual, expected)


def test_backward_in_blocks_equals_the_formula(
    spec: OpSpec, named: str, blocks: InBlocks, block_scores: int, device: torch.device
) -> None:
    _, args = private_arguments(spec, named, device)
    for part, actual, expected in zip(
        spec.differentiable, blocks.backward(*args), blocks.backward_formula(*args)
    ):
        assert_same(part, actual, expected.contiguous())


def test_backward_formula_is_the_derivative_of_the_forward(
    spec: OpSpec, named: str, blocks: InBlocks, device: torch.device
) -> None:
    """The reference backward is written out by hand: autograd of the forward agrees."""
    forward_args, backward_args = private_arguments(spec, named, device)
    places = [
        i
        for i, x in enumerate(forward_args)
        if isinstance(x, torch.Tensor) and x.is_floating_point()
    ]
    leaves = [forward_args[i].detach().requires_grad_() for i in places]
    args = list(forward_args)
    for i, leaf in zip(places, leaves):
        args[i] = leaf
    out, lse = blocks.forward_formula(*args)
    grad_lse = torch.where(lse.isinf(), 0, 1) * backward_args[1]
    expected = torch.autograd.grad((out, lse), leaves, (backward_args[0], grad_lse))
    actual = [x for x in blocks.backward_formula(*backward_args) if x.shape != (0,)]
    assert len(actual) == len(expected)
    for i, a, e in zip(places, actual, expected):
        assert_same(f"argument {i}", a, e)


def test_a_block_holds_no_more_scores_than_it_may(blocks: InBlocks) -> None:
    query, key = torch.empty(2, 3, 1000, 4), torch.empty(2, 3, 5000, 4)
    cut = list(query_blocks(query, key, blocks.block_scores))
    assert cut[0][0] == 0 and cut[-1][1] == 1000
    assert all(one[1] == other[0] for one, other in zip(cut, cut[1:]))
    assert max(last - first for first, last in cut) * 2 * 3 * 5000 <= blocks.block_scores
