"""Gradients of bias and relative_bias: sums of grad_score, each owned by one program.

A program recomputes the tiles of grad_score that its part of the gradient is the sum of, so that
neither atomics nor a [B, H, M, N] tensor is needed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attn_ops._triton.tiles import load_rows
from attn_ops._triton.visibility import interval
from attn_ops.cosine_sim.triton_backward import grad_of_scores, load_row_statistics


@triton.jit
def _grad_score_tile(
    query, key, value, grad_out, lse, delta, scoring, terms, band, batch, head, first_query,
    first_key,
    D: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, BITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_score [BM, BN], 0 where a pair does not exist or is hidden."""
    num_queries, num_keys = scoring.num_queries, scoring.num_keys
    kv_head = head // scoring.heads_per_group
    queries = first_query + tl.arange(0, BM)
    keys = first_key + tl.arange(0, BN)[None, :]
    first, past = interval(band, batch, queries, num_queries, num_keys)
    grad_score = tl.zeros([BM, BN], tl.float32)
    if (tl.min(first) < first_key + BN) & (tl.max(past) > first_key):
        q = load_rows(query, batch, head, first_query, num_queries, D, BM, BD)
        do = load_rows(grad_out, batch, head, first_query, num_queries, E, BM, BE)
        k = load_rows(key, batch, kv_head, first_key, num_keys, D, BN, BD)
        v = load_rows(value, batch, kv_head, first_key, num_keys, E, BN, BE)
        row_lse, row_delta = load_row_statistics(
            lse, delta, scoring, batch, head, first_query, BM, BITS
        )
        factor = scoring.factor
        if scoring.head_scale is not None:
            factor *= tl.load(scoring.head_scale + head)
        _, grad_score = grad_of_scores(
            q, k, do, v, row_lse[:, None], row_delta[:, None], scoring, terms, batch, head,
            queries[:, None], keys, factor, keys, (first, past), BITS, PRECISION,
        )  # fmt: skip
    return grad_score


@triton.jit
def grad_bias_kernel(
    query, key, value, grad_out, lse, delta, grad_bias, bias_rows, bias_columns,
    own_heads, own_row_blocks, own_column_blocks,
    sum_batches, sum_heads, sum_row_blocks, sum_column_blocks, scoring, terms, band,
    D: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, BITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns a tile of grad_bias and sums over the dimensions that bias is broadcast over.

    In each of the four dimensions either `own` counts the tiles and `sum` is 1, or the reverse.
    """
    program = tl.program_id(0)
    own_column = program % own_column_blocks
    own_row = program // own_column_blocks % own_row_blocks
    own_head = program // own_column_blocks // own_row_blocks % own_heads
    own_batch = program // own_column_blocks // own_row_blocks // own_heads
    total = tl.zeros([BM, BN], tl.float32)
    for i in range(sum_batches * sum_heads * sum_row_blocks * sum_column_blocks):
        column = own_column + i % sum_column_blocks
        row = own_row + i // sum_column_blocks % sum_row_blocks
        head = own_head + i // sum_column_blocks // sum_row_blocks % sum_heads
        batch = own_batch + i // sum_column_blocks // sum_row_blocks // sum_heads
        total += _grad_score_tile(
            query, key, value, grad_out, lse, delta, scoring, terms, band,
            batch.to(tl.int64), head.to(tl.int64), row * BM, column * BN,
            D, E, BM, BN, BD, BE, BITS, PRECISION,
        )  # fmt: skip
    rows = own_row * BM + tl.arange(0, BM)[:, None]
    columns = own_column * BN + tl.arange(0, BN)[None, :]
    if bias_rows == 1:
        total = tl.broadcast_to(tl.sum(total, 0, keep_dims=True), [BM, BN])
    if bias_columns == 1:
        total = tl.broadcast_to(tl.sum(total, 1, keep_dims=True), [BM, BN])
    matrix = own_batch.to(tl.int64) * own_heads + own_head
    pointers = grad_bias + (matrix * bias_rows + rows) * bias_columns + columns
    inside = (rows < bias_rows) & (columns < bias_columns)
    tl.store(pointers, total.to(grad_bias.dtype.element_ty), mask=inside)


@triton.jit
def grad_relative_bias_kernel(
    query, key, value, grad_out, lse, delta, grad_relative_bias, num_batches, scoring, terms, band,
    D: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, BITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns BO diagonals o = n - m + M - 1 of one head and walks down along them.

    BM queries and BO diagonals span BM + BO - 1 keys: the tile of grad_score has BM + BO.
    """
    num_queries, num_keys = scoring.num_queries, scoring.num_keys
    num_diagonals = num_queries + num_keys - 1
    blocks = tl.cdiv(num_diagonals, BO)
    first_diagonal = tl.program_id(0) % blocks * BO
    head = (tl.program_id(0) // blocks).to(tl.int64)
    # Row i of the tile holds diagonal j in column i + j.
    skewed = tl.arange(0, BM)[:, None] + tl.arange(0, BO)[None, :]
    # Query m meets these diagonals in keys m + shift and the BO - 1 after it.
    shift = first_diagonal - (num_queries - 1)
    begin = tl.maximum(-shift - (BO - 1), 0) // BM
    end = tl.cdiv(tl.maximum(tl.minimum(num_keys - shift, num_queries), 0), BM)
    total = tl.zeros([BO], tl.float32)
    for i in range((end - begin) * num_batches):
        first_query = (begin + i // num_batches) * BM
        first_key = tl.maximum(first_query + shift, 0)
        grad_score = _grad_score_tile(
            query, key, value, grad_out, lse, delta, scoring, terms, band,
            (i % num_batches).to(tl.int64), head, first_query, first_key,
            D, E, BM, BM + BO, BD, BE, BITS, PRECISION,
        )  # fmt: skip
        columns = skewed + (first_query + shift - first_key)
        along = tl.gather(grad_score, tl.maximum(columns, 0), axis=1)
        total += tl.sum(tl.where(columns >= 0, along, 0.0), 0)
    diagonals = first_diagonal + tl.arange(0, BO)
    pointers = grad_relative_bias + head * num_diagonals + diagonals
    tl.store(pointers, total, mask=diagonals < num_diagonals)
