"""`linear_step`: in place, whatever the strides, under the compiler and in exported programs."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap

import attn_ops
from tests.comparison import assert_same

step = torch.ops.attn.linear_step
DTYPES = (torch.float32, torch.bfloat16)
OPTIONS: dict[str, Any] = {"eps": 0.125, "feature_map": "elu_plus_one"}


def inputs(dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
    """query, key and value of one token, two query heads per key head."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((2, 4, 1, 8), (2, 2, 1, 8), (2, 2, 1, 5))
    return tuple(torch.randn(s, generator=generator).to(device, dtype) for s in sizes)


def states(device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    sizes = ((2, 4, 8, 5), (2, 4, 8))
    state, key_sum = (torch.rand(s, generator=generator).to(device) for s in sizes)
    return state, key_sum


def decay(device: torch.device) -> Tensor:
    return torch.tensor([1.0, 0.75, 0.5, 0.125], device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_states_that_are_views_are_updated_where_they_are(
    dtype: torch.dtype, device: torch.device
) -> None:
    """A transposed state, every other number of a larger tensor, one layer's slice of a cache."""
    expected_state, expected_key_sum = states(device)
    q, k, v = inputs(dtype, device)
    options = OPTIONS | {"decay": decay(device)}
    expected = step(q, k, v, expected_state, expected_key_sum, **options)
    assert not torch.equal(expected_state, states(device)[0])

    def views() -> dict[str, tuple[Tensor, Tensor]]:
        state, key_sum = states(device)
        cache, sums = torch.full((3, 2, 4, 8, 5), 7.0), torch.full((2, 4, 16), 7.0)
        cache, sums = cache.to(device), sums.to(device)
        cache[1], sums[..., ::2] = state, key_sum
        transposed = state.mT.contiguous().mT, key_sum.mT.contiguous().mT
        return {"transposed": transposed, "parts of others": (cache[1], sums[..., ::2])}

    for name, (state, key_sum) in views().items():
        assert name == "transposed" or not key_sum.is_contiguous()
        outside = {x.data_ptr(): x._base for x in (state, key_sum)}
        assert_same(f"{name}: out", step(q, k, v, state, key_sum, **options), expected)
        assert_same(f"{name}: state", state.contiguous(), expected_state)
        assert_same(f"{name}: key_sum", key_sum.contiguous(), expected_key_sum)
        if name == "parts of others":
            cache, sums = outside.values()
            assert cache is not None and sums is not None
            assert (cache[::2] == 7).all() and (sums[..., 1::2] == 7).all()


def test_nothing_else_is_written(device: torch.device) -> None:
    tensors = (*inputs(torch.float32, device), *states(device), decay(device))
    copies = tuple(x.clone() for x in tensors)
    out = step(*tensors[:5], decay=tensors[5], **OPTIONS)
    changed = [not torch.equal(x, y) for x, y in zip(tensors, copies)]
    assert changed == [False, False, False, True, True, False]
    storages = {x.untyped_storage().data_ptr() for x in tensors}
    assert out.untyped_storage().data_ptr() not in storages


def test_it_has_no_gradient_and_autograd_knows_that_the_state_has_changed(
    device: torch.device,
) -> None:
    tensors = [x.requires_grad_() for x in inputs(torch.float32, device)]
    state, key_sum = states(device)
    weight = torch.ones_like(state, requires_grad=True)
    product = weight * state
    assert not step(*tensors, state, key_sum, **OPTIONS).requires_grad
    assert not state.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strides", ("contiguous", "transposed"))
@pytest.mark.parametrize("with_decay", (False, True), ids=("no decay", "decay"))
def test_passes_opcheck(
    with_decay: bool, strides: str, dtype: torch.dtype, device: torch.device
) -> None:
    state, key_sum = states(device)
    if strides == "transposed":
        state, key_sum = state.mT.contiguous().mT, key_sum.mT.contiguous().mT
    options = OPTIONS | ({"decay": decay(device)} if with_decay else {})
    args = (*inputs(dtype, device), state, key_sum)
    torch.library.opcheck(step.default, args, options)
    private = (*args, options.get("decay"), 0.125, "elu_plus_one")
    torch.library.opcheck(torch.ops.attn._linear_step.default, private)


@pytest.mark.parametrize(
    "dims",
    ((0, 0, 0, 0, 0, 0), (1, 0, None, 2, 3, None), (None, -1, 1, -1, -1, -1)),
    ids=("in front", "anywhere", "at the end"),
)
def test_vmap_writes_to_the_state_of_each_copy(
    dims: tuple[int | None, ...], device: torch.device
) -> None:
    """Folded into the heads as a view or as a copy."""
    copies = 3
    tensors = (*inputs(torch.float32, device), *states(device), decay(device))
    mapped = tuple(
        x if dim is None else torch.stack([x / (i + 1) for i in range(copies)], dim)
        for x, dim in zip(tensors, dims)
    )
    looped = tuple(x.clone() for x in mapped)

    def one(*tensors: Tensor) -> Tensor:
        return step(*tensors[:5], decay=tensors[5], **OPTIONS)

    out = vmap(one, in_dims=dims)(*mapped)
    expected = [
        one(*(x if dim is None else x.select(dim, i) for x, dim in zip(looped, dims)))
        for i in range(copies)
    ]
    assert_same("out", out, torch.stack(expected))
    for name, i in (("state", 3), ("key_sum", 4)):
        assert_same(name, mapped[i].contiguous(), looped[i].contiguous())


def test_vmap_over_one_state_is_refused(device: torch.device) -> None:
    tensors = (*(torch.stack([x, x]) for x in inputs(torch.float32, device)), *states(device))
    with pytest.raises(ValueError, match="linear_step: state must be mapped by vmap"):
        vmap(lambda *xs: step(*xs, **OPTIONS), in_dims=(0, 0, 0, None, None))(*tensors)


def generated(function: Any, device: torch.device, count: int = 4) -> tuple[Tensor, ...]:
    """The outs of some steps, and the state and key_sum after them."""
    state, key_sum = states(device)
    outs = [
        function(*inputs(torch.float32, device, seed), state, key_sum).clone()
        for seed in range(count)
    ]
    return torch.cat(outs, 2), state, key_sum


def eager_step(*tensors: Tensor) -> Tensor:
    return attn_ops.linear_attention_step(*tensors, **OPTIONS)


@pytest.mark.parametrize(
    "settings",
    ({"backend": "aot_eager"}, {"dynamic": True}, {"mode": "reduce-overhead"}),
    ids=("aot_eager", "dynamic", "reduce-overhead"),
)
def test_compiled_steps_update_the_same_state(
    settings: dict[str, Any], device: torch.device
) -> None:
    torch.compiler.reset()
    compiled = torch.compile(eager_step, fullgraph=True, **settings)
    with torch.no_grad():
        results = (generated(function, device) for function in (compiled, eager_step))
        for name, actual, expected in zip(("out", "state", "key_sum"), *results):
            assert_same(name, actual, expected)


def test_a_state_made_inside_of_a_compiled_function(device: torch.device) -> None:
    """The compiler sees that the second step reads what the first has written."""

    def two_steps(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        state, key_sum = torch.zeros(2, 4, 8, 5), torch.zeros(2, 4, 8)
        state, key_sum = state.to(device), key_sum.to(device)
        outs = [eager_step(*tensors, state, key_sum) for tensors in (first, second)]
        return (*outs, state, key_sum)

    torch.compiler.reset()
    pair = inputs(torch.float32, device), inputs(torch.float32, device, 1)
    compiled = torch.compile(two_steps, fullgraph=True)
    for i, (actual, expected) in enumerate(zip(compiled(*pair), two_steps(*pair))):
        assert_same(f"result {i}", actual, expected)


class Decoder(nn.Module):
    """A layer that carries its state in buffers."""

    state: Tensor
    key_sum: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        state, key_sum = states(device)
        self.register_buffer("state", state)
        self.register_buffer("key_sum", key_sum)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return eager_step(query, key, value, self.state, self.key_sum)


@pytest.mark.parametrize("decomposed", (False, True), ids=("as traced", "decomposed"))
@pytest.mark.parametrize("strict", (True, False), ids=("strict", "not strict"))
def test_exported_program_updates_its_buffers(
    strict: bool, decomposed: bool, device: torch.device
) -> None:
    program = torch.export.export(Decoder(device), inputs(torch.float32, device), strict=strict)
    if decomposed:
        program = program.run_decompositions()
        assert {*program.graph_signature.buffers_to_mutate.values()} == {"state", "key_sum"}
    module = program.module()
    outs = [module(*inputs(torch.float32, device, seed)) for seed in range(3)]
    expected, state, key_sum = generated(eager_step, device, 3)
    assert_same("out", torch.cat(outs, 2), expected)
    carried = dict(module.named_buffers())
    assert_same("state", carried["state"], state)
    assert_same("key_sum", carried["key_sum"], key_sum)


class Stateless(nn.Module):
    """The state comes from outside."""

    def forward(self, *tensors: Tensor) -> Tensor:
        return eager_step(*tensors)


@pytest.mark.parametrize("decomposed", (False, True), ids=("as traced", "decomposed"))
def test_exported_program_updates_its_inputs(decomposed: bool, device: torch.device) -> None:
    args = (*inputs(torch.float32, device), *states(device))
    batch = torch.export.Dim("batch", min=2)
    shapes = (tuple({0: batch} for _ in args),)
    program = torch.export.export(Stateless(), args, dynamic_shapes=shapes)
    program = program.run_decompositions() if decomposed else program
    module = program.module()
    results = (generated(function, device, 3) for function in (module, eager_step))
    for name, actual, expected in zip(("out", "state", "key_sum"), *results):
        assert_same(name, actual, expected)
