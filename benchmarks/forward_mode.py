"""What forward mode costs: the time of `torch.func.jvp` over that of the forward, and its memory.

python -m benchmarks.forward_mode --op cosine_sim --threads 1

Query, key and value have a tangent each. Per length: milliseconds of the forward and of the jvp
(the fastest of turns), their ratio, and the bytes of the peak of memory beside what was there
before, over those of the [M, N] scores of all heads in float32. Before anything is timed the
tangents are compared with those of the formula in float64, at the first length.
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import attn_ops
from benchmarks.measure import TOLERANCE, Times, relative_error, take_turns

OPS: dict[str, Callable[..., Tensor]] = {
    "cosine_sim": attn_ops.cosine_sim_attention,
    "l1": attn_ops.l1_attention,
}
LAST = 32  # queries that are compared with the formula


def parser() -> argparse.ArgumentParser:
    """The command line; the defaults suit the device."""
    p = argparse.ArgumentParser("benchmarks.forward_mode", description=__doc__)
    p.add_argument("--op", choices=OPS, default="cosine_sim")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--shape", type=int, nargs=3, metavar=("B", "H", "D"), default=[1, 8, 64])
    p.add_argument("--seq-lens", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    p.add_argument("--causal", action="store_true")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--num-times", type=int, default=20, help="turns at most")
    p.add_argument("--budget", type=float, default=2.0, help="seconds of turns")
    return p


def draw(args: argparse.Namespace, length: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Query, key and value, and a tangent of each."""
    batch, heads, width = args.shape
    generator = torch.Generator().manual_seed(0)
    drawn = [
        torch.randn(batch, heads, length, width, generator=generator).to(
            args.device, getattr(torch, args.dtype)
        )
        for _ in range(6)
    ]
    return tuple(drawn[:3]), tuple(drawn[3:])


def peak(device: str) -> int:
    """Bytes; on a CPU the peak of the process, which never goes down again."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def formula(op: str, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """The op in a line of PyTorch, with all scores."""
    if op == "cosine_sim":
        scores = 8 * F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).mT
    else:
        differences = query.unsqueeze(3) - key.unsqueeze(2)
        scores = -differences.abs().sum(-1) / query.shape[3] ** 0.5
    if causal:
        hidden = torch.ones_like(scores, dtype=torch.bool).triu(key.shape[2] - query.shape[2] + 1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(-1) @ value


def check(args: argparse.Namespace) -> None:
    """SystemExit if the tangents of the last queries of the first head are wrong."""
    inputs, tangents = draw(args, args.seq_lens[0])
    ours = jvp_of(args)(inputs, tangents)[1][:1, :1, -LAST:]
    parts = [[x[:1, :1].double() for x in both] for both in (inputs, tangents)]
    (query, *rest), (tangent, *its_rest) = parts
    _, exact, *_ = torch.func.jvp(
        lambda query, key, value: formula(args.op, query, key, value, args.causal),
        (query[:, :, -LAST:], *rest),
        (tangent[:, :, -LAST:], *its_rest),
    )
    error = relative_error(ours, exact)
    if not error <= TOLERANCE[getattr(torch, args.dtype)]:
        raise SystemExit(f"wrong: the tangent is off by {error:.1e}")


def jvp_of(args: argparse.Namespace) -> Callable[..., tuple[Tensor, Tensor]]:
    """(inputs, tangents) -> out and its tangent."""

    def jvp(inputs: Any, tangents: Any) -> tuple[Tensor, Tensor]:
        out, tangent, *_ = torch.func.jvp(
            lambda *xs: OPS[args.op](*xs, causal=args.causal), inputs, tangents
        )
        return out, tangent

    return jvp


def row(args: argparse.Namespace, length: int) -> str:
    """One line of the table."""
    inputs, tangents = draw(args, length)
    batch, heads, _ = args.shape
    jvp = jvp_of(args)
    ready = [
        (Times("forward"), lambda: OPS[args.op](*inputs, causal=args.causal)),
        (Times("jvp"), lambda: jvp(inputs, tangents)),
    ]
    ready[0][1]()  # a CPU's peak without forward mode
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = peak(args.device)
    jvp(inputs, tangents)
    grown = (peak(args.device) - before) / (4 * batch * heads * length * length)
    take_turns(ready, args.device, args.num_times, args.budget, slow=False)
    failures = [f"{times.name}: {times.failure}" for times, _ in ready if times.failure]
    if failures:
        return f"| {length} | {'; '.join(failures)} |"
    forward, its_jvp = (1e3 * times.fastest for times, _ in ready)
    return f"| {length} | {forward:.3f} | {its_jvp:.3f} | {its_jvp / forward:.2f} | {grown:.3f} |"


def main() -> None:
    """Measures and prints."""
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    check(args)
    cuda = args.device == "cuda"
    name = torch.cuda.get_device_name() if cuda else f"CPU, {args.threads} threads"
    shape = "B{} H{} D{}".format(*args.shape)
    causal = ", causal" if args.causal else ""
    print(f"{name}, torch {torch.__version__}, {args.op}, {shape} {args.dtype}{causal}\n")
    print("| N | forward, ms | jvp, ms | ratio | memory, of the scores |")
    print("|---|---|---|---|---|")
    for length in args.seq_lens:
        print(row(args, length), flush=True)


if __name__ == "__main__":
    main()
