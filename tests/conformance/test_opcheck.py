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
from tests.conformance.spec import OpSpec, only
from tests.strategies import STRIDES

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
) -> dict[Any, tuple[Any, ...]]:
    """What the private forward and every private backward of this case receive."""
    with Calls() as seen:
        results = spec.run(**with_leaves(spec, case, strides, device))
        results = tuple(x for x in results if x.requires_grad)
        ones = (torch.ones((), dtype=x.dtype, device=device).expand_as(x) for x in results)
        torch.autograd.backward(results, tuple(ones))
    return {call.op: detached(call.args) for call in seen.calls}


def requiring_grad(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args
    )


@pytest.fixture(params=STRIDES)
def strides(request: pytest.FixtureRequest) -> str:
    return request.param


@only("everything", "plain")
def test_public_ops_pass(spec: OpSpec, named: str, strides: str, device: torch.device) -> None:
    for op in spec.ops:
        torch.library.opcheck(op.default, (), with_leaves(spec, named, strides, device))


@pytest.mark.parametrize("gradients", (False, True), ids=("no grad", "grad"))
@only("everything", "plain")
def test_private_forward_passes(
    spec: OpSpec, named: str, strides: str, gradients: bool, device: torch.device
) -> None:
    args = private_arguments(spec, named, strides, device)[spec.forward]
    torch.library.opcheck(spec.forward, requiring_grad(args) if gradients else args)


@pytest.mark.parametrize("gradients", (False, True), ids=("no grad", "grad"))
@only("everything", "plain")
def test_private_backwards_pass(
    spec: OpSpec, named: str, strides: str, gradients: bool, device: torch.device
) -> None:
    seen = private_arguments(spec, named, strides, device)
    found = [op for op in spec.backwards if op in seen]
    assert spec.backward in found
    assert named != "everything" or found == [*spec.backwards]
    # Tracing the second derivative takes 20 s: once, where most can go wrong.
    slow = {"test_aot_dispatch_dynamic"} if gradients and (named, strides) != FULLY_TRACED else {}
    tests = [test for test in ALL_TESTS if test not in slow]
    for op in found:
        args = requiring_grad(seen[op]) if gradients else seen[op]
        torch.library.opcheck(op, args, test_utils=tests)


def test_opcheck_finds_an_output_that_is_a_view_of_an_input() -> None:
    """The check itself can fail: an op that returns its argument is caught."""
    with torch.library._scoped_library("attn_ops_test", "FRAGMENT") as library:
        library.define("view(Tensor x) -> Tensor")
        library.impl("view", lambda x: x, "CompositeExplicitAutograd")
        torch.library.register_fake("attn_ops_test::view", lambda x: x, lib=library)
        with pytest.raises(OpCheckError):
            torch.library.opcheck(torch.ops.attn_ops_test.view.default, (torch.ones(3),))
