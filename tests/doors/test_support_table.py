"""docs/support.md says what a run found, no more."""

import os
import subprocess
import sys
from pathlib import Path

from tests.doors.support_table import DOORS, OPS

ROOT = Path(__file__).parent.parent.parent
OF_A_RUN = """
import pytest
from types import SimpleNamespace as Spec

@pytest.mark.parametrize("spec", [Spec(name="cosine_sim"), Spec(name="l1"), Spec(name="linear")])
@pytest.mark.parametrize("named", ["plain", "everything"])
def test_shapes(spec, named):
    if spec.name == "l1":
        assert named == "plain"
    if spec.name == "linear":
        pytest.skip()
"""


def written(folder: Path, device: str) -> str:
    """The table after a run of tests of which some fail and some are skipped."""
    path = folder / "conformance" / "test_meta.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(OF_A_RUN)
    table = folder / "support.md"
    plugin = ["-p", "tests.doors.support_table", "--support-table", str(table)]
    environment = {**os.environ, "ATTN_OPS_TEST_DEVICE": device, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-m", "pytest", *plugin, "-q", str(path), "-c", os.devnull],
        env=environment,
        cwd=folder,
        capture_output=True,
    )
    return table.read_text()


def cells(text: str, door: str) -> dict[str, str]:
    (row,) = (line for line in text.splitlines() if line.startswith(f"| {door} |"))
    return dict(zip(OPS, (cell.strip() for cell in row.split("|")[2:-1])))


def test_check_mark_stands_only_where_all_tests_passed(tmp_path: Path) -> None:
    """And a run on another device keeps what the first has found."""
    text = written(tmp_path, "cpu")
    found = cells(text, "meta device")
    assert found == dict.fromkeys(OPS, "") | {"cosine_sim": "✓", "l1": "✗"}
    for door in DOORS.values():
        if door != "meta device":
            assert set(cells(text, door).values()) == {""}
    assert "3 passed, 1 failed, 2 skipped" in text

    both = written(tmp_path, "meta")
    assert both.count("\n## ") == 2
    assert text.partition("## cpu")[2].strip() in both


def test_every_door_is_a_test_that_exists() -> None:
    for key in DOORS:
        file, _, test = key.partition("::")
        text = (ROOT / "tests" / file).read_text()
        assert f"def {test or 'test_'}" in text, key
