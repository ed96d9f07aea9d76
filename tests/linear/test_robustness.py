"""What breaks kernels of this kind: sizes, strides, magnitudes and what is hidden.

All compare results and every gradient with the formula in float64 (never NaN, never wrong).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.comparison import assert_same
from tests.conformance.evaluate import (
    DTYPES,
    assert_agrees,
    assert_arguments_agree,
    cotangents,
    with_gradients,
)
from tests.conformance.spec import OpSpec
from tests.linear.spec import CASES, CASES_WITH_STATE, LINEAR, WITH_STATE
from tests.strategies import Case

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
directions = pytest.mark.parametrize("causal", (False, True), ids=("not causal", "causal"))
BASE = Case(queries=40, keys=40, width=16, value_width=12, positive=True)
CAUSAL = BASE.but(causal=True)
STATE = CAUSAL.but(options={"state": True})


def agrees(
    spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device, **replaced: Any
) -> dict[str, Tensor]:
    """Builds the case, with some arguments replaced by functions of themselves, and compares."""
    arguments = spec.build(case, dtype, device)
    for name, change in replaced.items():
        arguments[name] = change(arguments[name])
    results = assert_arguments_agree(spec, arguments, case.strides)
    assert not any(x.isnan().any() for x in results.values())
    return results


EMPTY = {
    "batch": (LINEAR, Case(batch=0)),
    "query heads": (LINEAR, Case(heads=0, kv_heads=1)),
    "query heads, causal": (LINEAR, CAUSAL.but(heads=0, kv_heads=1, options={"decay": True})),
    "query heads beside a state": (WITH_STATE, STATE.but(heads=0, kv_heads=1)),
    "all heads": (LINEAR, Case(heads=0, kv_heads=0)),
    "queries": (LINEAR, Case(queries=0)),
    "keys": (LINEAR, Case(keys=0)),
    "keys, eps 0": (LINEAR, Case(keys=0, options={"eps": 0.0})),
    "keys, without norms": (LINEAR, Case(keys=0, options={"normalize": False})),
    "queries and keys": (LINEAR, Case(queries=0, keys=0)),
    "tokens": (LINEAR, CASES["everything"].but(queries=0, keys=0)),
    "batch with everything": (LINEAR, CASES["everything"].but(batch=0)),
    "packed": (LINEAR, CASES["packed and causal"].but(queries=0, keys=0, sequences=((0, 0),) * 2)),
    "merged": (LINEAR, CASES["merged batch and heads"].but(batch=0)),
    "tokens beside a state": (WITH_STATE, CASES_WITH_STATE["everything"].but(queries=0, keys=0)),
    "batch beside a state": (WITH_STATE, CASES_WITH_STATE["everything"].but(batch=0)),
}


@every_dtype
@pytest.mark.parametrize("name", EMPTY)
def test_sizes_of_zero(
    name: str, dtype: torch.dtype, device: torch.device, uninitialized_memory_is_nan: None
) -> None:
    """Results of the right shape; gradients of what contributes nothing are zeros."""
    assert_agrees(*EMPTY[name], dtype, device)


@every_dtype
@pytest.mark.parametrize("name", ("everything", "a state", "without norms"))
def test_one_token(name: str, dtype: torch.dtype, device: torch.device) -> None:
    assert_agrees(WITH_STATE, CASES_WITH_STATE[name].but(queries=1, keys=1), dtype, device)


@directions
@every_dtype
@pytest.mark.parametrize("keys", (15, 63, 65, 129, 257, 600))
def test_lengths_that_fill_no_block(
    keys: int, causal: bool, dtype: torch.dtype, device: torch.device
) -> None:
    case = BASE.but(batch=1, keys=keys, causal=causal, mask="BN", options={"decay": causal})
    agrees(LINEAR, case.but(queries=keys if causal else 17), dtype, device)


@every_dtype
@pytest.mark.parametrize(
    "widths", ((1, 1), (1, 256), (256, 1), (13, 13), (13, 256), (256, 13), (80, 96), (130, 200))
)
def test_widths(widths: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    case = STATE.but(batch=1, width=widths[0], value_width=widths[1], options={"decay": True})
    agrees(WITH_STATE, case, dtype, device)


@every_dtype
@pytest.mark.parametrize("width", (1, 2, 7, 13, 16))
def test_widths_of_taylor(width: int, dtype: torch.dtype, device: torch.device) -> None:
    case = STATE.but(batch=1, width=width, positive=False, options={"feature_map": "taylor"})
    agrees(WITH_STATE, case, dtype, device)


@every_dtype
def test_drawn_widths_and_lengths(dtype: torch.dtype, device: torch.device) -> None:
    """Wider and longer than the cases of the conformance suite, where vectors and blocks end."""

    @settings(max_examples=40)
    @given(WITH_STATE.drawn(), *[st.integers(1, 70)] * 2, st.integers(1, 150))
    def check(case: Case, width: int, value_width: int, tokens: int) -> None:
        if case.options["feature_map"] == "taylor":
            width = width % 12 + 1
        case = case.but(width=width, value_width=value_width, queries=tokens, keys=tokens)
        case = case.but(wide_parameters=True)  # float16 does not hold sums over all pairs
        assert_agrees(WITH_STATE, case, dtype, device)

    check()


@directions
@every_dtype
def test_mask_that_hides_everything(causal: bool, dtype: torch.dtype, device: torch.device) -> None:
    case = BASE.but(causal=causal, mask="BN", options={"decay": causal})
    for eps in (0.0, 1e-5):
        results = agrees(LINEAR, case.but(options={"eps": eps}), dtype, device, mask=zeros)
        assert not any(x.any() for x in results.values())


zeros: Callable[[Tensor], Tensor] = torch.zeros_like


@every_dtype
def test_mask_that_hides_everything_leaves_the_state_to_decay(
    dtype: torch.dtype, device: torch.device
) -> None:
    case = STATE.but(queries=3, keys=3, mask="BN", options={"decay": True})
    results = agrees(WITH_STATE, case, dtype, device, mask=zeros)
    arguments = WITH_STATE.build(case, dtype, device)
    left = arguments["decay"].to(arguments["state"].dtype)[:, None] ** 3
    assert_same("key_sum", results["final_key_sum"], arguments["key_sum"] * left)
    assert results["out"].any()


@every_dtype
def test_decay_of_one_is_no_decay(dtype: torch.dtype, device: torch.device) -> None:
    case = STATE.but(queries=300, keys=300, batch=1)
    ones = agrees(
        WITH_STATE, case.but(options={"decay": True}), dtype, device, decay=torch.ones_like
    )
    without = agrees(WITH_STATE, case, dtype, device)
    for name, result in without.items():
        size = result.abs().max() * torch.finfo(result.dtype).eps
        assert (ones[name] - result).abs().max() <= 16 * size, name


@every_dtype
@pytest.mark.parametrize("decay", (1e-3, 1e-7))
def test_tiny_decay(decay: float, dtype: torch.dtype, device: torch.device) -> None:
    """Its powers underflow, and must not be divided by."""
    case = STATE.but(queries=300, keys=300, batch=1, options={"decay": True})
    agrees(WITH_STATE, case, dtype, device, decay=lambda x: torch.full_like(x, decay))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_decay_near_the_smallest_number(dtype: torch.dtype, device: torch.device) -> None:
    case = STATE.but(batch=1, options={"decay": True})
    agrees(WITH_STATE, case, dtype, device, decay=lambda x: torch.full_like(x, 2.0**-120))


@directions
@pytest.mark.parametrize(
    ("dtype", "size"),
    (
        (torch.float64, 2.0**100),
        (torch.float32, 2.0**20),
        (torch.bfloat16, 2.0**20),
        (torch.float16, 32.0),
    ),
    ids=str,
)
def test_huge_and_tiny_features(
    size: float, dtype: torch.dtype, causal: bool, device: torch.device
) -> None:
    """A weighted mean does not depend on their size, but for eps."""
    case = BASE.but(causal=causal, options={"eps": 0.0})
    plain = agrees(LINEAR, case, dtype, device)
    for factor in (size, 1 / size):
        scaled = {"query": lambda q, f=factor: q * f, "key": lambda k, f=factor: k * f}
        results = agrees(LINEAR, case, dtype, device, **scaled)
        for name in ("out", "value"):
            rounding = 2 * torch.finfo(dtype).eps * plain[name].abs().max()
            assert (results[name] - plain[name]).abs().max() <= rounding, name


@every_dtype
@pytest.mark.parametrize("feature_map", ("elu_plus_one", "softplus", "relu", "taylor"))
def test_features_far_from_zero(feature_map: str, dtype: torch.dtype, device: torch.device) -> None:
    """exp(-12) is far below a rounding of one, and softplus(12) is 12."""
    case = CAUSAL.but(width=6, positive=False, options={"feature_map": feature_map})
    for sign in (-12, 12):
        agrees(
            LINEAR, case, dtype, device, query=lambda q, s=sign: q + s, key=lambda k, s=sign: k + s
        )


@every_dtype
def test_expanded_gradient_of_a_sum(dtype: torch.dtype, device: torch.device) -> None:
    arguments = WITH_STATE.build(STATE.but(mask="BN", options={"decay": True}), dtype, device)
    leaves = [x.requires_grad_() for x in WITH_STATE.floating(arguments).values()]
    results = WITH_STATE.run(**arguments)
    total = torch.stack([x.double().sum() for x in results]).sum()
    expanded = torch.autograd.grad(total, leaves, retain_graph=True)
    ones = torch.autograd.grad(results, leaves, [torch.ones_like(x) for x in results])
    for name, a, e in zip(WITH_STATE.floating(arguments), expanded, ones):
        assert_same(name, a, e)


@every_dtype
@pytest.mark.parametrize("name", ("query", "key", "value", "state", "key_sum"))
def test_last_dimension_that_is_not_contiguous(
    name: str, dtype: torch.dtype, device: torch.device
) -> None:
    arguments = WITH_STATE.build(STATE, dtype, device)
    strided = arguments | {name: arguments[name].mT.contiguous().mT}
    assert strided[name].stride(-1) != 1
    grads = cotangents(*WITH_STATE.run(**arguments))
    expected, actual = (
        with_gradients(WITH_STATE, WITH_STATE.run, args, *grads) for args in (arguments, strided)
    )
    for result, x in actual.items():
        assert_same(result, x, expected[result])


@directions
@every_dtype
def test_slices_of_one_projection(dtype: torch.dtype, causal: bool, device: torch.device) -> None:
    """query, key and value out of one tensor [B, M, 3, H, D]: a storage offset and a gap."""
    joint = torch.rand(2, 19, 3, 4, 16, device=device).to(dtype)
    query, key, value = joint.permute(2, 0, 3, 1, 4)
    assert_arguments_agree(LINEAR, {"query": query, "key": key, "value": value, "causal": causal})


@every_dtype
def test_mask_with_strides(dtype: torch.dtype, device: torch.device) -> None:
    """Every other column of a larger one, one row for all, and a transposed one."""
    arguments = LINEAR.build(BASE, dtype, device)
    wide = torch.rand(2, 80, generator=torch.Generator().manual_seed(0)).to(device) < 0.5
    for mask in (wide[:, ::2], wide[:1, :40].expand(2, 40), wide[:, :40].mT.contiguous().mT):
        assert_arguments_agree(LINEAR, arguments | {"mask": mask})


@every_dtype
@pytest.mark.parametrize("layout", ("BHMD", "BND"))
def test_single_key_head_sums_over_all_query_heads(
    layout: str, dtype: torch.dtype, device: torch.device
) -> None:
    agrees(LINEAR, CAUSAL.but(heads=8, kv_heads=1, layout=layout), dtype, device)


@every_dtype
def test_grouped_heads_equal_repeated_ones(dtype: torch.dtype, device: torch.device) -> None:
    arguments = LINEAR.build(CAUSAL.but(heads=6, kv_heads=2), dtype, device)
    repeated = {n: arguments[n].repeat_interleave(3, 1) for n in ("key", "value")}
    assert_same("out", LINEAR.out(**(arguments | repeated)), LINEAR.out(**arguments))


@every_dtype
def test_later_tokens_change_nothing_before(dtype: torch.dtype, device: torch.device) -> None:
    """Not a bit."""
    arguments = LINEAR.build(CAUSAL.but(queries=200, keys=200), dtype, device)
    out = LINEAR.out(**arguments)
    for first in (1, 100, 150):
        other = {name: arguments[name].clone() for name in ("query", "key", "value")}
        for x in other.values():
            x[:, :, first:] *= 7
        changed = LINEAR.out(**(arguments | other))
        assert torch.equal(changed[:, :, :first], out[:, :, :first])
        assert not torch.equal(changed[:, :, first:], out[:, :, first:])
