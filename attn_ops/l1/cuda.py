"""The kernels of the CUDA library where they serve, and the reference formulas elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from attn_ops import _ahead, _library

Kernel = Callable[..., Any]


# What a block of the widest tiles takes: Hopper and the data centre GPUs after it have it.
SHARED_MEMORY = 227 << 10


def missing(device: torch.device) -> str | None:
    """What the kernels need and do not have, so that formulas serve; None if they serve."""
    properties: Any = torch.cuda.get_device_properties(device)
    shared = properties.shared_memory_per_block_optin
    if shared < SHARED_MEMORY:
        return f"{SHARED_MEMORY >> 10} KB of shared memory for a block: it has {shared >> 10}"
    return _library.load_cuda_library()


def kernel(op: str, blocks: Kernel) -> Kernel:
    """`attn::op` on CUDA: `attn::op_cuda`, or `blocks`."""

    def call(*args: Any) -> Any:
        if missing(args[0].device):
            _ahead.leave()
            return blocks(*args)
        # Gradients of queries are summed by atomic additions unless an order is asked for.
        ordered = [torch.are_deterministic_algorithms_enabled()] if op.endswith("_bwd") else []
        return getattr(torch.ops.attn, f"{op}_cuda")(*args, *ordered)

    return call
