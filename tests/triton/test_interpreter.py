"""Triton reads TRITON_INTERPRET as it is imported: interpreted.py runs in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent


def test_interpreted_kernels_agree_with_the_formula() -> None:
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "ATTN_OPS_NO_NATIVE": "1",  # its CPU kernels would stand in the way of these
        "ATTN_OPS_TEST_DEVICE": "cpu",
    }
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted.py")],
        cwd=HERE.parent.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
