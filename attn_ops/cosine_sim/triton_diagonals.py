"""The gradient of relative_bias: sums of grad_score along diagonals.

Tiles of scores on one diagonal of blocks hold the same diagonals of scores in the same places: a
program adds them up as they are, and only its sum is summed along diagonals (add_diagonals_kernel).
No atomics, and no tensor that grows faster than M + N.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attn_ops._triton.bias import load_bias_tile
from attn_ops._triton.visibility import interval
from attn_ops.cosine_sim.triton_bias import grad_score_tile


@triton.jit
def _sum_tiles(
    total, query, key, value, bias, tile, grad_out, lse, delta, scoring, terms, band, head,
    first_batch, num_batches, begin, count, ahead, num_keys,
    D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, BITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds `count` tiles of each batch; that of query block i is `ahead` blocks of keys further."""
    for i in range(count * num_batches):
        row = begin + i // num_batches
        total += grad_score_tile(
            query, key, value, bias, tile, grad_out, lse, delta, scoring, terms, band,
            (first_batch + i % num_batches).to(tl.int64), head, row * BLOCK, (row + ahead) * BLOCK,
            num_keys, D, E, BLOCK, BLOCK, BD, BE, BITS, PRECISION,
        )  # fmt: skip
    return total


@triton.jit
def grad_relative_bias_kernel(
    query, key, value, bias, grad_out, lse, delta, parts, num_batches, scoring, terms, band,
    D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, BITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns a diagonal of blocks: parts [H, diagonals of blocks, BLOCK, BLOCK]."""
    num_queries, num_keys = scoring.num_queries, scoring.num_keys
    query_blocks, key_blocks = tl.cdiv(num_queries, BLOCK), tl.cdiv(num_keys, BLOCK)
    diagonals = query_blocks + key_blocks - 1
    head = (tl.program_id(0) % scoring.num_heads).to(tl.int64)
    # The longest first: from the middle to both sides.
    place = tl.program_id(0) // scoring.num_heads
    middle = diagonals // 2
    side = (place + 1) // 2
    number = tl.where(place % 2 == 0, middle + side, middle - side)
    ahead = number - (query_blocks - 1)
    begin = tl.maximum(-ahead, 0)
    end = tl.minimum(query_blocks, key_blocks - ahead)

    tile = None
    if bias is not None:
        if len(bias.block_shape) == 3:  # one tile for the whole diagonal
            tile = load_bias_tile(bias, head, head, 0, ahead * BLOCK, num_queries)
            bias = None
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    if band.start is None:
        # Whether scores are seen depends on the diagonal alone, but at the ends.
        least, most = (ahead - 1) * BLOCK + 1, (ahead + 1) * BLOCK - 1
        lower, upper = band.offset - band.left, band.offset + band.right
        seen = (least <= upper) & (most >= lower)
        full = (most <= upper) & (least >= lower)
        whole = tl.minimum(num_queries // BLOCK, num_keys // BLOCK - ahead)
        full_count = tl.where(full, tl.maximum(whole - begin, 0), 0)
        total = _sum_tiles(
            total, query, key, value, bias, tile, grad_out, lse, delta, scoring, terms, band, head,
            0, num_batches, begin, full_count, ahead, None, D, E, BLOCK, BD, BE, BITS, PRECISION,
        )  # fmt: skip
        total = _sum_tiles(
            total, query, key, value, bias, tile, grad_out, lse, delta, scoring, terms, band, head,
            0, num_batches, begin + full_count, tl.where(seen, end - begin - full_count, 0), ahead,
            num_keys, D, E, BLOCK, BD, BE, BITS, PRECISION,
        )  # fmt: skip
    else:
        for i in range((end - begin) * num_batches):
            row, batch = begin + i // num_batches, i % num_batches
            queries = row * BLOCK + tl.arange(0, BLOCK)
            first, past = interval(band, batch, queries, num_queries, num_keys)
            first_key = (row + ahead) * BLOCK
            seen = (tl.min(first) < first_key + BLOCK) & (tl.max(past) > first_key)
            total = _sum_tiles(
                total, query, key, value, bias, tile, grad_out, lse, delta, scoring, terms, band,
                head, batch, 1, row, tl.where(seen, 1, 0), ahead, num_keys,
                D, E, BLOCK, BD, BE, BITS, PRECISION,
            )  # fmt: skip
    entries = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(parts + (head * diagonals + number) * (BLOCK * BLOCK) + entries, total)


@triton.jit
def add_diagonals_kernel(
    parts, grad_relative_bias, num_queries, num_keys, num_heads, BLOCK: tl.constexpr
):
    """A program owns BLOCK diagonals: the upper part of one tile and the lower one of the next.

    In the tile `number`, entry (i, j) is of the pair n - m = ahead * BLOCK + j - i.
    """
    query_blocks, key_blocks = tl.cdiv(num_queries, BLOCK), tl.cdiv(num_keys, BLOCK)
    diagonals = query_blocks + key_blocks - 1
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    number = tl.program_id(0) // num_heads - 1  # from -1: the lower part of the first tile
    places = tl.arange(0, BLOCK)
    columns = places[:, None] + places[None, :]  # of row i and diagonal r: i + r
    tile = number + columns // BLOCK
    entries = places[:, None] * BLOCK + columns % BLOCK
    pointers = parts + (head * diagonals + tile) * (BLOCK * BLOCK) + entries
    total = tl.sum(tl.load(pointers, mask=(tile >= 0) & (tile < diagonals), other=0.0), 0)
    distances = (number - (query_blocks - 1)) * BLOCK + places  # n - m
    inside = (distances > -num_queries) & (distances < num_keys)
    pointers = grad_relative_bias + head * (num_queries + num_keys - 1)
    tl.store(pointers + (distances + num_queries - 1), total, mask=inside)
