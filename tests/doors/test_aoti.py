"""AOTInductor: one package of all ops, loaded and run from Python at sizes it was not made at."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attn_ops
from tests.comparison import assert_same
from tests.conformance.spec import OpSpec, all_specs
from tests.doors.all_ops import AllOps, Inputs

SIZES = ((3, 1, 4), (3, 4, 4), (3, 4))  # of a token, and of the state and key_sum


class WithStep(nn.Module):
    """All ops, and a step of decoding that writes to a state from outside."""

    def __init__(self, ops: AllOps) -> None:
        super().__init__()
        self.ops = ops

    def forward(self, inputs: Inputs, x: Tensor, state: Tensor, key_sum: Tensor) -> Any:
        return self.ops(inputs), attn_ops.linear_attention_step(x, x, x, state, key_sum)


@pytest.fixture(scope="module")
def model(device: torch.device) -> AllOps:
    return AllOps(all_specs(), device)


def step_inputs(batch: int, device: torch.device) -> list[Tensor]:
    return [torch.rand(batch, *size, device=device) for size in SIZES]


@pytest.fixture(scope="module")
def package(model: AllOps, device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = str(tmp_path_factory.mktemp("aoti") / "ops.pt2")
    args, shapes = model.exported_at()
    batch = {0: torch.export.Dim("batch", min=2)}
    program = torch.export.export(
        WithStep(model),
        (*args, *step_inputs(2, device)),
        dynamic_shapes=(*shapes, batch, batch, batch),
        strict=False,
    )
    torch._inductor.aoti_compile_and_package(program, package_path=path)
    return torch._inductor.aoti_load_package(path)


@pytest.fixture(scope="module")
def results(package: Any, model: AllOps, device: torch.device) -> Any:
    return package(model.inputs(), *step_inputs(5, device))[0]


def test_package_gives_the_same_numbers_at_other_sizes(
    spec: OpSpec, model: AllOps, results: Any
) -> None:
    expected = model.expected()[spec.name]
    for name, a, e in zip(spec.results, results[spec.name], expected, strict=True):
        assert_same(name, a, e)


@pytest.mark.ops("linear_step")
def test_package_writes_to_the_state_of_its_caller(
    package: Any, model: AllOps, device: torch.device
) -> None:
    x, *states = step_inputs(5, device)
    expected_states = [state.clone() for state in states]
    for token in (x, 2 * x):
        expected = attn_ops.linear_attention_step(token, token, token, *expected_states)
        assert_same("out", package(model.inputs(), token, *states)[1], expected)
    for name, a, e in zip(("state", "key_sum"), states, expected_states, strict=True):
        assert_same(name, a, e)
