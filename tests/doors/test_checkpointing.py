"""`attn_ops.checkpointing.save_list()`: attention runs once, everything around it twice."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import attn_ops
from attn_ops.checkpointing import save_list
from tests.comparison import assert_same
from tests.conformance.evaluate import scalar
from tests.conformance.spec import OpSpec

LENGTH = 96  # long enough for M * N to be larger than anything else
AROUND = torch.ops.aten.tanh.default  # stands before the op, and is computed again


def titan_policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """The shape of torchtitan's policy: a set of ops, every second matrix product recomputed."""
    saved = {torch.ops.aten.mm.default, *save_list()}
    return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.PREFER_RECOMPUTE


CONTEXTS = {
    "a list": partial(create_selective_checkpoint_contexts, save_list()),
    "a policy": partial(create_selective_checkpoint_contexts, titan_policy),
}


@pytest.fixture(params=CONTEXTS)
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"use_reentrant": False, "context_fn": CONTEXTS[request.param]}


@pytest.fixture(autouse=True)
def worth_keeping(request: pytest.FixtureRequest) -> None:
    """Scores are as large as nobody wants to keep: they are computed again."""
    if "spec" in request.fixturenames and request.getfixturevalue("spec").name == "l1_scores":
        pytest.skip("its result is the scores, which nobody should keep")


def problem(
    spec: OpSpec, device: torch.device
) -> tuple[Callable[..., Tensor], list[Tensor], tuple[str, ...]]:
    case = spec.resized(spec.cases["everything"], LENGTH, LENGTH, 1).but(value_width=4, width=4)
    arguments = spec.build(case.but(bias=None, mask=None), torch.float32, device)
    leaves = {n: x.detach().requires_grad_() for n, x in spec.floating(arguments).items()}

    def total(*tensors: Tensor) -> Tensor:
        inputs = (x.tanh() for x in tensors)
        return scalar(spec.run(**(arguments | dict(zip(leaves, inputs)))))

    return total, list(leaves.values()), tuple(leaves)


class Runs(TorchDispatchMode):
    """How often each op runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Any] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.counts[func] += 1
        return func(*args, **(kwargs or {}))


def test_forward_runs_once_and_the_rest_twice(
    spec: OpSpec, settings: dict[str, Any], device: torch.device
) -> None:
    total, leaves, names = problem(spec, device)
    expected = torch.autograd.grad(total(*leaves), leaves)
    with Runs() as runs:
        actual = torch.autograd.grad(checkpoint(total, *leaves, **settings), leaves)
    assert runs.counts[spec.forward] == 1
    assert runs.counts[spec.backward] == 1
    assert runs.counts[AROUND] == 2 * len(leaves)
    for name, a, e in zip(names, actual, expected):
        assert_same(name, a, e)


def test_what_is_saved_grows_with_the_length_alone(spec: OpSpec, device: torch.device) -> None:
    """The results of the saved op, and autograd's tensors: no M x N scores among them."""
    total, leaves, _ = problem(spec, device)
    sizes: list[int] = []

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op not in save_list():
            return CheckpointPolicy.PREFER_RECOMPUTE
        # Contexts of torch 2.11 do not show the result.
        sizes.extend(x.numel() for x in getattr(ctx, "op_output", ()))
        return CheckpointPolicy.MUST_SAVE

    def note(x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return x

    contexts = partial(create_selective_checkpoint_contexts, policy)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        checkpoint(total, *leaves, use_reentrant=False, context_fn=contexts)
    assert sizes
    assert max(sizes) < LENGTH * LENGTH


def test_compiled_graphs_keep_its_results_and_do_not_run_it_again(
    spec: OpSpec, settings: dict[str, Any], device: torch.device
) -> None:
    total, leaves, names = problem(spec, device)
    expected = torch.autograd.grad(total(*leaves), leaves)
    graphs: list[fx.GraphModule] = []

    def keep(module: fx.GraphModule, inputs: Any) -> fx.GraphModule:
        graphs.append(module)
        return module

    backend = aot_autograd(
        fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition
    )
    compiled = torch.compile(
        lambda *xs: checkpoint(total, *xs, **settings), backend=backend, fullgraph=True
    )
    actual = torch.autograd.grad(compiled(*leaves), leaves)
    for name, a, e in zip(names, actual, expected):
        assert_same(name, a, e)

    forward, backward = ([node.target for node in graph.graph.nodes] for graph in graphs)
    assert forward.count(spec.forward) == 1
    assert spec.forward not in backward
    assert backward.count(spec.backward) == 1
    assert AROUND in forward and AROUND in backward
    (kept,) = graphs[0].graph.find_nodes(op="output")[0].args
    sizes = [node.meta["val"].numel() for node in kept if isinstance(node, fx.Node)]
    assert max(sizes) < LENGTH * LENGTH


def test_without_the_list_it_runs_twice(spec: OpSpec, device: torch.device) -> None:
    """The count itself can fail."""
    total, leaves, _ = problem(spec, device)
    with Runs() as runs:
        torch.autograd.grad(checkpoint(total, *leaves, use_reentrant=False), leaves)
    assert runs.counts[spec.forward] == 2


def test_list_holds_private_forwards() -> None:
    assert attn_ops.checkpointing.save_list is save_list
    names = {str(op) for op in save_list()}
    assert names >= {"attn._cosine_sim_fwd.default", "attn._linear_fwd.default"}
    assert all(name.startswith("attn._") and "_bwd" not in name for name in names)
