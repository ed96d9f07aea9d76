"""What a compiler and an exported program see: the op itself, and one private op below it."""

import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import attn_ops
from tests.pinned import calls, exported_causal, inputs_of_causal


class Causal(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        return attn_ops.l1_attention(query, key, value, bias=bias, causal=True, scale=0.5)


class Scores(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        return attn_ops.l1_scores(query, key, score="inverse", eps=0.25) + bias


def test_exported_graph_is_the_op() -> None:
    program = exported_causal(Causal())
    assert_expected_inline(
        calls(program.graph),
        """attn.l1.default(query, key, value, None, bias, {'causal': True, 'scale': 0.5})""",
    )
    assert sum(node.op == "call_function" for node in program.graph.nodes) == 1


def test_decomposed_graph_is_the_private_op() -> None:
    decomposed = exported_causal(Causal()).run_decompositions()
    assert_expected_inline(
        calls(decomposed.graph),
        """\
attn._l1_fwd.default(query, key, value, None, unsqueeze, None, None, None, None,
    1099511627776, 0, 0.5, None, {})""",
    )


def test_graphs_of_scores() -> None:
    program = exported_causal(Scores())
    assert_expected_inline(
        calls(program.graph),
        """attn.l1_scores.default(query, key, {'score': 'inverse', 'eps': 0.25})""",
    )
    assert_expected_inline(
        calls(program.run_decompositions().graph),
        """attn._l1_scores_fwd.default(query, key, 0.3535533905932738, 0.25, {})""",
    )


def test_traced_graphs_of_forward_and_backward() -> None:
    def step(module: nn.Module, *tensors: Tensor) -> Tensor:
        return torch.func.grad(lambda *args: module(*args).sum())(*tensors)

    inputs = inputs_of_causal()
    assert_expected_inline(
        calls(make_fx(lambda *xs: step(Causal(), *xs))(*inputs).graph),
        """\
attn._l1_fwd.default(arg0_1, arg1_1, arg2_1, None, unsqueeze, None, None, None,
    None, 1099511627776, 0, 0.5, None, {})
attn._l1_bwd.default(expand, None, arg0_1, arg1_1, arg2_1, None, unsqueeze,
    None, None, None, None, getitem, getitem_1, 1099511627776, 0, 0.5, None,
    [True, False, False, False, False, False], {})""",
    )
    assert_expected_inline(
        calls(make_fx(lambda *xs: step(Scores(), *xs))(*inputs).graph),
        """\
attn._l1_scores_fwd.default(arg0_1, arg1_1, 0.3535533905932738, 0.25, {})
attn._l1_scores_bwd.default(mul, arg0_1, arg1_1, -0.3535533905932738, [True,
    False], {})""",
    )
