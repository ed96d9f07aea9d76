"""Export a model, compile it ahead of time into one file, load the file, get the same numbers.

python compile_examples/export_aoti.py
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim

from attn_ops.nn import MultiheadAttention


class Encoder(nn.Module):
    """Attention among the keys that `mask` lets through."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 64)
        self.attention = MultiheadAttention(64, heads=4, kv_heads=1, rotary_base=10000.0)
        self.head = nn.Linear(64, 10)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.attention(self.embedding(tokens), mask=mask))


def inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
    return torch.randint(100, (batch, length)), torch.rand(batch, length) < 0.8


def main() -> None:
    torch.manual_seed(0)
    model = Encoder().eval()
    sizes = {0: Dim("batch", max=64), 1: Dim("length", max=4096)}
    program = torch.export.export(model, inputs(2, 16), dynamic_shapes=(sizes, sizes))
    kept = [str(node.target) for node in program.graph.nodes if "attn." in str(node.target)]
    print(f"exported, {len(program.graph.nodes)} nodes, attention is {', '.join(kept)}")
    assert kept == ["attn.cosine_sim.default"]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "encoder.pt2"
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
        print(f"packaged, {path.stat().st_size / 1e6:.1f} MB: {path.name}")
        # A process that only loads the file needs `import attn_ops` for the op, not the model.
        package = torch._inductor.aoti_load_package(str(path))

    for batch, length in [(2, 16), (1, 3), (7, 300)]:
        tokens, mask = inputs(batch, length)
        expected, actual = model(tokens, mask), package(tokens, mask)
        error = (actual - expected).abs().max().item()
        print(f"batch {batch}, length {length:3}: largest difference {error:.1e}")
        torch.testing.assert_close(actual, expected)


if __name__ == "__main__":
    main()
