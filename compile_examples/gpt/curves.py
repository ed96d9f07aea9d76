"""Loss curves as a picture."""

from __future__ import annotations

from pathlib import Path

from gpt.training import History

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")


def smoothed(curve: list[tuple[int, float]], width: int) -> list[tuple[int, float]]:
    """The mean of the last ``width`` values at each step."""
    means, total = [], 0.0
    for i, (step, value) in enumerate(curve):
        total += value - (curve[i - width][1] if i >= width else 0.0)
        means.append((step, total / min(i + 1, width)))
    return means


def plot(histories: dict[str, History], bigram: float, title: str, path: Path) -> None:
    """Train (smoothed, thin) and validation (dots) curves, and the bigram model as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for colour, (name, history) in zip(COLOURS, histories.items()):
        train = smoothed(history.train, max(1, len(history.train) // 25))
        axes.plot(*zip(*train), color=colour, alpha=0.45, linewidth=1.2, label=f"{name}, train")
        last = history.valid[-1][1]
        label = f"{name}, validation: {last:.3f} at the end"
        axes.plot(*zip(*history.valid), "o-", color=colour, markersize=3.5, label=label)
    axes.axhline(bigram, color="grey", linestyle="--", linewidth=1, label=f"bigram: {bigram:.3f}")
    best = min(value for history in histories.values() for _, value in history.valid)
    axes.set_ylim(0.9 * min(best, bigram), 1.35 * max(best, bigram))
    axes.set_xlabel("steps")
    axes.set_ylabel("bits per byte")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
