"""How dot products, L1 and L2 distances of random vectors grow with their width.

python compile_examples/distance_scaling.py

Softmax is blind to what all scores have in common: their deviation counts. That of dot products and
of L1 distances grows as the square root of the width, so both want the factor 1/sqrt(D); that of L2
distances does not grow. An equal pair stays apart from the others: its distance is 0.
"""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from attn_ops import l1_scores

WIDTHS, SAMPLES = [2**i for i in range(9)], 512  # heads are up to 256 wide
# Mean and deviation for normal vectors of width D; of the L2 distance where D is large.
EXPECTED = {
    "L1 distance": lambda d: (2 * d / math.sqrt(math.pi), math.sqrt(d * (2 - 4 / math.pi))),
    "dot product": lambda d: (0.0, math.sqrt(d)),
    "L2 distance": lambda d: (math.sqrt(2 * d), 1.0),
}


def measured(width: int) -> dict[str, Tensor]:
    """All pairs of random normal queries and keys, [M, N] each."""
    query, key = torch.randn(2, 1, 1, SAMPLES, width)
    return {
        "L1 distance": -l1_scores(query, key, scale=1.0)[0, 0],
        "dot product": (query @ key.mT)[0, 0],
        "L2 distance": torch.cdist(query, key)[0, 0],
    }


def draw(numbers: dict[str, list[tuple[float, float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for place, (axes, title) in enumerate(zip(panels, ("mean", "standard deviation"))):
        for name, rows in numbers.items():
            line = axes.plot(WIDTHS, [row[place] for row in rows], "o", label=name)
            expected = [EXPECTED[name](width)[place] for width in WIDTHS]
            axes.plot(WIDTHS, expected, color=line[0].get_color(), linewidth=1)
        axes.set(xlabel="width", title=title)
        axes.set_xscale("log", base=2)
        axes.set_yscale("symlog" if place == 0 else "log")
        axes.grid(alpha=0.25)
    panels[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/distance_scaling.png"))
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    numbers: dict[str, list[tuple[float, float]]] = {name: [] for name in EXPECTED}
    print("width" + "".join(f"{name:>24}" for name in EXPECTED))
    for width in WIDTHS:
        for name, values in measured(width).items():
            numbers[name].append((values.mean().item(), values.std().item()))
        print(
            f"{width:5}" + "".join(f"{m[-1][0]:15.2f} ± {m[-1][1]:6.2f}" for m in numbers.values())
        )
    for name in ("L1 distance", "dot product"):
        torch.testing.assert_close(
            numbers[name], [EXPECTED[name](w) for w in WIDTHS], rtol=0.1, atol=0.5
        )
    draw(numbers, args.out)
    print(f"Points are measured, lines the formulas: the picture is in {args.out}")


if __name__ == "__main__":
    main()
