"""Triton reads TRITON_INTERPRET as it is imported: kernels.py runs in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import DEVICE

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent.parent
KERNELS = ("kernels", "forward_mode_kernels", "linear_kernels", "l1_sparse_kernels")


@pytest.mark.parametrize("kernels", KERNELS)
def test_kernels_agree_with_the_formula(kernels: str) -> None:
    environment = dict(os.environ)
    if DEVICE == "cpu":
        # The native CPU kernels would stand in the way of the interpreted ones.
        environment |= {"TRITON_INTERPRET": "1", "ATTN_OPS_NO_NATIVE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command.append(f"tests/triton/{kernels}.py")
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
