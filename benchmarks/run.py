"""The runner: `python -m benchmarks.run --op cosine_sim --causal --csv out.csv --plot`.

Every contender is compared with float64 before it is timed, contenders take turns, and a table of
milliseconds comes out, with the speed of ours and the ratio of the fastest peer to ours.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import cosine_sim, l1, l1_edges, linear
from benchmarks.cases import Contender, Entry, Setting
from benchmarks.measure import Exact, explain, measure
from benchmarks.report import Row, bars, markdown, write_csv, write_plots

OPS: dict[str, Entry] = {
    "cosine_sim": cosine_sim.ENTRY,
    "l1": l1.ENTRY,
    "l1_scores": l1.SCORES,
    "l1_sparse": l1_edges.ENTRY,
    "linear": linear.ENTRY,
}
RESULTS = Path("benchmarks/results")
PASSES = ["forward", "backward", "forward+backward"]
YES_NO_BOTH = {"yes": [True], "no": [False], "both": [False, True]}


def shape(text: str) -> list[int]:
    """`B,H,N,D` or `B,H,N,D,E`."""
    numbers = [int(word) for word in text.split(",")]
    if len(numbers) not in (4, 5) or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"must be B,H,N,D or B,H,N,D,E, got {text}")
    return numbers


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser("benchmarks.run", description=__doc__)
    p.add_argument("--preset", choices=["cpu", "cuda"], help="the op's defaults for what follows")
    p.add_argument("--op", choices=[*OPS, "all"], default="cosine_sim")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", nargs="+", default=["float32"])
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--tokens", type=int, help="batch times length, in place of --batch")
    p.add_argument("--heads", type=int, default=8)
    p.add_argument("--model-width", type=int, help="heads times head width, in place of --heads")
    p.add_argument("--kv-heads", type=int, help="as many as --heads by default")
    p.add_argument("--seq-lens", type=int, nargs="+", default=[1024, 2048])
    p.add_argument("--head-dim", type=int, nargs="+", default=[64])
    p.add_argument("--value-dim", type=int, help="as wide as --head-dim by default")
    text = "B,H,N,D[,E]: the rows, in place of all of the above but for the dtype"
    p.add_argument("--shapes", type=shape, nargs="+", help=text)
    p.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    p.add_argument("--causal", nargs="?", const="yes", default="no", choices=YES_NO_BOTH)
    p.add_argument("--mask-prob", type=float, default=0.0, help="share of keys hidden at random")
    p.add_argument("--normalize", choices=YES_NO_BOTH, help="of ops that have it")
    p.add_argument("--feature-map", nargs="+", help="of ops that have it")
    p.add_argument("--decay", nargs="?", const="yes", choices=YES_NO_BOTH, help="likewise")
    p.add_argument("--edges", type=int, nargs="+", help="of each query, likewise")
    only = p.add_mutually_exclusive_group()
    only.add_argument("--only-forwards", action="store_true")
    only.add_argument("--only-backwards", action="store_true", help="backward on a kept graph")
    only.add_argument("--passes", nargs="+", choices=PASSES, default=["forward", PASSES[-1]])
    p.add_argument("--num-times", type=int, default=30, help="rounds at most")
    p.add_argument("--budget", type=float, default=3.0, help="seconds of rounds for one row")
    p.add_argument("--everyone", action="store_true", help="slow and unequal contenders too")
    p.add_argument(
        "--skip", nargs="+", default=[], help="words in names of contenders to leave out"
    )
    p.add_argument("--csv", nargs="?", type=Path, const=Path(), metavar="FILE")
    p.add_argument("--plot", action="store_true", help=f"PNG files in {RESULTS}")
    return p


def shapes(args: argparse.Namespace) -> Iterator[tuple[int, int, int, int, int]]:
    """B, H, N, D, E of all rows."""
    if args.shapes:
        for batch, heads, length, width, *value_width in args.shapes:
            yield batch, heads, length, width, (value_width or [width])[0]
        return
    for width, length in itertools.product(args.head_dim, args.seq_lens):
        batch = max(1, args.tokens // length) if args.tokens else args.batch
        heads = args.model_width // width if args.model_width else args.heads
        yield batch, heads, length, width, args.value_dim or width


def options(args: argparse.Namespace, entry: Entry) -> Iterator[dict[str, Any]]:
    """What the op takes beside shapes: every combination that was asked for."""
    lists: dict[str, list[Any]] = {}
    for name in ("normalize", "feature_map", "decay", "edges"):
        given = getattr(args, name)
        if name in entry.takes:
            given = given or entry.takes[name]
            lists[name] = YES_NO_BOTH[given] if isinstance(given, str) else given
        elif given:
            raise SystemExit(f"--op {args.op} takes no --{name.replace('_', '-')}")
    for values in itertools.product(*lists.values()):
        yield dict(zip(lists, values, strict=True))


def settings(args: argparse.Namespace, entry: Entry) -> Iterator[Setting]:
    """All rows of the table but for the pass."""
    threads = args.threads if args.device == "cpu" else [0]
    for dtype, is_causal, of_op, (
        batch,
        heads,
        length,
        width,
        value_width,
    ), number in itertools.product(
        args.dtype,
        YES_NO_BOTH[args.causal],
        options(args, entry),
        list(shapes(args)),
        threads,
    ):
        yield Setting(
            device=args.device,
            dtype=getattr(torch, dtype),
            batch=batch,
            heads=heads,
            kv_heads=args.kv_heads or heads,
            length=length,
            width=width,
            value_width=value_width,
            causal=is_causal,
            mask_prob=args.mask_prob,
            threads=number,
            **of_op,
        )


def passes(args: argparse.Namespace) -> list[str]:
    """Which passes are timed."""
    if args.only_forwards:
        return ["forward"]
    return ["backward"] if args.only_backwards else args.passes


def where(device: str) -> str:
    """The line that every table needs."""
    if device == "cuda":
        name = f"{torch.cuda.get_device_name()}, time of the device"
    else:
        name = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return f"{name}, torch {torch.__version__}; milliseconds, fastest / median of turns"


def arguments(op: str) -> list[argparse.Namespace]:
    """The command line, once for each part of the preset of this op."""
    preset = parser().parse_args().preset
    parsed = []
    for defaults in OPS[op].presets[preset] if preset else ({},):
        p = parser()
        p.set_defaults(**defaults)
        parsed.append(p.parse_args())
        parsed[-1].op = op
    return parsed


def left_out(contender: Contender, words: list[str]) -> Contender:
    """The contender, or one that does not run where its name has one of the words."""
    if not any(word in contender.name for word in words):
        return contender
    return replace(contender, prepare=lambda inputs, setting: "left out")


def time_all(args: argparse.Namespace, entry: Entry, exact: Exact, rows: list[Row]) -> None:
    """Appends the rows, and prints each when it is there."""
    for setting in settings(args, entry):
        torch.compiler.reset()
        contenders = [left_out(c, args.skip) for c in entry.contenders(args.device, args.everyone)]
        try:
            inputs = entry.draw(setting)
        except Exception as error:
            print(f"{setting.words()}: {explain(error)}")
            continue
        results = measure(
            exact, contenders, inputs, setting, passes(args), args.num_times, args.budget
        )
        for which, times in results.items():
            rows.append(Row(setting, which, times))
            lines = markdown(entry, rows[-1:]).splitlines()
            print("\n".join(lines if len(rows) == 1 else lines[2:]), flush=True)


def setups(rows: list[Row]) -> str:
    """What was spent on compiling and checking; ours pays for the float64 results too."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for row in rows:
        for times in row.times:
            seconds[times.name] += times.setup
    words = ", ".join(f"{name} {spent:.0f} s" for name, spent in seconds.items())
    return f"compiling and checking: {words}"


def run(op: str) -> None:
    """Measures one op, prints, writes."""
    entry, rows = OPS[op], list[Row]()
    parts = arguments(op)
    args = parts[0]
    print(f"{op} on {where(args.device)}\n", flush=True)
    exact, start = Exact(entry), time.perf_counter()
    for part in parts:
        time_all(part, entry, exact, rows)
    print("\n" + bars(entry, rows))
    print(f"took {time.perf_counter() - start:.0f} s, of which {setups(rows)}")
    if args.csv is not None:
        path = args.csv if args.csv.name else RESULTS / f"{op}-{args.device}.csv"
        write_csv(path, entry, rows)
        print(f"wrote {path}")
    if args.plot:
        for path in write_plots(RESULTS, op, entry, rows):
            print(f"wrote {path}")


def main() -> None:
    """One op or all of them."""
    p = parser()
    args = p.parse_args()
    op = args.op
    if op == "all" and args.csv is not None and args.csv.name:
        p.error("--csv takes no file name with --op all: each op writes its own file")
    for name in OPS if op == "all" else [op]:
        run(name)


if __name__ == "__main__":
    main()
