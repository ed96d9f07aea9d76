"""Four processes that share a sequence, all four or two by two: every case of three ops.

Results and gradients are compared with those of one process.

python -m tests.doors.context_parallel_worker FOLDER  writes for each process FOLDER/RANK.json, the
names of the checks that it passed, or FOLDER/RANK.failed, the first that it did not. Where two
processes suffice the other two do nothing.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

from attn_ops.distributed.context_parallel import ContextParallel
from attn_ops.nn import MultiheadAttention
from tests.comparison import assert_same
from tests.conformance.evaluate import cotangents, with_gradients
from tests.conformance.spec import OpSpec, all_specs, as_tuple
from tests.doors import processes
from tests.doors.context_parallel_refusals import check_refusals
from tests.strategies import Case

WORLD = 4
LENGTH = 16  # two chunks of two tokens for each of four ranks
PACKED = ((3, 3), (0, 2), (4, 1), (2, 5), (5, 0))  # and tokens after them
OPS = ("cosine_sim", "l1", "linear")
# Nothing in them is spread otherwise than in the plain case.
ALIKE = re.compile("transposed|expanded|odd|wide|narrow|longer|relu|softplus|norms|dtype")


def run(context: ContextParallel, spec: OpSpec, **arguments: Any) -> tuple[Tensor, ...]:
    """The op over the ranks: all results, of this rank's tokens."""
    function = getattr(context, spec.function.__name__)
    return as_tuple(function(**arguments, **({"return_lse": True} if spec.softmax_like else {})))


def dimension_of_tokens(name: str, x: Any) -> int | None:
    """Of what is spread; None for what each rank has in full."""
    if name in ("query", "key", "value", "out"):
        return x.dim() - 2
    if name == "lse" or (name == "mask" and x.dim() == 2):
        return x.dim() - 1
    return x.dim() - 2 if name in ("mask", "bias") and x.shape[-2] > 1 else None


def spread(context: ContextParallel, arguments: dict[str, Any]) -> dict[str, Any]:
    own = dict(arguments)
    for name, x in arguments.items():
        dim = dimension_of_tokens(name, x)
        if dim is not None:
            own[name] = context.shard(x, dim)
    return own


def arguments_of(spec: OpSpec, case: Case, length: int = LENGTH) -> dict[str, Any]:
    """The case with a number of tokens that every layout divides."""
    packed = case.sequences is not None
    case = case.but(queries=length if case.causal or packed else length // 2, keys=length)
    case = case.but(sequences=PACKED) if packed else case
    return spec.build(case, torch.float64, torch.device("cpu"))


def compare(
    spec: OpSpec,
    arguments: dict[str, Any],
    context: ContextParallel,
    op: Callable[..., tuple[Tensor, ...]] | None = None,
) -> None:
    """The results and all gradients are those of one process."""
    grads = dict(zip(spec.results, cotangents(*spec.run(**arguments))))
    expected = with_gradients(spec, spec.run, arguments, *grads.values())
    function = op or partial(run, context, spec)
    own_grads = spread(context, grads).values()
    actual = with_gradients(spec, function, spread(context, arguments), *own_grads)
    for name, result in actual.items():
        dim = dimension_of_tokens(name, expected[name])
        if dim is None:  # a part of the gradient of what each rank has in full
            dist.all_reduce(result, group=context.mesh.get_group())
        else:
            result = context.unshard(result, dim)
        assert_same(name, result, expected[name])


def check_case(spec: OpSpec, case: Case, context: ContextParallel) -> None:
    compare(spec, arguments_of(spec, case), context)


def check_traffic(spec: OpSpec, context: ContextParallel) -> None:
    """One all-gather forward, one reduce-scatter backward, also with a mask of keys."""
    arguments = spread(context, arguments_of(spec, spec.cases["plain"].but(mask="BN", causal=True)))
    leaves = [x.requires_grad_() for x in spec.floating(arguments).values()]
    with CommDebugMode() as forward:
        out, *_ = run(context, spec, **arguments)
    with CommDebugMode() as backward:
        torch.autograd.grad(out, leaves, out)
    gather, scatter = ("all_gather_into_tensor", "reduce_scatter_tensor")
    counts = [{str(op): n for op, n in x.get_comm_counts().items()} for x in (forward, backward)]
    assert counts == [{f"c10d_functional.{gather}": 1}, {f"c10d_functional.{scatter}": 1}], counts


def check_twice(spec: OpSpec, context: ContextParallel) -> None:
    """Gradients of gradients."""
    full = spec.floating(arguments_of(spec, spec.cases["plain"].but(causal=True)))
    own = spread(context, full)
    for arguments in (full, own):
        for x in arguments.values():
            x.requires_grad_()
    second = []
    for function, arguments in ((spec.run, full), (partial(run, context, spec), own)):
        leaves = list(arguments.values())
        out = function(causal=True, **arguments)[0].sin().sum()
        grads = torch.autograd.grad(out, leaves, create_graph=True)
        norm = torch.stack([x.square().sum() for x in grads]).sum()
        second.append(torch.autograd.grad(norm, leaves))
    for name, expected, actual in zip(full, *second):
        assert_same(name, context.unshard(actual, 2), expected)


def check_compiled(spec: OpSpec, context: ContextParallel) -> None:
    """In one graph, one for all lengths."""
    torch.compiler.reset()  # all ops compile the same lines of Python
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        partial(run, context, spec), backend=counter, fullgraph=True, dynamic=True
    )
    case = spec.cases["grouped heads"].but(causal=True)
    compilations = []
    for length in (20, 36):  # of a rank no width of the case
        compare(spec, arguments_of(spec, case, length), context, compiled)
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[1], "compiled again for another length"


