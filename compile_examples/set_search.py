"""Search in a set that is part of the input: one L1 layer looks up the element that matches.

python compile_examples/set_search.py  (CPU, about a minute)

A set of 10 to 64 tokens, each a random content and a place on a line. A probe has the content of
one of them and a place of its own: how far is it from there to its match? The contents are new in
every example, so the weights can only learn to compare. The answer counts where it rounds to the
right number of places.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from attn_ops import l1_attention
from attn_ops.nn import MultiheadAttention

CONTENT, PLACES = 8, 32
SET_SIZES = [10, 16, 32, 64]


def draw_batch(batch: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The probe [B, 1, C+1], the set [B, N, C+1], and the distance in places [B]."""
    tokens = torch.randn(batch, size + 1, CONTENT)
    tokens[:, 0] = tokens[:, 1]  # a set has no order: the match may as well be its first element
    places = torch.randint(PLACES, (batch, size + 1, 1))
    tokens = torch.cat([tokens, places / PLACES - 0.5], -1)
    return tokens[:, :1], tokens[:, 1:], (places[:, 1] - places[:, 0]).flatten().float()


class Search(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(CONTENT + 1, dim)
        self.attention = MultiheadAttention(dim, heads, attention=l1_attention)
        self.answer = nn.Linear(dim, 1)

    def forward(self, probe: Tensor, others: Tensor) -> Tensor:
        probe, others = self.embed(probe), self.embed(others)
        found = probe + self.attention(probe, others)
        return PLACES * self.answer(found).flatten()


def train(dim: int, heads: int, steps: int) -> Search:
    torch.manual_seed(0)
    model = Search(dim, heads)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps)
    for step in range(steps):
        size = SET_SIZES[step % len(SET_SIZES)]
        probe, others, distance = draw_batch(128, size)
        optimizer.zero_grad()
        (model(probe, others) - distance).square().mean().backward()
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def accuracy(model: Search, size: int) -> float:
    torch.manual_seed(1)
    probe, others, distance = draw_batch(2000, size)
    return (model(probe, others).round() == distance).float().mean().item()


def draw(rows: dict[str, list[float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    for name, values in rows.items():
        axes.plot(SET_SIZES, values, "o-", label=name)
    axes.set(xlabel="tokens in the set, all but one distractors", ylabel="right answers")
    axes.set_xticks(SET_SIZES)
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.25)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--dims", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--out", type=Path, default=Path("runs/set_search.png"))
    args = parser.parse_args(argv)
    rows = {}
    print("width, parameters" + "".join(f"{size:4} tokens" for size in SET_SIZES))
    for dim in args.dims:
        model = train(dim, max(1, dim // 16), args.steps)
        count = sum(p.numel() for p in model.parameters())
        row = rows[f"width {dim}"] = [accuracy(model, size) for size in SET_SIZES]
        print(f"{dim:5} {count:11}" + "".join(f"{value:11.1%}" for value in row))
    draw(rows, args.out)
    print(f"A guess is right in {1 / PLACES:.1%} at most. The picture is in {args.out}")


if __name__ == "__main__":
    main()
