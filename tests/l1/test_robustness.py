"""Distances, scales and eps at the ends of their ranges: each is a sentence, in every dtype.

All compare results, lse and every gradient with the formula in float64 (never NaN, never wrong).
"""

from functools import partial

import pytest
import torch

import attn_ops
from attn_ops.l1 import in_blocks, reference
from tests.comparison import assert_same
from tests.conformance.evaluate import DTYPES, assert_arguments_agree, assert_changed_case_agrees
from tests.conformance.spec import OpSpec
from tests.l1.formula import l1_scores
from tests.l1.spec import INVERSE, L1, SCORES
from tests.strategies import Case

agrees = partial(assert_changed_case_agrees, L1)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
dense = pytest.mark.parametrize("spec", (L1, SCORES), ids=("l1", "l1_scores"))

BASE = Case(batch=2, heads=2, queries=40, keys=48, width=16, value_width=12)


@every_dtype
@pytest.mark.parametrize("far", (40.0, 1000.0))
def test_queries_far_from_every_key(far: float, dtype: torch.dtype, device: torch.device) -> None:
    """Every exp(score) of the row underflows: only a running maximum has weights there."""
    results = agrees(BASE, dtype, device, query=lambda q: q + far)
    if far == 1000.0:
        assert results["lse"].max() < -3000
    assert results["out"].any(-1).all()


@every_dtype
@pytest.mark.parametrize("scale", (100.0, -100.0, 1e3, 1.0, 0.0, 1e-30))
def test_scales_beyond_the_range_of_the_exponential(
    scale: float, dtype: torch.dtype, device: torch.device
) -> None:
    results = agrees(BASE.but(options={"scale": scale}), dtype, device)
    if scale == 0.0:
        assert not results["query"].any() and not results["key"].any()


@every_dtype
@pytest.mark.parametrize("eps", (1e-3, 1e-2, 30.0, 1e4))
@dense
def test_eps_of_every_size(
    spec: OpSpec, eps: float, dtype: torch.dtype, device: torch.device
) -> None:
    """The smallest makes the nearest key all that is seen, the largest every key the same."""
    options = {"score": "inverse", "scale": 0.25, "eps": eps}
    assert_changed_case_agrees(spec, BASE.but(options=options), dtype, device)


@every_dtype
@dense
def test_smallest_eps_at_equal_tokens(
    spec: OpSpec, dtype: torch.dtype, device: torch.device
) -> None:
    """The largest scores and slopes that there can be, where the derivative is zero."""
    arguments = spec.build(BASE.but(keys=40), dtype, device)
    arguments["key"] = arguments["query"].clone()
    floor = max(1 / torch.finfo(dtype).max, 1e-6)
    arguments |= {"score": "inverse", "eps": 2 * floor}
    leaves = [arguments[name].requires_grad_() for name in ("query", "key")]
    out = spec.out(**arguments)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert out.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)
    if spec is L1:  # a token sees itself alone
        assert (out - arguments["value"][:, :, :40]).abs().max() <= 1e-2


def test_default_eps_is_a_thousandth(device: torch.device) -> None:
    arguments = L1.build(BASE, torch.float64, device)
    default = attn_ops.l1_attention(**arguments, score="inverse")
    assert torch.equal(default, attn_ops.l1_attention(**arguments, score="inverse", eps=1e-3))
    exact = L1.formula(**arguments, score="inverse", eps=1e-3)[0]
    assert_same("out", default, exact)


@every_dtype
@dense
def test_eps_plays_no_part_in_a_negative_score(
    spec: OpSpec, dtype: torch.dtype, device: torch.device
) -> None:
    arguments = spec.build(BASE, dtype, device)
    assert torch.equal(spec.out(**arguments), spec.out(**arguments, eps=7.0))


@every_dtype
@pytest.mark.parametrize("size", (2.0**-12, 2.0**8, 2.0**12))
def test_tokens_of_every_size(size: float, dtype: torch.dtype, device: torch.device) -> None:
    """In float16 the sum over the widths is beyond its range for the last."""
    case = BASE.but(width=64, options={"scale": 0.125 / size})
    agrees(case, dtype, device, query=lambda q: q * size, key=lambda k: k * size)


@every_dtype
@pytest.mark.parametrize("options", ({}, INVERSE), ids=("negative", "inverse"))
def test_shifting_every_token_changes_nothing(
    options: dict, dtype: torch.dtype, device: torch.device
) -> None:
    """Bit by bit, where the shifted tokens are numbers of the dtype."""
    arguments = L1.build(BASE.but(options=options), dtype, device)
    for name in ("query", "key"):
        arguments[name] = (arguments[name] * 4).round() / 4
    shifted = arguments | {name: arguments[name] + 8 for name in ("query", "key")}
    for name, a, e in zip(L1.results, L1.run(**shifted), L1.run(**arguments)):
        assert torch.equal(a, e), name


@every_dtype
@dense
def test_widths_at_both_ends_of_what_kernels_pad(
    spec: OpSpec, dtype: torch.dtype, device: torch.device
) -> None:
    for width in (1, 15, 17, 31, 32, 33, 64, 65, 127, 129, 255, 256):
        arguments = spec.build(BASE.but(batch=1, width=width, options=INVERSE), dtype, device)
        assert_arguments_agree(spec, arguments)


@pytest.mark.parametrize("differences", (1, 100, 1 << 20))
def test_scores_in_blocks_and_by_some_widths_equal_the_formula(
    differences: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "DIFFERENCES", differences)
    monkeypatch.setattr(in_blocks, "BLOCK_SCORES", 200)
    case = Case(heads=6, kv_heads=2, queries=11, keys=13, width=5)
    arguments = SCORES.build(case, torch.float64, device)
    query, key = (arguments[name].requires_grad_() for name in ("query", "key"))
    for scale, eps in ((0.7, None), (0.7, 0.25)):
        options = {} if eps is None else {"score": "inverse", "eps": eps}
        (expected,) = l1_scores(query=query, key=key, scale=scale, **options)
        assert_same("scores", in_blocks.scores(query, key, scale, eps).detach(), expected)
    (expected,) = l1_scores(query=query, key=key, scale=0.7)
    grad = torch.randn_like(expected)
    actual = in_blocks.scores_backward(grad, query, key, -0.7, [True, True])
    for name, a, e in zip(
        ("query", "key"), actual, torch.autograd.grad(expected, (query, key), grad)
    ):
        assert_same(name, a.detach(), e)
    only_key = in_blocks.scores_backward(grad, query, key, -0.7, [False, True])
    assert only_key[0].shape == (0,) and torch.equal(only_key[1], actual[1])
