"""Times the Triton kernels of linear attention alone, without autograd and launches.

python -m benchmarks.triton_linear

GB/s of the floor bytes (forward: q, k, v, out once; backward: q, k, v, grad_out and three gradients
once) of the private ops in bfloat16, replayed as a CUDA graph; then taylor features and a step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import attn_ops  # noqa: F401  registers torch.ops.attn

SHAPES = [
    (8, 16, 4096, 128, 128),
    (8, 16, 8192, 128, 128),
    (4, 16, 16384, 128, 128),
    (1, 16, 65536, 128, 128),
    (8, 16, 1024, 128, 128),
    (8, 16, 4096, 64, 64),
    (8, 16, 4096, 64, 16),
    (8, 16, 4096, 128, 32),
]
EPS = 1e-5


def milliseconds(function: Callable[[], Any]) -> float:
    """The median time of a replayed graph of a call, the L2 cache flushed before each."""
    from triton.testing import do_bench

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return do_bench(graph.replay, warmup=5, rep=40, return_mode="median")


def positive(*sizes: int) -> Tensor:
    """Queries and keys, of one sign so that denominators are not near zero."""
    return torch.rand(sizes, device="cuda").bfloat16()


def passes(
    query: Tensor, key: Tensor, value: Tensor, eps: float | None, decay: Tensor | None, name: str
) -> tuple[float, float]:
    """Milliseconds of a forward and a backward."""
    tensors = (query, key, value, None, decay, None, None, None)
    options = (True, eps, name)
    forward, backward = torch.ops.attn._linear_fwd, torch.ops.attn._linear_bwd
    out, denominator, *_ = forward(*tensors, *options)
    of_results = (None, None) if eps is None else (out, denominator)
    arguments = (torch.randn_like(out), None, None, *tensors, *of_results, *options)
    wanted = [True] * 3 + [False] * 2
    return (
        milliseconds(lambda: forward(*tensors, *options)),
        milliseconds(lambda: backward(*arguments, wanted)),
    )


def measure(shape: tuple[int, ...]) -> None:
    """Prints the lines of one shape: not divided, divided, and with a decay."""
    batch, heads, length, width, columns = shape
    query, key = positive(batch, heads, length, width), positive(batch, heads, length, width)
    value = torch.randn(batch, heads, length, columns, device="cuda").bfloat16()
    decay = torch.full((heads,), 0.99, device="cuda")
    tokens = 2 * batch * heads * length
    floor = (tokens * 2 * (width + columns), tokens * (4 * width + 3 * columns))
    for words, eps, rates in (("", None, None), ("divided", EPS, None), ("decay", None, decay)):
        times = passes(query, key, value, eps, rates, "identity")
        rates_of = [size / ms / 1e6 for size, ms in zip(floor, times)]
        print(
            f"{shape!s:28} {words:8} forward {times[0]:7.4f} ms {rates_of[0]:5.0f} GB/s"
            f"   backward {times[1]:7.4f} ms {rates_of[1]:5.0f} GB/s",
            flush=True,
        )


def measure_taylor() -> None:
    """153 features of 16 inputs, at the length of the first shape."""
    query, key = positive(8, 16, 4096, 16), positive(8, 16, 4096, 16)
    value = torch.randn(8, 16, 4096, 128, device="cuda").bfloat16()
    for eps in (None, EPS):
        forward, backward = passes(query, key, value, eps, None, "taylor")
        print(f"taylor D16 E128 eps={eps}: forward {forward:.4f} ms, backward {backward:.4f} ms")


def measure_step() -> None:
    """One token of 64 sequences, beside a copy of as many bytes."""
    query, key, value = (positive(64, 16, 1, 128) for _ in range(3))
    state, key_sum = torch.zeros(64, 16, 128, 128, device="cuda"), torch.zeros(64, 16, 128).cuda()
    copy = torch.empty_like(state)
    one = milliseconds(
        lambda: torch.ops.attn._linear_step(
            query, key, value, state, key_sum, None, EPS, "identity"
        )
    )
    other = milliseconds(lambda: copy.copy_(state))
    print(f"step: {one:.4f} ms, copy of the state {other:.4f} ms, {other / one:.0%} of its speed")


def main() -> None:
    """Measures everything."""
    if not torch.cuda.is_available():
        sys.exit("benchmarks.triton_linear needs a CUDA device")
    print(torch.__version__, torch.cuda.get_device_name())
    for shape in SHAPES:
        measure(shape)
    measure_taylor()
    measure_step()


if __name__ == "__main__":
    main()
