"""`python -m attn_ops.info` tells the truth about this installation."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import attn_ops
from attn_ops import _library, info
from attn_ops.l1 import cuda as l1_cuda
from tests.conformance.spec import all_specs


def test_report_names_versions_libraries_and_devices() -> None:
    text = info.report()
    assert attn_ops.__version__ in text
    assert torch.__version__ in text
    for fact in ("libraries", "CPU", "GPU", "Triton"):
        assert f"\n{fact}" in text


def test_every_room_has_a_line_per_device() -> None:
    rooms = {(one.room, one.device) for one in info.servings()}
    assert rooms == {(spec.room, device) for spec in all_specs() for device in ("cpu", "cuda")}


def has_kernels(room: str) -> bool:
    """Whether the library that is loaded computes this room's forward."""
    overload = f"attn::_{room}_fwd"
    return torch._C._dispatch_has_kernel_for_dispatch_key(overload, "CPU")


@pytest.mark.parametrize("room", _library.ROOMS)
def test_cpu_line_agrees_with_what_was_loaded(room: str) -> None:
    one = info.serving_cpu(room)
    assert one.kernel == ("C++" if has_kernels(room) else "reference")
    assert bool(one.missing) == (one.kernel == "reference")
    assert bool(_library.loaded_libraries) or not has_kernels(room)


def test_a_library_that_is_loaded_serves_the_first_room() -> None:
    assert has_kernels("cosine_sim") == bool(_library.loaded_libraries)


@pytest.mark.parametrize("room", _library.ROOMS)
def test_missing_triton_is_named(room: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "find_spec", lambda name: None)
    one = info.serving_cuda(room)
    assert "Triton" not in one.kernel
    assert "Triton" in one.missing
    assert "not installed" in info.report()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What torch says of a GPU; a library that loads; kernels in it that give their name."""
    properties = SimpleNamespace(shared_memory_per_block_optin=227 << 10, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(_library, "load_cuda_library", lambda: None)
    monkeypatch.setattr(info, "triton_version", lambda: "3.6.0")
    for op in ("_l1_fwd", "_l1_scores_fwd", "_cosine_sim_fwd"):
        monkeypatch.setattr(torch.ops.attn, f"{op}_cuda", lambda x: "CUDA C++", raising=False)
    return properties


def served(op: str) -> str:
    """Which of the two a call reaches."""
    return l1_cuda.kernel(op, lambda x: "reference")(torch.empty(0))


@pytest.mark.parametrize("op", ("_l1_fwd", "_l1_scores_fwd"))
def test_cuda_line_agrees_with_what_the_op_does(op: str, gpu: SimpleNamespace) -> None:
    one = info.serving_cuda("l1")
    assert one.kernel.startswith("CUDA C++ and Triton") and served(op) == "CUDA C++"
    assert not one.missing


def test_too_little_shared_memory_is_named(gpu: SimpleNamespace) -> None:
    """Of most GPUs that are not in data centres."""
    gpu.shared_memory_per_block_optin = 99 << 10
    one = info.serving_cuda("l1")
    assert one.kernel.startswith("reference and Triton") and served("_l1_fwd") == "reference"
    assert "227 KB of shared memory" in one.missing and "99" in one.missing


def test_a_cuda_library_that_does_not_load_is_named(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_library, "load_cuda_library", lambda: "it does not load: no such file")
    one = info.serving_cuda("l1")
    assert one.kernel.startswith("reference and Triton") and served("_l1_fwd") == "reference"
    assert "no such file" in one.missing


def test_triton_alone_serves_cosine_sim_on_other_gpus_than_hopper(gpu: SimpleNamespace) -> None:
    assert info.serving_cuda("cosine_sim").kernel.startswith("CUDA C++ and Triton")
    gpu.major = 10
    one = info.serving_cuda("cosine_sim")
    assert one.kernel.startswith("Triton")
    assert "compute capability 9.0" in one.missing and "10.0" in one.missing


def test_a_cuda_library_that_was_built_for_other_gpus_is_named(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch.ops.attn, "_cosine_sim_fwd_cuda")
    one = info.serving_cuda("cosine_sim")
    assert one.kernel.startswith("Triton") and "built without them" in one.missing


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
    assert all(room in text for room in _library.ROOMS)


def test_without_the_native_library_the_reason_is_given() -> None:
    text = run("-m attn_ops.info", ATTN_OPS_NO_NATIVE="1")
    assert "ATTN_OPS_NO_NATIVE" in text
    assert "reference" in text
