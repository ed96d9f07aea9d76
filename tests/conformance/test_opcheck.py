"""`torch.library.opcheck`: schema, autograd registration, fakes, AOT dispatch with dynamic shapes.

The public ops, the private forward and the private backward, each with and without gradients, on
inputs of every kind of strides.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.optests import OpCheckError

from tests.conformance.capture import Calls
from tests.conformance.spec import OpSpec
from tests.strategies import STRIDES

CASES = ("everything", "plain")
FULLY_TRACED = ("everything", "transposed")
ALL_TESTS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


def with_leaves(spec: OpSpec, case: str, strides: str, device: torch.device) -> dict[str, Any]:
    """The arguments of a case, those with gradients requiring them."""
    arguments = spec.build(spec.cases[case].but(strides=strides), torch.float32, device)
    for x in spec.floating(arguments).values():
        x.requires_grad_()
    return arguments


def detached(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.detach() if isinstance(x, Tensor) else x for x in args)


def private_arguments(
    spec: OpSpec, case: str, strides: str, device: torch.device
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What the private forward and backward of this case receive."""
    with Calls() as seen:
        out, lse = spec.with_lse(**with_leaves(spec, case, strides, device))
        grad = torch.ones((), device=device)
        torch.autograd.backward((out, lse), (grad.expand_as(out), grad.expand_as(lse)))
    return detached(seen.of(spec.forward)), detached(seen.of(spec.backward))


def requiring_grad(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args
    )


@pytest.fixture(params=STRIDES)
def strides(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


def test_public_op_passes(spec: OpSpec, case: str, strides: str, device: torch.device) -> None:
    torch.library.opcheck(spec.op.default, (), with_leaves(spec, case, strides, device))


def test_public_op_with_lse_passes(
    spec: OpSpec, case: str, strides: str, device: torch.device
) -> None:
    torch.library.opcheck(spec.with_lse.default, (), with_leaves(spec, case, strides, device))


@pytest.mark.parametrize("gradients", (False, True), ids=("no grad", "grad"))
def test_private_forward_passes(
    spec: OpSpec, case: str, strides: str, gradients: bool, device: torch.device
) -> None:
    args, _ = private_arguments(spec, case, strides, device)
    torch.library.opcheck(spec.forward, requiring_grad(args) if gradients else args)


@pytest.mark.parametrize("gradients", (False, True), ids=("no grad", "grad"))
def test_private_backward_passes(
    spec: OpSpec, case: str, strides: str, gradients: bool, device: torch.device
) -> None:
    _, args = private_arguments(spec, case, strides, device)
    if not gradients:
        torch.library.opcheck(spec.backward, args)
        return
    # Tracing the second derivative takes 20 s: once, where most can go wrong.
    slow = "test_aot_dispatch_dynamic"
    tests = [test for test in ALL_TESTS if test != slow or (case, strides) == FULLY_TRACED]
    torch.library.opcheck(spec.backward, requiring_grad(args), test_utils=tests)


def test_opcheck_finds_an_output_that_is_a_view_of_an_input() -> None:
    """The check itself can fail: an op that returns its argument is caught."""
    with torch.library._scoped_library("attn_ops_test", "FRAGMENT") as library:
        library.define("view(Tensor x) -> Tensor")
        library.impl("view", lambda x: x, "CompositeExplicitAutograd")
        torch.library.register_fake("attn_ops_test::view", lambda x: x, lib=library)
        with pytest.raises(OpCheckError):
            torch.library.opcheck(torch.ops.attn_ops_test.view.default, (torch.ones(3),))
