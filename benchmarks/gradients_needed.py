"""What a gradient costs alone: python -m benchmarks.gradients_needed

The backward pass of every op where one tensor requires a gradient, beside that where all do:
milliseconds, the fastest turn, and the share of the time that all together take. All subsets of one
op take turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

import attn_ops
from benchmarks.measure import Times, take_turns

COLUMNS = ("all", "query", "key", "value", "bias")
Op = Callable[..., Tensor]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser("benchmarks.gradients_needed", description=__doc__)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--shape", type=int, nargs=4, metavar=("B", "H", "N", "D"))
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--num-times", type=int, default=20, help="turns at most")
    p.add_argument("--budget", type=float, default=5.0, help="seconds of turns of one op")
    return p


def problems(length: int, device: str) -> dict[str, tuple[Op, tuple[str, ...]]]:
    """Every op, and what it may differentiate by."""
    edges = torch.randint(length, (20 * length, 2), device=device)
    prepared = attn_ops.EdgeList(edges, length, length)

    def sparse(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attn_ops.l1_sparse_attention(query, key, value, prepared)

    def linear(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attn_ops.linear_attention(query, key, value, causal=True, feature_map="elu_plus_one")

    inputs = ("query", "key", "value")
    return {
        "cosine_sim_attention": (attn_ops.cosine_sim_attention, inputs),
        "cosine_sim_attention, bias": (attn_ops.cosine_sim_attention, (*inputs, "bias")),
        "l1_attention": (attn_ops.l1_attention, inputs),
        "l1_attention, bias": (attn_ops.l1_attention, (*inputs, "bias")),
        "l1_scores": (attn_ops.l1_scores, inputs[:2]),
        "l1_sparse_attention, 20 edges each": (sparse, inputs),
        "linear_attention, causal": (linear, inputs),
    }


def backward(op: Op, tensors: dict[str, Tensor], wanted: tuple[str, ...]) -> Callable[[], object]:
    """The backward pass of a graph in which these alone require a gradient."""
    leaves = {name: tensors[name].detach().requires_grad_() for name in wanted}
    out = op(**(tensors | leaves))
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, list(leaves.values()), grad, retain_graph=True)


def row(name: str, op: Op, tensors: dict[str, Tensor], args: argparse.Namespace) -> str:
    """One line of the table."""
    names = tuple(tensors)
    subsets = {"all": names} | {wanted: (wanted,) for wanted in names}
    ready = [(Times(wanted), backward(op, tensors, subset)) for wanted, subset in subsets.items()]
    take_turns(ready, args.device, args.num_times, args.budget, False)
    fastest = {times.name: times.fastest for times, _ in ready}
    cells = [
        f"{1e3 * fastest[column]:.2f} ({fastest[column] / fastest['all']:.2f})"
        if column in fastest
        else ""
        for column in COLUMNS
    ]
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    """Prints the table."""
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    large = args.device == "cuda"
    batch, heads, length, width = args.shape or ((4, 8, 4096, 64) if large else (1, 4, 1024, 64))
    print(f"B {batch}, H {heads}, N {length}, D {width}, {args.dtype}, {args.device}\n")
    print(f"| op | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    for name, (op, wanted) in problems(length, args.device).items():
        tensors = {
            argument: torch.randn(
                (heads, length, length) if argument == "bias" else (batch, heads, length, width),
                device=args.device,
                dtype=getattr(torch, args.dtype),
            )
            for argument in wanted
        }
        print(row(name, op, tensors, args), flush=True)


if __name__ == "__main__":
    main()
