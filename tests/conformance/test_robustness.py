"""What broke kernels of this kind before: each is a sentence, in every dtype that it concerns.

All compare results, lse and every gradient with the formula in float64 (never NaN, never wrong).
"""

import pytest
import torch
from torch import Tensor

from tests.comparison import assert_same
from tests.conformance.evaluate import DTYPES
from tests.conformance.evaluate import assert_changed_case_agrees as agrees
from tests.conformance.spec import OpSpec
from tests.strategies import Case

SOFTMAX_LIKE = True
WIDE = (torch.float64, torch.float32)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

BASE = Case(batch=2, heads=2, queries=40, keys=48, width=16, value_width=12)


@every_dtype
@pytest.mark.parametrize("sign", (-1, 1))
def test_bias_of_a_hundred(
    spec: OpSpec, dtype: torch.dtype, sign: int, device: torch.device
) -> None:
    case = BASE.but(bias="1HMN")
    agrees(spec, case, dtype, device, bias=lambda b: b + sign * 100)


@every_dtype
def test_bias_of_a_hundred_of_either_sign(
    spec: OpSpec, dtype: torch.dtype, device: torch.device
) -> None:
    agrees(spec, BASE.but(bias="BHMN"), dtype, device, bias=lambda b: b.sign() * 100)


@every_dtype
def test_bias_that_hides_by_a_huge_finite_number(
    spec: OpSpec, dtype: torch.dtype, device: torch.device
) -> None:
    huge = torch.finfo(torch.float16).min if dtype == torch.float16 else -1e30
    case = BASE.but(bias="B1MN", wide_parameters=False)
    agrees(spec, case, dtype, device, bias=lambda b: torch.where(b > 0, b, huge))


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("shift", (-100.0, 100.0))
def test_bias_that_is_the_same_everywhere_changes_only_lse(
    spec: OpSpec, dtype: torch.dtype, shift: float, device: torch.device
) -> None:
    plain = agrees(spec, BASE, dtype, device)
    shifted = agrees(spec, BASE.but(bias="1111"), dtype, device, bias=lambda b: b * 0 + shift)
    for name, roundings in (("out", 1), ("value", 1)):
        difference = (plain[name] - shifted[name]).abs().max()
        assert difference <= roundings * 1e-4 * plain[name].abs().max()
    assert (shifted["lse"] - plain["lse"] - shift).abs().max() < 1e-3


@every_dtype
def test_rows_that_see_no_key_are_zero_and_so_are_their_gradients(
    spec: OpSpec, dtype: torch.dtype, device: torch.device
) -> None:
    case = BASE.but(mask="B1MN", bias="BHMN", relative_bias="H")

    def hidden(mask: Tensor) -> Tensor:
        mask = mask.clone()
        mask[:, :, 5:9] = False
        return mask

    results = agrees(spec, case, dtype, device, mask=hidden)
    assert not results["out"][:, :, 5:9].any()
    assert (results["lse"][:, :, 5:9] == -torch.inf).all()
    assert not results["query"][:, :, 5:9].any()
    assert not results["bias"][:, :, 5:9].any()


@every_dtype
def test_no_row_sees_any_key(spec: OpSpec, dtype: torch.dtype, device: torch.device) -> None:
    results = agrees(spec, BASE.but(mask="BN"), dtype, device, mask=torch.zeros_like)
    assert all(not x.any() for name, x in results.items() if name != "lse")


@every_dtype
def test_rows_that_see_no_key_with_a_sink(
    spec: OpSpec, dtype: torch.dtype, device: torch.device
) -> None:
    case = BASE.but(mask="B1MN", sink=True)
    results = agrees(spec, case, dtype, device, mask=torch.zeros_like)
    sink = spec.build(case, dtype, device)["sink"]
    assert not results["out"].any()
    assert_same("lse", results["lse"], sink.to(results["lse"].dtype)[:, None].expand(2, 2, 40))


@every_dtype
@pytest.mark.parametrize("sink", (-100.0, 100.0, -torch.inf))
def test_sink_far_from_the_scores(
    spec: OpSpec, sink: float, dtype: torch.dtype, device: torch.device
) -> None:
    agrees(spec, BASE.but(sink=True, causal=True), dtype, device, sink=lambda s: s * 0 + sink)


@every_dtype
def test_rows_of_a_bias_that_is_minus_infinity(
    spec: OpSpec, dtype: torch.dtype, device: torch.device
) -> None:
    def hidden(bias: Tensor) -> Tensor:
        bias = bias.clone()
        bias[:, :, 3] = -torch.inf
        bias[:, :, 7, :20] = -torch.inf
        return bias

    results = agrees(spec, BASE.but(bias="BHMN"), dtype, device, bias=hidden)
    assert not results["out"][:, :, 3].any()
    assert not results["bias"][:, :, 3].any()
    agrees(spec, BASE.but(bias="BHMN", sink=True), dtype, device, bias=hidden)


@every_dtype
@pytest.mark.parametrize("keys", (512, 1024))
def test_one_causal_query_over_a_cache(
    spec: OpSpec, keys: int, dtype: torch.dtype, device: torch.device
) -> None:
    """It is the last one: it sees every key."""
    agrees(spec, BASE.but(queries=1, keys=keys, causal=True), dtype, device)
    agrees(spec, BASE.but(queries=1, keys=keys, causal=True, window=100, mask="BN"), dtype, device)


@every_dtype
def test_more_causal_queries_than_keys(
    spec: OpSpec, dtype: torch.dtype, device: torch.device
) -> None:
    results = agrees(spec, BASE.but(queries=70, keys=33, causal=True), dtype, device)
    assert not results["out"][:, :, : 70 - 33].any()
    assert results["out"][:, :, 70 - 33 :].any(-1).all()


@every_dtype
@pytest.mark.parametrize("keys", (1, 63, 513, 600))
@pytest.mark.parametrize("causal", (False, True))
def test_lengths_that_fill_no_block(
    spec: OpSpec, keys: int, causal: bool, dtype: torch.dtype, device: torch.device
) -> None:
    case = BASE.but(batch=1, heads=1, kv_heads=1, keys=keys, causal=causal)
    agrees(spec, case.but(queries=keys), dtype, device)
    agrees(spec, case.but(queries=17, bias="11MN"), dtype, device)


@every_dtype
@pytest.mark.parametrize("widths", ((1, 1), (3, 256), (256, 3), (80, 96), (130, 200)))
def test_widths(
    spec: OpSpec, widths: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    agrees(spec, BASE.but(width=widths[0], value_width=widths[1]), dtype, device)
