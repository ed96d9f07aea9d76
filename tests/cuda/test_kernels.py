"""CUDA kernels that stand in for the CPU's: *_kernels.py run in a process of their own each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import DEVICE
from tests.cuda import emulated

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("room", ("cosine_sim", "l1"))
def test_kernels_agree_with_the_formula(room: str) -> None:
    if DEVICE == "cpu" and emulated.compiler() is None:
        pytest.skip("the emulation is built with g++")
    environment = dict(os.environ)
    if DEVICE == "cpu":
        environment["ATTN_OPS_NO_NATIVE"] = "1"  # the CPU's kernels would stand in the way
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command.append(f"tests/cuda/{room}_kernels.py")
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
