"""Builds attn_ops/lib/libattn_ops.so from csrc/; all metadata is in pyproject.toml.

The library uses LibTorch's stable ABI and no Python symbols, so one build serves every Python and
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
OLDEST_TORCH = (2, 11)

# -ffp-contract: multiplications and additions become FMA also in ISO C++. -fno-math-errno: sqrt
# becomes an instruction.
COMPILE = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-Wall"]
# Vectors are passed between inlined functions only; their calling convention does not matter.
COMPILE += ["-Wno-psabi", "-Wno-ignored-attributes", "-fvisibility=hidden"]
COMPILE += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]


def torch_folder() -> Path:
    """The installed torch; SystemExit with what to do when there is none that serves."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "torch is not visible to the build. Install torch>=2.11 first, then type"
            " `pip install --no-build-isolation .`"
        )
    folder = Path(spec.submodule_search_locations[0])
    found = re.search(r"'(\d+)\.(\d+)[^']*'", (folder / "version.py").read_text())
    if found is None or (int(found[1]), int(found[2])) < OLDEST_TORCH:
        raise SystemExit(f"torch>=2.11 is needed, found {found[0] if found else folder}")
    return folder


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


def compile_objects(folder: Path, torch: Path) -> list[Path]:
    """Objects of csrc/**/*.cpp and of the schemas; only those older than a source are compiled."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted((ROOT / "csrc").rglob("*.cpp"))
    sources.append(write_if_changed(folder / "schemas.cpp", schema_source()))
    shared = [Path(__file__), *(ROOT / "csrc").rglob("*.h")]
    newest_shared = max(file.stat().st_mtime for file in shared)
    includes = [f"-I{ROOT / 'csrc'}", "-isystem", str(torch / "include")]
    command = [*compiler(), *COMPILE, *includes, *shlex.split(os.environ.get("CXXFLAGS", ""))]

    def compile_one(source: Path) -> Path:
        inside = source.is_relative_to(ROOT / "csrc")
        name = "_".join(source.relative_to(ROOT / "csrc").parts) if inside else source.name
        target = folder / f"{name}.o"
        newest = max(newest_shared, source.stat().st_mtime)
        if not target.exists() or target.stat().st_mtime < newest:
            partial = target.with_suffix(".partial")
            subprocess.run([*command, "-c", str(source), "-o", str(partial)], check=True)
            partial.replace(target)
        return target

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(compile_one, sources))


def link(objects: list[Path], target: Path, torch: Path) -> None:
    """Written beside the target and renamed: a process that has the old file open keeps it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        partial = Path(folder) / target.name
        command = [*compiler(), "-shared", *map(str, objects), "-o", str(partial)]
        command += [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
        command += shlex.split(os.environ.get("LDFLAGS", ""))
        subprocess.run(command, check=True)
        partial.replace(target)


class BuildLibrary(build_ext):
    """Builds the library in place of extension modules. CUDA sources would be a second library."""

    def library(self) -> Path:
        in_source = self.inplace or getattr(self, "editable_mode", False)
        return (ROOT if in_source else Path(self.build_lib)) / LIBRARY

    def run(self) -> None:
        try:
            torch = torch_folder()
            compiler()
        except SystemExit as reason:
            print(f"attn_ops is installed without its C++ library: {reason}", file=sys.stderr)
            return
        objects = compile_objects(Path(self.build_temp).resolve(), torch)
        link(objects, self.library(), torch)

    def get_outputs(self) -> list[str]:
        return [str(self.library())] if self.library().exists() else []

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
