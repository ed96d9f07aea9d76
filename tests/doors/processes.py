"""Checks that several processes run together, each test asking for the names of some.

A process runs them all once and leaves in a folder which passed, or why one failed.
"""

import json
import os
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

Checks = Iterable[tuple[str, Callable[[], None]]]


def run(checks: Checks, rank: int, folder: Path) -> None:
    """In a process: runs the checks, and ends it at the first that fails."""
    done = []
    for name, one in checks:
        try:
            one()
        except Exception:
            # Other processes may wait for this one: all end here.
            (folder / f"{rank}.failed").write_text(f"{name}\n{traceback.format_exc()}")
            os._exit(1)
        done.append(name)
    (folder / f"{rank}.json").write_text(json.dumps(done))


def assert_none_failed(folder: Path) -> None:
    failed = [file.read_text() for file in sorted(folder.glob("*.failed"))]
    assert not failed, "\n".join(failed)


def passed(folder: Path, world: int) -> list[set[str]]:
    """The names of the checks that passed, by rank."""
    return [set(json.loads((folder / f"{rank}.json").read_text())) for rank in range(world)]
