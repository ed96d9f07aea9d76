"""Times the kernels of cosine_sim alone, without autograd: what the block sizes of Triton's do.

ATTN_OPS_NO_NATIVE=1 python -m benchmarks.triton_cosine_sim   on Hopper, where else CUDA C++ serves

TFLOP/s of the private forward and backward ops (norms included): bfloat16, 16384 tokens, H*D =
2048; and float32, B4 H8. FLOP = 4*B*H*N*N*D forward, halved when causal, times 2.5 backward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

import attn_ops  # noqa: F401  registers torch.ops.attn
from attn_ops.masks import UNBOUNDED
from benchmarks.measure import time_once

TOKENS, MODEL_WIDTH = 16384, 2048
LENGTHS = (512, 1024, 4096, 16384)
SHAPES = [(width, length) for width in (64, 128) for length in LENGTHS] + [(256, 4096)]


def milliseconds(function: Callable[[], Any]) -> float:
    """The median time of a call on the device, the L2 cache flushed before each."""
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    times = sorted(1e3 * time_once(function, "cuda", flush) for _ in range(13))
    return times[len(times) // 2]


def measure(shape: tuple[int, int, int, int], causal: bool, dtype: torch.dtype) -> None:
    """Prints one line of the table; shape is [B, H, N, D]."""
    batch, heads, length, width = shape
    query, key, value, grad = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(4))
    inputs = (query, key, value, *[None] * 9)
    options = (UNBOUNDED, 0 if causal else UNBOUNDED, 8.0, 1)
    out, lse = torch.ops.attn._cosine_sim_fwd(*inputs, *options)
    wanted = [True] * 3 + [False] * 6
    forward = milliseconds(lambda: torch.ops.attn._cosine_sim_fwd(*inputs, *options))
    backward = milliseconds(
        lambda: torch.ops.attn._cosine_sim_bwd(grad, None, *inputs, out, lse, *options, wanted)
    )
    flops = 4 * batch * heads * length**2 * width / (2 if causal else 1)
    name = f"D{width} N{length}{' causal' if causal else ''}"
    name += " float32" if dtype == torch.float32 else ""
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
            shape = (TOKENS // length, MODEL_WIDTH // width, length, width)
            measure(shape, causal, torch.bfloat16)
    for width in (64, 128):
        measure((4, 8, 8192, width), False, torch.float32)


if __name__ == "__main__":
    main()
