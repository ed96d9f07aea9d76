"""What a compiler and an exported program see: the op itself, and one private op below it."""

import textwrap

import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import attn_ops


class Causal(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        return attn_ops.cosine_sim_attention(query, key, value, bias=bias, causal=True, scale=5.0)


def inputs() -> tuple[Tensor, ...]:
    return (
        torch.ones(2, 4, 6, 8),
        torch.ones(2, 2, 9, 8),
        torch.ones(2, 2, 9, 3),
        torch.ones(4, 6, 9),
    )


def exported() -> torch.export.ExportedProgram:
    # Not of 0 or 1, which would be fixed.
    dynamic = {0: torch.export.Dim("batch", min=2), 2: torch.export.Dim("queries", min=2)}
    keys = {0: dynamic[0], 2: torch.export.Dim("keys", min=2)}
    shapes = (dynamic, keys, keys, {1: dynamic[2], 2: keys[2]})
    return torch.export.export(Causal(), inputs(), dynamic_shapes=shapes)


def calls(graph: torch.fx.Graph) -> str:
    nodes = [node for node in graph.nodes if "attn" in str(node.target)]
    lines = (f"{node.target}{(*node.args, node.kwargs)}" for node in nodes)
    return "\n".join(textwrap.fill(line, 80, subsequent_indent="    ") for line in lines)


def test_exported_graph_is_the_op() -> None:
    program = exported()
    assert_expected_inline(
        calls(program.graph),
        """\
attn.cosine_sim.default(query, key, value, None, bias, {'causal': True, 'scale':
    5.0})""",
    )
    assert sum(node.op == "call_function" for node in program.graph.nodes) == 1


def test_decomposed_graph_is_the_private_op() -> None:
    assert_expected_inline(
        calls(exported().run_decompositions().graph),
        """\
attn._cosine_sim_fwd.default(query, key, value, None, unsqueeze, None, None,
    None, None, None, None, None, 1099511627776, 0, 5.0, 1, {})""",
    )


def test_traced_graph_of_forward_and_backward() -> None:
    def step(*tensors: Tensor) -> Tensor:
        return torch.func.grad(lambda *args: Causal()(*args).sum())(*tensors)

    assert_expected_inline(
        calls(make_fx(step)(*inputs()).graph),
        """\
attn._cosine_sim_fwd.default(arg0_1, arg1_1, arg2_1, None, unsqueeze, None,
    None, None, None, None, None, None, 1099511627776, 0, 5.0, 1, {})
attn._cosine_sim_bwd.default(expand, None, arg0_1, arg1_1, arg2_1, None,
    unsqueeze, None, None, None, None, None, None, None, getitem, getitem_1,
    1099511627776, 0, 5.0, 1, [True, False, False, False, False, False, False,
    False, False], {})""",
    )
