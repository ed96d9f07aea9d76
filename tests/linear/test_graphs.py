"""What a compiler and an exported program see: the op itself, and one private op below it."""

import textwrap

import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import attn_ops


class Causal(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, decay: Tensor) -> Tensor:
        return attn_ops.linear_attention(
            query, key, value, causal=True, decay=decay, feature_map="softplus"
        )


class Carried(nn.Module):
    """A prompt, then a token."""

    def forward(self, prompt: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        _, state, key_sum = attn_ops.linear_attention_with_state(
            prompt, prompt, prompt, normalize=False
        )
        out = attn_ops.linear_attention_step(token, token, token, state, key_sum)
        return out, state


def inputs() -> tuple[Tensor, ...]:
    return torch.ones(2, 4, 9, 8), torch.ones(2, 2, 9, 8), torch.ones(2, 2, 9, 3), torch.ones(4)


def exported() -> torch.export.ExportedProgram:
    # Not of 0 or 1, which would be fixed.
    dynamic = {0: torch.export.Dim("batch", min=2), 2: torch.export.Dim("tokens", min=2)}
    return torch.export.export(Causal(), inputs(), dynamic_shapes=(dynamic, dynamic, dynamic, {}))


def calls(graph: torch.fx.Graph) -> str:
    nodes = [node for node in graph.nodes if "attn" in str(node.target)]
    lines = (f"{node.target}{(*node.args, node.kwargs)}" for node in nodes)
    return "\n".join(textwrap.fill(line, 80, subsequent_indent="    ") for line in lines)


def test_exported_graph_is_the_op() -> None:
    program = exported()
    assert_expected_inline(
        calls(program.graph),
        """\
attn.linear.default(query, key, value, {'causal': True, 'decay': decay,
    'feature_map': 'softplus'})""",
    )
    assert sum(node.op == "call_function" for node in program.graph.nodes) == 1


def test_decomposed_graph_is_the_private_op() -> None:
    assert_expected_inline(
        calls(exported().run_decompositions().graph),
        """\
attn._linear_fwd.default(query, key, value, None, decay, None, None, None, True,
    1e-05, 'softplus', {})""",
    )


def test_traced_graph_of_forward_and_backward() -> None:
    def step(*tensors: Tensor) -> Tensor:
        return torch.func.grad(lambda *args: Causal()(*args).sum())(*tensors)

    assert_expected_inline(
        calls(make_fx(step)(*inputs()).graph),
        """\
attn._linear_fwd.default(arg0_1, arg1_1, arg2_1, None, arg3_1, None, None, None,
    True, 1e-05, 'softplus', {})
attn._linear_bwd.default(expand, None, None, arg0_1, arg1_1, arg2_1, None,
    arg3_1, None, None, None, getitem, getitem_1, True, 1e-05, 'softplus',
    [True, False, False, False, False], {})""",
    )


def test_exported_graph_of_a_prompt_and_a_token() -> None:
    """A step that writes into what the op before it has made."""
    program = torch.export.export(Carried(), (torch.ones(2, 4, 9, 8), torch.ones(2, 4, 1, 8)))
    assert_expected_inline(
        calls(program.graph),
        """\
attn.linear_with_state.default(prompt, prompt, prompt, {'normalize': False})
attn.linear_step.default(token, token, token, getitem_1, getitem_2, {})""",
    )
