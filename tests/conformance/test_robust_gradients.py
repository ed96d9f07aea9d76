"""Gradients that kernels of this kind got wrong before, and sizes of zero."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.comparison import assert_same
from tests.conformance.capture import Calls
from tests.conformance.evaluate import DTYPES, assert_agrees, assert_arguments_agree
from tests.conformance.spec import OpSpec
from tests.strategies import Case

SOFTMAX_LIKE = True
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
BASE = Case(batch=2, heads=2, queries=40, keys=48, width=16, value_width=12)


@every_dtype
def test_expanded_gradient_of_a_sum(spec: OpSpec, dtype: torch.dtype, device: torch.device) -> None:
    case = BASE.but(bias="1HMN")
    arguments = spec.build(case, dtype, device)
    leaves = [x.requires_grad_() for x in spec.floating(arguments).values()]
    out, lse = spec.run(**arguments)
    expanded = torch.autograd.grad(out.sum() + lse.sum(), leaves, retain_graph=True)
    ones = (torch.ones_like(out), torch.ones_like(lse))
    for name, a, e in zip(
        spec.floating(arguments), expanded, torch.autograd.grad((out, lse), leaves, ones)
    ):
        assert_same(name, a, e)
    assert_agrees(spec, case.but(strides="expanded"), dtype, device)


@every_dtype
@pytest.mark.parametrize("transposed", ("contiguous", "transposed"))
def test_gradient_with_transposed_strides(
    spec: OpSpec, transposed: str, dtype: torch.dtype, device: torch.device
) -> None:
    """The gradient of `out.transpose(1, 2).reshape(B, M, H*E)`, which models take."""
    arguments = spec.build(BASE.but(strides=transposed), dtype, device)
    leaves = [arguments[name].requires_grad_() for name in ("query", "key", "value")]
    out = spec.out(**arguments)
    grad = torch.randn(out.transpose(1, 2).shape, device=device).to(dtype)
    actual = torch.autograd.grad(out.transpose(1, 2), leaves, grad, retain_graph=True)
    expected = torch.autograd.grad(out, leaves, grad.transpose(1, 2).contiguous())
    for a, e in zip(actual, expected):
        assert_same("gradient", a, e)


@every_dtype
@pytest.mark.parametrize("last", ("query", "key", "value"))
def test_last_dimension_that_is_not_contiguous(
    spec: OpSpec, last: str, dtype: torch.dtype, device: torch.device
) -> None:
    arguments = spec.build(BASE, dtype, device)
    arguments[last] = arguments[last].mT.contiguous().mT
    assert arguments[last].stride(-1) != 1
    results = spec.run(**arguments)
    for name, a, e in zip(
        ("out", "lse"), results, spec.run(**(arguments | {last: arguments[last].contiguous()}))
    ):
        assert_same(name, a, e)


@every_dtype
def test_slices_of_one_projection(spec: OpSpec, dtype: torch.dtype, device: torch.device) -> None:
    """query, key and value out of one tensor [B, M, 3, H, D]: a storage offset and a gap."""
    joint = torch.randn(2, 19, 3, 4, 16, device=device).to(dtype)
    query, key, value = joint.permute(2, 0, 3, 1, 4)
    assert_arguments_agree(spec, {"query": query, "key": key, "value": value, "causal": True})


@every_dtype
def test_bias_gradient_of_merged_heads(
    spec: OpSpec, dtype: torch.dtype, device: torch.device
) -> None:
    merged = Case(batch=6, heads=1, kv_heads=1, queries=20, keys=33, layout="merged")
    for bias in ("HMN", "B1MN", "11MN", "B11N"):
        assert_agrees(spec, merged.but(bias=bias), dtype, device)


@every_dtype
@pytest.mark.parametrize("bias", ("1111", "B111", "1H11", "11M1", "111N", "BH11", "B11N", "1HM1"))
def test_bias_gradient_of_every_broadcast(
    spec: OpSpec, bias: str, dtype: torch.dtype, device: torch.device
) -> None:
    assert_agrees(spec, BASE.but(bias=bias, heads=4, wide_parameters=True), dtype, device)


@every_dtype
def test_bias_that_is_an_expanded_view(
    spec: OpSpec, dtype: torch.dtype, device: torch.device
) -> None:
    arguments = spec.build(BASE, dtype, device)
    arguments["bias"] = torch.randn(1, 2, 1, 48, device=device).to(dtype).expand(2, 2, 40, 48)
    assert_arguments_agree(spec, arguments)


def test_bias_that_requires_no_grad_costs_none(spec: OpSpec, device: torch.device) -> None:
    arguments = spec.build(BASE.but(bias="BHMN"), torch.float32, device)
    query = arguments["query"].requires_grad_()
    out = spec.out(**arguments)
    with Calls() as calls:
        out.sum().backward()
    raw = spec.backward(*calls.of(spec.backward))
    assert raw[spec.gradients_of_backward.index("bias")].shape == (0,)
    exact = spec.build(BASE.but(bias="BHMN"), torch.float64, device)
    exact["query"].requires_grad_()
    spec.formula(**exact)[0].sum().backward()
    assert (query.grad - exact["query"].grad).abs().max() < 1e-5


@every_dtype
@pytest.mark.parametrize("layout", ("BHMD", "BND"))
def test_single_key_head_sums_over_all_query_heads(
    spec: OpSpec, layout: str, dtype: torch.dtype, device: torch.device
) -> None:
    assert_agrees(spec, BASE.but(heads=8, kv_heads=1, layout=layout), dtype, device)


@every_dtype
def test_grouped_heads_equal_repeated_ones(
    spec: OpSpec, dtype: torch.dtype, device: torch.device
) -> None:
    arguments = spec.build(BASE.but(heads=6, kv_heads=2), dtype, device)
    repeated = {n: arguments[n].repeat_interleave(3, 1) for n in ("key", "value")}
    assert_same("out", spec.out(**(arguments | repeated)), spec.out(**arguments))


EMPTY = {
    "batch": Case(batch=0),
    "queries": Case(queries=0),
    "keys": Case(keys=0),
    "queries and keys": Case(queries=0, keys=0),
    "keys with a sink": Case(keys=0, sink=True),
    "packed": Case(batch=1, queries=0, keys=0, sequences=((0, 0), (0, 0)), causal=True),
    "merged": Case(batch=0, heads=1, kv_heads=1, layout="merged"),
}


@every_dtype
@pytest.mark.parametrize("name", EMPTY)
def test_sizes_of_zero(spec: OpSpec, name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Results of the right shape; gradients of what contributes nothing are zeros."""
    assert_agrees(spec, EMPTY[name], dtype, device)


