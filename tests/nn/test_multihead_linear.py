"""MultiheadAttention around linear attention, against its formula written out by hand."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim

from attn_ops import feature_maps, linear_attention
from attn_ops.nn import MultiheadAttention
from attn_ops.nn.multihead import rotary
from tests.comparison import assert_same

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped heads": {"kv_heads": 2},
    "narrow heads": {"head_dim": 5, "bias": True},
    "rotary": {"rotary_base": 100.0},
}


def by_hand(module: MultiheadAttention, x: Tensor, decay: Tensor) -> Tensor:
    """A matrix of weights for each head: positive products that fade with the distance."""
    query, key, value = (
        proj(x).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        for proj in (module.q_proj, module.k_proj, module.v_proj)
    )
    if module.rotary_base is not None:
        query, key = rotary(query, module.rotary_base), rotary(key, module.rotary_base)
    age = torch.arange(x.shape[1], device=x.device)[:, None] - torch.arange(
        x.shape[1], device=x.device
    )
    outs = []
    for head in range(module.heads):
        kv_head = head * module.kv_heads // module.heads
        phi_query, phi_key = (
            feature_maps.elu_plus_one(rows) for rows in (query[:, head], key[:, kv_head])
        )
        weight = (phi_query @ phi_key.mT * decay[head] ** age).tril()
        outs.append(weight @ value[:, kv_head] / (weight.sum(-1, keepdim=True) + 1e-5))
    return module.out_proj(torch.cat(outs, dim=-1))


def of_linear(device: torch.device, **config: Any) -> MultiheadAttention:
    attention = partial(linear_attention, feature_map="elu_plus_one", causal=True)
    return MultiheadAttention(24, 4, attention=attention, **config, device=device).double()


@pytest.mark.parametrize("config", CONFIGS)
def test_linear_attention_is_the_formula(config: str, device: torch.device) -> None:
    module = of_linear(device, **CONFIGS[config])
    x = torch.randn(2, 7, 24, device=device, dtype=torch.float64, requires_grad=True)
    decay = torch.tensor([1.0, 0.9, 0.5, 0.1], device=device).double().requires_grad_()
    actual, expected = module(x, decay=decay), by_hand(module, x, decay)
    assert_same("out", actual, expected)
    inputs = [x, decay, *module.parameters()]
    for ours, truth in zip(
        *(torch.autograd.grad(y.sin().sum(), inputs) for y in (actual, expected))
    ):
        assert_same("gradient", ours, truth)


def test_options_reach_linear_attention(device: torch.device) -> None:
    module = MultiheadAttention(24, 4, attention=linear_attention, device=device).double()
    x, context = torch.randn(2, 2, 7, 24, device=device, dtype=torch.float64)
    mask = torch.arange(7, device=device).expand(2, 7) < 4
    sums = module(x, context, normalize=False, mask=mask, feature_map="relu")
    assert_same("out", sums, module(x, context[:, :4], normalize=False, feature_map="relu"))
    twice = module(x, torch.cat([context, context], 1), normalize=False, feature_map="relu")
    once = module(x, context, normalize=False, feature_map="relu")
    assert_same("two times the same keys", twice, 2 * once)


def test_linear_attention_has_no_scale_to_learn(device: torch.device) -> None:
    module = MultiheadAttention(24, 4, attention=linear_attention, learned_scale=3.0, device=device)
    with pytest.raises(TypeError, match="unexpected keyword argument 'scale'"):
        module(torch.randn(2, 7, 24, device=device))


def test_linear_attention_is_one_graph_and_one_node(device: torch.device) -> None:
    module = of_linear(device, kv_heads=2, rotary_base=100.0)
    x = torch.randn(2, 7, 24, device=device, dtype=torch.float64)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    assert_same("out", compiled(x), module(x))
    sizes = ({0: Dim("batch"), 1: Dim("length", max=4096)},)
    program = torch.export.export(module, (x,), dynamic_shapes=sizes)
    longer = torch.randn(3, 30, 24, device=device, dtype=torch.float64)
    assert_same("out", program.module()(longer), module(longer))
    ops = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [op for op in ops if op.startswith("attn.")] == ["attn.linear.default"]


def test_rotary_goes_on_where_it_stopped(device: torch.device) -> None:
    x = torch.randn(2, 3, 11, 6, device=device, dtype=torch.float64)
    parts = [rotary(x[:, :, start : start + 4], 100.0, start) for start in (0, 4, 8)]
    assert_same("rotary", torch.cat(parts, dim=2), rotary(x, 100.0))
