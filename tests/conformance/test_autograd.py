"""Derivatives in both modes and of both orders, against finite differences, in float64."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import Phase
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from tests.comparison import assert_same
from tests.conformance.evaluate import scalar
from tests.conformance.spec import OpSpec, given_case
from tests.strategies import Case

# The cases are small already, and to make one smaller takes minutes of finite differences.
WITHOUT_SHRINKING = (Phase.explicit, Phase.generate)


def small(spec: OpSpec) -> st.SearchStrategy[Case]:
    return spec.drawn(smallest=1, largest=4)


def as_function(
    spec: OpSpec, case: Case, device: torch.device, function: Callable[..., Any] | None = None
) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """The op as a function of its differentiable arguments alone, finite, and those arguments."""
    arguments = spec.build(case, torch.float64, device)
    leaves = spec.floating(arguments)

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        op = spec.run if function is None else function
        results = op(**(arguments | dict(zip(leaves, tensors))))
        return tuple(torch.where(x.isinf(), 0, x) for x in results)  # infinities do not differ

    return call, tuple(x.detach().contiguous().requires_grad_() for x in leaves.values())


def test_gradcheck_forward_and_reverse_mode(spec: OpSpec, device: torch.device) -> None:
    @given_case(small, max_examples=25, phases=WITHOUT_SHRINKING)
    def check(spec: OpSpec, device: torch.device, case: Case) -> None:
        function, leaves = as_function(spec, case, device)
        torch.autograd.gradcheck(
            function, leaves, fast_mode=True, check_forward_ad=True, check_undefined_grad=False
        )

    check(spec, device)


def test_gradgradcheck(spec: OpSpec, device: torch.device) -> None:
    nondet_tol = 1e-10 if device.type in spec.unordered_twice else 0.0

    @given_case(small, max_examples=12, phases=WITHOUT_SHRINKING)
    def check(spec: OpSpec, device: torch.device, case: Case) -> None:
        function, leaves = as_function(spec, case, device)
        torch.autograd.gradgradcheck(
            function,
            leaves,
            nondet_tol=nondet_tol,
            fast_mode=True,
            check_fwd_over_rev=True,
            check_undefined_grad=False,
        )

    check(spec, device)


def test_every_entry_of_the_jacobian_of_everything(spec: OpSpec, device: torch.device) -> None:
    """Not the fast mode of gradcheck, and undefined and batched gradients too."""
    case = spec.resized(spec.cases["everything"], 2, 3, 1).but(width=4, value_width=2)
    function, leaves = as_function(spec, case, device)
    torch.autograd.gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True)


def test_forward_mode_agrees_with_the_formula(spec: OpSpec, device: torch.device) -> None:
    @given_case(lambda spec: spec.drawn(largest=8))
    def check(spec: OpSpec, device: torch.device, case: Case) -> None:
        function, leaves = as_function(spec, case, device)
        formula, _ = as_function(spec, case, device, spec.formula)
        # The tangent of an infinite bias is that of a constant.
        tangents = tuple(torch.where(x.isinf(), 0, torch.randn_like(x)) for x in leaves)
        actual = torch.func.jvp(function, leaves, tangents)
        expected = torch.func.jvp(formula, leaves, tangents)
        for name, a, e in zip(spec.results, actual[1], expected[1]):
            assert_same(f"tangent of {name}", a, e)
        for name, a, e in zip(spec.results, actual[0], expected[0]):
            assert_same(name, a, e)

    check(spec, device)


def test_dual_numbers_carry_tangents(spec: OpSpec, device: torch.device) -> None:
    """`torch.autograd.forward_ad` itself, one argument at a time: no tangent is lost."""
    function, leaves = as_function(spec, spec.cases["everything"], device)
    formula, _ = as_function(spec, spec.cases["everything"], device, spec.formula)

    def tangent_of(result: Tensor) -> Tensor:
        tangent = forward_ad.unpack_dual(result).tangent
        return torch.zeros_like(result) if tangent is None else tangent

    for i in range(len(leaves)):
        tangent = torch.randn_like(leaves[i])
        results = []
        for f in (function, formula):
            with forward_ad.dual_level():
                inputs = [x.detach() for x in leaves]
                inputs[i] = forward_ad.make_dual(inputs[i], tangent)
                results.append([tangent_of(y) for y in f(*inputs)])
        assert results[1][0].abs().max() > 0
        for actual, expected in zip(*results):
            assert_same(f"tangent of argument {i}", actual, expected)


def test_forward_over_reverse_by_dual_numbers(spec: OpSpec, device: torch.device) -> None:
    """A Hessian-vector product: the tangent of a gradient."""
    results = []
    for op in (spec.run, spec.formula):
        function, leaves = as_function(spec, spec.cases["everything"], device, op)
        generator = torch.Generator().manual_seed(3)
        tangents = [
            torch.randn(x.shape, generator=generator, dtype=x.dtype).to(device) for x in leaves
        ]
        with forward_ad.dual_level():
            inputs = [forward_ad.make_dual(x, t) for x, t in zip(leaves, tangents)]
            grads = torch.autograd.grad(scalar(function(*inputs)), inputs)
            results.append([forward_ad.unpack_dual(grad).tangent for grad in grads])
    for i, (actual, expected) in enumerate(zip(*results)):
        assert expected.abs().max() > 0
        assert_same(f"tangent of gradient {i}", actual, expected)


def test_gradient_of_each_result_alone(spec: OpSpec, device: torch.device) -> None:
    """A result that nobody differentiates has no gradient: the formula is fed none."""
    for index in range(len(spec.results)):
        grads = []
        for op in (spec.run, spec.formula):
            function, leaves = as_function(spec, spec.cases["everything"], device, op)
            result = function(*leaves)[index]
            grads.append(torch.autograd.grad(result.sin().sum(), leaves, materialize_grads=True))
        for i, (actual, expected) in enumerate(zip(*grads)):
            assert_same(f"gradient {i} of result {index}", actual, expected)


def test_finite_differences_find_a_wrong_gradient() -> None:
    """The check itself can fail."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.01

    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert not torch.autograd.gradcheck(Wrong.apply, x, raise_exception=False)
