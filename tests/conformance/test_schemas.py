"""The schemas that PyTorch knows are those of schemas.txt, whoever registered them."""

import torch

from attn_ops import _library
from tests.conformance.spec import OpSpec


def registered(line: str) -> str:
    """The schema of the op that this line names, as PyTorch prints it."""
    overload = getattr(torch.ops.attn, line.split("(")[0]).default
    return str(overload._schema)


def test_registered_schemas_equal_the_text(spec: OpSpec) -> None:
    for line in _library.schemas(spec.name):
        assert registered(line) == str(torch._C.parse_schema(f"attn::{line}"))


def test_both_public_and_both_private_ops_are_in_the_text(spec: OpSpec) -> None:
    names = {line.split("(")[0] for line in _library.schemas(spec.name)}
    private = {f"_{spec.name}_fwd", f"_{spec.name}_bwd"}
    assert private | {spec.name, spec.with_lse.__name__} <= names


def test_no_op_says_that_it_changes_or_returns_an_argument(spec: OpSpec) -> None:
    for overload in (spec.op.default, spec.with_lse.default, spec.forward, spec.backward):
        assert not overload._schema.is_mutable
        arguments = (*overload._schema.arguments, *overload._schema.returns)
        assert all(argument.alias_info is None for argument in arguments)


def test_forward_and_backward_agree_on_the_arguments_between_them(spec: OpSpec) -> None:
    """The backward takes the forward's arguments, its results, and the results' gradients."""
    forward, backward = (
        {a.name: str(a.type) for a in overload._schema.arguments}
        for overload in (spec.forward, spec.backward)
    )
    results = {r.name: str(r.type) for r in spec.forward._schema.returns}
    rest = {name: type for name, type in backward.items() if name not in forward}
    assert {n: t for n, t in backward.items() if n in forward} == forward
    assert set(rest) == set(results) | {f"grad_{name}" for name in results} | {"output_mask"}


def test_backward_returns_a_gradient_per_differentiable_argument(spec: OpSpec) -> None:
    returned = [r.name for r in spec.backward._schema.returns]
    assert returned == [f"grad_{name}" for name in spec.differentiable]


def test_public_ops_take_the_same_arguments(spec: OpSpec) -> None:
    one, with_lse = (
        [(a.name, str(a.type), a.default_value, a.kwarg_only) for a in op.default._schema.arguments]
        for op in (spec.op, spec.with_lse)
    )
    assert one == with_lse
