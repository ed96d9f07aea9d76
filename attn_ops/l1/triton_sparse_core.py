"""Which edges a program goes through, and the rows that they lead to.

The edges of row m stand in places start[m] .. start[m + 1]. A program has one row of one head, as
long as that is no longer than CHUNK edges. Longer rows, the hubs of a graph, are cut at multiples
of CHUNK: a kernel runs first over the pieces, then over the rows, which add their pieces up. A
chunk has two slots for pieces: of the row that has its first edge, and of the one that starts later
and has its last edge. No other row that meets the chunk can be longer than it.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Below every score; differences of two of them do not overflow to NaN.
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _owner(start, rows, place):
    """The row with the edge at `place`: a search that looks at 32 rows at once.

    Kernels do not specialize `rows`: Triton 3.6 crashes on this loop where that is a constant 1.
    """
    low = place * 0
    size = low + rows
    while size > 1:
        step = (size + 31) // 32
        row = low + tl.arange(0, 32) * step
        starts_before = tl.load(start + row, mask=row < low + size, other=place + 1) <= place
        low += (tl.sum(starts_before.to(tl.int32), 0) - 1) * step
        size = tl.minimum(step, rows - low)
    return low


@triton.jit
def _piece(start, rows, num_edges, slot, CHUNK: tl.constexpr):
    """Row, first and last edge of the piece in a slot, which is empty for rows that are not cut."""
    side = slot % 2
    first = slot // 2 * CHUNK
    stop = tl.minimum(first + CHUNK, num_edges)
    row = _owner(start, rows, tl.where(side == 0, first, stop - 1))
    row_begin, row_end = tl.load(start + row), tl.load(start + row + 1)
    begin, end = tl.maximum(row_begin, first), tl.minimum(row_end, stop)
    exists = (row_end - row_begin > CHUNK) & ((side == 0) | (row_begin > first))
    return row, begin, tl.where(exists, end, begin)


@triton.jit
def span(start, rows, num_edges, program, CHUNK: tl.constexpr, PIECES: tl.constexpr):
    """Row; first and last of its edges; and where this program stops among them.

    PIECES: the edges are those of a piece. Else the row's, and a row that is cut has no edges left.
    """
    if PIECES:
        row, begin, end = _piece(start, rows, num_edges, program, CHUNK)
        stop = end
    else:
        row = program
        begin, end = tl.load(start + row), tl.load(start + row + 1)
        stop = tl.where(end - begin > CHUNK, begin, end)
    return row, begin, end, stop


@triton.jit
def pieces(begin, end, CHUNK: tl.constexpr):
    """The chunks first .. stop that a row was cut into; none for a row that was not cut."""
    first = begin // CHUNK
    return first, tl.where(end - begin > CHUNK, (end - 1) // CHUNK + 1, first)


@triton.jit
def slot_of(chunk, begin, CHUNK: tl.constexpr):
    """The slot of a row's piece in a chunk; the row's edges start at `begin`."""
    return 2 * chunk + tl.where(begin > chunk * CHUNK, 1, 0)


@triton.jit
def sum_of_pieces(parts, begin, end, columns, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Sum of parts [slots, WIDTH] over the pieces of a row."""
    total = tl.zeros(columns.shape, tl.float32)
    first, stop = pieces(begin, end, CHUNK)
    for chunk in range(first, stop):
        pointers = parts + slot_of(chunk, begin, CHUNK) * WIDTH + columns
        total += tl.load(pointers, mask=columns < WIDTH, other=0.0)
    return total


@triton.jit
def load_row(pointer, columns, WIDTH: tl.constexpr):
    """[PADDED] float32."""
    return tl.load(pointer + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def store_row(pointer, x, columns, WIDTH: tl.constexpr):
    """In the dtype of the tensor."""
    tl.store(pointer + columns, x.to(pointer.dtype.element_ty), mask=columns < WIDTH)


@triton.jit
def load_ends(pointer, row_stride, index, live, columns, WIDTH: tl.constexpr):
    """[EDGES, PADDED] float32: the rows `index` [EDGES], int64; zeros for edges not live."""
    offsets = index[:, None] * row_stride + columns[None, :]
    inside = live[:, None] & (columns < WIDTH)[None, :]
    return tl.load(pointer + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def times_sign(x, difference):
    """x [EDGES] * sign(difference [EDGES, PADDED])."""
    x = x[:, None]
    return tl.where(difference > 0, x, tl.where(difference < 0, -x, 0.0))
