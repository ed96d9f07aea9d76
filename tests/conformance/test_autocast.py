"""Autocast: the op runs in the autocast dtype, takes mixed inputs and leaves float64 alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.comparison import assert_close, assert_same
from tests.conformance.capture import Calls
from tests.conformance.evaluate import (
    assert_dtypes,
    cotangents,
    in_dtype,
    scalar,
    with_gradients,
)
from tests.conformance.spec import OpSpec, as_tuple

TENSORS = ("query", "key", "value")


@pytest.fixture(params=(torch.bfloat16, torch.float16), ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def tensors_of(arguments: dict[str, Any]) -> list[str]:
    """query and key, and value if there is one."""
    return [name for name in TENSORS if name in arguments]


def seen_dtypes(spec: OpSpec, arguments: dict[str, Any]) -> list[torch.dtype]:
    with Calls() as calls:
        spec.run(**arguments)
    return [x.dtype for x in calls.of(spec.forward)[: len(tensors_of(arguments))]]


def test_op_runs_in_the_autocast_dtype(
    spec: OpSpec, dtype: torch.dtype, device: torch.device
) -> None:
    arguments = spec.build(spec.cases["everything"], torch.float32, device)
    with torch.autocast(device.type, dtype):
        assert seen_dtypes(spec, arguments) == [dtype] * len(tensors_of(arguments))
        assert spec.out(**arguments).dtype == dtype
        assert as_tuple(spec.function(**arguments))[0].dtype == dtype
        results = dict(zip(spec.results, spec.run(**arguments)))
    assert_dtypes(spec, results, dtype)
    assert seen_dtypes(spec, arguments) == [torch.float32] * len(tensors_of(arguments))


def test_mixed_inputs_are_taken(spec: OpSpec, dtype: torch.dtype, device: torch.device) -> None:
    arguments = spec.build(spec.cases["everything"], torch.float32, device)
    mixed = arguments | {name: arguments[name].to(dtype) for name in tensors_of(arguments)[1:]}
    mixed[tensors_of(arguments)[-1]] = arguments[tensors_of(arguments)[-1]].half()
    with torch.autocast(device.type, dtype):
        for name, a, e in zip(spec.results, spec.run(**mixed), spec.run(**arguments)):
            assert_same(name, a, e)
    with pytest.raises(TypeError, match="like query"):
        spec.run(**mixed)


def test_float64_is_left_alone(spec: OpSpec, dtype: torch.dtype, device: torch.device) -> None:
    arguments = spec.build(spec.cases["everything"], torch.float64, device)
    outside = spec.run(**arguments)
    with torch.autocast(device.type, dtype):
        assert seen_dtypes(spec, arguments) == [torch.float64] * len(tensors_of(arguments))
        inside = spec.run(**arguments)
    for name, a, e in zip(spec.results, inside, outside):
        assert_same(name, a, e)


def test_gradients_arrive_in_the_dtypes_of_the_inputs(
    spec: OpSpec, named: str, dtype: torch.dtype, device: torch.device
) -> None:
    """float32 inputs get float32 gradients, with the error of the autocast dtype."""
    arguments = spec.build(spec.cases[named].but(wide_parameters=True), torch.float32, device)
    exact_arguments = in_dtype(arguments, torch.float64)
    grads = cotangents(*spec.formula(**exact_arguments))
    exact = with_gradients(spec, spec.formula, exact_arguments, *grads)
    narrow = arguments | {name: arguments[name].to(dtype) for name in tensors_of(arguments)}
    same_dtype = with_gradients(spec, spec.formula, narrow, *grads)

    def op(**arguments: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(device.type, dtype):
            return spec.run(**arguments)

    actual = with_gradients(spec, op, arguments, *grads)
    rounding = spec.rounding(dtype, exact_arguments, *grads)
    for name, truth in exact.items():
        assert name in spec.results or actual[name].dtype == torch.float32
        assert_close(name, actual[name], same_dtype[name], truth, rounding)


def test_backward_inside_of_autocast_is_the_same(
    spec: OpSpec, dtype: torch.dtype, device: torch.device
) -> None:
    arguments = spec.build(spec.cases["everything"], torch.float32, device)
    leaves = [x.requires_grad_() for x in spec.floating(arguments).values()]
    results = []
    for enabled in (False, True):
        total = scalar(spec.run(**arguments))
        with torch.autocast(device.type, dtype, enabled=enabled):
            results.append(torch.autograd.grad(total, leaves))
    for name, expected, actual in zip(spec.floating(arguments), *results):
        assert_same(name, actual, expected)


def test_compiled_under_autocast(spec: OpSpec, dtype: torch.dtype, device: torch.device) -> None:
    arguments = spec.build(spec.cases["everything"], torch.float32, device)
    compiled = torch.compile(spec.run, backend="aot_eager", fullgraph=True)
    with torch.autocast(device.type, dtype):
        for name, a, e in zip(spec.results, compiled(**arguments), spec.run(**arguments)):
            assert_same(name, a, e)


def test_second_derivatives_under_autocast(spec: OpSpec, device: torch.device) -> None:
    """The formulas that differentiate the backward are not autocast themselves."""
    arguments = spec.build(spec.cases["everything"], torch.float64, device)
    names = tuple(spec.floating(arguments))

    def hessian_vector_product(op: Any) -> Any:
        def total(*values: Tensor) -> Tensor:
            return scalar(op(**(arguments | dict(zip(names, values)))))

        inputs = tuple(arguments[name] for name in names)
        gradient = torch.func.grad(total, tuple(range(len(names))))
        return torch.func.jvp(gradient, inputs, tuple(x.cos() for x in inputs))[1]

    expected = hessian_vector_product(spec.formula)
    with torch.autocast(device.type, torch.bfloat16):
        actual = hessian_vector_product(spec.run)
    for name, a, e in zip(names, actual, expected):
        assert_same(name, a, e)
