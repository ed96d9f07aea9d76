"""Sequences packed into one batch: each is alone, and what lies behind the last is nobody's."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

import attn_ops
from tests.comparison import assert_same
from tests.conformance.evaluate import DTYPES, assert_arguments_agree, cotangents, with_gradients
from tests.linear.spec import LINEAR
from tests.strategies import Case

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
directions = pytest.mark.parametrize("causal", (False, True), ids=("not causal", "causal"))
BASE = Case(batch=1, heads=4, kv_heads=2, width=8, value_width=6, options={"feature_map": "relu"})


def case_of(lengths: tuple[int, ...], left_over: int = 0, causal: bool = True) -> Case:
    total = sum(lengths) + left_over
    return BASE.but(
        queries=total,
        keys=total,
        causal=causal,
        mask="BN",
        sequences=tuple((length, length) for length in lengths),
        options={"decay": causal},
    )


LENGTHS = {
    "of one token each": (1,) * 40,
    "some empty": (0, 5, 0, 0, 9, 0),
    "all empty": (0, 0, 0),
    "of blocks": (64, 128, 64),
    "around blocks": (63, 65, 1, 127, 129),
    "longer than a block": (300, 20),
}


@directions
@every_dtype
@pytest.mark.parametrize("name", LENGTHS)
def test_lengths(name: str, dtype: torch.dtype, causal: bool, device: torch.device) -> None:
    case = case_of(LENGTHS[name], left_over=3, causal=causal)
    assert_arguments_agree(LINEAR, LINEAR.build(case, dtype, device))


@directions
@every_dtype
def test_packed_sequences_equal_separate_calls(
    dtype: torch.dtype, causal: bool, device: torch.device
) -> None:
    lengths = (7, 0, 20, 70)
    arguments = LINEAR.build(case_of(lengths, causal=causal), dtype, device)
    arguments.pop("mask")
    packed = LINEAR.out(**arguments)
    options = {name: x for name, x in arguments.items() if name not in LINEAR_TENSORS}
    first = 0
    for length in lengths:
        part = slice(first, first + length)
        tensors = (arguments[name][:, :, part] for name in ("query", "key", "value"))
        alone = attn_ops.linear_attention(*tensors, **options)
        assert_same(f"{length} tokens", packed[:, :, part], alone)
        first += length


LINEAR_TENSORS = ("query", "key", "value", "cu_seqlens")


@directions
@every_dtype
def test_other_sequences_change_nothing(
    dtype: torch.dtype, causal: bool, device: torch.device
) -> None:
    """Not a bit of results and gradients, whatever the others contain."""
    arguments = LINEAR.build(case_of((30, 40, 50), 5, causal), dtype, device)
    inside = slice(30, 70)
    others = dict(arguments)
    for name in ("query", "key", "value"):
        others[name] = arguments[name] * -64
        others[name][:, :, inside] = arguments[name][:, :, inside]
    out = LINEAR.out(**arguments)
    (grad_out,) = cotangents(out)
    results = [with_gradients(LINEAR, LINEAR.run, args, grad_out) for args in (arguments, others)]
    for name in ("out", "query", "key", "value"):
        one, other = (x[name] for x in results)
        assert torch.equal(one[:, :, inside], other[:, :, inside]), name
        assert not torch.equal(one[:, :, :30], other[:, :, :30]), name


@directions
@every_dtype
def test_tokens_after_the_last_offset(
    dtype: torch.dtype, causal: bool, device: torch.device
) -> None:
    """Zeros, zero gradients, and whatever they hold reaches nobody."""
    arguments = LINEAR.build(case_of((9, 11), 100, causal), dtype, device)
    results = assert_arguments_agree(LINEAR, arguments)
    for name in ("out", "query", "key", "value"):
        assert results[name][:, :, :20].any(), name
        assert not results[name][:, :, 20:].any(), name


@every_dtype
def test_offsets_of_64_bits(dtype: torch.dtype, device: torch.device) -> None:
    case = case_of((9, 0, 30), 4)
    results = [
        assert_arguments_agree(LINEAR, LINEAR.build(case.but(offsets=offsets), dtype, device))
        for offsets in (torch.int32, torch.int64)
    ]
    for name, result in results[0].items():
        assert torch.equal(result, results[1][name])


def test_one_sequence_of_all_tokens_is_no_packing(device: torch.device) -> None:
    arguments = LINEAR.build(case_of((70,)), torch.float32, device)
    packed = LINEAR.out(**arguments)
    del arguments["cu_seqlens"]
    assert_same("out", packed, LINEAR.out(**arguments))


def loss(query: Tensor, decay: Tensor, offsets: Tensor) -> Tensor:
    options: dict[str, Any] = {"causal": True, "feature_map": "softplus"}
    out = attn_ops.linear_attention(query, query, query, decay=decay, cu_seqlens=offsets, **options)
    return out.square().sum()


@pytest.mark.parametrize("argument", (None, 0, 1), ids=("results", "query", "decay"))
def test_offsets_that_differ_from_copy_to_copy(argument: int | None, device: torch.device) -> None:
    """They cannot be folded into the heads."""
    query = torch.randn(3, 1, 2, 8, 4, dtype=torch.float64, device=device)
    decay = torch.tensor([0.5, 0.75], dtype=torch.float64, device=device).expand(3, 2)
    offsets = torch.tensor([[0, 3, 8], [0, 5, 8], [0, 1, 8]], dtype=torch.int32, device=device)
    function = loss if argument is None else grad(loss, argument)
    expected = torch.stack([function(*copy) for copy in zip(query, decay, offsets)])
    assert_same("result", vmap(function)(query, decay, offsets), expected)
