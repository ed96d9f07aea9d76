"""The reference in blocks of queries, which serves where there is no kernel, equals the whole."""

from typing import Any

import pytest
import torch

from attn_ops.cosine_sim import in_blocks
from tests.comparison import assert_same
from tests.conformance.capture import Calls
from tests.conformance.evaluate import cotangents
from tests.cosine_sim.spec import CASES, SPEC, build


@pytest.fixture(params=(1, 200, 1 << 23), ids=("row by row", "some rows", "all at once"))
def block_scores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(in_blocks, "BLOCK_SCORES", request.param)
    return request.param


def private_arguments(name: str, device: torch.device) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    arguments = build(CASES[name], torch.float64, device)
    leaves = {n: x.detach().requires_grad_() for n, x in SPEC.floating(arguments).items()}
    with Calls() as calls:
        out, lse = SPEC.run(**(arguments | leaves))
        torch.autograd.grad((out, lse), list(leaves.values()), cotangents(out, lse))
    return calls.of(SPEC.forward), calls.of(SPEC.backward)


@pytest.mark.parametrize("name", CASES)
def test_forward_in_blocks_equals_the_formula(
    name: str, block_scores: int, device: torch.device
) -> None:
    args, _ = private_arguments(name, device)
    for part, actual, expected in zip(
        ("out", "lse"), in_blocks.forward(*args), in_blocks.forward_formula(*args)
    ):
        assert_same(part, actual, expected)


@pytest.mark.parametrize("name", CASES)
def test_backward_in_blocks_equals_the_formula(
    name: str, block_scores: int, device: torch.device
) -> None:
    _, args = private_arguments(name, device)
    for part, actual, expected in zip(
        SPEC.differentiable, in_blocks.backward(*args), in_blocks.backward_formula(*args)
    ):
        assert_same(part, actual, expected.contiguous())


@pytest.mark.parametrize("name", CASES)
def test_backward_formula_is_the_derivative_of_the_forward(name: str, device: torch.device) -> None:
    """The reference backward is written out by hand: autograd of the forward agrees."""
    forward_args, backward_args = private_arguments(name, device)
    places = [
        i
        for i, x in enumerate(forward_args)
        if isinstance(x, torch.Tensor) and x.is_floating_point()
    ]
    leaves = [forward_args[i].detach().requires_grad_() for i in places]
    args = list(forward_args)
    for i, leaf in zip(places, leaves):
        args[i] = leaf
    out, lse = in_blocks.forward_formula(*args)
    grad_lse = torch.where(lse.isinf(), 0, 1) * backward_args[1]
    expected = torch.autograd.grad((out, lse), leaves, (backward_args[0], grad_lse))
    actual = [x for x in in_blocks.backward_formula(*backward_args) if x.shape != (0,)]
    assert len(actual) == len(expected)
    for i, a, e in zip(places, actual, expected):
        assert_same(f"argument {i}", a, e)


def test_a_block_holds_no_more_scores_than_it_may() -> None:
    query, key = torch.empty(2, 3, 1000, 4), torch.empty(2, 3, 5000, 4)
    blocks = list(in_blocks._query_blocks(query, key))
    assert blocks[0][0] == 0 and blocks[-1][1] == 1000
    assert all(one[1] == other[0] for one, other in zip(blocks, blocks[1:]))
    assert max(last - first for first, last in blocks) * 2 * 3 * 5000 <= in_blocks.BLOCK_SCORES
