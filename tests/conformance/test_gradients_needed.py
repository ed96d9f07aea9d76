"""Only the gradients that somebody needs are computed, and only the inputs are kept for them."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.comparison import assert_same
from tests.conformance.capture import Calls
from tests.conformance.evaluate import cotangents, with_gradients
from tests.conformance.spec import OpSpec


def gradients_of(
    spec: OpSpec, arguments: dict[str, Any], names: tuple[str, ...]
) -> tuple[list[bool], dict[str, Tensor], tuple[Tensor, ...]]:
    """The backward's output_mask, the gradients of `names` and the backward's raw results."""
    leaves = {name: arguments[name].detach().requires_grad_() for name in names}
    out, lse = spec.with_lse(**(arguments | leaves))
    grads = [g.to(y.dtype) for y, g in zip((out, lse), cotangents(out, lse))]
    with Calls() as calls:
        results = torch.autograd.grad((out, lse), list(leaves.values()), grads)
    args = calls.of(spec.backward)
    return args[-1], dict(zip(names, results)), spec.backward(*args)


def test_each_gradient_alone_is_the_only_one_computed(spec: OpSpec, device: torch.device) -> None:
    arguments = spec.build(spec.cases["everything"], torch.float32, device)
    names = tuple(spec.floating(arguments))
    assert names == spec.differentiable
    _, everything, _ = gradients_of(spec, arguments, names)
    for i, name in enumerate(names):
        output_mask, grads, raw = gradients_of(spec, arguments, (name,))
        assert output_mask == [place == i for place in range(len(names))]
        assert [x.numel() > 0 for x in raw] == output_mask
        assert all(x.shape == (0,) for x, needed in zip(raw, output_mask) if not needed)
        assert_same(name, grads[name], everything[name])


def test_every_pair_of_gradients(spec: OpSpec, device: torch.device) -> None:
    """What one gradient shares with another is there whoever else is needed."""
    arguments = spec.build(spec.cases["everything"], torch.float32, device)
    _, everything, _ = gradients_of(spec, arguments, spec.differentiable)
    for pair in itertools.combinations(spec.differentiable, 2):
        for name, grad in gradients_of(spec, arguments, pair)[1].items():
            assert_same(f"{name} of {pair}", grad, everything[name])


def test_nothing_is_saved_where_nothing_requires_grad(spec: OpSpec, device: torch.device) -> None:
    arguments = spec.build(spec.cases["everything"], torch.float32, device)
    out, lse = spec.with_lse(**arguments)
    assert not out.requires_grad and not lse.requires_grad
    required = arguments | {"query": arguments["query"].requires_grad_()}
    with torch.no_grad():
        assert not spec.op(**required).requires_grad
    with torch.inference_mode():
        assert spec.op(**required).is_inference()


@contextmanager
def collected() -> Iterator[list[Tensor]]:
    """The tensors that autograd saves meanwhile."""
    saved: list[Tensor] = []

    def save(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        yield saved


@pytest.mark.parametrize("case", ("plain", "causal", "sink", "relative bias", "packed"))
def test_nothing_of_the_size_of_the_scores_is_saved(
    spec: OpSpec, case: str, device: torch.device
) -> None:
    length = 64
    sizes = {"batch": 1, "heads": 1, "kv_heads": 1, "queries": length, "keys": length}
    sequences = ((40, 30), (24, 34)) if case == "packed" else None
    arguments = spec.build(
        spec.cases[case].but(sequences=sequences, width=8, value_width=8, **sizes),
        torch.float32,
        device,
    )
    with collected() as saved:
        with_gradients(spec, spec.with_lse, arguments, *cotangents(*spec.formula(**arguments)))
    assert saved
    assert max(x.untyped_storage().nbytes() for x in saved) < 4 * length * length


def test_saved_tensors_are_the_inputs_and_the_results(spec: OpSpec, device: torch.device) -> None:
    """No copy of query, key, value or bias is kept."""
    arguments = spec.build(
        spec.cases["everything"].but(strides="transposed"), torch.float32, device
    )
    leaves = {name: x.requires_grad_() for name, x in spec.floating(arguments).items()}
    with collected() as saved:
        out, lse = spec.with_lse(**arguments)
    known = {x.data_ptr() for x in (*arguments.values(), out, lse) if isinstance(x, Tensor)}
    assert {x.data_ptr() for x in saved} <= known
    assert {x.data_ptr() for x in leaves.values()} <= {x.data_ptr() for x in saved}