def check_exported(spec: OpSpec, context: ContextParallel) -> None:
    """The graph keeps the op; it is the program of this rank."""

    class Model(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return run(context, spec, query=query, key=key, value=value, causal=True)[0]

    case = spec.cases["plain"].but(causal=True)
    inputs = tuple(spread(context, spec.floating(arguments_of(spec, case))).values())
    program = torch.export.export(Model(), inputs)
    assert "torch.ops.attn." in program.graph_module.code
    assert_same("out", program.module()(*inputs), Model()(*inputs))


def check_training(spec: OpSpec, context: ContextParallel) -> None:
    """Gradients averaged over ranks, as data parallelism does it, train as one process would."""
    x = torch.randn(2, LENGTH, 8, generator=torch.Generator().manual_seed(0)).double()
    models = []
    for attention in (spec.function, getattr(context, spec.function.__name__)):
        torch.manual_seed(0)
        scale = 5.0 if spec.name == "cosine_sim" else None
        model = MultiheadAttention(8, 2, 1, attention, learned_scale=scale, dtype=torch.float64)
        tokens, alone = x, attention is spec.function
        if not alone:
            tokens = context.shard(x, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            out = model(tokens, causal=True, **({} if spec.softmax_like else {"normalize": False}))
            (out - tokens).square().mean().backward()
            for p in () if alone else model.parameters():
                assert p.grad is not None
                dist.all_reduce(p.grad, group=context.mesh.get_group())
                p.grad.div_(context.mesh.size())
            optimizer.step()
            optimizer.zero_grad()
        models.append(model.state_dict())
    for name, expected in models[0].items():
        assert_same(name, models[1][name], expected)


Check = tuple[str, Callable[[], None]]
QUESTIONS = (check_traffic, check_twice, check_training)
QUESTIONS_OF_COMPILERS = (check_compiled, check_exported)


def checks(rank: int, grid: DeviceMesh, line: DeviceMesh) -> Iterator[Check]:
    """Every check of this process, named `op, question, layout`."""
    specs = {spec.name: spec for spec in all_specs()}
    layouts = {"4 ranks balanced": ContextParallel(line, load_balance=True)}
    others = {"4 ranks in order": ContextParallel(line)}
    if rank in grid.mesh[0]:
        two = grid["context"]
        layouts["2 ranks in order"] = ContextParallel(two)
        others["2 ranks balanced"] = ContextParallel(two, load_balance=True)
        yield "refusals", partial(check_refusals, grid)
    for op in OPS:
        spec = specs[op]
        for layout, context in layouts.items():
            for name, case in spec.cases.items():
                # Offsets are refused by linear attention, and beside a relative bias.
                refused = case.sequences and (op == "linear" or case.relative_bias)
                if not (refused or ALIKE.search(name)):
                    yield f"{op}, {name}, {layout}", partial(check_case, spec, case, context)
            for question in QUESTIONS:
                name = question.__name__.removeprefix("check_")
                yield f"{op}, {name}, {layout}", partial(question, spec, context)
        for layout, context in others.items():
            case = spec.cases["everything"]
            yield f"{op}, everything, {layout}", partial(check_case, spec, case, context)
        if "2 ranks in order" in layouts:
            for question in QUESTIONS_OF_COMPILERS:
                name, layout = question.__name__.removeprefix("check_"), "2 ranks in order"
                yield f"{op}, {name}, {layout}", partial(question, spec, layouts[layout])


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=WORLD)
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    line = init_device_mesh("cpu", (WORLD,))
    processes.run(checks(rank, grid, line), rank, folder)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    # Forked: what is imported here is imported once.
    arguments = (Path(sys.argv[1]),)
    torch.multiprocessing.start_processes(work, arguments, nprocs=WORLD, start_method="fork")
