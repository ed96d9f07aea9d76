"""MultiheadAttention around L1 attention, against its formula written out by hand."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim

from attn_ops import l1_attention
from attn_ops.nn import MultiheadAttention
from tests.comparison import assert_same
from tests.nn.multihead_by_hand import assert_equal_with_gradients, by_hand, tokens

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped heads": {"kv_heads": 2},
    "narrow heads": {"head_dim": 5, "bias": True},
}


def distance(query: Tensor, key: Tensor) -> Tensor:
    """[B, M, N]"""
    return (query.unsqueeze(2) - key.unsqueeze(1)).abs().sum(-1)


@pytest.mark.parametrize("config", CONFIGS)
def test_l1_attention_is_the_formula(config: str, device: torch.device) -> None:
    module = MultiheadAttention(
        24, 4, attention=l1_attention, **CONFIGS[config], device=device
    ).double()
    x = tokens(2, 7, 24, device=device, dtype=torch.float64)
    scale = -(module.head_dim**-0.5)
    expected = by_hand(module, x, causal=True, similarity=distance, scale=scale)
    assert_equal_with_gradients(module, module(x, causal=True), expected, x)


def test_cross_attention_by_l1_is_the_formula(device: torch.device) -> None:
    attention = partial(l1_attention, scale=0.7)
    module = MultiheadAttention(24, 4, context_dim=10, attention=attention, device=device).double()
    x = tokens(2, 3, 24, device=device, dtype=torch.float64)
    context = tokens(2, 9, 10, device=device, dtype=torch.float64)
    expected = by_hand(module, x, context, similarity=distance, scale=-0.7)
    assert_equal_with_gradients(module, module(x, context), expected, x, context)


def test_options_reach_l1_attention(device: torch.device) -> None:
    module = MultiheadAttention(24, 4, attention=l1_attention, device=device).double()
    x = tokens(2, 7, 24, device=device, dtype=torch.float64)
    mask = torch.arange(7, device=device).expand(2, 7) < 4
    options: dict[str, Any] = {"score": "inverse", "eps": 0.5}
    assert_same("out", module(x, mask=mask, **options), module(x, x[:, :4], **options))
    assert (module(x, **options) - module(x)).abs().max() > 1e-3


def test_l1_attention_has_no_scale_to_learn(device: torch.device) -> None:
    module = MultiheadAttention(24, 4, attention=l1_attention, learned_scale=3.0, device=device)
    with pytest.raises(TypeError, match="l1_attention: scale must be"):
        module(torch.randn(2, 7, 24, device=device))


@pytest.mark.parametrize("strict", [False, True])
def test_l1_attention_is_one_node(strict: bool, device: torch.device) -> None:
    module = MultiheadAttention(24, 4, 2, l1_attention, rotary_base=100.0, device=device)
    x = torch.randn(2, 7, 24, device=device)
    sizes = ({0: Dim("batch"), 1: Dim("length", max=4096)},)
    program = torch.export.export(module, (x,), dynamic_shapes=sizes, strict=strict)
    longer = torch.randn(3, 30, 24, device=device)
    assert_same("out", program.module()(longer), module(longer))
    ops = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [op for op in ops if op.startswith("attn.")] == ["attn.l1.default"]
