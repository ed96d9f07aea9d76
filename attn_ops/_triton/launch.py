"""Block sizes, warps and stages by width and dtype, and what else a launch needs from the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attn_ops._ahead import known, tracing
from attn_ops._triton.embed import embed
from attn_ops._triton.tiles import padded


class Launch(NamedTuple):
    """A block of rows is kept while blocks of columns pass by."""

    rows: int
    columns: int
    warps: int
    stages: int
    registers: int | None = None  # of a thread, at most: so that more programs run side by side


LARGE = 227 << 10  # bytes of shared memory of a program on Hopper
Table = dict[int, dict[int, list[Launch]]]


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use."""
    if device.type != "cuda":
        return LARGE
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


def choose(
    table: Table, device: torch.device, size: int, *widths: int, plain: bool, biased: bool = False
) -> Launch:
    """The launch for elements of `size` bytes and the widest head.

    table[bytes per element][padded width, 64 or more] is a pair: for devices with 227 KB of shared
    memory as long as scores are `plain` products, and for everything else; and, where the same
    devices do better with another, a third one for products and a bias that comes in tiles.
    """
    launches = table[size][max(padded(width, torch.bfloat16) for width in widths)]
    if not plain or shared_memory(device) < LARGE:
        return launches[1]
    return launches[-1 if biased else 0]


def dot_precision() -> str:
    """What `tl.dot` does with float32: full products unless PyTorch was told otherwise."""
    chosen = torch.backends.cuda.matmul.fp32_precision
    if chosen == "none":
        chosen = torch.backends.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if chosen == "tf32" else "ieee"


def launch(
    kernel: Any,
    programs: int,
    sizes: Launch,
    *args: Any,
    writes: Sequence[Tensor | None] = (),
    **constants: Any,
) -> None:
    """Runs `programs` programs, in one dimension of the grid: the others end at 65535.

    writes: the tensors that the kernel writes; of a forward, which packages are made of.
    """
    if tracing():
        if not known(programs == 0):
            options = {
                "num_warps": sizes.warps, "num_stages": sizes.stages, "maxnreg": sizes.registers
            }  # fmt: skip
            embed(kernel, programs, args, writes, constants | options)
    elif programs:
        kernel[(programs,)](
            *args, **constants,
            num_warps=sizes.warps, num_stages=sizes.stages, maxnreg=sizes.registers,
        )  # fmt: skip
