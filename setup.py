"""Builds the libraries of attn_ops/lib from csrc/; all metadata is in pyproject.toml.

libattn_ops.so has the C++ sources. libattn_ops_cuda.so has the CUDA sources; it is built where nvcc
is found (NVCC, CUDA_HOME or PATH) and torch is a CUDA build, or where ATTN_OPS_CUDA=1 asks for it,
for the GPUs of TORCH_CUDA_ARCH_LIST.

A library uses LibTorch's stable ABI and no Python symbols, so one build serves every Python and
every torch >= 2.11, and it is loaded with torch.ops.load_library. It needs the headers of an
installed torch, which a build in isolation does not see: type

    pip install --no-build-isolation .

Without torch, or without a C++ compiler, the package is installed without the library and says so.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError as error:  # pip does not look at build-system.requires without isolation
    raise SystemExit("setuptools>=77 is needed: pip install --upgrade setuptools") from error

ROOT = Path(__file__).resolve().parent
LIBRARY = "attn_ops/lib/libattn_ops.so"
CUDA_LIBRARY = "attn_ops/lib/libattn_ops_cuda.so"
OLDEST_TORCH = (2, 11)

# -ffp-contract: multiplications and additions become FMA also in ISO C++. -fno-math-errno: sqrt
# becomes an instruction.
COMPILE = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-Wall"]
# Vectors are passed between inlined functions only; their calling convention does not matter.
COMPILE += ["-Wno-psabi", "-Wno-ignored-attributes", "-fvisibility=hidden"]
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
COMPILE += STABLE_ABI

# Machine code for Hopper, and PTX for what comes after. Blocks are too large for GPUs before it.
GPUS = "9.0+PTX"
# Files of this name use instructions that only Hopper has: machine code that runs nowhere else, and
# is left out where it is not asked for.
HOPPER_SOURCES, HOPPER = "*_sm90a.cu", "9.0"
HOPPER_FLAGS = ["-gencode=arch=compute_90a,code=sm_90a"]
COMPILE_CUDA = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-DUSE_CUDA", *STABLE_ABI]
COMPILE_CUDA += ["-Xcompiler=-fPIC,-fvisibility=hidden"]


def torch_folder() -> Path:
    """The installed torch; SystemExit with what to do when there is none that serves."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "torch is not visible to the build. Install torch>=2.11 first, then type"
            " `pip install --no-build-isolation .`"
        )
    folder = Path(spec.submodule_search_locations[0])
    found = re.search(r"'(\d+)\.(\d+)[^']*'", version_text(folder))
    if found is None or (int(found[1]), int(found[2])) < OLDEST_TORCH:
        raise SystemExit(f"torch>=2.11 is needed, found {found[0] if found else folder}")
    return folder


def version_text(torch: Path) -> str:
    return (torch / "version.py").read_text()


def compiler() -> list[str]:
    """The C++ compiler; SystemExit when there is none."""
    if sys.platform == "win32":
        raise SystemExit("the C++ sources need gcc or clang; Windows is not supported")
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return [name]
    raise SystemExit("no C++ compiler found (g++ or clang++; or set CXX)")


def schema_source() -> str:
    """C++ that defines every schema of attn_ops/*/schemas.txt, the only place they are written."""
    lines = [
        line.strip()
        for file in sorted((ROOT / "attn_ops").glob("*/schemas.txt"))
        for line in file.read_text().splitlines()
        if line.strip() and not line.startswith("#")
    ]
    definitions = "\n".join(f'  m.def(R"schema({line})schema");' for line in lines)
    return (
        "#include <torch/csrc/stable/library.h>\n\n"
        f"STABLE_TORCH_LIBRARY_FRAGMENT(attn, m) {{\n{definitions}\n}}\n"
    )


def write_if_changed(file: Path, text: str) -> Path:
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    return file


def nvcc(torch: Path) -> str | None:
    """The CUDA compiler if the CUDA library is wanted."""
    wanted = os.environ.get("ATTN_OPS_CUDA")
    if wanted == "0" or (not wanted and "cuda: Optional[str] = None" in version_text(torch)):
        return None
    home = os.environ.get("CUDA_HOME")
    found = os.environ.get("NVCC") or shutil.which("nvcc", path=home and f"{home}/bin")
    if found is None and wanted:
        raise SystemExit("ATTN_OPS_CUDA is set and no nvcc is found (set NVCC or CUDA_HOME)")
    return found


def gpus() -> list[str]:
    """TORCH_CUDA_ARCH_LIST as PyTorch's own extensions read it."""
    return os.environ.get("TORCH_CUDA_ARCH_LIST", GPUS).replace(" ", ";").split(";")


