"""`torch.use_deterministic_algorithms`: every run gives the same bits, and no op is refused."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import attn_ops
from tests.conformance.evaluate import cotangents, scalar, with_gradients
from tests.conformance.spec import OpSpec

# Many blocks of every kernel, and more rows of keys than threads share evenly.
LENGTH, RUNS = 300, 4


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_repeats(run: Any) -> None:
    """Bit by bit; memory that nobody wrote to is NaN in this mode, and equals nothing."""
    first = run()
    assert first
    for _ in range(RUNS - 1):
        for name, result in run().items():
            assert torch.equal(result, first[name]), name


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
def test_results_and_gradients_repeat(
    spec: OpSpec, dtype: torch.dtype, device: torch.device
) -> None:
    case = spec.resized(spec.cases["everything"], LENGTH, LENGTH, 2)
    arguments = spec.build(case, dtype, device)
    grads = cotangents(*spec.run(**arguments))
    assert_repeats(lambda: with_gradients(spec, spec.run, arguments, *grads))


def test_second_derivatives_and_forward_mode_repeat(spec: OpSpec, device: torch.device) -> None:
    """Which formulas compute: PyTorch has a deterministic form of all that is in them."""
    case = spec.resized(spec.cases["everything"], 40, 40, 2)
    arguments = spec.build(case, torch.float32, device)
    names = tuple(spec.floating(arguments))
    values = tuple(spec.floating(arguments).values())

    def total(*values: Tensor) -> Tensor:
        return scalar(spec.run(**(arguments | dict(zip(names, values)))))

    def derivatives() -> dict[str, Tensor]:
        gradient = torch.func.grad(total, tuple(range(len(names))))
        grads, along, *_ = torch.func.jvp(gradient, values, tuple(x.cos() for x in values))
        leaves = [x.detach().requires_grad_() for x in values]
        first = torch.autograd.grad(total(*leaves), leaves, create_graph=True)
        second = torch.autograd.grad(scalar(first), leaves)
        return {
            f"{kind} of {name}": x
            for kind, found in (("grad", grads), ("jvp", along), ("second", second))
            for name, x in zip(names, found)
        }

    assert_repeats(derivatives)


@pytest.mark.ops("linear_step")
def test_a_step_repeats(device: torch.device) -> None:
    x = torch.randn(2, 3, 1, 64, device=device)
    states = torch.rand(2, 3, 64, 64, device=device), torch.rand(2, 3, 64, device=device)

    def step() -> dict[str, Tensor]:
        state, key_sum = (t.clone() for t in states)
        out = attn_ops.linear_attention_step(x, x, x, state, key_sum)
        return {"out": out, "state": state, "key_sum": key_sum}

    assert_repeats(step)
