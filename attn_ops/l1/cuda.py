"""The kernels of the CUDA library where they serve, and the reference formulas elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from attn_ops import _library

Kernel = Callable[..., Any]


# What a block of the widest tiles takes: Hopper and the data centre GPUs after it have it.
SHARED_MEMORY = 227 << 10


def kernel(op: str, blocks: Kernel) -> Kernel:
    """`attn::op` on CUDA: `attn::op_cuda`, or `blocks`."""

    def call(*args: Any) -> Any:
        properties: Any = torch.cuda.get_device_properties(args[0].device)
        small = properties.shared_memory_per_block_optin < SHARED_MEMORY
        if small or _library.load_cuda_library():
            return blocks(*args)
        # Gradients of queries are summed by atomic additions unless an order is asked for.
        ordered = [torch.are_deterministic_algorithms_enabled()] if op.endswith("_bwd") else []
        return getattr(torch.ops.attn, f"{op}_cuda")(*args, *ordered)

    return call
