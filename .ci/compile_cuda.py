"""Compile every .cu file of csrc with nvcc, where there is one: no GPU is needed for that.

LibTorch's stable ABI lets the sources compile against the headers of a CPU build of torch.
"""

import shutil
import subprocess
import sys
from pathlib import Path

ARCHITECTURES = ("80", "90a")


def main() -> int:
    """Return 1 if a source does not compile."""
    sources = sorted(Path("csrc").rglob("*.cu"))
    nvcc = shutil.which("nvcc")
    if not sources or nvcc is None:
        print(f"nvcc: {'not installed' if sources else 'no .cu files'}, nothing compiled")
        return 0
    from torch.utils.cpp_extension import include_paths

    flags = ["-std=c++20", "-O3", "-DUSE_CUDA", "-DTORCH_STABLE_ONLY", "-Icsrc"]
    flags.append("-DTORCH_TARGET_VERSION=0x020b000000000000")
    flags += [f"-I{path}" for path in include_paths()]
    flags += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    failed = 0
    for source in sources:
        print(f"nvcc {source}", flush=True)
        failed |= subprocess.run([nvcc, *flags, "-c", source, "-o", "/dev/null"]).returncode
    return int(failed != 0)


if __name__ == "__main__":
    sys.exit(main())
