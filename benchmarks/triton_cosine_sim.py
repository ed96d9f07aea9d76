"""Times the Triton kernels of cosine_sim alone, without autograd: what their block sizes do.

python -m benchmarks.triton_cosine_sim

TFLOP/s of the private forward and backward ops (norms included), 16384 tokens, H*D = 2048,
bfloat16; FLOP = 4*B*H*N*N*D forward, halved when causal, times 2.5 backward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

import attn_ops  # noqa: F401  registers torch.ops.attn
from attn_ops.masks import UNBOUNDED

TOKENS, MODEL_WIDTH = 16384, 2048
SHAPES = [(64, 512), (64, 1024), (64, 4096), (128, 512), (128, 1024), (128, 4096), (256, 4096)]


def milliseconds(function: Callable[[], Any]) -> float:
    """The median time of a call, the L2 cache flushed before each."""
    from triton.testing import do_bench

    return do_bench(function, warmup=10, rep=60, return_mode="median")


def measure(width: int, length: int, causal: bool) -> None:
    """Prints one line of the table."""
    heads = MODEL_WIDTH // width
    shape = (TOKENS // length, heads, length, width)
    query, key, value, grad = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)
    )
    inputs = (query, key, value, *[None] * 9)
    options = (UNBOUNDED, 0 if causal else UNBOUNDED, 8.0, 1)
    out, lse = torch.ops.attn._cosine_sim_fwd(*inputs, *options)
    wanted = [True] * 3 + [False] * 6
    forward = milliseconds(lambda: torch.ops.attn._cosine_sim_fwd(*inputs, *options))
    backward = milliseconds(
        lambda: torch.ops.attn._cosine_sim_bwd(grad, None, *inputs, out, lse, *options, wanted)
    )
    flops = 4 * TOKENS * length * MODEL_WIDTH / (2 if causal else 1)
    name = f"D{width} N{length}{' causal' if causal else ''}"
    rates = (flops / forward / 1e9, 2.5 * flops / backward / 1e9)
    print(
        f"{name:20s} forward {forward:7.3f} ms {rates[0]:5.0f} TFLOP/s"
        f"   backward {backward:7.3f} ms {rates[1]:5.0f} TFLOP/s"
    )


def main() -> None:
    """Measures every shape, causal and not."""
    if not torch.cuda.is_available():
        sys.exit("benchmarks.triton_cosine_sim needs a CUDA device")
    print(torch.__version__, torch.cuda.get_device_name())
    for width, length in SHAPES:
        for causal in (False, True):
            measure(width, length, causal)


if __name__ == "__main__":
    main()
