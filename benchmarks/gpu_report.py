"""What benchmarks.gpu_table measured beside its bars: lines, a CSV file, a plot."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_problem import lengths
from benchmarks.gpu_rows import AT_MOST, WORK, Bar, Row

FARTHEST = 2.0  # of the plot


@dataclass
class Result:
    """One row, one pass: by contender, ours first, its seconds or why there are none.

    Of the host and of memory not seconds but what the bar says. `reached`: ours, in its unit.
    """

    row: Row
    which: str
    bar: Bar
    measured: dict[str, float | str]
    reached: float | None = None

    def of(self, name: str) -> float | None:
        """What a contender reached, in the unit of the bar, if that depends on no other row."""
        measured = self.measured[name]
        if isinstance(measured, str):
            return None
        if self.which not in WORK:
            return measured
        if self.bar.unit == "TFLOP/s":
            return flop(self.row, self.which) / measured / 1e12
        if self.bar.unit == "GB/s":
            return key_value_bytes(self.row) / measured / 1e9
        return 1e3 * measured if self.bar.unit == "ms" else None

    def beside(self, others: list[Result]) -> Result:
        """Itself, with what ours reached."""
        ours = next(iter(self.measured))
        self.reached = self.of(ours)
        mine = self.measured[ours]
        for other in others if self.bar.of else []:
            its = other.measured[ours]
            same = (other.row.name, other.which) == (self.bar.of, self.which)
            if same and isinstance(mine, float) and isinstance(its, float):
                work = flop(self.row, self.which) / flop(other.row, self.which)
                self.reached = its / mine * (work if self.bar.unit == "rate" else 1)
        return self

    def share(self, reached: float | None) -> float | None:
        """1 where the bar is just met, more where it is surpassed; None without a bar."""
        if reached is None or self.bar.number is None:
            return None
        if self.bar.unit in AT_MOST:
            return self.bar.number / max(reached, 1e-9)
        return reached / self.bar.number

    def verdict(self) -> str:
        """Words for the table."""
        if self.bar.number is None:
            return ""
        share = self.share(self.reached)
        return "met" if share is not None and share >= 1 else "NOT MET"


def flop(row: Row, which: str) -> float:
    """FLOP of a pass."""
    batch, kv_heads, num_keys, width = row.shape
    pairs = float((row.queries or num_keys) * num_keys)
    if row.extra in ("equal", "random"):
        pairs = float((lengths(row).double() ** 2).sum())
    return WORK[which] * 4 * batch * kv_heads * row.group * width * pairs / (1 + row.causal)


def key_value_bytes(row: Row) -> float:
    """Of keys and values in 16 bits."""
    batch, kv_heads, num_keys, width = row.shape
    return 2.0 * 2 * batch * kv_heads * num_keys * width


def words(result: Result) -> list[str]:
    """Cells: which row, what ours took and reached, the bar, and whether it is met."""
    row, bar, ours = result.row, result.bar, next(iter(result.measured.values()))
    time = ours if isinstance(ours, str) else f"{1e3 * ours:.3f}" if result.which in WORK else ""
    reached = "" if result.reached is None else f"{result.reached:.4g} {bar.unit}"
    sign = "<=" if bar.unit in AT_MOST else ">="
    least = "" if bar.number is None else f"{sign} {bar.number:.4g}"
    if bar.of:
        least += f" of {bar.of}"
    return [row.section, row.name, row.dtype, result.which, time, reached, least, result.verdict()]


def line(result: Result) -> str:
    """One line of Markdown."""
    peers = []
    for name, measured in list(result.measured.items())[1:]:
        if isinstance(measured, str):
            peers.append(f"{name}: {measured}")
            continue
        its = result.of(name)
        of_unit = f" ({its:.0f})" if its is not None and result.bar.unit != "ms" else ""
        time = 1e3 * measured if result.which in WORK else measured
        peers.append(f"{name} {time:.3f}{of_unit}")
    return "| " + " | ".join([*words(result), ", ".join(peers)]) + " |"


def summary(results: list[Result]) -> str:
    """How many bars are met."""
    verdicts = [result.verdict() for result in results if result.bar.number is not None]
    return f"{verdicts.count('met')} of {len(verdicts)} bars met"


def write_csv(path: Path, results: list[Result]) -> None:
    """One line per contender, row and pass."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        header = "section,row,dtype,pass,contender,measured,reached,unit,bar,of,verdict"
        writer.writerow(header.split(","))
        for result in results:
            row, bar = result.row, result.bar
            for i, (name, measured) in enumerate(result.measured.items()):
                reached = result.reached if i == 0 else result.of(name)
                verdict = result.verdict() if i == 0 else ""
                start = [row.section, row.name, row.dtype, result.which, name, measured]
                writer.writerow([*start, reached, bar.unit, bar.number, bar.of, verdict])


def write_plot(path: Path, results: list[Result]) -> None:
    """What everybody reached over the bar, a line for each row and pass: right of 1 it is met."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    held = [result for result in results if result.bar.number is not None][::-1]
    points: dict[str, list[tuple[float, int]]] = {}
    for place, result in enumerate(held):
        for i, name in enumerate(result.measured):
            share = result.share(result.reached if i == 0 else result.of(name))
            if share is not None and result.which in WORK:
                points.setdefault(name, []).append((min(share, FARTHEST), place))
    figure, axis = plt.subplots(figsize=(9, 2 + 0.2 * len(held)))
    for number, (name, its) in enumerate(points.items()):
        axis.scatter(*zip(*its, strict=True), label=name, s=40 if number == 0 else 14)
    names = [f"{r.row.name} {r.row.dtype}, {r.which}: {' '.join(words(r)[5:7])}" for r in held]
    axis.set_yticks(range(len(held)), names, fontsize=6)
    axis.axvline(1.0, color="black", linewidth=1)
    axis.set_xlim(0, FARTHEST)
    axis.set_xlabel(f"reached / bar, {FARTHEST} at most")
    axis.grid(alpha=0.3)
    if points:
        axis.legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
