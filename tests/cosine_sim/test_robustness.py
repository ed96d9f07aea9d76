"""What broke kernels of this kind before: each is a sentence, in every dtype that it concerns.

All compare results, lse and every gradient with the formula in float64 (never NaN, never wrong).
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.comparison import assert_same
from tests.conformance.evaluate import DTYPES, assert_arguments_agree
from tests.cosine_sim.spec import SPEC, build
from tests.strategies import Case

WIDE = (torch.float64, torch.float32)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

BASE = Case(batch=2, heads=2, queries=40, keys=48, width=16, value_width=12)


def agrees(case: Case, dtype: torch.dtype, device: torch.device, **replaced: Any) -> dict[str, Any]:
    """Builds the case, with some arguments replaced by functions of themselves, and compares."""
    arguments = build(case, dtype, device)
    for name, change in replaced.items():
        arguments[name] = change(arguments[name])
    results = assert_arguments_agree(SPEC, arguments, case.strides)
    assert not any(x.isnan().any() for x in results.values())
    return results


@every_dtype
@pytest.mark.parametrize("sign", (-1, 1))
def test_bias_of_a_hundred(dtype: torch.dtype, sign: int, device: torch.device) -> None:
    case = BASE.but(bias="1HMN")
    agrees(case, dtype, device, bias=lambda b: b + sign * 100)


@every_dtype
def test_bias_of_a_hundred_of_either_sign(dtype: torch.dtype, device: torch.device) -> None:
    agrees(BASE.but(bias="BHMN"), dtype, device, bias=lambda b: b.sign() * 100)


@every_dtype
def test_bias_that_hides_by_a_huge_finite_number(dtype: torch.dtype, device: torch.device) -> None:
    huge = torch.finfo(torch.float16).min if dtype == torch.float16 else -1e30
    case = BASE.but(bias="B1MN", wide_parameters=False)
    agrees(case, dtype, device, bias=lambda b: torch.where(b > 0, b, huge))


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("shift", (-100.0, 100.0))
def test_bias_that_is_the_same_everywhere_changes_only_lse(
    dtype: torch.dtype, shift: float, device: torch.device
) -> None:
    plain = agrees(BASE, dtype, device)
    shifted = agrees(BASE.but(bias="1111"), dtype, device, bias=lambda b: b * 0 + shift)
    for name, roundings in (("out", 1), ("value", 1)):
        difference = (plain[name] - shifted[name]).abs().max()
        assert difference <= roundings * 1e-4 * plain[name].abs().max()
    assert (shifted["lse"] - plain["lse"] - shift).abs().max() < 1e-3


@every_dtype
@pytest.mark.parametrize(
    ("groups", "scale"), ((8, 16.0), (1, 100.0), (1, 1e4), (2, -100.0), (16, 1.0))
)
def test_groups_and_scale_beyond_the_range_of_the_exponential(
    groups: int, scale: float, dtype: torch.dtype, device: torch.device
) -> None:
    agrees(BASE.but(options={"groups": groups, "scale": scale}), dtype, device)


@every_dtype
@pytest.mark.parametrize("temperature", (100.0, -100.0, 1e4, 0.0))
def test_head_scale_beyond_the_range_of_the_exponential(
    temperature: float, dtype: torch.dtype, device: torch.device
) -> None:
    case = BASE.but(options={"head_scale": True, "scale": 1.0})
    agrees(case, dtype, device, head_scale=lambda s: s.sign() * 2 + temperature)


@every_dtype
def test_gains_that_break_the_bound_of_unit_vectors(
    dtype: torch.dtype, device: torch.device
) -> None:
    case = BASE.but(options={"query_gain": "HD", "key_gain": "HD"})
    agrees(case, dtype, device, query_gain=lambda g: g * 20, key_gain=lambda g: g * 20)


@every_dtype
def test_unnormalized_vectors_that_are_far_from_unit(
    dtype: torch.dtype, device: torch.device
) -> None:
    case = BASE.but(options={"normalize": False, "scale": 4.0})
    agrees(case, dtype, device, query=lambda q: q * 8, key=lambda k: k * 8)


@every_dtype
@pytest.mark.parametrize("groups", (1, 4))
def test_zero_vectors_have_zero_gradients(
    groups: int, dtype: torch.dtype, device: torch.device
) -> None:
    def some_zeros(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, :, ::3] = 0
        x[:, :, 1::3, :4] = 0
        return x

    case = BASE.but(options={"groups": groups})
    results = agrees(case, dtype, device, query=some_zeros, key=some_zeros)
    for name in ("query", "key"):
        assert not results[name][:, :, ::3].any()
        assert results[name][:, :, 2::3].any()


@every_dtype
def test_all_vectors_zero_is_the_mean_of_the_values(
    dtype: torch.dtype, device: torch.device
) -> None:
    arguments = build(BASE, dtype, device)
    arguments["query"] = arguments["query"] * 0
    results = assert_arguments_agree(SPEC, arguments)
    mean = arguments["value"].double().mean(2, keepdim=True).expand(results["out"].shape)
    assert (results["out"] - mean).abs().max() <= 4 * torch.finfo(dtype).eps


@every_dtype
@pytest.mark.parametrize("size", (2.0**-20, 2.0**-14, 2.0**12))
def test_length_of_the_vectors_does_not_matter(
    size: float, dtype: torch.dtype, device: torch.device
) -> None:
    """In float16 the squares of the first are below its range, of the last beyond it."""
    signs = {"query": lambda q: q.sign() * size, "key": lambda k: k.sign() * size}
    arguments = build(BASE, dtype, device)
    for name, change in signs.items():
        arguments[name] = change(arguments[name])
    small = assert_arguments_agree(SPEC, arguments)
    units = {name: arguments[name] / size for name in signs}
    unit = assert_arguments_agree(SPEC, arguments | units)
    for name in ("out", "lse", "value"):
        rounding = 2 * torch.finfo(small[name].dtype).eps * unit[name].abs().max()
        assert (small[name] - unit[name]).abs().max() <= rounding


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_vectors_below_the_floor_of_the_norm(dtype: torch.dtype, device: torch.device) -> None:
    """Shorter than 1e-12: divided by 1e-12, so they are not unit vectors."""
    agrees(BASE, dtype, device, query=lambda q: q * 1e-14, key=lambda k: k * 1e-13)


@every_dtype
def test_rows_that_see_no_key_are_zero_and_so_are_their_gradients(
    dtype: torch.dtype, device: torch.device
) -> None:
    case = BASE.but(mask="B1MN", bias="BHMN", relative_bias="H")

    def hidden(mask: Tensor) -> Tensor:
        mask = mask.clone()
        mask[:, :, 5:9] = False
        return mask

    results = agrees(case, dtype, device, mask=hidden)
    assert not results["out"][:, :, 5:9].any()
    assert (results["lse"][:, :, 5:9] == -torch.inf).all()
    assert not results["query"][:, :, 5:9].any()
    assert not results["bias"][:, :, 5:9].any()


@every_dtype
def test_no_row_sees_any_key(dtype: torch.dtype, device: torch.device) -> None:
    results = agrees(BASE.but(mask="BN"), dtype, device, mask=torch.zeros_like)
    assert all(not x.any() for name, x in results.items() if name != "lse")


@every_dtype
def test_rows_that_see_no_key_with_a_sink(dtype: torch.dtype, device: torch.device) -> None:
    case = BASE.but(mask="B1MN", sink=True)
    results = agrees(case, dtype, device, mask=torch.zeros_like)
    sink = build(case, dtype, device)["sink"]
    assert not results["out"].any()
    assert_same("lse", results["lse"], sink.to(results["lse"].dtype)[:, None].expand(2, 2, 40))


@every_dtype
@pytest.mark.parametrize("sink", (-100.0, 100.0, -torch.inf))
def test_sink_far_from_the_scores(sink: float, dtype: torch.dtype, device: torch.device) -> None:
    agrees(BASE.but(sink=True, causal=True), dtype, device, sink=lambda s: s * 0 + sink)


@every_dtype
def test_rows_of_a_bias_that_is_minus_infinity(dtype: torch.dtype, device: torch.device) -> None:
    def hidden(bias: Tensor) -> Tensor:
        bias = bias.clone()
        bias[:, :, 3] = -torch.inf
        bias[:, :, 7, :20] = -torch.inf
        return bias

    results = agrees(BASE.but(bias="BHMN"), dtype, device, bias=hidden)
    assert not results["out"][:, :, 3].any()
    assert not results["bias"][:, :, 3].any()
    agrees(BASE.but(bias="BHMN", sink=True), dtype, device, bias=hidden)


@every_dtype
@pytest.mark.parametrize("keys", (512, 1024))
def test_one_causal_query_over_a_cache(keys: int, dtype: torch.dtype, device: torch.device) -> None:
    """It is the last one: it sees every key."""
    agrees(BASE.but(queries=1, keys=keys, causal=True), dtype, device)
    agrees(BASE.but(queries=1, keys=keys, causal=True, window=100, mask="BN"), dtype, device)


@every_dtype
def test_more_causal_queries_than_keys(dtype: torch.dtype, device: torch.device) -> None:
    results = agrees(BASE.but(queries=70, keys=33, causal=True), dtype, device)
    assert not results["out"][:, :, : 70 - 33].any()
    assert results["out"][:, :, 70 - 33 :].any(-1).all()


@every_dtype
@pytest.mark.parametrize("keys", (1, 63, 513, 600))
@pytest.mark.parametrize("causal", (False, True))
def test_lengths_that_fill_no_block(
    keys: int, causal: bool, dtype: torch.dtype, device: torch.device
) -> None:
    case = BASE.but(batch=1, heads=1, kv_heads=1, keys=keys, causal=causal)
    agrees(case.but(queries=keys), dtype, device)
    agrees(case.but(queries=17, bias="11MN"), dtype, device)


@every_dtype
@pytest.mark.parametrize("widths", ((1, 1), (3, 256), (256, 3), (80, 96), (130, 200)))
def test_widths(widths: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    agrees(BASE.but(width=widths[0], value_width=widths[1]), dtype, device)
