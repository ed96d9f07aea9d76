"""The import arrows: every module imports only what lies below it, and rooms never import rooms.

integrations -> nn, distributed -> the board (attn_ops) -> api -> ops -> kernels -> shared files
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "attn_ops"
ROOMS = {path.parent.name for path in PACKAGE.glob("*/schemas.txt")}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

SHARED, KERNELS, OPS, API, BOARD, OVER_THE_BOARD, INTEGRATIONS = range(7)
FOLDERS = {"nn": OVER_THE_BOARD, "distributed": OVER_THE_BOARD, "integrations": INTEGRATIONS}


def folder(module: str) -> str:
    """`attn_ops.cosine_sim.ops` -> `cosine_sim`; a file beside the board is its own folder."""
    return (module.split(".") + [""])[1]


def level(module: str) -> int:
    """How high a module lies; an import goes down, or stays in its folder."""
    parts = module.split(".")
    if module == "attn_ops":
        return BOARD
    if parts[1] in FOLDERS:
        return FOLDERS[parts[1]]
    if parts[1] == "info":
        return OVER_THE_BOARD
    if parts[1] in ROOMS:
        names = {"api": API, "ops": OPS}
        return names.get(parts[2], KERNELS) if len(parts) > 2 else API
    return SHARED


def imports(module: str, *, top_level_only: bool = False) -> set[str]:
    """What a module imports: modules of this package in full, others by their name."""
    tree = ast.parse(MODULES[module].read_text())
    found: set[str] = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} uses a relative import"
            # `import masks` from attn_ops is a module, `import l2_normalize` is the board.
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
    return found


def test_rooms_are_found() -> None:
    assert {"cosine_sim", "l1", "linear"} <= ROOMS


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_what_lies_below(module: str) -> None:
    for other in imports(module) & MODULES.keys() - {module}:
        same_room = folder(other) == folder(module) and folder(module) in ROOMS
        if same_room:
            assert level(other) <= level(module), f"{module} imports {other}, which lies above it"
        elif folder(module) != folder(other) and not (level(module) == level(other) == SHARED):
            assert level(other) < level(module), f"{module} imports {other}, which is not below it"


@pytest.mark.parametrize("module", [name for name in MODULES if folder(name) in ROOMS])
def test_rooms_never_import_rooms(module: str) -> None:
    others = {folder(name) for name in imports(module) & MODULES.keys()} & ROOMS
    assert others <= {folder(module)}


def is_triton(module: str) -> bool:
    """Whether a module may import Triton as it is loaded."""
    return folder(module) == "_triton" or module.rpartition(".")[2].startswith("triton")


@pytest.mark.parametrize("module", [name for name in MODULES if not is_triton(name)])
def test_triton_is_not_imported_on_loading(module: str) -> None:
    for name in imports(module, top_level_only=True):
        assert name.split(".")[0] != "triton", f"{module} imports {name}"
        assert not (name in MODULES and is_triton(name)), f"{module} imports {name}"


def test_import_attn_ops_imports_no_triton_and_no_cuda() -> None:
    # torch may import triton by itself: only what attn_ops adds to a process counts.
    program = (
        "import sys, torch; before = set(sys.modules); import attn_ops; "
        "added = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "ours = {name for name in sys.modules if name.startswith('attn_ops.')}; "
        "assert 'triton' not in added, added; "
        "assert not any('triton' in name for name in ours), ours; "
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


TEXT = (".py", ".md", ".toml", ".txt", ".yaml", ".cpp", ".cu", ".h", ".cuh", "")
# Written in parts, so that this file does not find itself.
FORBIDDEN = {
    "a path of one machine": r"(?<![\w.])/(home|root|work|Users)" + r"/\w",
    "a package registry": r"(pypi|pythonhosted|download\.pytorch)" + r"\.org",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_names(what: str) -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.suffix in TEXT and path.is_file():
            found = re.search(FORBIDDEN[what], path.read_text())
            assert not found, f"{name} names {what}: {found.group() if found else ''}"


def test_files_hold_one_thing() -> None:
    """400 lines at most: a longer file is two."""
    for path in [*PACKAGE.rglob("*.py"), *ROOT.glob("csrc/**/*.[ch]*")]:
        lines = len(path.read_text().splitlines())
        assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines"
