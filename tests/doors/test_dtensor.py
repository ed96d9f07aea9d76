"""DTensor: every op sharded over batch and heads, or redistributed, never wrong.

The checks run in two gloo processes, once for all tests: see dtensor_worker.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.conformance.spec import OpSpec, all_specs
from tests.doors import processes

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed")

PLACEMENTS = ("batch", "heads", "sequence", "drawn 0", "drawn 1")


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def passed(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names of the checks that passed in both processes."""
    folder = tmp_path_factory.mktemp("dtensor")
    worker = [sys.executable, "-W", "ignore", "-m", "tests.doors.dtensor_worker"]
    workers = [
        subprocess.Popen([*worker, str(rank), str(folder)], cwd=ROOT, env=environment())
        for rank in range(2)
    ]
    try:
        for process in workers:
            process.wait(timeout=300)
    finally:
        for process in workers:
            process.kill()
    processes.assert_none_failed(folder)
    both = processes.passed(folder, 2)
    assert both[0] == both[1]
    return both[0]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_results_and_gradients_are_those_of_one_process(
    spec: OpSpec, placement: str, passed: set[str]
) -> None:
    """In every named case, grouped heads, masks and parameters included."""
    assert {f"{spec.name}, plain, {placement}", f"{spec.name}, everything, {placement}"} <= passed


@pytest.mark.parametrize("placement", ("batch", "heads"))
def test_what_is_sharded_alike_is_not_moved(spec: OpSpec, placement: str, passed: set[str]) -> None:
    assert f"{spec.name}, stays, {placement}" in passed


@pytest.mark.parametrize("placement", ("batch", "heads"))
def test_compiled_with_sharded_arguments(spec: OpSpec, placement: str, passed: set[str]) -> None:
    assert f"{spec.name}, compiled, {placement}" in passed


def test_no_answer_is_reused_for_another_call(spec: OpSpec, passed: set[str]) -> None:
    """The key of DTensor's cache holds bools, floats and which tensors are None."""
    assert f"{spec.name}, cache, both" in passed


@pytest.mark.ops("linear_step")
def test_step_updates_the_shards_of_its_state(passed: set[str]) -> None:
    assert "linear_step, plain, both" in passed


def test_every_named_case_was_checked(passed: set[str]) -> None:
    asked = {name.split(", ")[0] for name in passed}
    assert {spec.name for spec in all_specs()} <= asked


# A process group of eight that moves no data: enough to see where results are placed.
MESH_OF_EIGHT = """
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
import attn_ops
dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
mesh = init_device_mesh("cpu", (2, 4))

def place(kv_heads):
    query, key = torch.rand(4, 8, 6, 5), torch.rand(4, kv_heads, 6, 5)
    over = [Shard(0), Shard(1) if kv_heads % 4 == 0 else Replicate()]
    query = distribute_tensor(query, mesh, [Shard(0), Shard(1)]).requires_grad_()
    key = distribute_tensor(key, mesh, over).requires_grad_()
    out = attn_ops.cosine_sim_attention(query, key, key, causal=True)
    out.backward(out.detach())
    print(kv_heads, *out.placements, "|", *key.grad.placements, "|", *out.to_local().shape[:2])

for kv_heads in (8, 4, 2, 1):
    place(kv_heads)
dist.destroy_process_group()
"""


def test_two_dimensions_of_a_mesh_shard_batch_and_heads() -> None:
    """Groups of heads stay whole: two key heads cannot be shared by four."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MESH_OF_EIGHT],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "8 S(0) S(1) | S(0) S(1) | 2 2",
        "4 S(0) S(1) | S(0) S(1) | 2 2",
        "2 S(0) R | S(0) R | 2 8",
        "1 S(0) S(1) | S(0) P(sum) | 2 2",
    ]


def test_dtensor_is_not_imported_before_somebody_needs_it() -> None:
    program = (
        "import sys, attn_ops\n"
        "assert 'torch.distributed.tensor' not in sys.modules\n"
        "assert 'attn_ops.distributed' not in sys.modules\n"
        "import torch\n"
        "from torch.distributed.tensor import DTensor\n"
        "known = DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs\n"
        "assert torch.ops.attn._cosine_sim_fwd.default in known\n"
        "from attn_ops import _late\n"
        "assert not _late.errors, _late.errors\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=environment())