def gpu_flags() -> list[str]:
    """nvcc's targets."""
    flags = []
    for name in gpus():
        number = name.removesuffix("+PTX").replace(".", "")
        code = f"[sm_{number},compute_{number}]" if name.endswith("+PTX") else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    return flags


def cpu_sources(folder: Path) -> list[Path]:
    """csrc/**/*.cpp and the schemas."""
    schemas = write_if_changed(folder / "schemas.cpp", schema_source())
    return [*sorted((ROOT / "csrc").rglob("*.cpp")), schemas]


def compile_objects(
    command: list[str], sources: list[Path], folder: Path, torch: Path
) -> list[Path]:
    """Objects of the sources; only those older than their source or a header are compiled."""

    def newest(*patterns: str) -> float:
        shared = [
            Path(__file__),
            *(f for pattern in patterns for f in (ROOT / "csrc").rglob(pattern)),
        ]
        return max(file.stat().st_mtime for file in shared)

    newest_shared = {".cpp": newest("*.h"), ".cu": newest("*.h", "*.cuh")}
    command = [*command, f"-I{ROOT / 'csrc'}", "-isystem", str(torch / "include")]

    def compile_one(source: Path) -> Path:
        inside = source.is_relative_to(ROOT / "csrc")
        name = "_".join(source.relative_to(ROOT / "csrc").parts) if inside else source.name
        target = folder / f"{name}.o"
        changed = max(newest_shared[source.suffix], source.stat().st_mtime)
        if not target.exists() or target.stat().st_mtime < changed:
            partial = target.with_suffix(".partial")
            subprocess.run([*command, "-c", str(source), "-o", str(partial)], check=True)
            partial.replace(target)
        return target

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(compile_one, sources))


def link(command: list[str], objects: list[Path], target: Path, torch: Path) -> None:
    """Written beside the target and renamed: a process that has the old file open keeps it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        partial = Path(folder) / target.name
        libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
        flags = [*libraries, *shlex.split(os.environ.get("LDFLAGS", ""))]
        objects_and_target = [*map(str, objects), "-o", str(partial)]
        subprocess.run([*command, "-shared", *objects_and_target, *flags], check=True)
        partial.replace(target)


class BuildLibrary(build_ext):
    """Builds the libraries in place of extension modules."""

    def target(self, library: str) -> Path:
        in_source = self.inplace or getattr(self, "editable_mode", False)
        return (ROOT if in_source else Path(self.build_lib)) / library

    def run(self) -> None:
        try:
            torch = torch_folder()
            compiler()
        except SystemExit as reason:
            print(f"attn_ops is installed without its C++ library: {reason}", file=sys.stderr)
            return
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        command = [*compiler(), *COMPILE, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        objects = compile_objects(command, cpu_sources(folder), folder, torch)
        link(compiler(), objects, self.target(LIBRARY), torch)
        cuda_compiler = nvcc(torch)
        if cuda_compiler is not None:
            self.build_cuda(cuda_compiler, folder / "cuda", torch)

    def build_cuda(self, compiler: str, folder: Path, torch: Path) -> None:
        folder.mkdir(exist_ok=True)
        hopper = sorted((ROOT / "csrc").rglob(HOPPER_SOURCES))
        sources = [x for x in sorted((ROOT / "csrc").rglob("*.cu")) if x not in hopper]
        sources.append(ROOT / "csrc/common/checks.cpp")
        parts = [(sources, gpu_flags())]
        if any(name.removesuffix("+PTX").removesuffix("a") == HOPPER for name in gpus()):
            parts.append((hopper, HOPPER_FLAGS))
        try:
            command = [compiler, *COMPILE_CUDA]
            objects = []
            for part, flags in parts:
                objects += compile_objects([*command, *flags], part, folder, torch)
            # Its names of libtorch_cuda are found when it is loaded: a CPU build of torch has none.
            link([compiler], objects, self.target(CUDA_LIBRARY), torch)
        except subprocess.CalledProcessError as error:
            if os.environ.get("ATTN_OPS_CUDA"):
                raise
            print(f"attn_ops is installed without its CUDA library: {error}", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        targets = (self.target(library) for library in (LIBRARY, CUDA_LIBRARY))
        return [str(target) for target in targets if target.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PlainWheel(bdist_wheel):
    """py3-none-<platform>: no Python symbols in the library."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    # One entry, so that setuptools runs build_ext and takes the wheel for a platform wheel.
    ext_modules=[Extension("attn_ops.lib.libattn_ops", [])],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlainWheel},
)
