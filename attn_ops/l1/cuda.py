"""The kernels of the CUDA library where it is there, and the reference formulas where it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from attn_ops import _library

Kernel = Callable[..., Any]


def kernel(op: str, blocks: Kernel) -> Kernel:
    """`attn::op` on CUDA: `attn::op_cuda`, or `blocks`."""

    def call(*args: Any) -> Any:
        if _library.load_cuda_library():
            return blocks(*args)
        # Gradients of queries are summed by atomic additions unless an order is asked for.
        ordered = [torch.are_deterministic_algorithms_enabled()] if op.endswith("_bwd") else []
        return getattr(torch.ops.attn, f"{op}_cuda")(*args, *ordered)

    return call
