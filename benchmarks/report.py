"""Tables in Markdown, CSV files and plots of what was measured."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import Entry, Setting
from benchmarks.measure import Times


@dataclass(frozen=True)
class Row:
    """One setting, one kind of pass, all contenders."""

    setting: Setting
    which: str
    times: list[Times]  # ours first

    def ratio(self) -> float | None:
        """The fastest peer that computes the same, over ours; None where either is missing."""
        ours, *peers = self.times
        valid = [t.fastest for t in peers if not t.failure and t.with_norm]
        return None if ours.failure or not valid else min(valid) / ours.fastest


def cell(times: Times) -> str:
    """Milliseconds, fastest and median."""
    if times.failure:
        return times.failure
    return f"{1e3 * times.fastest:.2f} / {1e3 * times.median:.2f}"


def markdown(entry: Entry, rows: list[Row]) -> str:
    """A table of milliseconds (fastest / median), our rate and the ratio at its end."""
    names = [t.name for t in rows[0].times]
    header = [*rows[0].setting.words(), "pass", *names, entry.unit[0], "ratio"]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        ratio, speed = row.ratio(), rate(entry, row)
        lines.append(
            [
                *(str(word) for word in row.setting.words().values()),
                row.which,
                *(cell(times) for times in row.times),
                "-" if speed is None else f"{speed:.4g}",
                "-" if ratio is None else f"{ratio:.2f}",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rate(entry: Entry, row: Row) -> float | None:
    """Ours, the usual run, in the unit of the op."""
    ours = row.times[0]
    return None if ours.failure else entry.rate(row.setting, row.which, ours.median)


def bars(entry: Entry, rows: list[Row]) -> str:
    """The bars of an op, each with the lowest ratio or rate that was measured for it."""
    lines = []
    for bar in entry.bars:
        held = [row for row in rows if row.which == bar.which and bar.where(row.setting)]
        if not held:
            continue
        values = [rate(entry, row) if bar.of_rate else row.ratio() for row in held]
        lowest = min((value for value in values if value is not None), default=0.0)
        verdict = "met" if lowest >= bar.least and None not in values else "NOT MET"
        what, digits = (entry.unit[0], 0) if bar.of_rate else ("ratio", 2)
        lines.append(
            f"{bar.text}, {bar.which}: lowest {what} {lowest:.{digits}f} of {len(values)}, "
            f"bar {bar.least:.{digits}f}: {verdict}"
        )
    return "\n".join(lines)


def write_csv(path: Path, entry: Entry, rows: list[Row]) -> None:
    """One line per contender, setting and pass, in seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                *rows[0].setting.words(),
                "pass",
                "contender",
                "fastest_s",
                "median_s",
                entry.unit[0],
                "note",
            ]
        )
        for row in rows:
            for times in row.times:
                numbers: list[object] = ["", "", ""]
                if not times.failure:
                    speed = entry.rate(row.setting, row.which, times.median)
                    numbers = [times.fastest, times.median, f"{speed:.4g}"]
                words = row.setting.words().values()
                writer.writerow([*words, row.which, times.name, *numbers, times.failure])


def write_plots(folder: Path, op: str, entry: Entry, rows: list[Row]) -> list[Path]:
    """One PNG per pass: a panel for each setting but for the length, a line for each contender."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for which in dict.fromkeys(row.which for row in rows):
        panels: dict[str, list[Row]] = {}
        for row in rows:
            if row.which == which:
                words = {k: v for k, v in row.setting.words().items() if k != "N"}
                panels.setdefault(" ".join(f"{k} {v}" for k, v in words.items()), []).append(row)
        columns = min(len(panels), 4)
        height = -(-len(panels) // columns)
        figure, axes = plt.subplots(
            height, columns, figsize=(4.2 * columns, 3.2 * height), squeeze=False
        )
        for axis in axes.flat[len(panels) :]:
            axis.axis("off")
        for axis, (title, panel) in zip(axes.flat, panels.items(), strict=False):
            _plot_panel(axis, panel, entry, which)
            axis.set_title(title, fontsize=7)
        axes.flat[0].legend(fontsize=7)
        figure.suptitle(f"{op}, {which}: {entry.unit[0]} over sequence length")
        figure.tight_layout()
        device = rows[0].setting.device
        path = folder / f"{op}-{device}-{which}.png"
        figure.savefig(path, dpi=120)
        plt.close(figure)
        paths.append(path)
    return paths


def _plot_panel(axis: Any, panel: list[Row], entry: Entry, which: str) -> None:
    for index, first in enumerate(panel[0].times):
        points = [
            (row.setting.length, entry.rate(row.setting, which, row.times[index].median))
            for row in panel
            if not row.times[index].failure
        ]
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", label=first.name)
    axis.set_xscale("log", base=2)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
