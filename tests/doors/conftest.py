"""The tests of this folder are asked of every op, as those of the conformance suite are."""

import pytest
import torch

from tests.conformance.conftest import nothing_compiled, pytest_generate_tests  # noqa: F401
from tests.conftest import DEVICE

# What these ask is computed on the CPU on every machine: it says nothing of another device.
ON_THE_CPU = ("test_context_parallel.py", "test_dtensor.py", "test_onnx.py")
TWO_GPUS = ("test_fsdp_tensor_parallel.py",)  # otherwise its two processes take the CPU


@pytest.fixture(autouse=True, scope="module")
def its_own_device(request: pytest.FixtureRequest) -> None:
    if DEVICE == "cpu":
        return
    if request.path.name in ON_THE_CPU:
        pytest.skip("is computed on the CPU")
    if request.path.name in TWO_GPUS and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ops(*names): the ops that a test without a spec asks")
