"""Only the gradients that somebody needs are computed, and only the inputs are kept for them."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tests.comparison import assert_same
from tests.conformance.capture import Calls
from tests.conformance.evaluate import cotangents, with_gradients
from tests.conformance.spec import OpSpec, as_tuple, only


def gradients_of(
    spec: OpSpec, arguments: dict[str, Any], names: tuple[str, ...]
) -> tuple[list[str], dict[str, Tensor]]:
    """The arguments whose gradients were computed, and the gradients of `names`."""
    leaves = {name: arguments[name].detach().requires_grad_() for name in names}
    outputs = [y for y in spec.run(**(arguments | leaves)) if y.requires_grad]
    grads = [g.to(y.dtype) for y, g in zip(outputs, cotangents(*outputs))]
    with Calls() as calls:
        results = torch.autograd.grad(outputs, list(leaves.values()), grads)
    computed = []
    for op, args, raw in calls.calls:
        if op is spec.backward:
            for name, needed, x in zip(spec.gradients_of_backward, args[-1], raw):
                assert needed == (x.shape != (0,)), f"{name}: {x.shape}, needed: {needed}"
                computed += [name] if needed else []
        else:
            computed += [n for n, own in spec.own_backward.items() if own in str(op)]
    return computed, dict(zip(names, results))


def test_each_gradient_alone_is_the_only_one_computed(spec: OpSpec, device: torch.device) -> None:
    arguments = spec.build(spec.cases["everything"], torch.float32, device)
    names = tuple(spec.floating(arguments))
    assert names == spec.differentiable
    computed, everything = gradients_of(spec, arguments, names)
    assert sorted(computed) == sorted(names)
    for name in names:
        computed, grads = gradients_of(spec, arguments, (name,))
        assert computed == [name]
        assert_same(name, grads[name], everything[name])


def test_every_pair_of_gradients(spec: OpSpec, device: torch.device) -> None:
    """What one gradient shares with another is there whoever else is needed."""
    arguments = spec.build(spec.cases["everything"], torch.float32, device)
    _, everything = gradients_of(spec, arguments, spec.differentiable)
    for pair in itertools.combinations(spec.differentiable, 2):
        for name, grad in gradients_of(spec, arguments, pair)[1].items():
            assert_same(f"{name} of {pair}", grad, everything[name])


def test_nothing_is_saved_where_nothing_requires_grad(spec: OpSpec, device: torch.device) -> None:
    arguments = spec.build(spec.cases["everything"], torch.float32, device)
    assert not any(x.requires_grad for x in spec.run(**arguments))
    required = arguments | {"query": arguments["query"].requires_grad_()}
    with torch.no_grad():
        assert not any(x.requires_grad for x in spec.run(**required))
    with torch.inference_mode():
        assert all(x.is_inference() for x in spec.run(**required))


@contextmanager
def collected() -> Iterator[list[Tensor]]:
    """The tensors that autograd saves meanwhile."""
    saved: list[Tensor] = []

    def save(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        yield saved


@only("plain", "causal", "sink", "relative bias", "packed", "a state")
def test_nothing_of_the_size_of_the_scores_is_saved(
    spec: OpSpec, named: str, device: torch.device
) -> None:
    length = 64
    case = spec.resized(spec.cases[named], length, length, 1)
    case = case.but(heads=1, kv_heads=1, width=8, value_width=8)
    arguments = spec.build(case, torch.float32, device)
    with collected() as saved:
        with_gradients(spec, spec.run, arguments, *cotangents(*spec.formula(**arguments)))
    assert saved
    assert max(x.untyped_storage().nbytes() for x in saved) < 4 * length * length


def test_saved_tensors_are_the_inputs_and_the_results(spec: OpSpec, device: torch.device) -> None:
    """No copy of query, key, value or bias is kept."""
    arguments = spec.build(
        spec.cases["everything"].but(strides="transposed"), torch.float32, device
    )
    leaves = {name: x.requires_grad_() for name, x in spec.floating(arguments).items()}
    with collected() as saved, Calls() as calls:
        spec.run(**arguments)
    results = [x for call in calls.calls for x in as_tuple(call.results)]
    known = {x.data_ptr() for x in (*arguments.values(), *results) if isinstance(x, Tensor)}
    assert {x.data_ptr() for x in saved} <= known
    assert {x.data_ptr() for x in leaves.values()} <= {x.data_ptr() for x in saved}