@every_dtype
@pytest.mark.parametrize("size", ("batch", "queries", "keys"))
def test_everything_of_size_zero(
    spec: OpSpec, size: str, dtype: torch.dtype, device: torch.device
) -> None:
    assert_agrees(spec, spec.cases["everything"].but(**{size: 0}), dtype, device)


@every_dtype
def test_offsets_of_64_bits_and_tokens_after_the_last(
    spec: OpSpec, dtype: torch.dtype, device: torch.device
) -> None:
    case = Case(batch=1, queries=20, keys=24, sequences=((7, 9), (0, 3), (8, 6)), causal=True)
    narrow = assert_arguments_agree(spec, spec.build(case, dtype, device))
    wide = assert_arguments_agree(spec, spec.build(case.but(offsets=torch.int64), dtype, device))
    for name, result in narrow.items():
        assert torch.equal(result, wide[name])
    assert not narrow["out"][:, :, 15:].any()
    assert (narrow["lse"][:, :, 15:] == -torch.inf).all()
    assert not narrow["key"][:, :, 18:].any() and not narrow["value"][:, :, 18:].any()


@every_dtype
def test_packed_sequences_equal_separate_calls(
    spec: OpSpec, dtype: torch.dtype, device: torch.device
) -> None:
    pairs = ((7, 9), (12, 6), (1, 5))
    case = Case(batch=1, queries=20, keys=20, sequences=pairs, causal=True, window=4)
    arguments = spec.build(case, dtype, device)
    packed = spec.out(**arguments)
    m = n = 0
    for queries, keys in pairs:
        alone = spec.function(
            arguments["query"][:, :, m : m + queries],
            arguments["key"][:, :, n : n + keys],
            arguments["value"][:, :, n : n + keys],
            causal=True,
            window=4,
        )
        assert_same("sequence", packed[:, :, m : m + queries], alone)
        m, n = m + queries, n + keys


