"""Times sparse L1 attention against the gather and scatter formula, eager and compiled.

python -m benchmarks.l1_sparse                 2 M edges over 100 k tokens on CUDA
python -m benchmarks.l1_sparse --device cpu    200 k edges over 10 k tokens

float32, one EdgeList for all calls, and its making apart; contenders take turns. GB/s are of the
floor bytes of the forward: every edge reads a row of q, k and v. `--tune` times sizes of tiles.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import attn_ops
from benchmarks.l1_sparse_formula import formula, hub_edges, random_edges

COPY = 4278e9  # bytes per second that an H200 copies
# Elements of a tile, its fewest edges, and edges of a program.
TUNED = ((128, 2, 512), (256, 4, 512), (256, 4, 1024), (256, 4, 256), (512, 4, 512))


def seconds_of(calls: dict[str, Callable[[], Any]], device: str, rounds: int) -> dict[str, float]:
    """The shortest time of each; one round that warms up comes before."""
    best = dict.fromkeys(calls, float("inf"))
    flush = torch.empty(256 << 20, dtype=torch.int8, device=device) if device == "cuda" else None
    for turn in range(rounds + 1):
        for name, call in list(calls.items()):
            if flush is not None:
                flush.zero_()
                torch.cuda.synchronize()
            start = time.perf_counter()
            try:
                call()
            except RuntimeError as error:
                print(f"  {name}: {str(error).splitlines()[0][:90]}")
                del calls[name]
                continue
            if flush is not None:
                torch.cuda.synchronize()
            if turn:
                best[name] = min(best[name], time.perf_counter() - start)
    return {name: best[name] for name in calls}


def inputs(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """query, key and value."""
    torch.manual_seed(0)

    def tensor() -> Tensor:
        shape = (1, args.heads, args.tokens, args.width)
        return torch.randn(shape, device=args.device, dtype=args.dtype).requires_grad_()

    return tensor(), tensor(), tensor()


def report(name: str, seconds: dict[str, float], floor: float) -> None:
    """One line per contender, as multiples of ours."""
    ours = next(iter(seconds.values()))
    for contender, s in seconds.items():
        rate = f"{floor / s / 1e9:7.0f} GB/s" if "forward" == name.split()[-1] else ""
        print(f"  {name:17} {contender:10} {s * 1e3:9.2f} ms {s / ours:6.2f}x {rate}", flush=True)


def measure(args: argparse.Namespace, words: str, edges: Tensor, compiled: Any) -> None:
    """Everything about one graph."""
    tensors = inputs(args)
    graph = attn_ops.EdgeList(edges, args.tokens, args.tokens)
    size = tensors[0].element_size()
    floor = edges.shape[0] * args.heads * args.width * 3 * size
    print(f"{words}: {graph}, longest row {graph.row_start.diff().max()}")
    print(f"  floor {floor / 1e9:.2f} GB, {floor / COPY * 1e3:.2f} ms at {COPY / 1e9:.0f} GB/s")
    forwards: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: attn_ops.l1_sparse_attention(*tensors, graph),
        "eager": lambda: formula(*tensors, edges),
    }
    if compiled is not None:
        forwards["compiled"] = lambda: compiled(*tensors, edges)
    query, key, value = (x.detach()[:, :1].double() for x in tensors)
    expected = formula(query, key, value, edges)
    error = (forwards["ours"]()[:, :1] - expected).norm() / expected.norm()
    print(f"  relative error of the first head {error:.1e}")
    grad = torch.randn_like(expected[:, :1].expand(-1, args.heads, -1, -1), dtype=args.dtype)
    with torch.no_grad():
        report("forward", seconds_of(dict(forwards), args.device, args.rounds), floor)

    def both(forward: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(forward(), tensors, grad)

    calls = {name: both(forward) for name, forward in forwards.items()}
    report("forward+backward", seconds_of(calls, args.device, args.rounds), floor)
    making = {"EdgeList": lambda: attn_ops.EdgeList(edges, args.tokens, args.tokens)}
    print(f"  making it {seconds_of(making, args.device, 2)['EdgeList'] * 1e3:.2f} ms")


def tune(args: argparse.Namespace, edges: Tensor) -> None:
    """Sizes of the kernels' tiles, on CUDA."""
    from attn_ops.l1 import triton_sparse

    tensors = inputs(args)
    graph = attn_ops.EdgeList(edges, args.tokens, args.tokens)
    grad = torch.randn_like(tensors[0])

    def forward() -> Tensor:
        return attn_ops.l1_sparse_attention(*tensors, graph)

    for tile, fewest, chunk in TUNED:
        triton_sparse.TILE, triton_sparse.FEWEST, triton_sparse.CHUNK = tile, fewest, chunk
        calls = {
            "forward": forward,
            "forward+backward": lambda: torch.autograd.grad(forward(), tensors, grad),
        }
        times = seconds_of(calls, args.device, args.rounds)
        print(
            f"  tile {tile}, at least {fewest} edges, chunk {chunk}:",
            {name: f"{s * 1e3:.2f} ms" for name, s in times.items()},
        )


def main() -> None:
    """Measures a uniform graph, one of uneven degrees and one of two hubs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--edges", type=int)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default="float32")
    parser.add_argument("--tune", action="store_true")
    args = parser.parse_args()
    on_cpu = args.device == "cpu"
    args.tokens = args.tokens or (10_000 if on_cpu else 100_000)
    args.edges = args.edges or (200_000 if on_cpu else 2_000_000)
    if on_cpu:
        torch.set_num_threads(args.threads)
    print(torch.__version__, "CPU" if on_cpu else torch.cuda.get_device_name(), args.dtype)
    graphs = {
        "uniform": random_edges(args.tokens, args.edges, args.device, False),
        "uneven degrees": random_edges(args.tokens, args.edges, args.device, True),
        "two hubs": hub_edges(args.tokens, args.edges, args.device),
    }
    if args.tune:
        tune(args, graphs["uniform"])
        return
    compiled = torch.compile(formula)
    for words, edges in graphs.items():
        measure(args, words, edges, compiled if words == "uniform" else None)


if __name__ == "__main__":
    main()
