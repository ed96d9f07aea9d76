"""Long sequences: the digits of float32, and 16 bits that neither overflow nor stop growing."""

import pytest
import torch
from torch import Tensor

import attn_ops
from tests.linear.formula import FEATURES

HALVES = (torch.bfloat16, torch.float16)
directions = pytest.mark.parametrize("causal", (False, True), ids=("not causal", "causal"))


def normal(*sizes: int, seed: int) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


def running_sums(terms: Tensor) -> Tensor:
    """One after the other, along the tokens [N, ...]."""
    total, sums = torch.zeros_like(terms[0]), torch.empty_like(terms)
    for n, term in enumerate(terms.unbind()):
        total = total + term
        sums[n] = total
    return sums


def by_token(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """out and the gradients of query, key and value by the recurrence, not normalised."""
    states = running_sums(k.unsqueeze(2) * v.unsqueeze(1))  # [N, D, E]
    out = torch.einsum("nd,nde->ne", q, states)
    grad_query = torch.einsum("ne,nde->nd", grad, states)
    later = running_sums((q.unsqueeze(2) * grad.unsqueeze(1)).flip(0)).flip(0)
    grad_key = torch.einsum("ne,nde->nd", v, later)
    grad_value = torch.einsum("nd,nde->ne", k, later)
    return out, grad_query, grad_key, grad_value


def normalised_by_token(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    states = running_sums(k.unsqueeze(2) * v.unsqueeze(1))
    return torch.einsum("nd,nde->ne", q, states) / (q * running_sums(k)).sum(1, keepdim=True)


def error(actual: Tensor, exact: Tensor) -> float:
    return (actual.double() - exact).abs().max().item()


def test_float32_is_twice_as_far_off_as_a_recurrence_at_most(device: torch.device) -> None:
    length, width = 16384, 32
    inputs = [normal(length, width, seed=i).to(device) for i in range(4)]
    recurrence = by_token(*inputs)
    exact = by_token(*(x.double() for x in inputs))
    q, k, v = (x[None, None].requires_grad_() for x in inputs[:3])
    out = attn_ops.linear_attention(q, k, v, causal=True, normalize=False)
    actual = (out, *torch.autograd.grad(out, (q, k, v), inputs[3][None, None]))
    for name, a, r, e in zip(("out", "query", "key", "value"), actual, recurrence, exact):
        assert error(a[0, 0], e) <= 2 * error(r, e), name


def test_float32_normalised_likewise(device: torch.device) -> None:
    length, width = 16384, 32
    q, k, v = (normal(length, width, seed=i).to(device) for i in range(3))
    features = FEATURES["elu_plus_one"]
    recurrence = normalised_by_token(features(q), features(k), v)
    exact = normalised_by_token(features(q.double()), features(k.double()), v.double())
    q, k, v = (x[None, None] for x in (q, k, v))
    out = attn_ops.linear_attention(q, k, v, causal=True, eps=0.0, feature_map="elu_plus_one")
    assert error(out[0, 0], exact) <= 2 * error(recurrence, exact)


@directions
@pytest.mark.parametrize("feature_map", ("elu_plus_one", "relu", "softplus", "taylor"))
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_mean_of_ones_is_one_at_any_length(
    dtype: torch.dtype, feature_map: str, causal: bool, device: torch.device
) -> None:
    """Neither sum may overflow (65536 in float16) or lose what is added (256 in bfloat16)."""
    length = 65536
    query, key = (normal(1, 1, length, 4, seed=i).to(device, dtype) for i in range(2))
    key[:, :, 0] = query[..., 0] = 1  # or relu might leave nothing to divide by
    value = torch.ones(1, 1, length, 3, device=device, dtype=dtype)
    tensors = [x.requires_grad_() for x in (query, key, value)]
    out = attn_ops.linear_attention(*tensors, causal=causal, eps=0.0, feature_map=feature_map)
    assert (out - 1).abs().max() <= 2 * torch.finfo(dtype).eps
    grads = torch.autograd.grad(out, tensors, torch.ones_like(out))
    assert all(x.isfinite().all() for x in grads)
    # Each query gives away one in all.
    assert abs(grads[2].double().sum().item() / out.numel() - 1) <= 0.02


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_long_means_are_right(dtype: torch.dtype, device: torch.device) -> None:
    """A value that grows along the sequence: a sum that stopped growing would be seen."""
    length = 65536
    query, key = (normal(1, 1, length, 16, seed=i).to(device, dtype) for i in range(2))
    ramp = torch.linspace(0, 1, length, device=device).to(dtype)
    value = torch.stack([ramp, 1 - ramp], -1)[None, None]
    out = attn_ops.linear_attention(query, key, value, causal=True, feature_map="elu_plus_one")
    q, k = (FEATURES["elu_plus_one"](x[0, 0].double()) for x in (query, key))
    states = (k.unsqueeze(2) * value[0, 0].double().unsqueeze(1)).cumsum(0)
    exact = torch.einsum("nd,nde->ne", q, states) / (1e-5 + (q * k.cumsum(0)).sum(1, keepdim=True))
    assert error(out[0, 0], exact) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_state_of_a_long_sequence_keeps_growing(dtype: torch.dtype, device: torch.device) -> None:
    length = 65536
    ones = torch.ones(1, 1, length, 2, device=device, dtype=dtype)
    _, state, key_sum = attn_ops.linear_attention_with_state(ones, ones, ones)
    assert (state == length).all() and (key_sum == length).all()
    token = ones[:, :, :1]
    out = attn_ops.linear_attention_step(token, token, token, state, key_sum)
    assert (state == length + 1).all() and (out == 1).all()
