"""What a compiler and an exported program see: the op itself, and one private op below it."""

import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import attn_ops
from tests.pinned import calls, exported_causal, inputs_of_causal


class Causal(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        return attn_ops.cosine_sim_attention(query, key, value, bias=bias, causal=True, scale=5.0)


def test_exported_graph_is_the_op() -> None:
    program = exported_causal(Causal())
    assert_expected_inline(
        calls(program.graph),
        """\
attn.cosine_sim.default(query, key, value, None, bias, {'causal': True, 'scale':
    5.0})""",
    )
    assert sum(node.op == "call_function" for node in program.graph.nodes) == 1


def test_decomposed_graph_is_the_private_op() -> None:
    assert_expected_inline(
        calls(exported_causal(Causal()).run_decompositions().graph),
        """\
attn._cosine_sim_fwd.default(query, key, value, None, unsqueeze, None, None,
    None, None, None, None, None, 1099511627776, 0, 5.0, 1, {})""",
    )


def test_traced_graph_of_forward_and_backward() -> None:
    def step(*tensors: Tensor) -> Tensor:
        return torch.func.grad(lambda *args: Causal()(*args).sum())(*tensors)

    assert_expected_inline(
        calls(make_fx(step)(*inputs_of_causal()).graph),
        """\
attn._cosine_sim_fwd.default(arg0_1, arg1_1, arg2_1, None, unsqueeze, None,
    None, None, None, None, None, None, 1099511627776, 0, 5.0, 1, {})
attn._cosine_sim_bwd.default(expand, None, arg0_1, arg1_1, arg2_1, None,
    unsqueeze, None, None, None, None, None, None, None, getitem, getitem_1,
    1099511627776, 0, 5.0, 1, [True, False, False, False, False, False, False,
    False, False], {})""",
    )
