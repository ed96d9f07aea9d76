"""How linear attention grows with the length, and what decay, features and decoding cost.

python -m benchmarks.linear_scaling --plot docs/linear_scaling.png

Forward and backward alone, causal, not normalised unless said. Results are compared with float64
while the lengths are measured; the calls of one comparison take turns. Lines that start with "bar"
tell what issue 4 asks of one H200; on a CPU the bar is that of two threads over one.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import attn_ops
from benchmarks.cases import Setting, draw
from benchmarks.linear import ENTRY
from benchmarks.measure import Exact, Times, measure, take_turns, timed_call

RESULTS = Path("benchmarks/results")
PASSES = ["forward", "backward"]
Runs = dict[str, Callable[[], object]]


def parser() -> argparse.ArgumentParser:
    """The command line; the defaults suit the device."""
    p = argparse.ArgumentParser("benchmarks.linear_scaling", description=__doc__)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--longest", type=int, help="a power of two; 1048576 on CUDA, 16384 on CPU")
    p.add_argument("--shape", type=int, nargs=3, metavar=("B", "H", "N"), help="of the comparisons")
    p.add_argument("--decode", type=int, nargs=2, metavar=("B", "H"), default=[64, 16])
    p.add_argument("--num-times", type=int, default=20, help="turns at most")
    p.add_argument("--budget", type=float, default=2.0, help="seconds of turns")
    p.add_argument("--csv", type=Path, help=f"{RESULTS}/linear_scaling-<device>.csv by default")
    p.add_argument("--plot", type=Path, metavar="PNG")
    return p


def setting(
    args: argparse.Namespace, shape: list[int], width: int, value_width: int, **options: Any
) -> Setting:
    """A causal setting of B, H, N."""
    batch, heads, length = shape
    chosen: dict[str, Any] = {
        "normalize": False,
        "feature_map": "identity",
        "decay": False,
        "threads": args.threads,
        **options,
    }
    return Setting(
        device=args.device,
        dtype=getattr(torch, args.dtype),
        batch=batch,
        heads=heads,
        kv_heads=heads,
        length=length,
        width=width,
        value_width=value_width,
        causal=True,
        **chosen,
    )


def bar(text: str, value: float, limit: float, at_most: bool) -> None:
    """Prints whether a bar is met."""
    met = value <= limit if at_most else value >= limit
    sign = "at most" if at_most else "at least"
    print(f"bar {text}: {value:.2f}, {sign} {limit:.2f}: {'met' if met else 'NOT MET'}", flush=True)


def in_turns(args: argparse.Namespace, runs: Runs) -> dict[str, float]:
    """Seconds of the fastest turn of each; those that failed are said and left out."""
    ready = [(Times(name), run) for name, run in runs.items()]
    take_turns(ready, args.device, args.num_times, args.budget, slow=False)
    for times, _ in ready:
        if times.failure:
            print(f"{times.name}: {times.failure}")
    return {times.name: times.fastest for times, _ in ready if not times.failure}


def compare(
    args: argparse.Namespace, what: str, first: Setting, second: Setting, limit: float
) -> None:
    """The time of the first over that of the second, forward and backward."""
    for which in PASSES:
        runs: Runs = {}
        for name, its in ((what, first), ("plain", second)):
            inputs = draw(its)
            call = ENTRY.ours.prepare(inputs, its)
            assert not isinstance(call, str), call
            runs[name] = timed_call(call, inputs, which)
        seconds = in_turns(args, runs)
        if len(seconds) == 2:
            ratio = seconds[what] / seconds["plain"]
            bar(f"{what}, {which}, time over plain", ratio, limit, at_most=True)


def lengths(args: argparse.Namespace) -> list[tuple[int, str, float]]:
    """N, pass, seconds (the fastest of turns) for B1 H4 D64, every result checked."""
    rows = []
    exact = Exact(ENTRY)
    length = 1024
    while length <= args.longest:
        its = setting(args, [1, 4, length], 64, 64)
        results = measure(exact, [ENTRY.ours], draw(its), its, PASSES, args.num_times, args.budget)
        for which, (times,) in results.items():
            if times.failure:
                print(f"N {length} {which}: {times.failure}")
                continue
            rows.append((length, which, times.fastest))
            speed = ENTRY.rate(its, which, times.fastest)
            print(f"N {length:8d} {which:8s} {1e3 * times.fastest:10.4f} ms {speed:7.0f} GB/s")
        length *= 2
    for which in PASSES:
        seconds = {n: s for n, pass_, s in rows if pass_ == which}
        last, quarter = args.longest, args.longest // 4
        if last in seconds and quarter in seconds:
            ratio = seconds[last] / seconds[quarter]
            text = f"linear growth, {which}, time at N={last} over N={quarter}"
            bar(text, ratio, 4.4, at_most=True)
    return rows


def decode(args: argparse.Namespace) -> None:
    """`linear_step` in GB/s of state bytes, read and written, beside a copy of as many bytes."""
    (batch, heads), width = args.decode, 128
    its = setting(args, [batch, heads, 1], width, width, normalize=True)
    inputs = draw(its)
    query, key, value = (x.detach() for x in inputs.leaves())
    state = torch.zeros(batch, heads, width, width, device=args.device)
    key_sum = torch.zeros(batch, heads, width, device=args.device)
    copy = torch.empty_like(state)
    step = attn_ops.linear_attention_step
    seconds = in_turns(
        args,
        {
            "linear_step": lambda: step(query, key, value, state, key_sum),
            "copy": lambda: copy.copy_(state),
        },
    )
    moved = 2 * state.numel() * state.element_size()
    for name, its_seconds in seconds.items():
        print(f"{name}: {1e6 * its_seconds:.1f} us, {moved / its_seconds / 1e9:.0f} GB/s")
    if len(seconds) == 2:
        text = f"decoding B{batch} H{heads} D{width}, share of the speed of a copy"
        bar(text, seconds["copy"] / seconds["linear_step"], 0.7, at_most=False)


def two_threads(args: argparse.Namespace) -> None:
    """One head of one batch: two cores against one."""
    for width in (64, 128):
        for which in PASSES:
            its = setting(args, [1, 1, args.shape[2]], width, width)
            inputs = draw(its)
            call = ENTRY.ours.prepare(inputs, its)
            assert not isinstance(call, str), call
            run = timed_call(call, inputs, which)
            fastest = {1: math.inf, 2: math.inf}
            # Turns of many calls each: to change the number of threads starts and ends threads.
            for threads in (1, 2, 1, 2, 1, 2):
                torch.set_num_threads(threads)
                seconds = in_turns(args, {which: run})
                fastest[threads] = min(fastest[threads], seconds.get(which, math.inf))
            text = f"B1 H1 N{args.shape[2]} D{width} {args.dtype}, {which}"
            speed_up = fastest[1] / fastest[2]
            bar(f"{text}, speed-up of 2 threads", speed_up, 1.6, at_most=False)
    torch.set_num_threads(args.threads)


def write_csv(path: Path, rows: list[tuple[int, str, float]]) -> None:
    """N, pass, seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("N", "pass", "seconds"), *rows])
    print(f"wrote {path}")


