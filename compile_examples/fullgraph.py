"""Look into a compiled module: one graph, no breaks, and attention is one node of it.

python compile_examples/fullgraph.py
"""

import torch
from torch import Tensor, fx, nn

from attn_ops.nn import MultiheadAttention

GRAPHS: list[fx.GraphModule] = []


def show_and_run(graph: fx.GraphModule, inputs: list[Tensor]) -> fx.GraphModule:
    """A backend of torch.compile: takes each captured graph, and runs it as it is."""
    GRAPHS.append(graph)
    return graph


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.attention = MultiheadAttention(64, heads=4, kv_heads=2, learned_scale=8.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm(x), causal=True)


def main() -> None:
    torch.manual_seed(0)
    block, x = Block(), torch.randn(2, 16, 64)

    # fullgraph=True raises where the compiler would have to fall back to Python.
    captured = torch.compile(block, backend=show_and_run, fullgraph=True)(x)
    (graph,) = GRAPHS
    print("What the compiler captured, one line per call:")
    for node in graph.graph.nodes:
        if node.op.startswith("call"):
            print(f"  {node.name:28} {node.target}")
    attention = [node for node in graph.graph.nodes if "attn.cosine_sim" in str(node.target)]
    assert len(attention) == 1, "attention is one node"

    explained = torch._dynamo.explain(block)(x)
    print(f"graphs: {explained.graph_count}, breaks: {explained.graph_break_count}")
    assert explained.graph_break_count == 0

    # The default backend makes kernels of what is around the node, and the same numbers.
    compiled = torch.compile(block, fullgraph=True)
    expected = block(x)
    torch.testing.assert_close(captured, expected)
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    assert block.attention.learned_scale is not None
    print(f"gradient of the learned scale: {block.attention.learned_scale.grad}")


if __name__ == "__main__":
    main()
