"""Autograd's own tools around the ops: anomaly mode, hooks, offloading, modules."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

import attn_ops
from attn_ops.nn import MultiheadAttention
from tests.comparison import assert_same
from tests.conformance.evaluate import scalar
from tests.conformance.spec import OpSpec


def problem(
    spec: OpSpec, device: torch.device
) -> tuple[Callable[..., Tensor], list[Tensor], tuple[Tensor, ...]]:
    """A scalar of the op, what it depends on, and its gradients without anything around."""
    arguments = spec.build(spec.cases["everything"], torch.float32, device)
    leaves = {n: x.detach().requires_grad_() for n, x in spec.floating(arguments).items()}

    def total(*tensors: Tensor) -> Tensor:
        return scalar(spec.run(**(arguments | dict(zip(leaves, tensors)))))

    values = list(leaves.values())
    return total, values, torch.autograd.grad(total(*values), values)


def assert_all_same(spec: OpSpec, actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for name, a, e in zip(spec.differentiable, actual, expected, strict=True):
        assert_same(name, a, e)


def test_anomaly_mode_finds_nothing_wrong(spec: OpSpec, device: torch.device) -> None:
    total, leaves, expected = problem(spec, device)
    with torch.autograd.detect_anomaly(check_nan=True):
        actual = torch.autograd.grad(total(*leaves), leaves)
    assert_all_same(spec, actual, expected)


def test_anomaly_mode_names_the_op_whose_gradient_is_nan(
    spec: OpSpec, device: torch.device
) -> None:
    arguments = spec.build(spec.cases["plain"], torch.float32, device)
    query = arguments["query"].detach().requires_grad_()
    op = spec.forward._opname.strip("_")
    with torch.autograd.detect_anomaly(check_nan=True):
        out = spec.out(**(arguments | {"query": query}))
        with pytest.raises(RuntimeError, match=f"{op}Backward.* returned nan"):
            out.backward(torch.full_like(out, torch.nan))


def test_hooks_of_tensors_see_and_change_gradients(spec: OpSpec, device: torch.device) -> None:
    total, leaves, expected = problem(spec, device)
    seen: list[Tensor] = []
    handle = leaves[0].register_hook(lambda g: seen.append(g) or g * 2)  # type: ignore[func-returns-value]
    actual = torch.autograd.grad(total(*leaves), leaves)
    handle.remove()
    assert len(seen) == 1
    assert_same("seen", seen[0], expected[0])
    assert_same("changed", actual[0], expected[0] * 2)
    assert_all_same(spec, torch.autograd.grad(total(*leaves), leaves), expected)


def test_hooks_after_accumulation(spec: OpSpec, device: torch.device) -> None:
    """As optimizers in the backward pass use them; gradients add up over two passes."""
    total, leaves, expected = problem(spec, device)
    calls: list[int] = []
    for i, leaf in enumerate(leaves):
        leaf.register_post_accumulate_grad_hook(lambda _, i=i: calls.append(i))
    for _ in range(2):
        total(*leaves).backward()
    assert sorted(calls) == sorted([*range(len(leaves))] * 2)
    for leaf, e in zip(leaves, expected):
        assert leaf.grad is not None
        assert_same("accumulated", leaf.grad, 2 * e)


def test_hooks_of_nodes_change_what_goes_in_and_out(spec: OpSpec, device: torch.device) -> None:
    """Before and after the backward of the op itself, which is linear in what goes in."""
    arguments = spec.build(spec.cases["plain"], torch.float32, device)
    query = arguments["query"] = arguments["query"].detach().requires_grad_()
    out = spec.out(**arguments)
    grad = torch.randn_like(out)
    (expected,) = torch.autograd.grad(out, query, grad, retain_graph=True)
    node: Any = out.grad_fn
    assert spec.forward._opname.strip("_") in node.name()
    seen: list[tuple[Any, Any]] = []
    before = node.register_prehook(lambda grads: (2 * grads[0], *grads[1:]))
    after = node.register_hook(lambda grads, of_results: seen.append((grads, of_results)))
    (doubled,) = torch.autograd.grad(out, query, grad, retain_graph=True)
    before.remove()
    after.remove()
    assert_same("doubled", doubled, 2 * expected)
    ((grads, of_results),) = seen
    assert_same("what came in", of_results[0], 2 * grad)
    assert any(g is not None and torch.equal(g, doubled) for g in grads)
    assert_same("without hooks", torch.autograd.grad(out, query, grad)[0], expected)


def test_hooks_of_saved_tensors_unpack_what_was_packed(spec: OpSpec, device: torch.device) -> None:
    total, leaves, expected = problem(spec, device)
    packed: list[Tensor] = []

    def pack(x: Tensor) -> int:
        packed.append(x.clone())
        return len(packed) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: packed[i]):
        loss = total(*leaves)
    assert packed
    assert_all_same(spec, torch.autograd.grad(loss, leaves), expected)


def test_save_on_cpu(spec: OpSpec, device: torch.device) -> None:
    total, leaves, expected = problem(spec, device)
    with torch.autograd.graph.save_on_cpu(pin_memory=device.type == "cuda"):
        loss = total(*leaves)
    assert_all_same(spec, torch.autograd.grad(loss, leaves), expected)


ATTENTIONS = {
    "cosine_sim": attn_ops.cosine_sim_attention,
    "l1": attn_ops.l1_attention,
    "linear": partial(attn_ops.linear_attention, feature_map="elu_plus_one"),
}


@pytest.mark.parametrize(
    "attention", [pytest.param(f, marks=pytest.mark.ops(op), id=op) for op, f in ATTENTIONS.items()]
)
def test_modules_have_gradients_per_sample(
    attention: Callable[..., Tensor], device: torch.device
) -> None:
    """vmap over grad over functional_call, as private training and influence functions do."""
    module = MultiheadAttention(8, heads=2, attention=attention, dtype=torch.float64, device=device)
    x = torch.randn(3, 5, 8, dtype=torch.float64, device=device)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(module, parameters, (sample[None],), {"causal": True}).sin().sum()

    actual = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(len(x)):
        module.zero_grad()
        module(x[i : i + 1], causal=True).sin().sum().backward()
        for name, p in module.named_parameters():
            assert p.grad is not None
            assert_same(f"{name} of sample {i}", actual[name][i], p.grad)
