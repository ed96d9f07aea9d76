"""The gradient of decay, which weighs every pair of tokens by the distance between them."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.comparison import Rounding, assert_close
from tests.conformance.evaluate import DTYPES, assert_arguments_agree, in_dtype, with_gradients
from tests.linear.spec import LINEAR, WITH_STATE
from tests.strategies import Case

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
DECAYS = (0.9990234375, 0.75)
CASE = Case(
    batch=1,
    heads=2,
    kv_heads=1,
    queries=2000,
    keys=2000,
    width=4,
    value_width=3,
    causal=True,
    options={"decay": True, "feature_map": "softplus"},
)


def arguments_of(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    arguments = WITH_STATE.build(case, dtype, device)
    return arguments | {
        "decay": torch.tensor(DECAYS, device=device, dtype=arguments["decay"].dtype)
    }


@functools.cache
def long_problem(normalize: bool, device: torch.device) -> tuple[Any, ...]:
    """A case, gradients of its results, the exact gradient of decay, and its magnitudes."""
    case = CASE.but(options={"normalize": normalize, "state": True})
    arguments = in_dtype(arguments_of(case, torch.float32, device), torch.float64)
    generator = torch.Generator().manual_seed(2)
    results = WITH_STATE.formula(**arguments)
    grads = [torch.rand(x.shape, generator=generator).bfloat16().half() for x in results]
    grads = [x.to(device, torch.float64) for x in grads]
    exact = with_gradients(WITH_STATE, WITH_STATE.formula, arguments, *grads)
    return case, grads, exact["decay"], WITH_STATE.magnitudes(arguments, *grads)


@every_dtype
@pytest.mark.parametrize("normalize", (False, True), ids=("sums", "means"))
def test_long_sequence(normalize: bool, dtype: torch.dtype, device: torch.device) -> None:
    """As near as rounding allows: the formula in this dtype excuses nothing here."""
    case, grads, truth, magnitudes = long_problem(normalize, device)
    arguments = arguments_of(case, dtype, device)
    actual = with_gradients(WITH_STATE, WITH_STATE.run, arguments, *grads)
    assert_close("decay", actual["decay"], truth, truth, Rounding(dtype, *magnitudes))


@every_dtype
def test_masked_tokens_still_age_the_others(dtype: torch.dtype, device: torch.device) -> None:
    """Whether a key is hidden or is zero is one and the same."""
    arguments = arguments_of(CASE.but(queries=90, keys=90, mask="BN"), dtype, device)
    arguments["mask"][:, 10:60] = False
    hidden = assert_arguments_agree(WITH_STATE, arguments)
    assert hidden["decay"].abs().min() > 0


@every_dtype
def test_packed(dtype: torch.dtype, device: torch.device) -> None:
    """Ages do not reach into the next sequence: between single tokens there are none."""
    case = CASE.but(queries=60, keys=60)
    alone = LINEAR.build(case.but(sequences=((1, 1),) * 60), dtype, device)
    assert not assert_arguments_agree(LINEAR, alone)["decay"].any()
    pairs = LINEAR.build(case.but(sequences=((2, 2),) * 30), dtype, device)
    assert assert_arguments_agree(LINEAR, pairs)["decay"].any()


def test_decay_of_a_network_that_learns_it(device: torch.device) -> None:
    """A logit per head, as models have it: its gradient finds the decay that made the data."""
    arguments = LINEAR.build(CASE.but(queries=40, keys=40), torch.float64, device)
    wanted = torch.tensor([0.95, 0.5], dtype=torch.float64, device=device)
    target = LINEAR.out(**(arguments | {"decay": wanted}))
    logits = torch.zeros(2, dtype=torch.float64, device=device, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        out = LINEAR.out(**(arguments | {"decay": logits.sigmoid()}))
        loss = (out - target).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(logits.sigmoid().detach(), wanted, rtol=1e-3, atol=1e-3)
