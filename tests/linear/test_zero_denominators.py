"""Signed products under `normalize=True`: a sum of exactly zero gives zeros, never NaN.

Small integers, so that every dtype finds the same sums whatever their order.
"""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.conformance.evaluate import DTYPES, assert_arguments_agree
from tests.conformance.spec import OpSpec
from tests.linear.spec import LINEAR, WITH_STATE

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def agrees(spec: OpSpec, arguments: dict[str, Any]) -> dict[str, Tensor]:
    results = assert_arguments_agree(spec, arguments)
    assert all(x.isfinite().all() for x in results.values())
    return results


def ones_of_both_signs(
    dtype: torch.dtype, device: torch.device, tokens: int = 70
) -> dict[str, Any]:
    """Every second key cancels the one before; the products before it are not zero."""
    generator = torch.Generator().manual_seed(0)
    key = torch.randint(1, 4, (2, 2, tokens, 8), generator=generator)
    key[:, :, 1::2] = -key[:, :, ::2]
    query, value = torch.ones(2, 2, tokens, 8), torch.randn(2, 2, tokens, 6, generator=generator)
    tensors = {"query": query, "key": key, "value": value.bfloat16().half()}
    return {name: x.to(device, dtype) for name, x in tensors.items()}


@every_dtype
def test_every_second_query_divides_by_zero(dtype: torch.dtype, device: torch.device) -> None:
    arguments = ones_of_both_signs(dtype, device) | {"causal": True, "eps": 0.0}
    results = agrees(LINEAR, arguments)
    for name in ("out", "query"):
        assert not results[name][:, :, 1::2].any()
        assert results[name][:, :, 2::2].any(-1).all()


@every_dtype
def test_all_queries_divide_by_zero(dtype: torch.dtype, device: torch.device) -> None:
    results = agrees(LINEAR, ones_of_both_signs(dtype, device) | {"eps": 0.0})
    assert not any(x.any() for x in results.values())


@every_dtype
def test_sum_that_is_minus_eps(dtype: torch.dtype, device: torch.device) -> None:
    arguments = ones_of_both_signs(dtype, device) | {"causal": True, "eps": 8.0}
    arguments["key"] = arguments["key"].sign() * -1
    results = agrees(LINEAR, arguments)
    for name in ("out", "query"):
        assert not results[name][:, :, ::2].any()
        assert results[name][:, :, 1::2].any(-1).all()


@every_dtype
def test_eps_keeps_a_sum_of_zero_from_being_zero(dtype: torch.dtype, device: torch.device) -> None:
    """Then the numerator is divided by eps, large as it may be."""
    arguments = ones_of_both_signs(dtype, device, tokens=4) | {"causal": True, "eps": 0.5}
    results = agrees(LINEAR, arguments)
    assert results["out"][:, :, 1::2].any(-1).all()


@every_dtype
def test_state_that_cancels_the_keys(dtype: torch.dtype, device: torch.device) -> None:
    arguments = ones_of_both_signs(dtype, device, tokens=6) | {"eps": 0.0}
    arguments["key"] = arguments["key"][:, :, :2].repeat(1, 1, 3, 1)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    arguments["key_sum"] = -arguments["key"][:, :, 0].to(sums)
    arguments["state"] = torch.ones(2, 2, 8, 6, dtype=sums, device=device)
    results = agrees(WITH_STATE, arguments)
    assert not results["out"][:, :, ::2].any()
    assert results["out"][:, :, 1::2].any(-1).all()


@every_dtype
def test_step_that_divides_by_zero(dtype: torch.dtype, device: torch.device) -> None:
    arguments = ones_of_both_signs(dtype, device, tokens=1)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    key_sum = -arguments["key"][:, :, 0].to(sums)
    state = torch.ones(2, 2, 8, 6, dtype=sums, device=device)
    out = torch.ops.attn.linear_step(**arguments, state=state, key_sum=key_sum, eps=0.0)
    assert not out.any() and not key_sum.any()
    expected = 1 + arguments["key"].mT.to(sums) @ arguments["value"].to(sums)
    torch.testing.assert_close(state, expected)


@st.composite
def of_integers(draw: st.DrawFn) -> dict[str, Any]:
    """Signed integers of which many sums are zero."""
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    causal = draw(st.booleans())
    keys, width = draw(st.integers(0, 9)), draw(st.integers(1, 3))
    queries = keys if causal else draw(st.integers(0, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))

    def integers(*sizes: int) -> Tensor:
        return torch.randint(-2, 3, sizes, generator=generator).double()

    arguments = {
        "query": integers(batch, heads, queries, width),
        "key": integers(batch, heads, keys, width),
        "value": integers(batch, heads, keys, draw(st.integers(1, 3))),
        "causal": causal,
        "eps": draw(st.sampled_from((0.0, 1.0, 0.5))),
    }
    if draw(st.booleans()):
        arguments["mask"] = torch.rand(batch, keys, generator=generator) < 0.7
    return arguments


@every_dtype
def test_drawn_integers(dtype: torch.dtype, device: torch.device) -> None:
    zeros = []

    @given(of_integers())
    def check(arguments: dict[str, Any]) -> None:
        arguments = {
            name: x.to(device, dtype if x.is_floating_point() else x.dtype)
            if isinstance(x, Tensor)
            else x
            for name, x in arguments.items()
        }
        results = agrees(LINEAR, arguments)
        zeros.append(results["out"].numel() - results["out"].count_nonzero().item())

    check()
    assert sum(zeros) > 0
