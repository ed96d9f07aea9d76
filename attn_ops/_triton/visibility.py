"""Which columns a row sees: one interval, so that blocks are skipped, taken whole, or masked.

Rows are queries and columns are keys, or, for the gradients of keys and values, the other way
round: a band and monotone bounds turn into a band and monotone bounds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_ops._ahead import known


class Band(NamedTuple):
    """Row m, at p = m + offset, sees [p - left, p + right] and, unless None, [start, stop).

    start, stop: int32 [1 or B, rows]; `batch` is their stride between batches.
    """

    offset: Any
    left: Any
    right: Any
    start: Any
    stop: Any
    batch: Any


def _band(offset: int, left: int, right: int, start: Tensor | None, stop: Tensor | None) -> Band:
    if start is None or stop is None:
        return Band(offset, left, right, None, None, None)
    start, stop = start.contiguous(), stop.contiguous()
    batch = 0 if known(start.shape[0] == 1) else start.shape[1]
    return Band(offset, left, right, start, stop, batch)


def _clamped(num_queries: int, num_keys: int, left: int, right: int) -> tuple[int, int]:
    """The same band in 32 bits: no pair is further apart than M + N."""
    reach = num_queries + num_keys
    if not isinstance(reach, int):
        least, most = torch.sym_min, torch.sym_max
        return most(-reach, least(left, reach)), most(-reach, least(right, reach))
    return max(-reach, min(left, reach)), max(-reach, min(right, reach))


def keys_seen(
    num_queries: int,
    num_keys: int,
    left: int,
    right: int,
    start: Tensor | None,
    stop: Tensor | None,
) -> Band:
    """Rows are queries: query m, at p = m + N - M, sees [p - left, p + right] and [start, stop)."""
    left, right = _clamped(num_queries, num_keys, left, right)
    return _band(num_keys - num_queries, left, right, start, stop)


def queries_seeing(
    num_queries: int,
    num_keys: int,
    left: int,
    right: int,
    start: Tensor | None,
    stop: Tensor | None,
) -> Band:
    """Rows are keys: the same pairs, seen from the other side."""
    left, right = _clamped(num_queries, num_keys, left, right)
    first = past = None
    if start is not None and stop is not None:
        keys = torch.arange(num_keys, device=start.device, dtype=torch.int32)
        keys = keys.expand(start.shape[0], num_keys).contiguous()
        # Key n is seen from the first query with stop > n on, up to the first with start > n.
        first, past = (
            torch.searchsorted(edge.contiguous(), keys, right=True, out_int32=True)
            for edge in (stop, start)
        )
    return _band(num_queries - num_keys, right, left, first, past)


@triton.jit
def interval(band, batch, rows, num_rows, num_columns):
    """first, past: a row sees columns [first, past). Rows past the end copy the last one."""
    rows = tl.minimum(rows, num_rows - 1)
    first = tl.maximum(rows + (band.offset - band.left), 0)
    past = tl.minimum(rows + (band.offset + band.right + 1), num_columns)
    if band.start is not None:
        rows = batch * band.batch + rows
        first = tl.maximum(first, tl.load(band.start + rows))
        past = tl.minimum(past, tl.load(band.stop + rows))
    return first, tl.maximum(past, 0)


@triton.jit
def block_range(first, past, BLOCK: tl.constexpr):
    """begin <= full_begin <= full_end <= end, in blocks of columns.

    No row sees anything outside of [begin, end); every row sees all of [full_begin, full_end).
    """
    begin = tl.min(first) // BLOCK
    end = tl.maximum(tl.cdiv(tl.max(past), BLOCK), begin)
    full_begin = tl.minimum(tl.cdiv(tl.max(first), BLOCK), end)
    full_end = tl.maximum(tl.min(past) // BLOCK, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def hide_outside(score, columns, limits):
    """-inf where a column is outside of its row's interval; `limits` None hides nothing."""
    if limits is not None:
        seen = (columns >= limits[0][:, None]) & (columns < limits[1][:, None])
        score = tl.where(seen, score, float("-inf"))
    return score
