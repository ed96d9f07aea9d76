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


def cotangents(
    out: Tensor, lse: Tensor, strides: str = "contiguous", seed: int = 1
) -> tuple[Tensor, Tensor]:
    """Gradients of (out, lse), in float64 numbers that 16 bits hold."""
    generator = torch.Generator().manual_seed(seed)
    grad_out, grad_lse = (
        torch.randn(x.shape, generator=generator).bfloat16().half().to(out.device, torch.float64)
        for x in (out, lse)
    )
    if strides == "expanded" and grad_out.numel():
        grad_out = grad_out.flatten()[0].expand(grad_out.shape)
        grad_lse = grad_lse.flatten()[0].expand(grad_lse.shape)
    return grad_out, grad_lse


def with_gradients(
    spec: OpSpec, function: Callable[..., Any], arguments: dict[str, Any], *grads: Tensor
) -> dict[str, Tensor]:
    """out, lse and the gradient of every differentiable argument, by name."""
    leaves = {n: x.detach().requires_grad_() for n, x in spec.floating(arguments).items()}
    outputs = function(**(arguments | leaves))
    # `to` keeps the strides of an expanded gradient.
    pairs = [(y, grad.to(y.dtype)) for y, grad in zip(outputs, grads)]
    pairs = [(y, grad) for y, grad in pairs if y.requires_grad]
    results = torch.autograd.grad(
        [y for y, _ in pairs], list(leaves.values()), [g for _, g in pairs], materialize_grads=True
    )
    return {"out": outputs[0], "lse": outputs[1]} | dict(zip(leaves, results))


def assert_agrees(spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """The op agrees with its formula: out, lse, and every gradient in the dtype of its argument."""
    arguments = spec.build(case, dtype, device)
    assert_arguments_agree(spec, arguments, strides=case.strides)


def assert_arguments_agree(
    spec: OpSpec, arguments: dict[str, Any], strides: str = "contiguous"
) -> dict[str, Tensor]:
    """The same for arguments that a test made itself; returns the op's results."""
    dtype = arguments["query"].dtype
    exact_arguments = in_dtype(arguments, torch.float64)
    grads = cotangents(*spec.formula(**exact_arguments), strides)
    exact = with_gradients(spec, spec.formula, exact_arguments, *grads)
    same_dtype = with_gradients(spec, spec.formula, arguments, *grads)
    actual = with_gradients(spec, spec.with_lse, arguments, *grads)
    rounding = spec.rounding(dtype, exact_arguments, *grads)
    assert actual["out"].dtype == dtype
    assert actual["lse"].dtype == compute_dtype(dtype)
    for name, x in spec.floating(arguments).items():
        assert actual[name].dtype == x.dtype, f"the gradient of {name} is {actual[name].dtype}"
    for name, truth in exact.items():
        assert_close(name, actual[name], same_dtype[name], truth, rounding)
    return actual