@every_dtype
def test_two_halves_of_the_keys_combine_through_lse(
    spec: OpSpec, dtype: torch.dtype, device: torch.device
) -> None:
    arguments = spec.build(BASE, dtype, device)
    whole, whole_lse = spec.run(**arguments)

    def half(keys: slice) -> tuple[Tensor, ...]:
        part = {name: arguments[name][:, :, keys] for name in ("key", "value")}
        out, lse = spec.run(**(arguments | part))
        return out.to(lse.dtype), lse

    (left, left_lse), (right, right_lse) = half(slice(0, 17)), half(slice(17, None))
    lse = torch.logaddexp(left_lse, right_lse)
    combined = (left_lse - lse).exp()[..., None] * left + (right_lse - lse).exp()[..., None] * right
    # Each half was rounded to the dtype once.
    assert (lse - whole_lse).abs().max() <= 16 * torch.finfo(lse.dtype).eps * 8
    assert (combined - whole).abs().max() <= 4 * torch.finfo(dtype).eps * whole.abs().max()


def test_gradient_through_two_halves_is_that_of_the_whole(
    spec: OpSpec, device: torch.device
) -> None:
    """lse has a gradient of its own, or context parallelism would train on wrong numbers."""
    arguments = spec.build(BASE, torch.float64, device)
    leaves = [arguments[name].requires_grad_() for name in ("query", "key", "value")]

    def half(keys: slice) -> tuple[Tensor, ...]:
        part = {name: arguments[name][:, :, keys] for name in ("key", "value")}
        return spec.run(**(arguments | part))

    (left, left_lse), (right, right_lse) = half(slice(0, 17)), half(slice(17, None))
    lse = torch.logaddexp(left_lse, right_lse)
    out = (left_lse - lse).exp()[..., None] * left + (right_lse - lse).exp()[..., None] * right
    halves = torch.autograd.grad(out.sin().sum() + lse.sum(), leaves)
    out, lse = spec.run(**arguments)
    for a, e in zip(halves, torch.autograd.grad(out.sin().sum() + lse.sum(), leaves)):
        assert_same("gradient", a, e)


def test_tangents_and_second_derivatives_at_zero_vectors_and_empty_rows(
    spec: OpSpec,
    device: torch.device,
) -> None:
    """Where a norm, a distance or the softmax has no derivative of its own."""
    arguments = spec.build(BASE.but(mask="B1MN", sink=True, batch=1), torch.float64, device)
    arguments["query"][:, :, ::3] = 0
    arguments["key"][:, :, ::4] = 0
    arguments["mask"][:, :, 5:9] = False
    names = ("query", "key", "value", "sink")
    inputs = tuple(arguments.pop(name) for name in names)
    tangents = tuple(x.cos() for x in inputs)
    without_sink = {name: x for name, x in zip(names, inputs) if name != "sink"}

    def derivatives(op: Callable[..., tuple[Tensor, ...]]) -> list[Tensor]:
        def scalar(*values: Tensor) -> Tensor:
            out, lse = op(**arguments, **dict(zip(names, values)))
            alone = op(**arguments, **dict(zip(without_sink, values)))[0]
            return out.sin().sum() + lse.square().sum() + alone.sin().sum()

        gradient = torch.func.grad(scalar, (0, 1, 2, 3))
        first, tangent, *_ = torch.func.jvp(gradient, inputs, tangents)
        leaves = tuple(x.detach().requires_grad_() for x in inputs)
        grads = torch.autograd.grad(scalar(*leaves), leaves, create_graph=True)
        along = torch.stack([(g * t).sum() for g, t in zip(grads, tangents)]).sum()
        return [*first, *tangent, *torch.autograd.grad(along, leaves)]

    for i, (a, e) in enumerate(zip(derivatives(spec.run), derivatives(spec.formula))):
        assert not e.isnan().any()
        assert_same(f"derivative {i}", a, e)
