"""What rounding excuses in the linear ops: the formula itself, and no wrong law."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.comparison import Rounding, assert_close
from tests.conformance.evaluate import DTYPES, cotangents, in_dtype, with_gradients
from tests.linear.spec import WITH_STATE
from tests.strategies import Case

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
Arguments = dict[str, Any]
CASE = Case(
    heads=4,
    queries=16,
    keys=16,
    causal=True,
    mask="BN",
    options={"state": True, "decay": True, "eps": 2.0, "feature_map": "softplus"},
)
CPU = torch.device("cpu")


def results(
    dtype: torch.dtype, **options: Any
) -> tuple[Arguments, dict[str, Tensor], dict[str, Tensor], Rounding]:
    """Arguments, the formula in this dtype and in float64, and its rounding."""
    arguments = WITH_STATE.build(CASE.but(options=options), dtype, CPU)
    arguments["decay"] = torch.tensor([0.875, 0.75, 0.5, 0.9375], dtype=arguments["decay"].dtype)
    exact_arguments = in_dtype(arguments, torch.float64)
    grads = cotangents(*WITH_STATE.formula(**exact_arguments))
    exact, same_dtype = (
        with_gradients(WITH_STATE, WITH_STATE.formula, args, *grads)
        for args in (exact_arguments, arguments)
    )
    return arguments, same_dtype, exact, WITH_STATE.rounding(dtype, exact_arguments, *grads)


@every_dtype
def test_accepts_the_formula_in_its_own_dtype_and_its_rounded_truth(dtype: torch.dtype) -> None:
    _, same_dtype, exact, rounding = results(dtype)
    for name, truth in exact.items():
        assert_close(name, same_dtype[name], same_dtype[name], truth, rounding)
        assert_close(name, truth.to(same_dtype[name].dtype), same_dtype[name], truth, rounding)


def last_row_is_missing(x: Tensor) -> Tensor:
    return torch.cat([x[..., :-1, :], torch.zeros_like(x[..., -1:, :])], -2)


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "rows in another order": lambda x: x.roll(1, -2),
    "last row missing": last_row_is_missing,
    "a group's gradient halved": lambda x: x / 2,
    "another sign": lambda x: -x,
    "a NaN": lambda x: torch.where(x == x.max(), torch.nan, x),
    "infinite": lambda x: torch.full_like(x, torch.inf),
}


@every_dtype
@pytest.mark.parametrize("wrong", WRONG)
def test_rejects_wrong_results(wrong: str, dtype: torch.dtype) -> None:
    _, same_dtype, exact, rounding = results(dtype)
    for name, truth in exact.items():
        x = same_dtype[name]
        bad = WRONG[wrong](x.reshape(-1, 1) if x.dim() == 1 else x).view(x.shape)
        with pytest.raises(AssertionError, match=f"{name} .* is off by"):
            assert_close(name, bad, x, truth, rounding)


def first_key_seen_late(a: Arguments) -> Arguments:
    """The query does not see its own token."""
    late = {n: torch.cat([a[n][:, :, :1] * 0, a[n][:, :, :-1]], 2) for n in ("key", "value")}
    mask = torch.cat([torch.zeros_like(a["mask"][:, :1]), a["mask"][:, :-1]], 1)
    return a | late | {"mask": mask}


LAWS: dict[str, Callable[[Arguments], Arguments]] = {
    "no decay": lambda a: a | {"decay": None},
    "decay of the wrong head": lambda a: a | {"decay": a["decay"].roll(1)},
    "key head of the wrong group": lambda a: a | {"key": a["key"].roll(1, 1)},
    "no mask": lambda a: a | {"mask": None},
    "no eps": lambda a: a | {"eps": 0.0},
    "no state": lambda a: a | {"state": None, "key_sum": None},
    "state that is not aged": lambda a: (
        a | {"state": a["state"] / a["decay"].to(a["state"].dtype)[:, None, None]}
    ),
    "own token unseen": first_key_seen_late,
    "another feature map": lambda a: a | {"feature_map": "elu_plus_one"},
    "not normalised": lambda a: a | {"normalize": False},
}


@every_dtype
@pytest.mark.parametrize("law", LAWS)
def test_rejects_a_wrong_law(law: str, dtype: torch.dtype) -> None:
    arguments, same_dtype, exact, rounding = results(dtype)
    bad, *_ = WITH_STATE.formula(**LAWS[law](arguments))
    with pytest.raises(AssertionError, match="out .* is off by"):
        assert_close("out", bad, same_dtype["out"], exact["out"], rounding)


@pytest.mark.parametrize("normalize", (False, True), ids=("sums", "means"))
def test_float32_is_held_to_float32(normalize: bool) -> None:
    _, same_dtype, exact, rounding = results(torch.float32, normalize=normalize)
    for name, truth in exact.items():
        with pytest.raises(AssertionError, match=f"{name} .* is off by"):
            assert_close(name, truth.bfloat16().float(), same_dtype[name], truth, rounding)
