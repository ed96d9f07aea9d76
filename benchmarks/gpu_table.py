"""What issue 5 asks of cosine-sim attention, on one GPU, beside softmax attention.

python -m benchmarks.gpu_table

Queries and keys are not normalised on entry; norms, forward and backward, are in the measured time.
TFLOP/s are 4*B*H*N*N*D forward, half of it when causal, 2.5 times as many backward. Every contender
is compared with float64 at its last queries before it is timed; contenders take turns, the median
counts, and the L2 cache is flushed before each call. gpu_rows.py has the rows and the bars.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch._functorch.config as functorch_config
from torch import Tensor

import attn_ops
from benchmarks import gpu_problem, overhead
from benchmarks.cases import Call
from benchmarks.forward_mode import peak
from benchmarks.gpu_problem import Problem
from benchmarks.gpu_report import Result, line, summary, write_csv, write_plot
from benchmarks.gpu_rows import FORWARD, ROWS, Row
from benchmarks.measure import TOLERANCE, Times, explain, relative_error, take_turns

SECTIONS = list(dict.fromkeys(row.section for row in ROWS))
RESULTS = Path("benchmarks/results")
OURS = "attn_ops"
HOST_CALLS = ("F.scaled_dot_product_attention", "attn_ops.cosine_sim_attention")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser("benchmarks.gpu_table", description=__doc__)
    p.add_argument("--device", default="cuda")
    p.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    p.add_argument("--no-peers", action="store_true", help="time nothing but this library")
    p.add_argument("--num-times", type=int, default=15, help="turns at most")
    p.add_argument("--budget", type=float, default=0.3, help="seconds of turns for one pass")
    p.add_argument("--csv", type=Path, default=RESULTS / "gpu_table.csv")
    p.add_argument("--plot", type=Path, default=RESULTS / "gpu_table.png")
    return p


def check(problem: Problem, call: Call, with_norm: bool) -> str:
    """What is wrong with the last queries of the first head and the gradients they give, or ''."""
    backward = list(problem.row.bars) != [FORWARD]
    with torch.set_grad_enabled(backward):
        out = call()
    results = [problem.part(out)]
    if backward:
        grad_out = torch.zeros_like(out)
        problem.part(grad_out).copy_(problem.part(problem.grad_out))
        grads = torch.autograd.grad(out, problem.leaves, grad_out, allow_unused=True)
        results += problem.parts_of_gradients(grads)
    exact = gpu_problem.exact(problem, with_norm)
    names = ("out", *(f"grad_{name}" for name in problem.names))
    for name, result, right in zip(names, results, exact, strict=False):
        error = relative_error(result.detach(), right)
        if not error <= TOLERANCE[out.dtype]:
            return f"wrong: {name} is off by {error:.1e}"
    return ""


def timed(problem: Problem, call: Call, which: str) -> Callable[[], object]:
    """A forward in inference, a backward on a kept graph, or both in a row."""
    leaves, grad_out = problem.leaves, problem.grad_out
    if which == FORWARD:
        return torch.no_grad()(call)
    if which == "backward":
        kept: list[Tensor] = []

        def backward() -> object:
            if not kept:  # in the round that warms up
                kept.append(call())
            return torch.autograd.grad(kept[0], leaves, grad_out, retain_graph=True)

        return backward
    return lambda: torch.autograd.grad(call(), leaves, grad_out)


def time_row(row: Row, args: argparse.Namespace) -> list[Result]:
    """All contenders checked, then every pass timed."""
    torch.compiler.reset()
    problem = gpu_problem.draw(row, args.device)
    names = [OURS, *(() if args.no_peers else row.peers)]
    calls: dict[str, Call] = {}
    failures = dict.fromkeys(names, "")
    for name in names:
        try:
            calls[name] = gpu_problem.contender(problem, None if name == OURS else name)
            failures[name] = check(problem, calls[name], name != gpu_problem.NO_NORM)
        except Exception as error:
            failures[name] = explain(error)
    results = []
    for which, bar in row.bars.items():
        times = [Times(name, failure=failures[name]) for name in names]
        ready = [(t, timed(problem, calls[t.name], which)) for t in times if not t.failure]
        take_turns(ready, args.device, args.num_times, args.budget, slow=False)
        results.append(Result(row, which, bar, {t.name: t.failure or t.median for t in times}))
    return results


def host_time(row: Row, args: argparse.Namespace) -> list[Result]:
    """Microseconds that an eager call with grad takes beyond one of SDPA, the fastest of rounds."""
    leaves = list(gpu_problem.draw(row, args.device).leaves)
    calls = [overhead.CALLS[name] for name in HOST_CALLS]
    fastest = [float("inf")] * 2
    for turn in range(10 * args.num_times + 1):
        for i, call in enumerate(calls):
            seconds = overhead.seconds(call, leaves, "with grad", 20)
            if args.device == "cuda":
                torch.cuda.synchronize()
            if turn > 0:  # the first one warms up
                fastest[i] = min(fastest[i], seconds)
    sdpa, ours = fastest
    return [Result(row, "host", row.bars["host"], {OURS: 1e6 * (ours - sdpa), "SDPA": 1e6 * sdpa})]


def memory(row: Row, args: argparse.Namespace) -> list[Result]:
    """MiB that a forward and a backward take beyond inputs, result and gradients."""
    problem = gpu_problem.draw(row, args.device)
    call = gpu_problem.contender(problem, None)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = peak(args.device)
    out = call()
    grads = torch.autograd.grad(out, problem.leaves, problem.grad_out)
    theirs = sum(x.numel() * x.element_size() for x in (out, *grads))
    beyond = (peak(args.device) - before - theirs) / (1 << 20)
    return [Result(row, "memory", row.bars["memory"], {OURS: max(0.0, beyond)})]


MEASURES = {"host": host_time, "memory": memory}


def main() -> None:
    """Measures, prints each row when it is there, and writes both files."""
    args = parser().parse_args()
    functorch_config.donated_buffer = False  # a kept graph is walked many times
    name = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    print(f"{name}, torch {torch.__version__}, {OURS} {attn_ops.__version__}\n")
    print("| section | row | dtype | pass | ms | reached | bar | | peers, ms |")
    print("|---|---|---|---|---|---|---|---|---|")
    start, results = time.perf_counter(), list[Result]()
    for row in ROWS:
        if row.section not in args.sections:
            continue
        try:
            new = MEASURES.get(row.section, time_row)(row, args)
        except Exception as error:
            new = [
                Result(row, which, bar, {OURS: explain(error)}) for which, bar in row.bars.items()
            ]
        for result in new:
            results.append(result.beside(results))
            print(line(results[-1]), flush=True)
    print(f"\n{summary(results)}; took {time.perf_counter() - start:.0f} s")
    write_csv(args.csv, results)
    write_plot(args.plot, results)
    print(f"wrote {args.csv} and {args.plot}")


if __name__ == "__main__":
    main()
