"""Each example runs, and says what it found; the assertions of its claim are its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "compile_examples"

# These have tests of their own.
LONGER = {
    "fsdp_tensor_parallel.py",
    "linear_recurrent_generation.py",
    "set_search.py",
    "symmetric_matching.py",
    "train_gpt.py",
}
# What a reader is to see at the end.
LAST_WORDS = {
    "context_parallel.py": "in 2 processes",
    "distance_scaling.py": "Points are measured, lines the formulas",
    "dynamic_shapes.py": "another program, not causal: compiled 2 times",
    "export_aoti.py": "batch 7, length 300: largest difference",
    "export_state.py": "as read at once, the state too",
    "fsdp2.py": "in 2 processes",
    "fullgraph.py": "gradient of the learned scale",
    "func_transforms.py": "an ensemble of 3 models in one call: (3, 5, 12, 32)",
}


@pytest.mark.parametrize("name", LAST_WORDS)
def test_example_runs(name: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for variable in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(variable, None)  # this process may be one of torchrun's, the example is not
    done = subprocess.run(
        [sys.executable, str(FOLDER / name)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert LAST_WORDS[name] in done.stdout.splitlines()[-1]


def test_every_example_is_run() -> None:
    assert {path.name for path in FOLDER.glob("*.py")} - LONGER == LAST_WORDS.keys()


@pytest.mark.parametrize("name", LAST_WORDS)
def test_example_is_short(name: str) -> None:
    assert len((FOLDER / name).read_text().splitlines()) < 80