def write_plot(path: Path, args: argparse.Namespace, rows: list[tuple[int, str, float]]) -> None:
    """Milliseconds over N, both logarithmic, with a line of slope one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4))
    for which in PASSES:
        points = [(n, 1e3 * seconds) for n, pass_, seconds in rows if pass_ == which]
        if not points:
            continue
        (line,) = axis.plot(*zip(*points, strict=True), marker="o", label=which)
        last, slowest = points[-1]
        steady = [(n, slowest * n / last) for n, _ in points]
        axis.plot(*zip(*steady, strict=True), "--", color=line.get_color(), alpha=0.4)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("tokens (dashed: proportional to the length)")
    axis.set_ylabel("milliseconds")
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} threads"
    axis.set_title(f"causal linear attention, B1 H4 D64 {args.dtype}\n{name}", fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"wrote {path}")


def main() -> None:
    """Measures, prints, writes."""
    args = parser().parse_args()
    cuda = args.device == "cuda"
    args.threads = torch.get_num_threads()
    args.longest = args.longest or (1 << 20 if cuda else 1 << 14)
    args.shape = args.shape or ([8, 16, 4096] if cuda else [1, 4, 4096])
    name = torch.cuda.get_device_name() if cuda else f"CPU, {args.threads} threads"
    print(f"{name}, torch {torch.__version__}, {args.dtype}", flush=True)
    rows = lengths(args)
    plain = setting(args, args.shape, 128, 128)
    compare(args, "decay", setting(args, args.shape, 128, 128, decay=True), plain, 1.15)
    taylor = setting(args, args.shape, 16, 128, feature_map="taylor")
    compare(args, "taylor of D=16", taylor, plain, 2.5)
    decode(args)
    if not cuda:
        two_threads(args)
    write_csv(args.csv or RESULTS / f"linear_scaling-{args.device}.csv", rows)
    if args.plot:
        write_plot(args.plot, args, rows)


if __name__ == "__main__":
    main()
