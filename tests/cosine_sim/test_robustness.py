"""What broke kernels of cosine similarity before: each is a sentence, in every dtype.

All compare results, lse and every gradient with the formula in float64 (never NaN, never wrong).
"""

from functools import partial

import pytest
import torch
from torch import Tensor

from tests.conformance.evaluate import DTYPES, assert_arguments_agree, assert_changed_case_agrees
from tests.cosine_sim.spec import SPEC, build
from tests.strategies import Case

agrees = partial(assert_changed_case_agrees, SPEC)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

BASE = Case(batch=2, heads=2, queries=40, keys=48, width=16, value_width=12)


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
