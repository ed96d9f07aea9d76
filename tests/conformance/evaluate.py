"""An op and its formula, forward and backward, from the same numbers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.comparison import assert_close, compute_dtype
from tests.conformance.spec import OpSpec
from tests.strategies import Case

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def in_dtype(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same numbers in another dtype, contiguous."""
    return {
        name: x.detach().to(dtype).contiguous()
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for name, x in arguments.items()
    }


def cotangents(*results: Tensor, strides: str = "contiguous", seed: int = 1) -> tuple[Tensor, ...]:
    """Gradients of the results, in float64 numbers that 16 bits hold."""
    generator = torch.Generator().manual_seed(seed)

    def cotangent(x: Tensor) -> Tensor:
        grad = torch.randn(x.shape, generator=generator).bfloat16().half()
        grad = grad.to(x.device, torch.float64)
        return (
            grad.flatten()[0].expand(grad.shape) if strides == "expanded" and grad.numel() else grad
        )

    return tuple(cotangent(x) for x in results)


def scalar(results: tuple[Tensor, ...]) -> Tensor:
    """A number that depends on every result that is finite, on none of them linearly."""
    return sum(torch.where(x.isinf(), 0, x).sin().sum() for x in results)  # type: ignore[return-value]


def with_gradients(
    spec: OpSpec,
    function: Callable[..., tuple[Tensor, ...]],
    arguments: dict[str, Any],
    *grads: Tensor,
) -> dict[str, Tensor]:
    """The results and the gradient of every differentiable argument, by name."""
    leaves = {n: x.detach().requires_grad_() for n, x in spec.floating(arguments).items()}
    outputs = function(**(arguments | leaves))
    assert len(outputs) == len(spec.results)
    # `to` keeps the strides of an expanded gradient.
    pairs = [(y, grad.to(y.dtype)) for y, grad in zip(outputs, grads)]
    pairs = [(y, grad) for y, grad in pairs if y.requires_grad]
    results = torch.autograd.grad(
        [y for y, _ in pairs], list(leaves.values()), [g for _, g in pairs], materialize_grads=True
    )
    return dict(zip((*spec.results, *leaves), (*outputs, *results)))


def assert_dtypes(spec: OpSpec, results: dict[str, Tensor], dtype: torch.dtype) -> None:
    """`out` has the dtype of query; everything else has that of sums."""
    for name in spec.results:
        expected = dtype if name == "out" else compute_dtype(dtype)
        assert results[name].dtype == expected, f"{name} is {results[name].dtype}"


def assert_agrees(spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """The op agrees with its formula: results, and every gradient in its argument's dtype."""
    arguments = spec.build(case, dtype, device)
    assert_arguments_agree(spec, arguments, strides=case.strides)


def assert_arguments_agree(
    spec: OpSpec, arguments: dict[str, Any], strides: str = "contiguous"
) -> dict[str, Tensor]:
    """The same for arguments that a test made itself; returns the op's results."""
    dtype = arguments["query"].dtype
    exact_arguments = in_dtype(arguments, torch.float64)
    grads = cotangents(*spec.formula(**exact_arguments), strides=strides)
    exact = with_gradients(spec, spec.formula, exact_arguments, *grads)
    same_dtype = with_gradients(spec, spec.formula, arguments, *grads)
    actual = with_gradients(spec, spec.run, arguments, *grads)
    rounding = spec.rounding(dtype, exact_arguments, *grads)
    assert_dtypes(spec, actual, dtype)
    for name, x in spec.floating(arguments).items():
        assert actual[name].dtype == x.dtype, f"the gradient of {name} is {actual[name].dtype}"
    for name, truth in exact.items():
        assert_close(name, actual[name], same_dtype[name], truth, rounding)
    return actual


def assert_changed_case_agrees(
    spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device, **changes: Any
) -> dict[str, Tensor]:
    """The same for a case of which some arguments are replaced by functions of themselves."""
    arguments = spec.build(case, dtype, device)
    for name, change in changes.items():
        arguments[name] = change(arguments[name])
    results = assert_arguments_agree(spec, arguments, case.strides)
    assert not any(x.isnan().any() for x in results.values())
    return results
