"""How exact results are: `GradScaler`, and how float32 is multiplied."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import attn_ops
from attn_ops import info
from tests.comparison import assert_close, assert_same
from tests.conformance.evaluate import cotangents, in_dtype, scalar, with_gradients
from tests.conformance.spec import OpSpec


def test_grad_scaler_gives_unscaled_gradients(spec: OpSpec, device: torch.device) -> None:
    """A scale of a power of two changes no digit where nothing over- or underflows."""
    arguments = spec.build(spec.cases["everything"], torch.float32, device)
    leaves = [x.requires_grad_() for x in spec.floating(arguments).values()]

    def loss() -> torch.Tensor:
        with torch.autocast(device.type, torch.float16):
            return scalar(tuple(x.float() for x in spec.run(**arguments)))

    expected = torch.autograd.grad(loss(), leaves)
    scaler = torch.amp.GradScaler(device.type, init_scale=256.0)
    optimizer = torch.optim.SGD(leaves, lr=0.0)
    scaler.scale(loss()).backward()
    scaler.unscale_(optimizer)
    for leaf, e in zip(leaves, expected, strict=True):
        assert leaf.grad is not None
        # What is below float16's normal numbers without the scale has lost digits.
        torch.testing.assert_close(leaf.grad, e, rtol=2e-3, atol=1e-3 * e.abs().max().item())


def test_grad_scaler_skips_a_step_that_overflows(spec: OpSpec, device: torch.device) -> None:
    arguments = spec.build(spec.cases["plain"], torch.float32, device)
    query = arguments["query"] = arguments["query"].detach().requires_grad_()
    before = query.detach().clone()
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**40)
    optimizer = torch.optim.SGD([query], lr=1.0)
    with torch.autocast(device.type, torch.float16):
        out = spec.out(**arguments)
    assert out.dtype == torch.float16
    scaler.scale(out.float().square().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(query, before)
    assert scaler.get_scale() == 2.0**39


# What products may make of float32 operands: as they are, tf32 (the digits of float16), bfloat16.
OPERANDS = {"highest": torch.float32, "high": torch.float16, "medium": torch.bfloat16}


@contextmanager
def matmul_precision(setting: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class InBlocks(TorchDispatchMode):
    """Has the formulas serve that do where there is no kernel."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "attn":
            return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args)
        return func(*args, **(kwargs or {}))


def always_full(spec: OpSpec, result: str, device: torch.device) -> bool:
    """Whether docs/precision.md says so."""
    if result in spec.own_backward:
        return False  # a formula on every device
    if spec.name == "l1_sparse":
        return True
    if device.type == "cpu":
        return "C++" in info.serving_cpu(spec.room).kernel
    return spec.room == "l1" and "C++" in info.serving_cuda("l1").kernel


@pytest.mark.parametrize("setting", OPERANDS)
@pytest.mark.parametrize("in_blocks", (False, True), ids=("kernels", "formulas"))
def test_float32_products_lose_no_more_than_the_setting_permits(
    spec: OpSpec, in_blocks: bool, setting: str, device: torch.device
) -> None:
    case = spec.resized(spec.cases["everything"], 70, 150, 1)
    arguments = spec.build(case, torch.float32, device)
    exact_arguments = in_dtype(arguments, torch.float64)
    grads = cotangents(*spec.formula(**exact_arguments))
    exact = with_gradients(spec, spec.formula, exact_arguments, *grads)
    same_dtype = with_gradients(spec, spec.formula, arguments, *grads)
    with matmul_precision(setting), InBlocks() if in_blocks else nullcontext():
        actual = with_gradients(spec, spec.run, arguments, *grads)
    for name, truth in exact.items():
        full = not in_blocks and always_full(spec, name, device)
        operands = torch.float32 if full else OPERANDS[setting]
        rounding = spec.rounding(operands, exact_arguments, *grads)
        assert_close(name, actual[name], same_dtype[name], truth, rounding)


@pytest.mark.ops("linear_step")
@pytest.mark.parametrize("setting", OPERANDS)
def test_a_step_is_full_float32_whatever_the_setting(setting: str, device: torch.device) -> None:
    if device.type == "cpu" and "C++" not in info.serving_cpu("linear").kernel:
        pytest.skip("a formula serves")
    x = torch.randn(2, 3, 1, 64, device=device)
    state, key_sum = torch.randn(2, 3, 64, 64, device=device), torch.rand(2, 3, 64, device=device)
    exact = [t.double() for t in (x, x, x, state, key_sum)]
    options: dict[str, Any] = {"feature_map": "elu_plus_one"}
    expected = [attn_ops.linear_attention_step(*exact, **options), *exact[3:]]
    with matmul_precision(setting):
        out = attn_ops.linear_attention_step(x, x, x, state, key_sum, **options)
    for name, a, e in zip(("out", "state", "key_sum"), (out, state, key_sum), expected):
        assert_same(name, a, e.float())
