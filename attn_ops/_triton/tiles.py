"""Reading and writing tiles of [B, H, rows, columns] tensors of any strides.

A tensor is a Strided view or a tensor descriptor (descriptors.py). Offsets are 64 bits wide. Rows
past the end and columns past the width read as zero.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_ops._ahead import known


class Strided(NamedTuple):
    """A rank 4 tensor as kernels take it: the stride of a broadcast dimension is 0."""

    pointer: Any
    batch: Any
    head: Any
    row: Any
    column: Any


def strided(tensor: Tensor) -> Strided:
    """The kernel argument for a tensor [B, H, rows, columns]."""
    return Strided(tensor, *tensor.stride())


def row_major(tensor: Tensor) -> Tensor:
    """The tensor, copied where neighbours in a row are not neighbours in memory.

    Triton lays tiles out in the order of their strides. Products of tiles whose rows are not
    contiguous need more descriptors, and ptxas of CUDA 12.8, out of uniform registers, then uses
    some that it never set: illegal reads (benchmarks/LOG.md). Checked by test_compile.py.
    """
    if known(tensor.stride(-1) == 1):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def padded(width: int, dtype: torch.dtype) -> int:
    """The width of the tile that holds `width` columns: a power of two that `tl.dot` takes.

    16-bit tiles are at least 64 wide: compiled by Triton 3.6 for Hopper, products whose right
    operand has fewer columns come out wrong or read outside of shared memory (benchmarks/LOG.md).
    """
    return max(16 if dtype == torch.float32 else 64, triton.next_power_of_2(width))


@triton.jit
def row_pointers(view, batch, head, first_row, BLOCK: tl.constexpr, PADDED: tl.constexpr):
    """Pointers [BLOCK, PADDED] to the rows from `first_row` on; batch and head are int64."""
    # The offsets inside of the tile do not change in a loop over `first_row`: they stay apart.
    rows = tl.arange(0, BLOCK).to(tl.int64)[:, None] * view.row
    columns = tl.arange(0, PADDED).to(tl.int64)[None, :] * view.column
    start = batch * view.batch + head * view.head + tl.cast(first_row, tl.int64) * view.row
    return view.pointer + start + (rows + columns)


@triton.jit
def owner(blocks, num_heads, bias):
    """block, head and batch of a program, the last two int64.

    The batches that read the same tiles of a bias at the same time find them in the L2 cache.
    """
    program = tl.program_id(0)
    if bias is None:
        block, batch = program % blocks, program // (blocks * num_heads)
        head = program // blocks % num_heads
    else:
        num_batches = tl.num_programs(0) // (blocks * num_heads)
        batch, block = program % num_batches, program // num_batches % blocks
        head = program // num_batches // blocks
    return block, head.to(tl.int64), batch.to(tl.int64)


@triton.jit
def load_rows(
    view, batch, head, first_row, num_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """The tile [BLOCK, PADDED]; `num_rows` is None where all of its rows exist."""
    if isinstance(view, tl.tensor_descriptor):
        tile = view.load([batch.to(tl.int32), head.to(tl.int32), first_row, 0])
        return tile.reshape([BLOCK, PADDED])
    else:
        pointers = row_pointers(view, batch, head, first_row, BLOCK, PADDED)
        if num_rows is None and WIDTH == PADDED:
            return tl.load(pointers)
        else:
            inside = tl.arange(0, PADDED)[None, :] < WIDTH
            if num_rows is not None:
                inside = inside & (first_row + tl.arange(0, BLOCK)[:, None] < num_rows)
            return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def store_rows(
    view, batch, head, first_row, num_rows, tile, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """Writes the part of the tile [BLOCK, PADDED] that exists, in the tensor's dtype."""
    if isinstance(view, tl.tensor_descriptor):
        at = [batch.to(tl.int32), head.to(tl.int32), first_row, 0]
        view.store(at, tile.to(view.dtype).reshape([1, 1, BLOCK, PADDED]))
    else:
        pointers = row_pointers(view, batch, head, first_row, BLOCK, PADDED)
        inside = tl.arange(0, PADDED)[None, :] < WIDTH
        inside = inside & (first_row + tl.arange(0, BLOCK)[:, None] < num_rows)
        tl.store(pointers, tile.to(view.pointer.dtype.element_ty), mask=inside)


@triton.jit
def store_block(view, batch, head, first_row, first_column, num_rows, num_columns, tile):
    """Writes the part of the tile that exists at any place of [B, H, num_rows, num_columns].

    A tensor without a descriptor is contiguous.
    """
    if isinstance(view, tl.tensor_descriptor):
        at = [batch.to(tl.int32), head.to(tl.int32), first_row, first_column]
        view.store(at, tile.to(view.dtype).reshape([1, 1, tile.shape[0], tile.shape[1]]))
    else:
        rows = (first_row + tl.arange(0, tile.shape[0]))[:, None]
        columns = (first_column + tl.arange(0, tile.shape[1]))[None, :]
        start = view.pointer + batch.to(tl.int64) * view.batch + head.to(tl.int64) * view.head
        inside = (rows < num_rows) & (columns < num_columns)
        pointers = start + (rows.to(tl.int64) * view.row + columns)
        tl.store(pointers, tile.to(view.pointer.dtype.element_ty), mask=inside)


@triton.jit
def load_pairs(start, row_stride, column_stride, queries, keys, inside):
    """Entries of an [M, N] matrix at the pairs that `queries` and `keys` span, 0 outside.

    One is a column and one a row vector, in either order: the tile comes out accordingly.
    """
    offsets = queries.to(tl.int64) * row_stride + keys.to(tl.int64) * column_stride
    return tl.load(start + offsets, mask=inside, other=0)


@triton.jit
def load_per_row(
    pointer, row_of_matrix, first_row, num_rows, OTHER: tl.constexpr, BLOCK: tl.constexpr
):
    """[BLOCK] of a contiguous [matrices, num_rows] tensor, OTHER past the end."""
    rows = first_row + tl.arange(0, BLOCK)
    return tl.load(pointer + row_of_matrix * num_rows + rows, mask=rows < num_rows, other=OTHER)
