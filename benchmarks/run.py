"""The runner: `python -m benchmarks.run --op cosine_sim --causal --csv out.csv --plot`.

Every contender is compared with float64 before it is timed, contenders take turns, and a table of
milliseconds comes out, with the ratio of the fastest peer to ours.
"""

from __future__ import annotations

import argparse
import itertools
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import cosine_sim
from benchmarks.cases import Entry, Setting, draw
from benchmarks.measure import Exact, explain, measure
from benchmarks.report import Row, bars, markdown, write_csv, write_plots

OPS: dict[str, Entry] = {"cosine_sim": cosine_sim.ENTRY}
RESULTS = Path("benchmarks/results")

# What `make bench-cpu` and `make bench-gpu` run; arguments that are given win.
PRESETS = {
    "cpu": {
        "device": "cpu",
        "dtype": ["float32", "bfloat16"],
        "head_dim": [64, 128],
        "seq_lens": [1024, 2048, 4096],
        "threads": [1, 2],
        "causal": "both",
        "budget": 1.0,
    },
    "cuda": {
        "device": "cuda",
        "dtype": ["bfloat16"],
        "tokens": 16384,
        "model_width": 2048,
        "head_dim": [64, 128],
        "seq_lens": [1024, 4096, 16384],
        "causal": "both",
        "num_times": 20,
        "budget": 2.0,
    },
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser("benchmarks.run", description=__doc__)
    p.add_argument("--preset", choices=PRESETS, help="a set of defaults for all that follows")
    p.add_argument("--op", choices=OPS, default="cosine_sim")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", nargs="+", default=["float32"])
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--tokens", type=int, help="batch times length, in place of --batch")
    p.add_argument("--heads", type=int, default=8)
    p.add_argument("--model-width", type=int, help="heads times head width, in place of --heads")
    p.add_argument("--kv-heads", type=int, help="as many as --heads by default")
    p.add_argument("--seq-lens", type=int, nargs="+", default=[1024, 2048])
    p.add_argument("--head-dim", type=int, nargs="+", default=[64])
    p.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    p.add_argument("--causal", nargs="?", const="yes", default="no", choices=["yes", "no", "both"])
    p.add_argument("--mask-prob", type=float, default=0.0, help="share of keys hidden at random")
    only = p.add_mutually_exclusive_group()
    only.add_argument("--only-forwards", action="store_true")
    only.add_argument("--only-backwards", action="store_true", help="backward on a kept graph")
    p.add_argument("--num-times", type=int, default=30, help="rounds at most")
    p.add_argument("--budget", type=float, default=3.0, help="seconds of rounds for one row")
    p.add_argument("--everyone", action="store_true", help="slow and unequal contenders too")
    p.add_argument("--csv", nargs="?", type=Path, const=Path(), metavar="FILE")
    p.add_argument("--plot", action="store_true", help=f"PNG files in {RESULTS}")
    return p


def settings(args: argparse.Namespace) -> Iterator[Setting]:
    """All rows of the table but for the pass."""
    causal = {"yes": [True], "no": [False], "both": [False, True]}[args.causal]
    threads = args.threads if args.device == "cpu" else [0]
    for dtype, width, is_causal, length, number in itertools.product(
        args.dtype, args.head_dim, causal, args.seq_lens, threads
    ):
        heads = args.model_width // width if args.model_width else args.heads
        yield Setting(
            device=args.device,
            dtype=getattr(torch, dtype),
            batch=max(1, args.tokens // length) if args.tokens else args.batch,
            heads=heads,
            kv_heads=args.kv_heads or heads,
            length=length,
            width=width,
            causal=is_causal,
            mask_prob=args.mask_prob,
            threads=number,
        )


def passes(args: argparse.Namespace) -> list[str]:
    """Which passes are timed."""
    if args.only_forwards:
        return ["forward"]
    return ["backward"] if args.only_backwards else ["forward", "forward+backward"]


def where(device: str) -> str:
    """The line that every table needs."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return f"{name}, torch {torch.__version__}; milliseconds, fastest / median of turns"


def main() -> None:
    """Runs, prints, writes."""
    p = parser()
    preset = PRESETS.get(p.parse_known_args()[0].preset or "", {})
    p.set_defaults(**preset)
    args = p.parse_args()
    entry = OPS[args.op]
    print(f"{args.op} on {where(args.device)}\n", flush=True)
    rows: list[Row] = []
    exact = Exact(entry)
    for setting in settings(args):
        torch.compiler.reset()
        contenders = entry.contenders(args.device, args.everyone)
        try:
            inputs = draw(setting)
        except Exception as error:
            print(f"{setting.words()}: {explain(error)}")
            continue
        results = measure(
            exact, contenders, inputs, setting, passes(args), args.num_times, args.budget
        )
        for which, times in results.items():
            rows.append(Row(setting, which, times))
            lines = markdown(rows[-1:]).splitlines()
            print("\n".join(lines if len(rows) == 1 else lines[2:]), flush=True)
    print("\n" + bars(entry, rows))
    if args.csv is not None:
        path = args.csv if args.csv.name else RESULTS / f"{args.op}-{args.device}.csv"
        write_csv(path, entry, rows)
        print(f"wrote {path}")
    if args.plot:
        for path in write_plots(RESULTS, args.op, entry, rows):
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
