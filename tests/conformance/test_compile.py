"""`torch.compile(fullgraph=True, dynamic=True)`: one compilation for all lengths, equal numbers."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tests.comparison import assert_same
from tests.conformance.evaluate import cotangents, scalar, with_gradients
from tests.conformance.spec import OpSpec, as_tuple, only
from tests.strategies import Case

# Sizes that are all different, and no width or number of heads: equal ones are taken for one size.
LENGTHS = ((21, 27), (23, 29), (51, 51), (47, 35))


def compile_counted(function: Callable[..., Any], counter: Any) -> Callable[..., Any]:
    return torch.compile(function, backend=counter, fullgraph=True, dynamic=True)


@pytest.fixture
def literal_floats() -> Iterator[None]:
    """A float that comes from outside is taken as the literal that it is in a user's code.

    PyTorch would otherwise trace it as a symbol, find that an op needs the number, and start again:
    two compilations at the first call whatever the op, and none later.
    """
    with torch._dynamo.config.patch(specialize_float=True):
        yield


def assert_compiled_equals_eager(
    spec: OpSpec, compiled: Callable[..., Any], case: Case, device: torch.device
) -> None:
    arguments = spec.build(case, torch.float32, device)
    grads = cotangents(*spec.run(**arguments))
    expected = with_gradients(spec, spec.run, arguments, *grads)
    actual = with_gradients(spec, compiled, arguments, *grads)
    for name, result in actual.items():
        assert_same(name, result, expected[name])


def test_one_compilation_serves_all_lengths(
    spec: OpSpec, named: str, device: torch.device, literal_floats: None
) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = compile_counted(spec.run, counter)
    for i, (queries, keys) in enumerate(LENGTHS):
        case = spec.resized(spec.cases[named], queries, keys, (5, 3, 4, 5)[i])
        assert_compiled_equals_eager(spec, compiled, case, device)
    assert counter.frame_count == 1


@only("plain", "everything")
def test_inductor_compiles_forward_and_backward_once(
    spec: OpSpec, named: str, device: torch.device, literal_floats: None
) -> None:
    counter = CompileCounterWithBackend("inductor")
    compiled = compile_counted(spec.run, counter)
    for i, (queries, keys) in enumerate(LENGTHS[:2]):
        case = spec.resized(spec.cases[named], queries, keys, 5 - i)
        assert_compiled_equals_eager(spec, compiled, case, device)
    assert counter.frame_count == 1


def test_python_function_compiles_once(
    spec: OpSpec, device: torch.device, literal_floats: None
) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = compile_counted(spec.function, counter)
    for queries, keys in LENGTHS:
        case = spec.resized(spec.cases["everything"], queries, keys, 5)
        arguments = spec.build(case, torch.float32, device)
        results = (as_tuple(call(**arguments)) for call in (compiled, spec.function))
        for name, actual, expected in zip(spec.results, *results):
            assert_same(name, actual, expected)
    assert counter.frame_count == 1


def test_float_from_outside_does_not_compile_again_over_lengths(
    spec: OpSpec, device: torch.device
) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = compile_counted(spec.run, counter)
    counts = []
    for queries, keys in LENGTHS:
        case = spec.resized(spec.cases["everything"], queries, keys, 5)
        assert_compiled_equals_eager(spec, compiled, case, device)
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1


def test_graph_breaks_would_be_counted(device: torch.device) -> None:
    """The counter itself can fail: a value that is burnt in compiles once per value."""

    def specialized(x: Tensor) -> Tensor:
        return x * int(x.shape[0] == 3)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(specialized, backend=counter, dynamic=True)
    for length in (3, 4):
        compiled(torch.ones(length, device=device))
    assert counter.frame_count == 2


def test_gradient_inside_of_a_compiled_function(spec: OpSpec, device: torch.device) -> None:
    arguments = spec.build(spec.cases["everything"], torch.float32, device)
    names = tuple(spec.floating(arguments))

    def total(*tensors: Tensor) -> Tensor:
        return scalar(spec.run(**(arguments | dict(zip(names, tensors)))))

    gradient = torch.func.grad(total, argnums=tuple(range(len(names))))
    tensors = tuple(arguments[name] for name in names)
    compiled = torch.compile(gradient, backend="aot_eager", fullgraph=True)
    for name, actual, expected in zip(names, compiled(*tensors), gradient(*tensors)):
        assert_same(name, actual, expected)
