"""The backward core on queries and keys as they enter the dot product.

`delta` first; then one kernel owns blocks of queries (grad_query) and one owns blocks of keys
(grad_key, grad_value). Each number is summed by one program in one order: no atomics.

Letters: M queries, N keys, D query/key width, E value width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attn_ops._triton.bias import add_pair_terms, load_bias_tile
from attn_ops._triton.products import add_product, load_factor, product, transposed
from attn_ops._triton.softmax import LOG2_E, probabilities
from attn_ops._triton.tiles import load_per_row, load_rows, owner, store_rows
from attn_ops._triton.visibility import block_range, hide_outside, interval
from attn_ops.cosine_sim.triton_normalize import through_norm


@triton.jit
def delta_kernel(
    out, grad_out, grad_lse, delta, num_queries, num_heads,
    E: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """delta [B, H, M] = sum of out * grad_out over E, minus grad_lse: what a row's scores share."""
    blocks = tl.cdiv(num_queries, BM)
    program = tl.program_id(0)
    first_query = program % blocks * BM
    head = (program // blocks % num_heads).to(tl.int64)
    batch = (program // blocks // num_heads).to(tl.int64)
    o = load_rows(out, batch, head, first_query, num_queries, E, BM, BE).to(tl.float32)
    do = load_rows(grad_out, batch, head, first_query, num_queries, E, BM, BE).to(tl.float32)
    total = tl.sum(o * do, 1)
    queries = first_query + tl.arange(0, BM)
    inside = queries < num_queries
    if grad_lse is not None:
        start = batch * grad_lse.batch + head * grad_lse.head
        pointers = grad_lse.pointer + start + queries.to(tl.int64) * grad_lse.row
        total -= tl.load(pointers, mask=inside, other=0.0)
    matrix = batch * num_heads + head
    tl.store(delta + matrix * num_queries + queries, total, mask=inside)


@triton.jit
def load_row_statistics(
    lse, delta, scoring, batch, head, first_query, BM: tl.constexpr, BITS: tl.constexpr
):
    """lse, in the unit of the scores, and delta [BM]. lse is +inf where no weight may come out."""
    matrix = batch * scoring.num_heads + head
    row_lse = load_per_row(lse, matrix, first_query, scoring.num_queries, float("inf"), BM)
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse)
    row_delta = load_per_row(delta, matrix, first_query, scoring.num_queries, 0.0, BM)
    return row_lse * (LOG2_E / BITS), row_delta


@triton.jit
def grad_of_scores(
    rows, columns, grad_rows, grad_columns, lse, delta, bias, scoring, terms, batch, head,
    queries, keys, factor, limit_columns, limits, BITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """weights and grad_score, [queries, keys] or [keys, queries], whichever the rows are.

    rows, columns: tiles of q̂ and k̂; grad_rows, grad_columns: of grad_out and value, in that order
    where rows are queries; bias: its tile, or None. lse, delta,
    queries and keys have the shape that
    broadcasts.
    """
    score = product(rows, transposed(columns, PRECISION), PRECISION) * factor
    if bias is not None:
        score += bias.to(tl.float32)
    score = add_pair_terms(
        score, terms, batch, head, queries, keys, scoring.num_queries, scoring.num_keys
    )
    score = hide_outside(score, limit_columns, limits)
    weights = probabilities(score, lse, BITS)
    grad_weights = product(grad_rows, transposed(grad_columns, PRECISION), PRECISION)
    return weights, weights * (grad_weights - delta)


@triton.jit
def _sweep_keys(
    grad_q, q, do, key, value, bias, row_lse, row_delta, scoring, terms, batch, head, first_query,
    queries, factor, limits, num_keys, begin, count, before, gap,
    D: tl.constexpr, E: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    BITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what `count` blocks of keys from `begin` on give to grad_q; see `_attend`."""
    kv_head = head // scoring.heads_per_group
    for i in range(count):
        first_key = (begin + i + tl.where(i < before, 0, gap)) * BN
        keys = first_key + tl.arange(0, BN)[None, :]
        k = load_factor(key, batch, kv_head, first_key, num_keys, D, BN, BD, PRECISION)
        v = load_factor(value, batch, kv_head, first_key, num_keys, E, BN, BE, PRECISION)
        tile = None
        if bias is not None:
            tile = load_bias_tile(bias, batch, head, first_query, first_key, scoring.num_queries)
        _, grad_score = grad_of_scores(
            q, k, do, v, row_lse[:, None], row_delta[:, None], tile, scoring, terms, batch, head,
            queries[:, None], keys, factor, keys, limits, BITS, PRECISION,
        )  # fmt: skip
        grad_q = add_product(grad_q, grad_score, k, PRECISION)
    return grad_q


@triton.jit
def grad_query_kernel(
    query, key, value, bias, grad_out, lse, delta, grad_query, grad_factor, source, scoring, terms,
    band,
    D: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, BITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns BM queries of one head: grad_query = grad_factor * (grad_score @ k̂).

    source: the queries before the norm, if the gradient is to go back through it.
    """
    num_queries, num_keys = scoring.num_queries, scoring.num_keys
    blocks = tl.cdiv(num_queries, BM)
    block, head, batch = owner(blocks, scoring.num_heads, bias)
    block = blocks - 1 - block  # the longest rows of causal attention first
    queries = block * BM + tl.arange(0, BM)
    first, past = interval(band, batch, queries, num_queries, num_keys)
    begin, full_begin, full_end, end = block_range(first, past, BN)

    factor = scoring.factor
    if scoring.head_scale is not None:
        factor *= tl.load(scoring.head_scale + head)
    q = load_factor(query, batch, head, block * BM, num_queries, D, BM, BD, PRECISION)
    do = load_factor(grad_out, batch, head, block * BM, num_queries, E, BM, BE, PRECISION)
    row_lse, row_delta = load_row_statistics(lse, delta, scoring, batch, head, block * BM, BM, BITS)
    grad_q = tl.zeros([BM, BD], tl.float32)
    grad_q = _sweep_keys(
        grad_q, q, do, key, value, bias, row_lse, row_delta, scoring, terms, batch, head,
        block * BM, queries, factor, None, None, full_begin, full_end - full_begin, 0, 0, D, E, BN,
        BD, BE, BITS, PRECISION,
    )  # fmt: skip
    left, right = full_begin - begin, end - full_end
    grad_q = _sweep_keys(
        grad_q, q, do, key, value, bias, row_lse, row_delta, scoring, terms, batch, head,
        block * BM, queries, factor, (first, past), num_keys, begin, left + right, left,
        full_end - full_begin,
        D, E, BN, BD, BE, BITS, PRECISION,
    )  # fmt: skip
    if source is not None:
        x = load_rows(source, batch, head, block * BM, num_queries, D, BM, BD)
        grad_q = through_norm(grad_q, x)
    store_rows(grad_query, batch, head, block * BM, num_queries, grad_q * grad_factor, D, BM, BD)


@triton.jit
def _sweep_queries(
    grad_k, grad_v, k, v, query, bias, grad_out, lse, delta, scoring, terms, batch, head, first_key,
    keys, factor, share, limits, num_queries, begin, count, before, gap,
    D: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    BITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what `count` blocks of queries from `begin` on give to grad_k and grad_v."""
    for i in range(count):
        first_query = (begin + i + tl.where(i < before, 0, gap)) * BM
        queries = first_query + tl.arange(0, BM)[None, :]
        q = load_factor(query, batch, head, first_query, num_queries, D, BM, BD, PRECISION)
        do = load_factor(grad_out, batch, head, first_query, num_queries, E, BM, BE, PRECISION)
        row_lse, row_delta = load_row_statistics(
            lse, delta, scoring, batch, head, first_query, BM, BITS
        )
        tile = None
        if bias is not None:
            tile = load_bias_tile(bias, batch, head, first_query, first_key, scoring.num_queries)
            tile = tl.trans(tile)
        weights, grad_score = grad_of_scores(
            k, q, v, do, row_lse[None, :], row_delta[None, :], tile, scoring, terms, batch, head,
            queries, keys[:, None], factor, queries, limits, BITS, PRECISION,
        )  # fmt: skip
        grad_v = add_product(grad_v, weights, do, PRECISION)
        if share is not None:
            grad_score *= share
        grad_k = add_product(grad_k, grad_score, q, PRECISION)
    return grad_k, grad_v


@triton.jit
def grad_key_value_kernel(
    query, key, value, bias, grad_out, lse, delta, grad_key, grad_value, grad_factor, head_share,
    source, scoring, terms, band,
    D: tl.constexpr, E: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, BITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns BN keys of one head and walks over the queries of the heads that read it.

    grad_key = grad_factor * sum of head_share * (grad_scoreᵀ @ q̂) over those heads. grad_key or
    grad_value is None where nobody asks for it. `band` says which queries a key is seen by.
    source: the keys before the norm, if their gradient is to go back through it.
    """
    num_queries, num_keys = scoring.num_queries, scoring.num_keys
    blocks = tl.cdiv(num_keys, BN)
    # In order: the first keys of causal attention have the most queries.
    block, kv_head, batch = owner(blocks, scoring.num_heads // scoring.heads_per_group, bias)
    keys = block * BN + tl.arange(0, BN)
    first, past = interval(band, batch, keys, num_keys, num_queries)
    begin, full_begin, full_end, end = block_range(first, past, BM)
    left, right = full_begin - begin, end - full_end

    k = load_factor(key, batch, kv_head, block * BN, num_keys, D, BN, BD, PRECISION)
    v = load_factor(value, batch, kv_head, block * BN, num_keys, E, BN, BE, PRECISION)
    grad_k = tl.zeros([BN, BD], tl.float32)
    grad_v = tl.zeros([BN, BE], tl.float32)
    for member in range(scoring.heads_per_group):
        head = kv_head * scoring.heads_per_group + member
        factor = scoring.factor
        share = None
        if scoring.head_scale is not None:
            factor *= tl.load(scoring.head_scale + head)
            share = tl.load(head_share + head)
        grad_k, grad_v = _sweep_queries(
            grad_k, grad_v, k, v, query, bias, grad_out, lse, delta, scoring, terms, batch, head,
            block * BN, keys, factor, share, None, None, full_begin, full_end - full_begin, 0, 0,
            D, E, BM, BD, BE, BITS, PRECISION,
        )  # fmt: skip
        grad_k, grad_v = _sweep_queries(
            grad_k, grad_v, k, v, query, bias, grad_out, lse, delta, scoring, terms, batch, head,
            block * BN, keys, factor, share, (first, past), num_queries, begin, left + right, left,
            full_end - full_begin,
            D, E, BM, BD, BE, BITS, PRECISION,
        )  # fmt: skip
    if grad_key is not None:
        if source is not None:
            x = load_rows(source, batch, kv_head, block * BN, num_keys, D, BN, BD)
            grad_k = through_norm(grad_k, x)
        store_rows(grad_key, batch, kv_head, block * BN, num_keys, grad_k * grad_factor, D, BN, BD)
    if grad_value is not None:
        store_rows(grad_value, batch, kv_head, block * BN, num_keys, grad_v, E, BN, BE)
