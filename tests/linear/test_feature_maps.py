"""The feature maps as functions, and inside of the ops."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attn_ops import feature_maps, linear_attention, linear_attention_with_state
from tests.comparison import assert_same
from tests.conformance.evaluate import DTYPES
from tests.linear.formula import FEATURES
from tests.linear.spec import MAPS

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_map = pytest.mark.parametrize("name", MAPS)


def normal(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_the_names_are_those_of_the_specification() -> None:
    assert tuple(feature_maps.FEATURE_MAPS) == MAPS
    for name, function in feature_maps.FEATURE_MAPS.items():
        assert function is getattr(feature_maps, name)


@every_map
@every_dtype
def test_equals_the_formula(name: str, dtype: torch.dtype, device: torch.device) -> None:
    x = torch.cat([normal(3, 4, 5), normal(3, 4, 5) * 10]).to(device, dtype)
    actual = feature_maps.FEATURE_MAPS[name](x)
    assert actual.dtype == dtype
    assert actual.shape[-1] == feature_maps.num_features(name, 5)
    exact = FEATURES[name](x.double())
    # Taylor features are products of a few rounded numbers.
    error = ((actual.double() - exact).abs() - torch.finfo(dtype).tiny).clamp_min(0)
    assert (error <= 4 * torch.finfo(dtype).eps * exact.abs()).all()


@given(width=st.integers(1, 40), seed=st.integers(0, 99), size=st.sampled_from((0.1, 1.0, 5.0)))
def test_taylor_features_expand_the_exponential(width: int, seed: int, size: float) -> None:
    query, key = (normal(6, width, seed=seed + i) * size for i in range(2))
    scores = query @ key.T / width**0.5
    product = feature_maps.taylor(query) @ feature_maps.taylor(key).T
    assert_same("q·k", product, 1 + scores + scores**2 / 2)
    assert (product > 0).all()  # (1 + (1 + s)**2) / 2


def test_taylor_features_stand_in_the_order_that_is_documented() -> None:
    """1, then u, then the pairs (0,0), (0,1), ..., (1,1), ..."""
    x = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)
    u, half = x * 3**-0.25, 0.5**0.5
    squares = [u[0] ** 2 * half, u[0] * u[1], u[0] * u[2], u[1] ** 2 * half, u[1] * u[2]]
    expected = torch.stack([torch.ones_like(u[0]), *u, *squares, u[2] ** 2 * half])
    assert_same("features", feature_maps.taylor(x), expected)
    assert feature_maps.num_features("taylor", 16) == 153


@every_dtype
@pytest.mark.parametrize("name", ("elu_plus_one", "softplus"))
def test_positive_features_stay_positive(
    name: str, dtype: torch.dtype, device: torch.device
) -> None:
    """exp(x) is added to nothing that would swallow it."""
    x = torch.linspace(-9, 9, 101, device=device).to(dtype)
    y = feature_maps.FEATURE_MAPS[name](x)
    assert (y > 0).all()
    assert (y.diff() >= 0).all()


@pytest.mark.parametrize("name", ("elu_plus_one", "softplus", "relu"))
def test_far_from_zero_the_derivatives_are_finite(name: str, device: torch.device) -> None:
    x = torch.tensor([-1e4, -100, 0.0, 100, 1e4], device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(feature_maps.FEATURE_MAPS[name](x).sum(), x)
    assert grad[0] == 0 and grad[-1] == 1 and (grad >= 0).all() and (grad <= 1).all()
    if name == "relu":
        assert grad[2] == 0


@every_map
def test_derivatives_of_both_orders(name: str, device: torch.device) -> None:
    x = normal(3, 4).to(device).requires_grad_()
    function = feature_maps.FEATURE_MAPS[name]
    torch.autograd.gradcheck(function, x, check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(function, x, check_fwd_over_rev=True)


@every_map
def test_vmap_and_compile(name: str, device: torch.device) -> None:
    x, function = normal(3, 4, 5).to(device), feature_maps.FEATURE_MAPS[name]
    assert_same("vmap", torch.func.vmap(function, 1, 1)(x), function(x))
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    assert_same("compiled", compiled(x), function(x))


@every_map
@pytest.mark.parametrize("options", ({}, {"causal": True}), ids=("not causal", "causal"))
def test_inside_equals_outside(name: str, options: dict[str, Any], device: torch.device) -> None:
    """The features of the op are those of the function, 153 of them for width 16."""
    query, key, value = (normal(2, 3, 20, 16, seed=i).to(device) for i in range(3))
    inside = linear_attention(query, key, value, feature_map=name, normalize=False, **options)
    features = feature_maps.FEATURE_MAPS[name]
    outside = linear_attention(features(query), features(key), value, normalize=False, **options)
    assert_same("out", inside, outside)


@every_map
def test_state_is_the_sum_over_the_features(name: str, device: torch.device) -> None:
    key, value = normal(1, 2, 9, 4).to(device), normal(1, 2, 9, 3, seed=1).to(device)
    _, state, key_sum = linear_attention_with_state(key, key, value, feature_map=name)
    features = feature_maps.FEATURE_MAPS[name](key)
    assert_same("state", state, features.mT @ value)
    assert_same("key_sum", key_sum, features.sum(2))
