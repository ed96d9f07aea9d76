"""Runs in two processes: every case of every op as DTensors, placed in many ways.

The results and gradients are compared with those of ordinary tensors.

python -m tests.doors.dtensor_worker RANK FOLDER  writes FOLDER/RANK.json, the names of the checks
that passed, or FOLDER/RANK.failed, the first that did not.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.experimental import implicit_replication

import attn_ops
from tests.comparison import assert_same
from tests.conformance.evaluate import cotangents, with_gradients
from tests.conformance.spec import OpSpec, all_specs
from tests.doors import processes
from tests.strategies import Case

WORLD = 2
DEVICE = torch.device("cpu")
RANDOM = 2  # placements drawn for each case
# Nothing in them is placed otherwise than in the plain case.
ALIKE = re.compile("transposed|expanded|odd|wide|narrow|longer|relu|softplus|taylor|norms|dtype")

Place = Callable[[str, Tensor], Placement]


def over_batch(name: str, x: Tensor) -> Placement:
    shared = {"query", "key", "value", "value_reverse", "state", "key_sum"}
    wide = name == "mask" or (name == "bias" and x.dim() == 4)
    return Shard(0) if name in shared or (wide and x.shape[0] > 1) else Replicate()


def over_heads(name: str, x: Tensor) -> Placement:
    if name in ("relative_bias", "sink", "head_scale", "decay") or (
        name in ("query_gain", "key_gain") and x.dim() == 2
    ):
        dim = 0
    elif x.dim() > 2:
        dim = 0 if name == "bias" and x.dim() == 3 else 1
    else:
        return Replicate()
    return Shard(dim) if x.shape[dim] % WORLD == 0 else Replicate()


def over_sequence(name: str, x: Tensor) -> Placement:
    return Shard(2) if name in ("query", "key", "value") and x.dim() == 4 else Replicate()


def drawn(seed: int) -> Place:
    generator = random.Random(seed)

    def place(name: str, x: Tensor) -> Placement:
        dim = generator.randint(-1, x.dim() - 1)
        # PyTorch does not expand a dimension of one element that it was made to shard.
        return Replicate() if dim < 0 or x.shape[dim] == 1 else Shard(dim)

    return place


PLACEMENTS: dict[str, Place] = {
    "batch": over_batch,
    "heads": over_heads,
    "sequence": over_sequence,
    **{f"drawn {seed}": drawn(seed) for seed in range(RANDOM)},
}


def distributed(arguments: dict[str, Any], mesh: DeviceMesh, place: Place) -> dict[str, Any]:
    return {
        name: distribute_tensor(x, mesh, [place(name, x)])
        if isinstance(x, Tensor) and not name.startswith("cu_seqlens")
        else x
        for name, x in arguments.items()
    }


def compare(
    spec: OpSpec,
    arguments: dict[str, Any],
    mesh: DeviceMesh,
    placement: str,
    op: Callable[..., tuple[Tensor, ...]] | None = None,
) -> None:
    """The results and all gradients are those of ordinary tensors."""
    grads = cotangents(*spec.run(**arguments))
    expected = with_gradients(spec, spec.run, arguments, *grads)
    sharded = distributed(arguments, mesh, PLACEMENTS[placement])
    replicated = [distribute_tensor(x, mesh, [Replicate()]) for x in grads]
    # Offsets of packed sequences and the masks made of them are ordinary tensors.
    with implicit_replication():
        actual = with_gradients(spec, op or spec.run, sharded, *replicated)
    for name, result in actual.items():
        assert isinstance(result, DTensor), f"{name} is {type(result)}"
        assert_same(name, result.full_tensor(), expected[name])


def check(spec: OpSpec, case: Case, mesh: DeviceMesh, placement: str) -> None:
    compare(spec, spec.build(case, torch.float64, DEVICE), mesh, placement)


def check_stays(spec: OpSpec, mesh: DeviceMesh, placement: str) -> None:
    """What is sharded alike is computed in place: nothing moves, and results stay sharded."""
    case = spec.cases["grouped heads"].but(batch=2, heads=4, kv_heads=2)
    arguments = distributed(spec.build(case, torch.float64, DEVICE), mesh, PLACEMENTS[placement])
    leaves = [x.requires_grad_() for n, x in spec.floating(arguments).items() if x.dim() == 4]
    with CommDebugMode() as traffic:
        out = spec.out(**arguments)
        torch.autograd.grad(out, leaves, out)
    assert traffic.get_total_counts() == 0, traffic.get_comm_counts()
    dim = {"batch": 0, "heads": 1}[placement]
    assert isinstance(out, DTensor)
    assert out.placements == (Shard(dim),)
    assert out.to_local().shape[dim] * WORLD == out.shape[dim]


def check_cache(spec: OpSpec, mesh: DeviceMesh) -> None:
    """DTensor reuses no answer to a call that differs in bools, in floats or in what is None."""
    case = spec.cases["plain"].but(batch=2, heads=2, kv_heads=2, keys=6, queries=6)
    plain = spec.build(case, torch.float64, DEVICE)
    everything = spec.build(spec.cases["everything"], torch.float64, DEVICE)
    flags = [x.name for x in spec.ops[0].default._schema.arguments if str(x.type) == "bool"]
    calls = [(plain | {flag: on}, spec.differentiable) for flag in flags for on in (True, False)]
    # Tensors of the same shape in one place or in another.
    gain = torch.linspace(0.5, 2, 2 * case.width, dtype=torch.float64).view(2, -1)
    gains = [n for n in ("query_gain", "key_gain") if n in spec.differentiable]
    calls += [(plain | {name: gain}, spec.differentiable) for name in gains]
    # The same tensors, but other gradients wanted.
    calls += [(everything, (name,)) for name in spec.differentiable]
    for arguments, wanted in calls:
        one = replace(spec, differentiable=wanted)
        for placement in ("batch", "heads"):
            compare(one, arguments, mesh, placement)


def check_compiled(spec: OpSpec, mesh: DeviceMesh, placement: str) -> None:
    arguments = spec.build(spec.cases["everything"], torch.float64, DEVICE)
    torch.compiler.reset()  # all ops compile the same lines of Python
    compiled = torch.compile(spec.run, backend="aot_eager", fullgraph=True)
    compare(spec, arguments, mesh, placement, compiled)


def check_step(mesh: DeviceMesh) -> None:
    """The shards of a state are updated in place, or the call is refused."""
    torch.manual_seed(0)
    query, key, value = (torch.rand(2, 4, 1, 6, dtype=torch.float64) for _ in range(3))
    state, key_sum = torch.rand(2, 4, 6, 6).double(), torch.rand(2, 4, 6).double()
    for dim in (0, 1):
        places = [Shard(dim)]
        shards = [distribute_tensor(x, mesh, places) for x in (state, key_sum)]
        inputs = [distribute_tensor(x, mesh, [Replicate()]) for x in (query, key, value)]
        alone = [state.clone(), key_sum.clone()]
        expected = attn_ops.linear_attention_step(query, key, value, *alone)
        actual = attn_ops.linear_attention_step(*inputs, *shards)
        for name, a, e in zip(("out", "state", "key_sum"), (actual, *shards), (expected, *alone)):
            assert isinstance(a, DTensor)
            assert a.placements == (Shard(dim),), f"{name}: {a.placements}"
            assert_same(name, a.full_tensor(), e)
    moved = [distribute_tensor(x, mesh, [Shard(2)]) for x in (state, key_sum)]
    try:
        attn_ops.linear_attention_step(*inputs, *moved)
    except RuntimeError as error:
        assert "what is updated in place must be sharded alike" in str(error), error
    else:
        raise AssertionError("a state that cannot be updated in place was accepted")


Check = tuple[str, Callable[[], None]]


def checks(mesh: DeviceMesh) -> Iterator[Check]:
    """Every check, named `op, question, placement`."""
    for spec in all_specs():
        for name, case in spec.cases.items():
            for placement in () if ALIKE.search(name) else PLACEMENTS:
                yield (
                    f"{spec.name}, {name}, {placement}",
                    partial(check, spec, case, mesh, placement),
                )
        for placement in ("batch", "heads"):
            for question, function in (("stays", check_stays), ("compiled", check_compiled)):
                yield (
                    f"{spec.name}, {question}, {placement}",
                    partial(function, spec, mesh, placement),
                )
        yield f"{spec.name}, cache, both", partial(check_cache, spec, mesh)
    yield "linear_step, plain, both", partial(check_step, mesh)


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    processes.run(checks(mesh), rank, folder)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
