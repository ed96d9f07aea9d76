"""compile_examples/aoti_cpp: a package runs in a C++ program without Python, with equal numbers."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch._inductor import cpp_builder, exc
from torch.utils.cpp_extension import CUDA_HOME

from attn_ops import _library

ROOT = Path(__file__).parent.parent.parent
SOURCE = ROOT / "compile_examples" / "aoti_cpp"


def compiler() -> str | None:
    try:
        return cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError):
        return None


def run(*command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # Else Inductor starts processes that try out what instructions the CPU has.
    environment["TORCHINDUCTOR_VEC_ISA_OK"] = "1"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_program(folder: Path) -> None:
    options = [
        f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}",
        f"-DCMAKE_CXX_COMPILER={compiler()}",
    ]
    run("cmake", "-S", str(SOURCE), "-B", str(folder), *options)
    run("cmake", "--build", str(folder))


@pytest.mark.ops("cosine_sim", "l1", "l1_scores", "l1_sparse", "linear", "linear_with_state")
@pytest.mark.skipif(not _library.loaded_libraries, reason="the ops are in the native library")
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
@pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
@pytest.mark.skipif(
    torch.version.cuda is not None and CUDA_HOME is None,
    reason="the CMake files of a PyTorch that has CUDA look for CUDA",
)
def test_package_runs_without_python(tmp_path: Path, device: torch.device) -> None:
    if device.type == "cuda" and (reason := _library.load_cuda_library()):
        pytest.skip(reason)
    with ThreadPoolExecutor() as pool:  # each takes half a minute
        example = str(SOURCE / "export.py")
        package = pool.submit(run, sys.executable, example, str(tmp_path), device.type)
        build_program(tmp_path)
        package.result()
    lines = run(str(tmp_path / "run"), str(tmp_path)).splitlines()
    assert len(lines) == 4
    assert lines[-1] == "as in Python, without Python"
