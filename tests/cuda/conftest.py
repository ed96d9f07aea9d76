"""The CUDA sources as a library for the CPU: their kernels run on the fibers of emulated.h."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=c++20", "-O1", "-shared", "-fPIC", "-DATTN_EMULATE", "-Wno-unknown-pragmas"]
FLAGS += ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020b000000000000"]


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Loads every `attn::_*_cuda` op, for CPU tensors."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the emulated library is built with g++")
    torch_folder = Path(torch.__file__).parent
    target = tmp_path_factory.mktemp("emulated") / "libemulated.so"
    sources = [*sorted((ROOT / "csrc").rglob("*.cu")), ROOT / "csrc/common/checks.cpp"]
    command = [compiler, *FLAGS, f"-I{ROOT / 'tests/cuda'}", f"-I{ROOT / 'csrc'}"]
    command += ["-isystem", str(torch_folder / "include"), "-x", "c++", *map(str, sources)]
    command += [
        "-x",
        "none",
        f"-L{torch_folder / 'lib'}",
        "-ltorch_cpu",
        "-lc10",
        "-o",
        str(target),
    ]
    subprocess.run(command, check=True)
    torch.ops.load_library(str(target))
