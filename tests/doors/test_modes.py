"""Modes and tensor subclasses: whoever stands between an op and its kernel sees it, and may act."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import attn_ops
from tests.comparison import assert_same
from tests.conformance.capture import Calls
from tests.conformance.evaluate import cotangents, with_gradients
from tests.conformance.spec import OpSpec, as_tuple

Results = dict[str, Tensor]


@pytest.fixture
def arguments(spec: OpSpec, device: torch.device) -> dict[str, Any]:
    return spec.build(spec.cases["everything"], torch.float32, device)


def gradients(spec: OpSpec, function: Any, arguments: dict[str, Any]) -> Results:
    """The results and all gradients."""
    return with_gradients(spec, function, arguments, *cotangents(*spec.formula(**arguments)))


def assert_all_same(actual: Results, expected: Results) -> None:
    assert actual.keys() == expected.keys()
    for name, e in expected.items():
        assert_same(name, actual[name], e)


def test_dispatch_mode_sees_every_op_forward_and_backward(
    spec: OpSpec, arguments: dict[str, Any]
) -> None:
    """Each private op once, in order, and the same numbers."""
    expected = gradients(spec, spec.run, arguments)
    with Calls() as calls:
        actual = gradients(spec, spec.run, arguments)
    prepares = [getattr(torch.ops.attn, op).default for op in spec.prepares]
    assert [call.op for call in calls.calls] == [*prepares, spec.forward, *spec.backwards]
    assert_all_same(actual, expected)


class InDouble(TorchDispatchMode):
    """Has the ops of this library compute in float64, whatever they are given."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        def widened(x: Tensor) -> Tensor:
            return x.double() if x.is_floating_point() else x

        def narrowed(x: Tensor) -> Tensor:
            return x.float() if x.is_floating_point() else x

        if func.namespace != "attn":
            return func(*args, **(kwargs or {}))
        return tree_map_only(Tensor, narrowed, func(*tree_map_only(Tensor, widened, args)))


def test_dispatch_mode_may_replace_tensors(spec: OpSpec, arguments: dict[str, Any]) -> None:
    """What it makes of the forward's results is what the backward reads."""
    with InDouble(), Calls() as calls:
        actual = gradients(spec, spec.run, arguments)
    assert spec.forward in {call.op for call in calls.calls}
    assert_all_same(actual, gradients(spec, spec.run, arguments))


class Functions(TorchFunctionMode):
    """Notes public ops, and replaces them by what it has for them."""

    def __init__(self, replaced: dict[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.replaced, self.seen = replaced, list[Any]()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.seen.append(func)
        return self.replaced.get(func, func)(*args, **(kwargs or {}))


def public(op: Any) -> tuple[Any, Any]:
    """What a mode sees of a call by the packet, and of one by the overload."""
    return op, op.default


@pytest.mark.parametrize("called", ("op", "function"))
def test_function_mode_sees_the_public_op(
    spec: OpSpec, called: str, arguments: dict[str, Any]
) -> None:
    call, op = (spec.ops[0], spec.ops[0]) if called == "op" else (spec.function, spec.ops[-1])
    with Functions({}) as mode:
        actual = as_tuple(call(**arguments))
    assert len({*mode.seen}.intersection(public(op))) == 1
    for name, a, e in zip(spec.results, actual, spec.run(**arguments)):
        assert_same(name, a, e)


def test_function_mode_may_replace_the_public_op(spec: OpSpec, arguments: dict[str, Any]) -> None:
    """As a test double does: nothing of it is left."""

    def double(**arguments: Any) -> Tensor:
        return torch.full_like(spec.formula(**arguments)[0], 7.0)

    op = spec.ops[-1]
    with Functions(dict.fromkeys(public(op), double)), Calls() as calls:
        out = op(**arguments)
    assert (out == 7).all()
    assert not calls.calls


class Plain(torch.Tensor):
    """A subclass that PyTorch keeps by itself."""


def test_plain_subclasses_come_back(spec: OpSpec, arguments: dict[str, Any]) -> None:
    expected = gradients(spec, spec.run, arguments)
    wrapped = arguments | {
        name: x.as_subclass(Plain) for name, x in spec.floating(arguments).items()
    }
    assert all(type(x) is Plain for x in spec.run(**wrapped))
    assert_all_same(gradients(spec, spec.run, wrapped), expected)


def pairs(spec: OpSpec, arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments that hold two different ones each, and the second ones alone."""
    second = {name: 0.5 * x for name, x in spec.floating(arguments).items()}
    both = {name: TwoTensor(arguments[name], x) for name, x in second.items()}
    return arguments | both, arguments | second


@pytest.mark.parametrize("compiled", (False, True), ids=("eager", "compiled"))
def test_wrapper_subclass_goes_through_forward_and_backward(
    spec: OpSpec, compiled: bool, arguments: dict[str, Any]
) -> None:
    """One that holds two tensors: both halves of every result and gradient are right."""
    both, second = pairs(spec, arguments)
    call = torch.compile(spec.run, backend="aot_eager", fullgraph=True) if compiled else spec.run
    grads = cotangents(*spec.formula(**arguments))
    wrapped = tuple(TwoTensor(grad, grad.clone()) for grad in grads)
    actual = with_gradients(spec, call, both, *wrapped)
    assert all(isinstance(x, TwoTensor) for x in actual.values())
    for half, part in (("a", arguments), ("b", second)):
        expected = with_gradients(spec, spec.run, part, *grads)
        assert_all_same({name: getattr(x, half) for name, x in actual.items()}, expected)


@pytest.mark.ops("linear_step")
def test_a_step_writes_to_what_a_wrapper_holds(device: torch.device) -> None:
    def problem() -> list[Tensor]:
        torch.manual_seed(1)
        sizes = ((2, 3, 1, 4),) * 3 + ((2, 3, 4, 4), (2, 3, 4))
        return [torch.rand(size, device=device) for size in sizes]

    first, second = problem(), [0.5 * x for x in problem()]
    wrapped = [TwoTensor(x.clone(), y.clone()) for x, y in zip(first, second)]
    with Calls() as calls:
        out = attn_ops.linear_attention_step(*wrapped)
    assert torch.ops.attn._linear_step.default in {call.op for call in calls.calls}
    for half, part in (("a", first), ("b", second)):
        assert_same("out", getattr(out, half), attn_ops.linear_attention_step(*part))
        for name, w, x in zip(("state", "key_sum"), wrapped[3:], part[3:]):
            assert_same(name, getattr(w, half), x)
