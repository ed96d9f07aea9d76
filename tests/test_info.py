"""`python -m attn_ops.info` tells the truth about this installation."""

import os
import subprocess
import sys

import torch

import attn_ops
from attn_ops import _library, info


def test_report_names_versions_libraries_and_devices() -> None:
    text = info.report()
    assert attn_ops.__version__ in text
    assert torch.__version__ in text
    for fact in ("libraries", "CPU", "GPU", "Triton"):
        assert f"\n{fact}" in text


def test_every_room_has_a_line_per_device() -> None:
    rooms = {(one.room, one.device) for one in info.servings()}
    assert {("cosine_sim", "cpu"), ("cosine_sim", "cuda")} <= rooms


def test_cpu_line_agrees_with_what_was_loaded() -> None:
    one = info.serving_cpu("cosine_sim")
    assert one.kernel == ("C++" if _library.loaded_libraries else "reference")
    assert bool(one.missing) == (one.kernel == "reference")


def test_missing_triton_is_named(monkeypatch) -> None:
    monkeypatch.setattr(info, "find_spec", lambda name: None)
    assert info.serving_cuda("cosine_sim").kernel == "reference"
    assert "not installed" in info.report()


def run(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *program.split()],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_runs_as_a_program() -> None:
    text = run("-m attn_ops.info")
    assert "cosine_sim" in text


def test_without_the_native_library_the_reason_is_given() -> None:
    text = run("-m attn_ops.info", ATTN_OPS_NO_NATIVE="1")
    assert "ATTN_OPS_NO_NATIVE" in text
    assert "reference" in text
