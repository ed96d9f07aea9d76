"""The example in two processes: over heads, and over the parameters with half a batch each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed")


@pytest.mark.parametrize(
    ("attention", "tensor"),
    [
        pytest.param(
            attention, tensor, marks=pytest.mark.ops(attention), id=f"{attention}-{tensor}"
        )
        for attention, tensor in (("cosine_sim", 2), ("l1", 2), ("linear", 1))
    ],
)
def test_losses_are_those_of_one_process(attention: str, tensor: int) -> None:
    example = ROOT / "compile_examples" / "fsdp_tensor_parallel.py"
    options = ["--attention", attention, "--tensor", str(tensor), "--backend", "aot_eager"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for variable in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(variable, None)  # this process may be one of torchrun's, the example is not
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(example), *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # Each process has about half of what is spread: of a block's matrices, or of everything.
    assert done.stdout.count("parameters are here") == 2
    assert done.stdout.count("in 2 processes") == 20
