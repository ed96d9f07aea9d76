"""Export a model with a state: a text that is read in parts gives what it gives as a whole.

python compile_examples/export_state.py
"""

import torch
from torch import Tensor, nn
from torch.export import Dim

from attn_ops import linear_attention_with_state

WIDTH = 64


class Reader(nn.Module):
    """Causal linear attention, one head, that goes on from what it gave back before."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, WIDTH)
        self.project = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, tokens: Tensor, state: Tensor, key_sum: Tensor) -> tuple[Tensor, ...]:
        rows = self.project(self.embedding(tokens)).unsqueeze(1)  # [B, H=1, N, 3 * WIDTH]
        query, key, value = rows.chunk(3, dim=-1)
        return linear_attention_with_state(
            query, key, value, state, key_sum, feature_map="elu_plus_one"
        )


def nothing_yet(batch: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(batch, 1, WIDTH, WIDTH), torch.zeros(batch, 1, WIDTH)


def main() -> None:
    torch.manual_seed(0)
    model = Reader().eval()
    batch, length = Dim("batch", max=64), Dim("length", max=4096)
    program = torch.export.export(
        model,
        (torch.randint(100, (2, 16)), *nothing_yet(2)),
        dynamic_shapes=({0: batch, 1: length}, {0: batch}, {0: batch}),
    )
    kept = [str(node.target) for node in program.graph.nodes if "attn." in str(node.target)]
    print(f"exported, {len(program.graph.nodes)} nodes, attention is {', '.join(kept)}")
    assert kept == ["attn.linear_with_state.default"]

    text = torch.randint(100, (3, 300))
    outs, state = [], nothing_yet(3)
    for part in text.split([150, 7, 143], dim=1):
        out, *state = program.module()(part, *state)
        outs.append(out)
    whole, *after = model(text, *nothing_yet(3))
    for actual, expected in zip((torch.cat(outs, dim=2), *state), (whole, *after)):
        torch.testing.assert_close(actual, expected)
    print("read in parts of 150, 7 and 143 tokens: as read at once, the state too")


if __name__ == "__main__":
    main()
