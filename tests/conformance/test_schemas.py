"""The schemas that PyTorch knows are those of schemas.txt, whoever registered them."""

from typing import Any

import pytest
import torch

from attn_ops import _library
from tests.conformance.capture import Calls
from tests.conformance.spec import OpSpec, all_specs, as_tuple


def registered(line: str) -> str:
    """The schema of the op that this line names, as PyTorch prints it."""
    overload = getattr(torch.ops.attn, line.split("(")[0]).default
    return str(overload._schema)


def types(overload: Any) -> dict[str, str]:
    """The arguments of an op in their order, with their types."""
    return {a.name: str(a.type) for a in overload._schema.arguments}


def test_registered_schemas_equal_the_text(spec: OpSpec) -> None:
    for line in _library.schemas(spec.room):
        assert registered(line) == str(torch._C.parse_schema(f"attn::{line}"))


def test_all_public_and_private_ops_are_in_the_text(spec: OpSpec) -> None:
    names = {f"attn::{line.split('(')[0]}" for line in _library.schemas(spec.room)}
    overloads = (*(op.default for op in spec.ops), spec.forward, *spec.backwards)
    assert {overload._schema.name for overload in overloads} <= names


def test_no_op_says_that_it_changes_or_returns_an_argument(spec: OpSpec) -> None:
    for overload in (*(op.default for op in spec.ops), spec.forward, *spec.backwards):
        assert not overload._schema.is_mutable
        arguments = (*overload._schema.arguments, *overload._schema.returns)
        assert all(argument.alias_info is None for argument in arguments)


def test_public_op_returns_all_results(spec: OpSpec) -> None:
    assert len(spec.ops[0].default._schema.returns) == len(spec.results)
    assert all(len(op.default._schema.returns) == 1 for op in spec.ops[1:])


def test_public_ops_take_the_same_arguments(spec: OpSpec) -> None:
    first, *others = (
        [(a.name, str(a.type), a.default_value, a.kwarg_only) for a in op.default._schema.arguments]
        for op in spec.ops
    )
    assert all(other == first for other in others)


def test_forward_and_backward_agree_on_the_arguments_between_them(spec: OpSpec) -> None:
    """The backward takes the forward's arguments, its results, and the results' gradients."""
    if spec.linear_backward:
        pytest.skip("its backward is linear in one gradient")
    forward, backward = types(spec.forward), types(spec.backward)
    results = [r.name for r in spec.forward._schema.returns]
    assert {n: t for n, t in backward.items() if n in forward} == forward
    rest = backward.keys() - forward.keys()
    assert rest <= {*results, *(f"grad_{name}" for name in results), "output_mask"}
    assert {"grad_out", "output_mask"} <= rest
    # Each is read as itself or as its gradient.
    assert all(name in rest or f"grad_{name}" in rest for name in results)


def test_backward_takes_the_gradient_of_each_result_that_has_one(
    spec: OpSpec, device: torch.device
) -> None:
    if spec.linear_backward:
        pytest.skip("its backward is linear in one gradient")
    arguments = spec.build(spec.cases["everything"], torch.float64, device)
    with Calls() as calls:
        spec.run(**arguments)
    leaves = [
        x.detach().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in calls.of(spec.forward)
    ]
    names = [r.name for r in spec.forward._schema.returns]
    results = dict(zip(names, as_tuple(spec.forward(*leaves))))
    with_gradient = {f"grad_{name}" for name, x in results.items() if x.requires_grad}
    taken = {f"grad_{name}" for name in names} & types(spec.backward).keys()
    assert with_gradient <= taken
    # What an op does not return may have a gradient in another op of the room.
    assert len(with_gradient) == len(spec.results)


def test_backwards_together_return_a_gradient_per_differentiable_argument(spec: OpSpec) -> None:
    returned = spec.gradients_of_backward
    own = [name for name in spec.differentiable if name in spec.own_backward]
    assert [name for name in returned if name in spec.differentiable] + own == [
        *spec.differentiable
    ]
    of_room = {n for other in all_specs() if other.room == spec.room for n in other.differentiable}
    assert {*returned} <= of_room


def test_backward_of_one_argument_takes_what_the_backward_takes(spec: OpSpec) -> None:
    """In the same order, and the argument itself for sure."""
    backward = types(spec.backward)
    for argument, op in spec.own_backward.items():
        own = types(getattr(torch.ops.attn, op).default)
        assert [*own] == [name for name in backward if name in own]
        assert own == {name: backward[name] for name in own} | {argument: "Tensor"}
        assert backward[argument] == "Optional[Tensor]"
