"""Gradients of bias and relative_bias: sums of grad_score, each owned by one program.

A program recomputes the tiles of grad_score that its part of the gradient is the sum of, so that
neither atomics nor a [B, H, M, N] tensor is needed. Where few batches share a bias, the program
that sums the gradient of its queries has all of them (grad_query_bias_kernel).
"""

from __future__ import annotations

import triton
import triton.language as tl

from attn_ops._triton.bias import load_bias_tile
from attn_ops._triton.tiles import load_rows, owner, store_block, store_rows
from attn_ops._triton.visibility import block_range, interval
from attn_ops.cosine_sim.triton_backward import grad_of_scores, load_row_statistics
from attn_ops.cosine_sim.triton_normalize import through_norm


@triton.jit
def _factor(scoring, head):
    factor = scoring.factor
    if scoring.head_scale is not None:
        factor *= tl.load(scoring.head_scale + head)
    return factor


@triton.jit
def grad_score_tile(
    query, key, value, bias, tile, grad_out, lse, delta, scoring, terms, band, batch, head,
    first_query, first_key, num_keys,
    D: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, BITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_score [BM, BN]; num_keys is None where all keys exist and every query sees them.

    `tile`: what is added to the scores if it is known already, else None.
    """
    num_queries = scoring.num_queries
    kv_head = (head.to(tl.int32) // scoring.heads_per_group).to(tl.int64)
    queries = first_query + tl.arange(0, BM)
    keys = first_key + tl.arange(0, BN)[None, :]
    limits = None
    if num_keys is not None:
        limits = interval(band, batch, queries, num_queries, num_keys)
    q = load_rows(query, batch, head, first_query, num_queries, D, BM, BD)
    k = load_rows(key, batch, kv_head, first_key, num_keys, D, BN, BD)
    do = load_rows(grad_out, batch, head, first_query, num_queries, E, BM, BE)
    v = load_rows(value, batch, kv_head, first_key, num_keys, E, BN, BE)
    if bias is not None:
        tile = load_bias_tile(bias, batch, head, first_query, first_key, scoring.num_queries)
    row_lse, row_delta = load_row_statistics(
        lse, delta, scoring, batch, head, first_query, BM, BITS
    )
    _, grad_score = grad_of_scores(
        q, k, do, v, row_lse[:, None], row_delta[:, None], tile, scoring, terms, batch, head,
        queries[:, None], keys, _factor(scoring, head), keys, limits, BITS, PRECISION,
    )  # fmt: skip
    return grad_score


@triton.jit
def _sum_over_heads(
    total, query, key, value, bias, grad_out, lse, delta, scoring, terms, band, own_batch, own_head,
    sum_heads, first_query, first_key, num_keys, count,
    D: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, BITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the tile of `count` heads, `sum_heads` of each batch."""
    for i in range(count):
        batch = (own_batch + i // sum_heads).to(tl.int64)
        head = (own_head + i % sum_heads).to(tl.int64)
        total += grad_score_tile(
            query, key, value, bias, None, grad_out, lse, delta, scoring, terms, band, batch, head,
            first_query, first_key, num_keys, D, E, BM, BN, BD, BE, BITS, PRECISION,
        )  # fmt: skip
    return total


@triton.jit
def grad_bias_kernel(
    query, key, value, bias, grad_out, lse, delta, grad_bias, bias_rows, bias_columns,
    own_heads, own_row_blocks, own_column_blocks,
    sum_batches, sum_heads, sum_row_blocks, sum_column_blocks, scoring, terms, band,
    D: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, BITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns a tile of grad_bias and sums over the dimensions that bias is broadcast over.

    In each of the four dimensions either `own` counts the tiles and `sum` is 1, or the reverse.
    """
    num_queries, num_keys = scoring.num_queries, scoring.num_keys
    program = tl.program_id(0)
    own_column = program % own_column_blocks
    own_row = program // own_column_blocks % own_row_blocks
    own_head = program // own_column_blocks // own_row_blocks % own_heads
    own_batch = program // own_column_blocks // own_row_blocks // own_heads
    heads = sum_batches * sum_heads
    total = tl.zeros([BM, BN], tl.float32)
    for i in range(sum_row_blocks * sum_column_blocks):
        first_key = (own_column + i % sum_column_blocks) * BN
        first_query = (own_row + i // sum_column_blocks) * BM
        queries = first_query + tl.arange(0, BM)
        first, past = interval(band, own_batch, queries, num_queries, num_keys)
        seen = (tl.min(first) < first_key + BN) & (tl.max(past) > first_key)
        full = (tl.max(first) <= first_key) & (tl.min(past) >= first_key + BN)
        if band.start is not None:  # other batches may see another part
            seen = seen | (sum_batches > 1)
            full = False
        total = _sum_over_heads(
            total, query, key, value, bias, grad_out, lse, delta, scoring, terms, band, own_batch,
            own_head, sum_heads, first_query, first_key, None, tl.where(full, heads, 0),
            D, E, BM, BN, BD, BE, BITS, PRECISION,
        )  # fmt: skip
        total = _sum_over_heads(
            total, query, key, value, bias, grad_out, lse, delta, scoring, terms, band, own_batch,
            own_head, sum_heads, first_query, first_key, num_keys,
            tl.where(full, 0, tl.where(seen, heads, 0)),
            D, E, BM, BN, BD, BE, BITS, PRECISION,
        )  # fmt: skip
    if bias_rows == 1:
        total = tl.broadcast_to(tl.sum(total, 0, keep_dims=True), [BM, BN])
    if bias_columns == 1:
        total = tl.broadcast_to(tl.sum(total, 1, keep_dims=True), [BM, BN])
    store_block(
        grad_bias, own_batch, own_head, own_row * BM, own_column * BN, bias_rows, bias_columns,
        total,
    )  # fmt: skip


@triton.jit
def _sweep_keys(
    grad_q, grad_q_next, q, q_next, do, do_next, statistics, statistics_next, key, value, bias,
    grad_bias, scoring, terms, batch, head, first_query, queries, factor, limits, num_keys, begin,
    count, before, gap,
    D: tl.constexpr, E: tl.constexpr, BN: tl.constexpr, BITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As in the gradient of queries, of one batch or of two, with the sum of their grad_score."""
    kv_head = (head.to(tl.int32) // scoring.heads_per_group).to(tl.int64)
    for i in range(count):
        first_key = (begin + i + tl.where(i < before, 0, gap)) * BN
        keys = first_key + tl.arange(0, BN)[None, :]
        k = load_rows(key, batch, kv_head, first_key, num_keys, D, BN, q.shape[1])
        v = load_rows(value, batch, kv_head, first_key, num_keys, E, BN, do.shape[1])
        tile = None
        if bias is not None:
            tile = load_bias_tile(bias, batch, head, first_query, first_key, scoring.num_queries)
        _, total = grad_of_scores(
            q, k, do, v, statistics[0][:, None], statistics[1][:, None], tile, scoring, terms,
            batch, head, queries[:, None], keys, factor, keys, limits, BITS, PRECISION,
        )  # fmt: skip
        grad_q = tl.dot(total.to(k.dtype), k, grad_q, input_precision=PRECISION)
        if q_next is not None:
            k = load_rows(key, batch + 1, kv_head, first_key, num_keys, D, BN, q.shape[1])
            v = load_rows(value, batch + 1, kv_head, first_key, num_keys, E, BN, do.shape[1])
            _, grad_score = grad_of_scores(
                q_next, k, do_next, v, statistics_next[0][:, None], statistics_next[1][:, None],
                tile, scoring, terms, batch + 1, head, queries[:, None], keys, factor, keys, limits,
                BITS, PRECISION,
            )  # fmt: skip
            grad_q_next = tl.dot(grad_score.to(k.dtype), k, grad_q_next, input_precision=PRECISION)
            total += grad_score
        store_block(
            grad_bias, batch, head, first_query, first_key, scoring.num_queries, scoring.num_keys,
            total,
        )  # fmt: skip
    return grad_q, grad_q_next


@triton.jit
def _clear(
    grad_bias, batch, head, first_query, begin, end, scoring, BM: tl.constexpr, BN: tl.constexpr
):
    """Zeros in the blocks of keys [begin, end), which no query of the block sees."""
    for i in range(begin, end):
        store_block(
            grad_bias, batch, head, first_query, i * BN, scoring.num_queries, scoring.num_keys,
            tl.zeros([BM, BN], tl.float32),
        )  # fmt: skip


@triton.jit
def grad_query_bias_kernel(
    query, key, value, bias, grad_out, lse, delta, grad_query, grad_factor, source, grad_bias,
    scoring, terms, band,
    D: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, BITS: tl.constexpr, PRECISION: tl.constexpr,
    BATCHES: tl.constexpr,
):  # fmt: skip
    """A program owns BM queries of one head, of all BATCHES (1 or 2) that share a row of bias.

    Its band is the same in all batches.
    """
    num_queries, num_keys = scoring.num_queries, scoring.num_keys
    blocks = tl.cdiv(num_queries, BM)
    block, head, batch = owner(blocks, scoring.num_heads, bias)
    batch *= BATCHES
    block = blocks - 1 - block  # the longest rows of causal attention first
    first_query = block * BM
    queries = first_query + tl.arange(0, BM)
    first, past = interval(band, batch, queries, num_queries, num_keys)
    begin, full_begin, full_end, end = block_range(first, past, BN)
    factor = _factor(scoring, head)

    q = load_rows(query, batch, head, first_query, num_queries, D, BM, BD)
    do = load_rows(grad_out, batch, head, first_query, num_queries, E, BM, BE)
    statistics = load_row_statistics(lse, delta, scoring, batch, head, first_query, BM, BITS)
    grad_q = tl.zeros([BM, BD], tl.float32)
    q_next, do_next, statistics_next = None, None, None
    grad_q_next = tl.zeros([BM, BD], tl.float32)
    if BATCHES == 2:
        q_next = load_rows(query, batch + 1, head, first_query, num_queries, D, BM, BD)
        do_next = load_rows(grad_out, batch + 1, head, first_query, num_queries, E, BM, BE)
        statistics_next = load_row_statistics(
            lse, delta, scoring, batch + 1, head, first_query, BM, BITS
        )
    grad_q, grad_q_next = _sweep_keys(
        grad_q, grad_q_next, q, q_next, do, do_next, statistics, statistics_next, key, value, bias,
        grad_bias, scoring, terms, batch, head, first_query, queries, factor, None, None,
        full_begin, full_end - full_begin, 0, 0, D, E, BN, BITS, PRECISION,
    )  # fmt: skip
    left, right = full_begin - begin, end - full_end
    grad_q, grad_q_next = _sweep_keys(
        grad_q, grad_q_next, q, q_next, do, do_next, statistics, statistics_next, key, value, bias,
        grad_bias, scoring, terms, batch, head, first_query, queries, factor, (first, past),
        num_keys, begin, left + right, left, full_end - full_begin, D, E, BN, BITS, PRECISION,
    )  # fmt: skip
    _clear(grad_bias, batch, head, first_query, 0, begin, scoring, BM, BN)
    _clear(grad_bias, batch, head, first_query, end, tl.cdiv(num_keys, BN), scoring, BM, BN)
    _finish(
        grad_query, grad_q, source, batch, head, first_query, num_queries, grad_factor, D, BM, BD
    )
    if BATCHES == 2:
        _finish(
            grad_query, grad_q_next, source, batch + 1, head, first_query, num_queries, grad_factor,
            D, BM, BD,
        )  # fmt: skip


@triton.jit
def _finish(
    grad_query, grad_q, source, batch, head, first_query, num_queries, grad_factor,
    D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Writes grad_factor * grad_q, back through the norm if there are queries before it."""
    if source is not None:
        x = load_rows(source, batch, head, first_query, num_queries, D, BM, BD)
        grad_q = through_norm(grad_q, x)
    store_rows(grad_query, batch, head, first_query, num_queries, grad_q * grad_factor, D, BM, BD)
