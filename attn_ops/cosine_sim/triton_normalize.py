"""Queries and keys before the core, and their gradients after it.

A row [D] of x consists of `groups` slices of WIDTH elements. The kernels take (row, slice) pairs as
their rows, so that any number of slices is the same code: groups = 1 is the plain norm.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _slice_offsets(rows, columns, groups, row_stride, column_stride, WIDTH: tl.constexpr):
    """Where the elements of slice `rows % groups` of row `rows // groups` are."""
    column = (rows % groups)[:, None] * WIDTH + columns[None, :]
    return (rows // groups).to(tl.int64)[:, None] * row_stride + column.to(tl.int64) * column_stride


@triton.jit
def inverse_norm(x):
    """1 / max(|x|, 1e-12) per row of x [R, W] float32; 0 for a zero row. And |x|² itself."""
    squared = tl.sum(x * x, 1)
    inverse = 1.0 / tl.maximum(tl.sqrt(squared), 1e-12)
    return tl.where(squared == 0.0, 0.0, inverse), squared


@triton.jit
def unit_rows(x):
    """Rows of x [R, W] as unit vectors, in x's dtype."""
    tile = x.to(tl.float32)
    inverse, _ = inverse_norm(tile)
    return (tile * inverse[:, None]).to(x.dtype)


@triton.jit
def through_norm(grad, x):
    """The gradient of x [R, W] from grad, that of its unit rows."""
    tile = x.to(tl.float32)
    inverse, squared = inverse_norm(tile)
    tile *= inverse[:, None]
    # Below the floor of the norm the divisor is a constant: nothing to project out.
    along = tl.where(squared > 1e-24, tl.sum(tile * grad, 1), 0.0)
    return (grad - tile * along[:, None]) * inverse[:, None]


@triton.jit
def normalize_kernel(
    x, gain, unit, num_rows, num_heads, groups,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """unit [B, H, M, D] contiguous = x / norm of its slice * gain; gain [H, D] or None."""
    blocks = tl.cdiv(num_rows * groups, ROWS)
    program = tl.program_id(0)
    head = (program // blocks % num_heads).to(tl.int64)
    batch = (program // blocks // num_heads).to(tl.int64)
    rows = program % blocks * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, PADDED)
    inside = (rows < num_rows * groups)[:, None] & (columns < WIDTH)[None, :]
    start = x.pointer + batch * x.batch + head * x.head
    pointers = start + _slice_offsets(rows, columns, groups, x.row, x.column, WIDTH)
    tile = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    inverse, _ = inverse_norm(tile)
    tile *= inverse[:, None]
    if gain is not None:
        entry = (rows % groups)[:, None] * WIDTH + columns[None, :]
        tile *= tl.load(gain + head * groups * WIDTH + entry, mask=inside, other=0.0)
    start = unit + (batch * num_heads + head) * num_rows * groups * WIDTH
    offsets = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    tl.store(start + offsets, tile.to(unit.dtype.element_ty), mask=inside)


@triton.jit
def normalize_backward_kernel(
    grad, x, gain, head_scale, scale, grad_x, gain_parts, scale_parts, num_rows, num_heads, groups,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Gradients of x, of gain and of head_scale, from grad: the gradient before `scale`.

    unit = x * r * gain, and scale * head_scale * grad is the gradient of unit. A program takes
    slices of one kind and writes its sums to gain_parts [programs, WIDTH] (the gradient of gain)
    and scale_parts [programs] (the sum of grad * unit). NORM None: x was taken as it is.
    """
    blocks = tl.cdiv(num_rows, ROWS)
    program = tl.program_id(0)
    block = program % blocks
    piece = program // blocks % groups
    head = (program // blocks // groups % num_heads).to(tl.int64)
    batch = (program // blocks // groups // num_heads).to(tl.int64)
    rows = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = piece * WIDTH + tl.arange(0, PADDED)
    inside = (rows < num_rows) & (tl.arange(0, PADDED) < WIDTH)[None, :]
    pointers = x.pointer + batch * x.batch + head * x.head + rows * x.row
    tile = tl.load(pointers + columns.to(tl.int64)[None, :] * x.column, mask=inside, other=0.0)
    tile = tile.to(tl.float32)
    offsets = ((batch * num_heads + head) * num_rows + rows) * (groups * WIDTH) + columns[None, :]
    raw = tl.load(grad + offsets, mask=inside, other=0.0).to(tl.float32)

    inverse = tl.full([ROWS], 1.0, tl.float32)
    if NORM is not None:
        inverse, squared = inverse_norm(tile)
        tile *= inverse[:, None]
    through_gain = raw
    if gain is not None:
        entry = gain + head * (groups * WIDTH) + columns
        through_gain *= tl.load(entry, mask=tl.arange(0, PADDED) < WIDTH, other=0.0)[None, :]
    along = tl.sum(tile * through_gain, 1)
    if scale_parts is not None:
        tl.store(scale_parts + program, tl.sum(along))
    if head_scale is not None:
        scale *= tl.load(head_scale + head)
    if gain_parts is not None:
        part = tl.sum(raw * tile, 0) * scale
        pointers = gain_parts + program.to(tl.int64) * WIDTH + tl.arange(0, PADDED)
        tl.store(pointers, part, mask=tl.arange(0, PADDED) < WIDTH)
    if grad_x is not None:
        if NORM is not None:
            # Below the floor of the norm the divisor is a constant: nothing to project out.
            along = tl.where(squared > 1e-24, along, 0.0)
            through_gain -= tile * along[:, None]
        result = through_gain * (inverse * scale)[:, None]
        tl.store(grad_x + offsets, result.to(grad_x.dtype.element_ty), mask=inside)
