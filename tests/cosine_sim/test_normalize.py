"""`l2_normalize`: the separate step beside `normalize=False`."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import attn_ops
from attn_ops import l2_normalize
from tests.comparison import assert_same
from tests.conformance.evaluate import DTYPES
from tests.cosine_sim.formula import unit


def gradient_of_sum(x: Tensor, groups: int = 1) -> Tensor:
    (grad,) = torch.autograd.grad(l2_normalize(x, groups=groups).sum(), x)
    return grad


every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@given(
    sizes=st.lists(st.integers(0, 4), max_size=3),
    groups=st.integers(1, 4),
    width=st.integers(0, 5),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-6, 2),
    seed=st.integers(0, 9),
)
def test_equals_the_formula_in_float64(
    device: torch.device,
    sizes: list[int],
    groups: int,
    width: int,
    dtype: torch.dtype,
    exponent: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*sizes, groups * width, generator=generator).mul(10.0**exponent)
    x = x.to(device, dtype)
    actual, exact = l2_normalize(x, groups=groups), unit(x.double(), groups)
    assert actual.dtype == dtype and actual.shape == x.shape
    # A component is at most 1: rounded once, after a few roundings in the dtype of sums.
    assert torch.all((actual.double() - exact).abs() <= 4 * torch.finfo(dtype).eps)


@every_dtype
def test_zero_stays_zero_with_a_zero_gradient(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(5, 8, device=device).to(dtype)
    x[2] = 0
    x[3, :4] = 0
    x.requires_grad_()
    y, grad = l2_normalize(x, groups=2), gradient_of_sum(x, groups=2)
    assert not y[2].any() and not grad[2].any()
    assert not y[3, :4].any() and not grad[3, :4].any()
    assert grad[0].any() and not grad.isnan().any()


@pytest.mark.parametrize("size", (2.0**-24, 2.0**-14, 2.0**15))
def test_tiny_and_huge_float16_vectors_become_unit(size: float, device: torch.device) -> None:
    """Their squares are below and beyond the range of float16."""
    x = torch.full((3, 16), size, dtype=torch.float16, device=device)
    assert torch.equal(l2_normalize(x), torch.full_like(x, 0.25))


def test_below_the_floor_the_divisor_is_constant(device: torch.device) -> None:
    x = torch.tensor([[3e-13, -4e-13]], device=device, dtype=torch.float64, requires_grad=True)
    assert_same("result", l2_normalize(x), x * 1e12)
    assert_same("gradient", gradient_of_sum(x), torch.full_like(x, 1e12))


def test_one_tensor_gives_a_tensor_and_several_a_tuple(device: torch.device) -> None:
    x, y = torch.randn(2, 3, device=device), torch.randn(4, 3, device=device)
    assert isinstance(l2_normalize(x), Tensor)
    pair = l2_normalize(x, y)
    assert isinstance(pair, tuple)
    for actual, single in zip(pair, (x, y)):
        assert torch.equal(actual, l2_normalize(single))


@pytest.mark.parametrize("groups", (1, 2))
def test_derivatives_of_both_orders(groups: int, device: torch.device) -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64, device=device, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return l2_normalize(x, groups=groups)

    torch.autograd.gradcheck(function, x, check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(function, x, check_fwd_over_rev=True)


def test_vmap_and_compile(device: torch.device) -> None:
    x = torch.randn(3, 5, 8, device=device)
    assert_same("vmap", torch.func.vmap(l2_normalize, 1, 1)(x), l2_normalize(x))
    compiled = torch.compile(l2_normalize, backend="aot_eager", fullgraph=True, dynamic=True)
    assert_same("compiled", compiled(x, groups=2), l2_normalize(x, groups=2))


def test_the_op_passes_opcheck(device: torch.device) -> None:
    x = torch.randn(3, 5, 8, device=device, requires_grad=True)
    for strided in (x, x.transpose(0, 1), x[:1].expand(3, 5, 8)):
        torch.library.opcheck(torch.ops.attn.l2_normalize.default, (strided, 2))


@every_dtype
@pytest.mark.parametrize("groups", (1, 2))
def test_with_unnormalized_attention_it_is_the_attention(
    groups: int, dtype: torch.dtype, device: torch.device
) -> None:
    query, key, value = (torch.randn(2, 2, n, 16, device=device).to(dtype) for n in (9, 12, 12))
    inside = attn_ops.cosine_sim_attention(query, key, value, groups=groups)
    unit_query, unit_key = l2_normalize(query, key, groups=groups)
    outside = attn_ops.cosine_sim_attention(unit_query, unit_key, value, normalize=False)
    error = (inside.double() - outside.double()).abs().max()
    # Unit vectors rounded to the dtype: scores are off by about 8 eps.
    assert error <= 16 * torch.finfo(dtype).eps * value.abs().max()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_mixed_dtypes_are_kept_apart(dtype: torch.dtype, device: torch.device) -> None:
    x, y = torch.randn(2, 3, device=device), torch.randn(2, 3, device=device).to(dtype)
    assert [z.dtype for z in l2_normalize(x, y)] == [torch.float32, dtype]
