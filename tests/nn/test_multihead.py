"""MultiheadAttention against its formula written out by hand."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attn_ops import cosine_sim_attention
from attn_ops.nn import MultiheadAttention
from attn_ops.nn.multihead import rotary
from tests.comparison import Rounding, assert_close, assert_same
from tests.nn.multihead_by_hand import (
    assert_equal_with_gradients,
    by_hand,
    softmax_attention,
    tokens,
)

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped heads": {"kv_heads": 2},
    "one key/value head": {"kv_heads": 1},
    "narrow heads": {"head_dim": 5},
    "bias": {"bias": True},
    "learned scale": {"learned_scale": 3.0, "kv_heads": 2},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("config", CONFIGS)
def test_self_attention_is_the_formula(
    config: str, dtype: torch.dtype, device: torch.device
) -> None:
    module = MultiheadAttention(24, 4, **CONFIGS[config], device=device, dtype=dtype)
    x = tokens(2, 7, 24, device=device, dtype=dtype)
    expected = by_hand(module, x, causal=True)
    assert_equal_with_gradients(module, module(x, causal=True), expected, x)


@pytest.mark.parametrize("config", CONFIGS)
def test_cross_attention_is_the_formula(config: str, device: torch.device) -> None:
    module = MultiheadAttention(24, 4, context_dim=10, **CONFIGS[config], device=device).double()
    x = tokens(2, 3, 24, device=device, dtype=torch.float64)
    context = tokens(2, 9, 10, device=device, dtype=torch.float64)
    assert_equal_with_gradients(module, module(x, context), by_hand(module, x, context), x, context)


def test_options_reach_the_attention(device: torch.device) -> None:
    module = MultiheadAttention(24, 4, device=device)
    x = tokens(2, 7, 24, device=device)
    mask = torch.arange(7, device=device).expand(2, 7) < 4
    assert_same("out", module(x, mask=mask), module(x, x[:, :4]))


def test_options_given_once_reach_the_attention(device: torch.device) -> None:
    attention = partial(cosine_sim_attention, scale=3.0, groups=2)
    module = MultiheadAttention(24, 4, attention=attention, device=device)
    sharper = MultiheadAttention(24, 4, device=device)
    sharper.load_state_dict(module.state_dict())
    x = tokens(2, 7, 24, device=device)
    assert_same("out", module(x), sharper(x, scale=3.0, groups=2))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_softmax_attention_is_the_module_of_pytorch(kv_heads: int, device: torch.device) -> None:
    module = MultiheadAttention(24, 4, kv_heads, softmax_attention, bias=True, device=device)
    theirs = nn.MultiheadAttention(24, 4, batch_first=True, device=device)

    def every_head(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (kv_heads, 6)).repeat_interleave(4 // kv_heads, 0).flatten(0, 1)

    with torch.no_grad():
        k_proj, v_proj = module.k_proj, module.v_proj
        theirs.in_proj_weight.copy_(
            torch.cat([module.q_proj.weight, every_head(k_proj.weight), every_head(v_proj.weight)])
        )
        theirs.in_proj_bias.copy_(
            torch.cat([module.q_proj.bias, every_head(k_proj.bias), every_head(v_proj.bias)])
        )
        theirs.out_proj.load_state_dict(module.out_proj.state_dict())
    x = tokens(2, 7, 24, device=device)
    assert_same("out", module(x), theirs(x, x, x, need_weights=False)[0])
    hidden = torch.ones(7, 7, dtype=torch.bool, device=device).triu(1)
    expected = theirs(x, x, x, need_weights=False, attn_mask=hidden)[0]
    assert_same("causal", module(x, is_causal=True), expected)


def test_gradcheck(device: torch.device) -> None:
    module = MultiheadAttention(
        4, 2, 1, head_dim=2, learned_scale=2.0, rotary_base=100.0, device=device
    ).double()
    names = [name for name, _ in module.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        arguments = dict(zip(names, parameters))
        return torch.func.functional_call(module, arguments, (x,), {"causal": True})

    x = tokens(1, 3, 4, device=device, dtype=torch.float64)
    assert torch.autograd.gradcheck(run, (x, *module.parameters()), check_forward_ad=True)


# Rotary


def rotary_by_hand(x: Tensor, base: float) -> Tensor:
    """Complex numbers turned, one position after the other."""
    half = x.shape[-1] // 2
    turned = []
    for position in range(x.shape[-2]):
        pair = torch.complex(x[..., position, :half], x[..., position, half:])
        angle = torch.tensor([position * base ** (-i / half) for i in range(half)]).to(x)
        pair = pair * torch.polar(torch.ones_like(angle), angle)
        turned.append(torch.cat([pair.real, pair.imag], dim=-1))
    return torch.stack(turned, dim=-2)


def test_rotary_turns_complex_numbers(device: torch.device) -> None:
    x = torch.randn(2, 3, 11, 6, device=device)
    assert_same("rotary", rotary(x, 100.0), rotary_by_hand(x, 100.0))


def test_rotary_is_applied_to_queries_and_keys_before_the_norm(device: torch.device) -> None:
    module = MultiheadAttention(24, 4, 2, rotary_base=100.0, device=device)
    x = tokens(2, 7, 24, device=device)
    query, key, value = (
        proj(x).unflatten(-1, (-1, 6)).transpose(1, 2)
        for proj in (module.q_proj, module.k_proj, module.v_proj)
    )
    query, key = rotary_by_hand(query, 100.0), rotary_by_hand(key, 100.0)
    out = cosine_sim_attention(query, key, value, causal=True)
    expected = module.out_proj(out.transpose(1, 2).flatten(2))
    assert_equal_with_gradients(module, module(x, causal=True), expected, x)


def test_rotary_knows_distances_alone(device: torch.device) -> None:
    module = MultiheadAttention(24, 4, rotary_base=100.0, device=device)
    x = tokens(1, 20, 24, device=device)
    late = module(x, causal=True, window=3)[:, 12:]
    assert_same("out", late, module(x[:, 10:], causal=True, window=3)[:, 2:])


# State, devices and dtypes


def test_state_dict_round_trip(device: torch.device) -> None:
    module = MultiheadAttention(24, 4, 2, learned_scale=3.0, bias=True, device=device)
    assert module.learned_scale is not None
    with torch.no_grad():
        module.learned_scale.mul_(torch.tensor([1.0, 2.0, 3.0, 4.0], device=device))
    again = MultiheadAttention(24, 4, 2, learned_scale=8.0, bias=True, device=device)
    assert not again.load_state_dict(module.state_dict()).missing_keys
    x = tokens(2, 7, 24, device=device)
    assert torch.equal(again(x), module(x))


def test_state_dict_has_the_parameters_alone() -> None:
    plain = MultiheadAttention(24, 4, rotary_base=100.0)
    projections = [f"{name}_proj.weight" for name in ("q", "k", "v", "out")]
    assert list(plain.state_dict()) == projections
    learned = MultiheadAttention(24, 4, learned_scale=3.0)
    assert sorted(learned.state_dict()) == sorted([*projections, "learned_scale"])


def test_device_and_dtype_are_those_of_every_parameter() -> None:
    module = MultiheadAttention(
        24, 4, bias=True, learned_scale=3.0, device="meta", dtype=torch.bfloat16
    )
    for name, parameter in module.named_parameters():
        assert (parameter.device.type, parameter.dtype) == ("meta", torch.bfloat16), name
    out = module(torch.empty(2, 7, 24, device="meta", dtype=torch.bfloat16), causal=True)
    assert (out.device.type, out.dtype, out.shape) == ("meta", torch.bfloat16, (2, 7, 24))


def assert_near_the_formula(
    module: MultiheadAttention, x: Tensor, out: Tensor, dtype: torch.dtype
) -> None:
    narrow = by_hand(copy.deepcopy(module).to(dtype), x.to(dtype))
    truth = by_hand(copy.deepcopy(module).double(), x.double())
    magnitudes = {"out": truth.abs().max().item()}
    assert_close("out", out, narrow, truth, Rounding(dtype, score=3.0, magnitudes=magnitudes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_near_the_formula(dtype: torch.dtype, device: torch.device) -> None:
    module = MultiheadAttention(24, 4, 2, learned_scale=3.0, device=device, dtype=dtype)
    x = tokens(2, 7, 24, device=device, dtype=dtype)
    out = module(x)
    assert out.dtype == dtype
    assert_near_the_formula(module, x, out, dtype)


def test_autocast_leaves_the_parameters_in_float32(device: torch.device) -> None:
    module = MultiheadAttention(24, 4, 2, learned_scale=3.0, device=device)
    x = tokens(2, 7, 24, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    assert_near_the_formula(module, x, out, torch.bfloat16)
    out.float().sum().backward()
    assert {p.grad.dtype for p in module.parameters() if p.grad is not None} == {torch.float32}
