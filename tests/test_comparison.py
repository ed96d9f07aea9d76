"""The tolerance itself: it accepts rounding and rejects every kind of wrong result."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.comparison import Rounding, assert_close, assert_same
from tests.conformance.evaluate import DTYPES, cotangents, in_dtype, with_gradients
from tests.cosine_sim.spec import SPEC
from tests.strategies import Case

CASE = Case(batch=2, heads=2, queries=16, keys=24, width=16, value_width=16, bias="HMN")


def results(dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor], Rounding]:
    """The formula in this dtype and in float64, and its rounding."""
    arguments = SPEC.build(CASE, dtype, torch.device("cpu"))
    exact_arguments = in_dtype(arguments, torch.float64)
    grads = cotangents(*SPEC.formula(**exact_arguments))
    exact = with_gradients(SPEC, SPEC.formula, exact_arguments, *grads)
    same_dtype = with_gradients(SPEC, SPEC.formula, arguments, *grads)
    return same_dtype, exact, SPEC.rounding(dtype, exact_arguments, *grads)


def two_rows_swapped(x: Tensor) -> Tensor:
    order = torch.arange(x.shape[2])
    order[[0, 1]] = order[[1, 0]]
    return x[:, :, order]


def one_element_is_nan(x: Tensor) -> Tensor:
    x = x.clone()
    x[..., -1, -1] = torch.nan
    return x


def last_row_is_missing(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :, -1] = 0
    return x


WRONG: tuple[Callable[[Tensor], Tensor], ...] = (
    two_rows_swapped,
    one_element_is_nan,
    last_row_is_missing,
    lambda x: x * 8.0,  # a scale factor twice
    lambda x: x / 2,  # a group's gradient halved
    lambda x: -x,
    lambda x: torch.full_like(x, torch.inf),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accepts_the_formula_in_its_own_dtype_and_its_rounded_truth(dtype: torch.dtype) -> None:
    same_dtype, exact, rounding = results(dtype)
    for name, truth in exact.items():
        assert_close(name, same_dtype[name], same_dtype[name], truth, rounding)
        assert_close(name, truth.to(same_dtype[name].dtype), same_dtype[name], truth, rounding)


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rejects_a_wrong_result(dtype: torch.dtype, wrong: Callable[[Tensor], Tensor]) -> None:
    same_dtype, exact, rounding = results(dtype)
    for name, truth in exact.items():
        bad = wrong(same_dtype[name] if name != "bias" else same_dtype[name].unsqueeze(0))
        bad = bad.squeeze(0) if name == "bias" else bad
        with pytest.raises(AssertionError, match=f"{name} .* is off by"):
            assert_close(name, bad, same_dtype[name], truth, rounding)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rejects_a_causal_mask_that_is_off_by_one(dtype: torch.dtype) -> None:
    case = CASE.but(causal=True)
    arguments = SPEC.build(case, dtype, torch.device("cpu"))
    exact_arguments = in_dtype(arguments, torch.float64)
    truth, lse = SPEC.formula(**exact_arguments)
    seen = torch.ones(16, 24, dtype=torch.bool).tril(24 - 16 - 1)[None, None]
    off = SPEC.formula(**(arguments | {"causal": False, "mask": seen}))[0]
    same_dtype = SPEC.formula(**arguments)[0]
    rounding = SPEC.rounding(dtype, exact_arguments, torch.zeros_like(truth), torch.zeros_like(lse))
    with pytest.raises(AssertionError, match="out .* is off by"):
        assert_close("out", off, same_dtype, truth, rounding)


def test_float32_is_held_to_float32() -> None:
    same_dtype, exact, rounding = results(torch.float32)
    for name, truth in exact.items():
        with pytest.raises(AssertionError, match=f"{name} .* is off by"):
            assert_close(name, truth.bfloat16().float(), same_dtype[name], truth, rounding)


def test_an_overflow_of_the_formula_excuses_nothing() -> None:
    _, exact, rounding = results(torch.float16)
    overflown = torch.full_like(exact["out"], torch.nan, dtype=torch.float16)
    with pytest.raises(AssertionError):
        assert_close("out", overflown, overflown, exact["out"], rounding)


def test_equal_infinities_agree_and_others_do_not() -> None:
    hidden = torch.tensor([-torch.inf, 1.0])
    assert_same("lse", hidden, hidden.clone())
    for other in (torch.tensor([torch.inf, 1.0]), torch.tensor([-1e30, 1.0])):
        with pytest.raises(AssertionError):
            assert_same("lse", other, hidden)


def test_another_shape_or_dtype_is_no_agreement() -> None:
    x = torch.ones(3)
    for other in (torch.ones(1, 3), torch.ones(3, dtype=torch.float64)):
        with pytest.raises(AssertionError):
            assert_same("x", other, x)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_same_rejects_a_small_relative_difference(dtype: torch.dtype) -> None:
    x = torch.randn(64, dtype=dtype)
    assert_same("x", x * (1 + 4 * torch.finfo(dtype).eps), x)
    with pytest.raises(AssertionError):
        assert_same("x", x * 1.001, x)
