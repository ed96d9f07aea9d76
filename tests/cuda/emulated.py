"""The CUDA sources as a library for the CPU: their kernels run on the fibers of emulated.h."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-DATTN_EMULATE", "-Wno-unknown-pragmas"]
FLAGS += ["-Wno-attributes"]  # nvcc hides what it includes; here nothing is hidden
FLAGS += ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020b000000000000"]


def compiler() -> str | None:
    """The kernels need a half type of the compiler's, which g++ has on x86."""
    return shutil.which("g++")


def load(room: str) -> None:
    """Builds and loads the library: the room's `attn::_*_cuda` ops, for CPU tensors."""
    command = [str(compiler()), *FLAGS, f"-I{ROOT / 'tests/cuda'}", f"-I{ROOT / 'csrc'}"]
    folder = Path(torch.__file__).parent
    command += ["-isystem", str(folder / "include")]
    with tempfile.TemporaryDirectory() as target:
        objects = [_object(command, source, Path(target)) for source in _sources(room)]
        for process, _ in objects:
            if process.wait():
                raise RuntimeError(f"{process.args!r} failed")
        library = Path(target) / "libemulated.so"
        libraries = [f"-L{folder / 'lib'}", "-ltorch_cpu", "-lc10", "-o", str(library)]
        subprocess.run([command[0], "-shared", *(o for _, o in objects), *libraries], check=True)
        torch.ops.load_library(str(library))


def _sources(room: str) -> list[Path]:
    return [*sorted((ROOT / "csrc" / room).rglob("*.cu")), ROOT / "csrc/common/checks.cpp"]


def _object(command: list[str], source: Path, target: Path) -> tuple[subprocess.Popen[bytes], str]:
    result = str(target / f"{source.stem}.o")
    return subprocess.Popen([*command, "-x", "c++", "-c", str(source), "-o", result]), result
