"""`torch.func.vmap`: whatever is mapped, wherever the mapped dimension stands, and under `grad`."""

from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from tests.comparison import assert_same
from tests.conformance.evaluate import scalar
from tests.conformance.spec import OpSpec

COPIES = 3


def tensors_and_rest(
    spec: OpSpec, case: str, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    arguments = spec.build(spec.cases[case], torch.float64, device)
    tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
    return tensors, {name: x for name, x in arguments.items() if name not in tensors}


def copies_of(x: Tensor, dim: int) -> Tensor:
    """Different copies of an argument, stacked at `dim`; those of a number in (0, 1] are in it."""
    if x.is_floating_point():
        return torch.stack([x * (1 - i / 4) + i / 8 for i in range(COPIES)], dim)
    if x.dtype == torch.bool:
        return torch.stack([x.roll(i, -1) for i in range(COPIES)], dim)
    return torch.stack([x] * COPIES, dim)


def assert_maps(spec: OpSpec, case: str, device: torch.device, dims: dict[str, int]) -> None:
    """vmap over these arguments at these dimensions equals the formula, one copy at a time."""
    tensors, rest = tensors_and_rest(spec, case, device)
    names = tuple(tensors)
    inputs = tuple(copies_of(x, dims[n]) if n in dims else x for n, x in tensors.items())
    in_dims = tuple(dims.get(name) for name in names)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        return spec.run(**dict(zip(names, values)), **rest)

    actual = vmap(function, in_dims=in_dims)(*inputs)
    singles = [
        spec.formula(
            **{
                name: x if dim is None else x.select(dim, i)
                for name, x, dim in zip(names, inputs, in_dims)
            },
            **rest,
        )
        for i in range(COPIES)
    ]
    for name, a, e in zip(spec.results, actual, zip(*singles)):
        assert_same(name, a, torch.stack(e))


def test_all_arguments_mapped_in_front(spec: OpSpec, named: str, device: torch.device) -> None:
    tensors, _ = tensors_and_rest(spec, named, device)
    assert_maps(spec, named, device, dict.fromkeys(tensors, 0))


def test_only_query_key_and_value_mapped(spec: OpSpec, named: str, device: torch.device) -> None:
    assert_maps(spec, named, device, {"query": 0, "key": 0, "value": 0})


@pytest.mark.parametrize("dim", (0, 1, -1))
def test_one_argument_mapped_alone(spec: OpSpec, dim: int, device: torch.device) -> None:
    tensors, _ = tensors_and_rest(spec, "everything", device)
    for name, x in tensors.items():
        assert_maps(spec, "everything", device, {name: min(dim, x.dim())})


def test_mapped_dimensions_of_different_places(spec: OpSpec, device: torch.device) -> None:
    tensors, _ = tensors_and_rest(spec, "everything", device)
    dims = {name: i % (x.dim() + 1) for i, (name, x) in enumerate(tensors.items())}
    assert_maps(spec, "everything", device, dims)


def test_structures_of_in_dims_and_out_dims(spec: OpSpec, device: torch.device) -> None:
    """A dict and a list of arguments, results mapped at other places, one that is not mapped."""
    tensors, rest = tensors_and_rest(spec, "everything", device)
    dims: dict[str, Any] = {**dict.fromkeys(tensors, -1), "query": 1, "key": None}
    inputs = {n: x if (d := dims[n]) is None else copies_of(x, d) for n, x in tensors.items()}
    names = list(tensors)[2:]

    def function(pair: dict[str, Tensor], others: list[Tensor]) -> tuple[Any, Tensor]:
        return spec.run(**pair, **dict(zip(names, others)), **rest), pair["key"]

    out_dims: Any = tuple(range(-1, len(spec.results) - 1))
    results, key = vmap(
        function,
        in_dims=({n: dims[n] for n in ("query", "key")}, [dims[n] for n in names]),
        out_dims=cast(Any, (out_dims, None)),
    )({n: inputs[n] for n in ("query", "key")}, [inputs[n] for n in names])
    assert torch.equal(key, tensors["key"])
    for i in range(COPIES):
        copy = {n: x if (d := dims[n]) is None else x.select(d, i) for n, x in inputs.items()}
        expected = spec.formula(**copy, **rest)
        for name, a, e, dim in zip(spec.results, results, expected, out_dims):
            assert_same(name, a.select(dim, i).contiguous(), e)


def test_some_copies_at_a_time(spec: OpSpec, device: torch.device) -> None:
    tensors, rest = tensors_and_rest(spec, "everything", device)
    queries = copies_of(tensors["query"], -1)

    def function(query: Tensor) -> Tensor:
        return spec.out(**(tensors | {"query": query}), **rest)

    at_once = vmap(function, in_dims=-1, out_dims=1)(queries)
    assert_same("out", vmap(function, -1, 1, chunk_size=COPIES - 1)(queries), at_once)


def test_nested(spec: OpSpec, device: torch.device) -> None:
    tensors, rest = tensors_and_rest(spec, "everything", device)

    def function(query: Tensor, key: Tensor) -> Tensor:
        return spec.out(**(tensors | {"query": query, "key": key}), **rest)

    queries, keys = copies_of(tensors["query"], 0), copies_of(tensors["key"], 0)
    actual = vmap(vmap(function, in_dims=(None, 0)), in_dims=(0, None))(queries, keys)
    for i in range(COPIES):
        for j in range(COPIES):
            arguments = tensors | {"query": queries[i], "key": keys[j]} | rest
            assert_same(f"{i}, {j}", actual[i, j], spec.formula(**arguments)[0])


def gradients_by_copy(
    spec: OpSpec, case: str, device: torch.device, mapped: tuple[str, ...], transform: str
) -> None:
    """Per-sample gradients of every argument, mapped or shared, against a loop of the formula."""
    tensors, rest = tensors_and_rest(spec, case, device)
    names = tuple(spec.floating(tensors))
    fixed = {name: x for name, x in tensors.items() if name not in names} | rest
    inputs = tuple(copies_of(tensors[n], 0) if n in mapped else tensors[n] for n in names)
    in_dims = tuple(0 if n in mapped else None for n in names)

    def gradients(op: Any, *values: Tensor) -> Any:
        def total(*values: Tensor) -> Tensor:
            return scalar(op(**dict(zip(names, values)), **fixed))

        gradient = grad(total, tuple(range(len(names))))
        if transform == "grad":
            return gradient(*values)
        tangents = tuple(torch.where(x.isinf(), 0, x.cos()) for x in values)
        return jvp(gradient, values, tangents)[1]

    actual = vmap(lambda *xs: gradients(spec.run, *xs), in_dims=in_dims)(*inputs)
    singles = [
        gradients(spec.formula, *(x if d is None else x[i] for x, d in zip(inputs, in_dims)))
        for i in range(COPIES)
    ]
    for name, a, e in zip(names, actual, zip(*singles)):
        assert_same(f"gradient of {name}", a, torch.stack(e))


def test_per_sample_gradients(spec: OpSpec, named: str, device: torch.device) -> None:
    gradients_by_copy(spec, named, device, ("query", "key", "value"), "grad")


def test_gradients_of_mapped_parameters(spec: OpSpec, named: str, device: torch.device) -> None:
    """An ensemble: every copy has parameters of its own."""
    gradients_by_copy(spec, named, device, spec.differentiable, "grad")


def test_hessian_vector_products_by_sample(spec: OpSpec, device: torch.device) -> None:
    gradients_by_copy(spec, "everything", device, ("query",), "jvp of grad")


def test_gradient_of_a_mapped_call(spec: OpSpec, named: str, device: torch.device) -> None:
    """grad over vmap: what the copies share gets the sum of their gradients."""
    tensors, rest = tensors_and_rest(spec, named, device)
    names = tuple(spec.floating(tensors))
    fixed = {name: x for name, x in tensors.items() if name not in names} | rest
    queries = copies_of(tensors["query"], 0)
    shared = tuple(tensors[name] for name in names if name != "query")

    def one(op: Any, query: Tensor, *values: Tensor) -> Tensor:
        return scalar(op(**dict(zip(names, (query, *values))), **fixed))

    def mapped(queries: Tensor, *values: Tensor) -> Tensor:
        in_dims = (0, *(None for _ in values))
        return vmap(lambda *xs: one(spec.run, *xs), in_dims=in_dims)(queries, *values).sum()

    def looped(queries: Tensor, *values: Tensor) -> Tensor:
        return sum((one(spec.formula, query, *values) for query in queries), queries.new_zeros(()))

    places = tuple(range(len(names)))
    actual, expected = (grad(f, places)(queries, *shared) for f in (mapped, looped))
    for name, a, e in zip(names, actual, expected):
        assert_same(f"gradient of {name}", a, e)
