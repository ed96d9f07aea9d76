"""What a call costs on the host, whatever it computes: microseconds with inputs of a few tokens.

python -m benchmarks.overhead

Beside `F.scaled_dot_product_attention`; in brackets how many times as long as that a call takes.
Calls take turns in short rounds, of which the fastest counts, so that other work on the machine
shows little; one thread. Compiled calls are of fullgraph=True.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

import attn_ops

Call = Callable[[Tensor, Tensor, Tensor], Tensor]

MODES = ["no grad", "inference", "with grad", "backward", "compiled", "compiled with grad"]
ops = torch.ops.attn
# A function each, since the compiler keeps what it compiled by the code of a function.
CALLS: dict[str, Call] = {
    "F.scaled_dot_product_attention": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    "F.normalize of q and k, then the same": lambda q, k, v: F.scaled_dot_product_attention(
        F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, scale=8.0
    ),
    "attn_ops.cosine_sim_attention": lambda q, k, v: attn_ops.cosine_sim_attention(q, k, v),
    "torch.ops.attn.cosine_sim": lambda q, k, v: ops.cosine_sim(q, k, v),
    "attn_ops.l1_attention": lambda q, k, v: attn_ops.l1_attention(q, k, v),
    "torch.ops.attn.l1": lambda q, k, v: ops.l1(q, k, v),
    "attn_ops.l1_scores": lambda q, k, v: attn_ops.l1_scores(q, k),
    "torch.ops.attn.l1_scores": lambda q, k, v: ops.l1_scores(q, k),
    "attn_ops.linear_attention": lambda q, k, v: attn_ops.linear_attention(q, k, v),
    "torch.ops.attn.linear": lambda q, k, v: ops.linear(q, k, v),
    "attn_ops.linear_attention, causal": lambda q, k, v: attn_ops.linear_attention(
        q, k, v, causal=True
    ),
    "torch.ops.attn.linear, causal": lambda q, k, v: ops.linear(q, k, v, causal=True),
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser("benchmarks.overhead", description=__doc__)
    p.add_argument("--device", default="cpu", help="the time of the host alone, also with cuda")
    p.add_argument("--dtype", default="float32")
    shape = [1, 2, 8, 16]
    p.add_argument("--shape", type=int, nargs=4, metavar=("B", "H", "N", "D"), default=shape)
    p.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    p.add_argument("--rounds", type=int, default=300)
    p.add_argument("--number", type=int, default=20, help="calls of a round")
    return p


def seconds(call: Call, inputs: list[Tensor], mode: str, number: int) -> float:
    """Of one call in a round of so many; one more comes before, which finds caches of others."""
    if mode == "backward":
        grad_out = torch.ones_like(call(*inputs))
        outs = [call(*inputs) for _ in range(number + 1)]

        def run() -> None:
            # l1_scores does not read the value.
            torch.autograd.grad(outs.pop(), inputs, grad_out, allow_unused=True)
    else:

        def run() -> None:
            call(*inputs)

    run()
    start = time.perf_counter()
    for _ in range(number):
        run()
    return (time.perf_counter() - start) / number


def measure(args: argparse.Namespace, mode: str) -> list[float]:
    """Seconds of every call, the fastest of rounds in turns."""
    # What was compiled for another mode would be asked first whether it fits.
    torch.compiler.reset()
    compiled = mode.startswith("compiled")
    calls = [torch.compile(c, fullgraph=True) if compiled else c for c in CALLS.values()]
    grad = mode in ("with grad", "backward", "compiled with grad")
    torch.manual_seed(0)
    options = {"dtype": getattr(torch, args.dtype), "device": args.device}
    inputs = [torch.randn(args.shape, **options).requires_grad_(grad) for _ in range(3)]
    fastest = [float("inf")] * len(calls)
    with (
        torch.inference_mode() if mode == "inference" else nullcontext(),
        torch.set_grad_enabled(grad),
    ):
        for round_ in range(args.rounds + 1):
            for i, call in enumerate(calls):
                if args.device != "cpu":
                    torch.accelerator.synchronize()
                its = seconds(call, inputs, mode, args.number)
                if round_ > 0:  # the first one warms up
                    fastest[i] = min(fastest[i], its)
    return fastest


def main() -> None:
    """Prints the table."""
    args = parser().parse_args()
    torch.set_num_threads(1)
    columns = [measure(args, mode) for mode in args.modes]
    print(f"torch {torch.__version__}, {args.device}, {args.dtype}, {args.shape}: microseconds\n")
    print(f"| call | {' | '.join(args.modes)} |")
    print(f"|{'---|' * (len(columns) + 1)}")
    for i, name in enumerate(CALLS):
        cells = (f"{1e6 * column[i]:.1f} ({column[i] / column[0]:.1f})" for column in columns)
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
