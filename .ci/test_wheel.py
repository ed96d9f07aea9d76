"""One wheel, installed and tested under every Python: `make test-wheel`.

auditwheel tells which Linux it runs on, and that it brings no library along. Then each interpreter
of PYTHONS (names on PATH, or paths; those that are not here are skipped) gets an environment with
torch and the wheel, in which part of the suite runs, away from the checkout.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OF_TORCH = ("libtorch_cpu.so", "libc10.so")  # the torch that is installed has them
PYTHONS = "python3.10 python3.11 python3.12 python3.13"
PARTS = (
    ["tests/conformance/test_numerics.py", "tests/test_info.py"],
    [f"tests/{op}/test_errors.py" for op in ("cosine_sim", "l1", "linear")],
    ["tests/conformance/test_opcheck.py", "-k", "plain"],
)
LOADED = (
    "import attn_ops, torch; from attn_ops import _library as library;"
    "assert 'site-packages' in attn_ops.__file__, attn_ops.__file__;"
    "assert library.loaded_libraries, library.library_error;"
    "print('torch', torch.__version__, 'loads', library.loaded_libraries)"
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser("test_wheel", description=__doc__)
    p.add_argument("--wheels", type=Path, default=ROOT / "dist", help="the newest in there")
    p.add_argument("--pythons", default=PYTHONS)
    p.add_argument("--torch", default="torch>=2.11", help="what pip is asked for")
    p.add_argument("--index", default="", help="the package index to take torch from")
    p.add_argument("--environments", type=Path, help="made or used in there, and kept")
    return p


def run(*command: str | Path, folder: Path = ROOT) -> None:
    """Shows a command, and raises CalledProcessError where it fails."""
    print("$", shlex.join(map(str, command)), flush=True)
    subprocess.run([str(word) for word in command], check=True, cwd=folder)


def audit(wheel: Path) -> str:
    """The platform that auditwheel gives the wheel; SystemExit if that takes more than a tag."""
    excluded = [word for library in OF_TORCH for word in ("--exclude", library)]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", folder]
        subprocess.run([*command, *excluded, str(wheel)], check=True)
        (repaired,) = Path(folder).glob("*.whl")
        grafted = [name for name in zipfile.ZipFile(repaired).namelist() if ".libs/" in name]
        platform = re.fullmatch(r".*-py3-none-(\w+)\.whl", repaired.name)
    if grafted or platform is None or "manylinux" not in platform[1]:
        raise SystemExit(f"{wheel.name} becomes {repaired.name} and brings {grafted} along")
    return platform[1]


def version(python: str) -> str | None:
    """Of an interpreter that is there and starts; shims of other versions do not."""
    path = shutil.which(python)
    if path is None:
        return None
    program = "import sys; print('%d.%d' % sys.version_info[:2])"
    done = subprocess.run([path, "-c", program], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def test(python: str, wheel: Path, folder: Path, args: argparse.Namespace) -> None:
    """Installs torch and the wheel for `python` in `folder`, and runs tests of a copy there."""
    of_folder = str(folder / "bin" / "python")
    if not Path(of_folder).exists():
        run(python, "-m", "venv", folder)
    pip = [of_folder, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    run(*pip, *(["--index-url", args.index] if args.index else []), args.torch)
    run(*pip, "--force-reinstall", "--no-deps", wheel)
    run(*pip, f"attn_ops[test] @ {wheel.resolve().as_uri()}")
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(ROOT / "tests", Path(copy) / "tests")
        shutil.copy(ROOT / "pyproject.toml", copy)
        run(of_folder, "-c", LOADED, folder=Path(copy))
        for part in PARTS:
            run(of_folder, "-m", "pytest", "-q", "-n", "auto", *part, folder=Path(copy))


def main() -> int:
    """Return 1 if the wheel fails under a Python that is here."""
    args = parser().parse_args()
    wheels = sorted(args.wheels.glob("attn_ops-*.whl"), key=lambda path: path.stat().st_mtime)
    if not wheels:
        raise SystemExit(f"no wheel in {args.wheels}: make wheel")
    results = [f"{wheels[-1].name}: {audit(wheels[-1])}"]
    for python in args.pythons.split():
        found = version(python)
        if found is None:
            results.append(f"{python}: not here, skipped")
            continue
        with tempfile.TemporaryDirectory() as temporary:
            folder = (args.environments or Path(temporary)) / f"python{found}"
            try:
                test(python, wheels[-1], folder, args)
                results.append(f"{python}: passed")
            except subprocess.CalledProcessError as error:
                results.append(f"{python}: failed, {error}")
    print("\n".join(results))
    return int(any(": failed" in result for result in results))


if __name__ == "__main__":
    sys.exit(main())
