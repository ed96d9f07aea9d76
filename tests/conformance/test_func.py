"""`torch.func`, plain and nested, each result compared in value with the formula's, in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp

from tests.comparison import assert_same
from tests.conformance.evaluate import scalar
from tests.conformance.spec import OpSpec
from tests.strategies import Case

Function = Callable[..., Any]

# All arguments at once, but small: a Hessian has the square of their number of entries.
SMALL = {"heads": 2, "kv_heads": 1, "width": 4}


class Problem:
    """A scalar of the op's results as a function of its differentiable arguments."""

    def __init__(self, spec: OpSpec, case: Case, device: torch.device) -> None:
        self.spec = spec
        self.arguments = spec.build(case, torch.float64, device)
        leaves = spec.floating(self.arguments)
        self.names = tuple(leaves)
        self.inputs = tuple(leaves.values())
        self.places = tuple(range(len(self.inputs)))
        generator = torch.Generator().manual_seed(5)
        self.tangents = tuple(
            torch.randn(x.shape, generator=generator, dtype=x.dtype).to(device) for x in self.inputs
        )

    def results(self, op: Function, *inputs: Tensor) -> tuple[Tensor, ...]:
        return op(**(self.arguments | dict(zip(self.names, inputs))))

    def scalar(self, op: Function) -> Function:
        def function(*inputs: Tensor) -> Tensor:
            return scalar(self.results(op, *inputs))

        return function

    def compare(self, transform: Callable[[Function], Any]) -> None:
        """transform(scalar function) -> results, for the op and for the formula."""
        actual = torch.utils._pytree.tree_leaves(transform(self.scalar(self.spec.run)))
        expected = torch.utils._pytree.tree_leaves(transform(self.scalar(self.spec.formula)))
        assert len(actual) == len(expected) > 0
        assert any(e.abs().max() > 0 for e in expected)
        for i, (a, e) in enumerate(zip(actual, expected)):
            assert_same(f"result {i}", a.contiguous(), e)


@pytest.fixture
def everything(spec: OpSpec, device: torch.device) -> Problem:
    return Problem(spec, spec.cases["everything"], device)


@pytest.fixture
def small(spec: OpSpec, device: torch.device) -> Problem:
    return Problem(spec, spec.resized(spec.cases["everything"], 2, 3, 1).but(**SMALL), device)


def test_grad(spec: OpSpec, named: str, device: torch.device) -> None:
    problem = Problem(spec, spec.cases[named], device)
    problem.compare(lambda f: grad(f, problem.places)(*problem.inputs))


def test_jvp(spec: OpSpec, named: str, device: torch.device) -> None:
    problem = Problem(spec, spec.cases[named], device)
    tangents = tuple(torch.where(x.isinf(), 0, t) for x, t in zip(problem.inputs, problem.tangents))
    # PyTorch makes no dual number of a tensor that overlaps itself.
    inputs = tuple(x.clone(memory_format=torch.contiguous_format) for x in problem.inputs)
    problem.compare(lambda f: jvp(f, inputs, tangents))


def test_vjp(everything: Problem) -> None:
    def transform(f: Function) -> Any:
        result, pullback, *_ = vjp(f, *everything.inputs)
        return result, pullback(torch.full_like(result, 0.5))

    everything.compare(transform)


def test_jacobians_of_all_results(small: Problem) -> None:
    for jacobian in (jacrev, jacfwd):
        actual, expected = (
            jacobian(lambda *xs, op=op: small.results(op, *xs), small.places)(*small.inputs)
            for op in (small.spec.run, small.spec.formula)
        )
        for result, rows, exact_rows in zip(small.spec.results, actual, expected):
            for name, a, e in zip(small.names, rows, exact_rows):
                assert_same(f"{jacobian.__name__}: {result} by {name}", a.contiguous(), e)


def test_hessian(small: Problem) -> None:
    small.compare(lambda f: hessian(f, small.places)(*small.inputs))


def test_reverse_over_reverse_hessian(small: Problem) -> None:
    small.compare(lambda f: jacrev(jacrev(f, small.places), small.places)(*small.inputs))


def test_grad_of_grad(everything: Problem) -> None:
    def transform(f: Function) -> Any:
        def along(*inputs: Tensor) -> Tensor:
            grads = grad(f, everything.places)(*inputs)
            return sum((g * t).sum() for g, t in zip(grads, everything.tangents))

        return grad(along, everything.places)(*everything.inputs)

    everything.compare(transform)


def test_jvp_of_grad(everything: Problem) -> None:
    everything.compare(
        lambda f: jvp(grad(f, everything.places), everything.inputs, everything.tangents)
    )


def test_grad_of_jvp(everything: Problem) -> None:
    def transform(f: Function) -> Any:
        def along(*inputs: Tensor) -> Tensor:
            return jvp(f, inputs, everything.tangents)[1]

        return grad(along, everything.places)(*everything.inputs)

    everything.compare(transform)


def test_jvp_of_jvp(everything: Problem) -> None:
    def along(f: Function) -> Function:
        return lambda *inputs: jvp(f, inputs, everything.tangents)[1]

    everything.compare(lambda f: along(along(f))(*everything.inputs))


def test_third_derivatives(small: Problem) -> None:
    def along(f: Function) -> Function:
        """The derivative of f in the direction of the tangents, by reverse mode."""

        def derivative(*inputs: Tensor) -> Tensor:
            grads = grad(f, small.places)(*inputs)
            return sum((g * t).sum() for g, t in zip(grads, small.tangents))

        return derivative

    small.compare(lambda f: grad(along(along(f)), small.places)(*small.inputs))
    small.compare(lambda f: jvp(along(along(f)), small.inputs, small.tangents))


def test_double_backward_without_torch_func(everything: Problem) -> None:
    def transform(f: Function) -> Any:
        inputs = tuple(x.detach().requires_grad_() for x in everything.inputs)
        grads = torch.autograd.grad(f(*inputs), inputs, create_graph=True)
        along = torch.stack([(g * t).sum() for g, t in zip(grads, everything.tangents)]).sum()
        return grads, torch.autograd.grad(along, inputs)

    everything.compare(transform)
