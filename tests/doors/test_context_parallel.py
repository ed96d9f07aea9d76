"""Context parallel: results and gradients over a sequence that processes share, those of one.

The checks run in four gloo processes, once for all tests: see context_parallel_worker.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.doors import processes

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed")

LAYOUTS = ("2 ranks in order", "2 ranks balanced", "4 ranks in order", "4 ranks balanced")
# The layouts that every case was asked in; the others were asked the case with all arguments.
ASKED_EVERYTHING = ("2 ranks in order", "4 ranks balanced")
OPS = [pytest.param(op, marks=pytest.mark.ops(op), id=op) for op in ("cosine_sim", "l1", "linear")]
SOFTMAX_LIKE = OPS[:2]


@pytest.fixture(scope="session")
def passed(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names of the checks that all processes passed that took part in them."""
    folder = tmp_path_factory.mktemp("context_parallel")
    worker = [sys.executable, "-W", "ignore", "-m", "tests.doors.context_parallel_worker"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*worker, str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    processes.assert_none_failed(folder)
    assert done.returncode == 0, done.stderr
    names = processes.passed(folder, 4)
    assert names[0] == names[1] and names[2] == names[3] and names[2] < names[0]
    return names[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_results_and_all_gradients_are_those_of_one_process(
    op: str, layout: str, passed: set[str]
) -> None:
    cases = {"everything"}
    if layout in ASKED_EVERYTHING:
        cases |= {"plain", "grouped heads", "one key head of rank 3", "merged batch and heads"}
        cases |= {"causal"}
    assert {f"{op}, {case}, {layout}" for case in cases} <= passed


@pytest.mark.parametrize("layout", ASKED_EVERYTHING)
@pytest.mark.parametrize("op", SOFTMAX_LIKE)
def test_masks_biases_windows_and_packed_sequences(op: str, layout: str, passed: set[str]) -> None:
    cases = {"key mask and broadcast bias", "mask of rank 4 and causal", "bias of every row"}
    cases |= {"relative bias", "window", "packed", "packed, causal, window", "sink"}
    assert {f"{op}, {case}, {layout}" for case in cases} <= passed


@pytest.mark.ops("linear")
@pytest.mark.parametrize("layout", ASKED_EVERYTHING)
def test_states_decay_and_feature_maps(layout: str, passed: set[str]) -> None:
    assert {f"linear, {case}, {layout}" for case in ("key mask", "decay", "taylor")} <= passed


@pytest.mark.parametrize("layout", ASKED_EVERYTHING)
@pytest.mark.parametrize("op", OPS)
def test_one_collective_each_way(op: str, layout: str, passed: set[str]) -> None:
    assert f"{op}, traffic, {layout}" in passed


@pytest.mark.parametrize("layout", ASKED_EVERYTHING)
@pytest.mark.parametrize("op", OPS)
def test_gradients_of_gradients(op: str, layout: str, passed: set[str]) -> None:
    assert f"{op}, twice, {layout}" in passed


@pytest.mark.parametrize("layout", ASKED_EVERYTHING)
@pytest.mark.parametrize("op", OPS)
def test_steps_of_training_are_those_of_one_process(op: str, layout: str, passed: set[str]) -> None:
    assert f"{op}, training, {layout}" in passed


@pytest.mark.parametrize("op", OPS)
def test_compiled_in_one_graph_for_all_lengths(op: str, passed: set[str]) -> None:
    assert f"{op}, compiled, 2 ranks in order" in passed


@pytest.mark.parametrize("op", OPS)
def test_exported_program_keeps_the_op(op: str, passed: set[str]) -> None:
    assert f"{op}, exported, 2 ranks in order" in passed


def test_what_cannot_hold_is_refused_in_words(passed: set[str]) -> None:
    assert "refusals" in passed
