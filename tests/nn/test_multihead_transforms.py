"""MultiheadAttention inside PyTorch's compiler and export."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

from attn_ops import cosine_sim_attention, l1_attention
from attn_ops.nn import MultiheadAttention
from tests.comparison import assert_same
from tests.nn.multihead_by_hand import (
    assert_equal_with_gradients,
    softmax_attention,
    tokens,
)


@pytest.mark.parametrize("attention", [cosine_sim_attention, l1_attention, softmax_attention])
@pytest.mark.parametrize("cross", [False, True])
def test_one_fullgraph_compilation_serves_all_lengths(
    attention: Callable[..., Tensor], cross: bool, device: torch.device
) -> None:
    rotary_base = None if cross else 100.0
    module = MultiheadAttention(24, 4, 2, attention, rotary_base=rotary_base, device=device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for batch, length in [(2, 7), (3, 12), (5, 33)]:
        inputs = [tokens(batch, length, 24, device=device)]
        if cross:
            inputs.append(tokens(batch, 2 * length + 1, 24, device=device))
        assert_equal_with_gradients(module, compiled(*inputs), module(*inputs), *inputs)
        counts.append(counter.frame_count)
    # torch 2.11 starts tracing over once, when it finds that rotary_base has to be a constant.
    assert counts[0] == counts[-1] <= 2


def test_inductor_compiles_the_learned_scale(device: torch.device) -> None:
    module = MultiheadAttention(24, 4, 2, learned_scale=3.0, rotary_base=100.0, device=device)
    x = tokens(2, 7, 24, device=device)
    compiled = torch.compile(module, fullgraph=True)
    assert_equal_with_gradients(module, compiled(x, causal=True), module(x, causal=True), x)


@pytest.mark.parametrize("strict", [False, True])
def test_export_keeps_the_op(strict: bool, device: torch.device) -> None:
    module = MultiheadAttention(24, 4, 2, learned_scale=3.0, device=device)
    batch, length = Dim("batch"), Dim("length", max=4096)
    example = (torch.randn(2, 7, 24, device=device), torch.randn(2, 9, 24, device=device))
    sizes = ({0: batch, 1: length}, {0: batch, 1: Dim("keys", max=4096)})
    program = torch.export.export(module, example, dynamic_shapes=sizes, strict=strict)
    x, context = torch.randn(3, 30, 24, device=device), torch.randn(3, 5, 24, device=device)
    assert_same("out", program.module()(x, context), module(x, context))
    ops = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [op for op in ops if op.startswith("attn.")] == ["attn.cosine_sim.default"]


def test_repr_names_the_attention() -> None:
    assert_expected_inline(
        repr(MultiheadAttention(8, 4, 2, partial(cosine_sim_attention, groups=2))),
        """\
MultiheadAttention(
  heads=4, kv_heads=2, attention=cosine_sim_attention
  (q_proj): Linear(in_features=8, out_features=8, bias=False)
  (k_proj): Linear(in_features=8, out_features=4, bias=False)
  (v_proj): Linear(in_features=8, out_features=4, bias=False)
  (out_proj): Linear(in_features=8, out_features=8, bias=False)
)""",
    )
