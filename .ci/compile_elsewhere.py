"""Compile csrc for what this machine is not: NVIDIA GPUs, arm64, another compiler.

Each is tried where its compiler is installed (nvcc, aarch64-linux-gnu-g++, clang++). Nothing is
linked or run: LibTorch's stable ABI lets the sources compile against the headers of any torch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils.cpp_extension import include_paths

COMMON = ["-Icsrc", "-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
COMMON += [flag for path in include_paths() for flag in ("-isystem", path)]
COMMON += ["-O1", "-c", "-o", "/dev/null"]
CUDA = ["-std=c++20", "-DUSE_CUDA", "--expt-relaxed-constexpr", "-Xptxas", "-O1"]

# compiler, files, flags. Hopper's own sources compile for other GPUs too, to empty kernels.
TARGETS = (
    ("nvcc", "*.cu", [*CUDA, "-gencode=arch=compute_90,code=sm_90"]),
    ("nvcc", "*_sm90a.cu", [*CUDA, "-gencode=arch=compute_90a,code=sm_90a"]),
    ("aarch64-linux-gnu-g++", "*.cpp", ["-std=c++17"]),
    ("clang++", "*.cpp", ["-std=c++17", "-Wno-bitwise-conditional-parentheses"]),
)


def main() -> int:
    """Return 1 if a source does not compile."""
    failed = False
    for compiler, files, flags in TARGETS:
        sources = sorted(Path("csrc").rglob(files))
        if not sources or shutil.which(compiler) is None:
            reason = "not installed" if sources else f"no {files} in csrc"
            print(f"{compiler}: {reason}, nothing compiled")
            continue
        print(f"{compiler}: {len(sources)} files", flush=True)
        commands = ([compiler, *flags, *COMMON, str(source)] for source in sources)
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            runs = list(pool.map(subprocess.run, commands))
        failed |= any(run.returncode for run in runs)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
