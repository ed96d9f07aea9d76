"""The forward core on queries and keys as they enter the dot product: out and lse.

Letters: M queries, N keys, D query/key width, E value width; BM x BN scores at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attn_ops._triton.bias import add_pair_terms, load_bias_tile
from attn_ops._triton.products import (
    add_product,
    as_factor,
    load_factor,
    product,
    transposed,
)
from attn_ops._triton.softmax import log_add, log_sum, running_maximum_step
from attn_ops._triton.tiles import load_rows, owner, store_rows
from attn_ops._triton.visibility import block_range, hide_outside, interval
from attn_ops.cosine_sim.triton_normalize import unit_rows


@triton.jit
def _attend(
    out, total, maximum, q, key, value, bias, scoring, terms, batch, head, queries, first_query,
    factor, shift, limits, num_keys, begin, count, before, gap,
    D: tl.constexpr, E: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    BITS: tl.constexpr, SCORES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds `count` blocks of keys from `begin` on; after `before` of them it jumps over `gap`.

    limits and num_keys are None where all of these keys exist and every query sees them.
    """
    kv_head = head // scoring.heads_per_group
    for i in range(count):
        first_key = (begin + i + tl.where(i < before, 0, gap)) * BN
        keys = first_key + tl.arange(0, BN)
        k = load_factor(key, batch, kv_head, first_key, num_keys, D, BN, BD, SCORES)
        score = product(q, transposed(k, SCORES), SCORES) * factor
        if bias is not None:
            tile = load_bias_tile(bias, batch, head, first_query, first_key, scoring.num_queries)
            score += tile.to(tl.float32)
        score = add_pair_terms(
            score, terms, batch, head, queries[:, None], keys[None, :],
            scoring.num_queries, scoring.num_keys,
        )  # fmt: skip
        score = hide_outside(score, keys[None, :], limits)
        if shift is None:
            weights, maximum, correction = running_maximum_step(score, maximum, BITS)
            total *= correction
            out *= correction[:, None]
        else:
            weights = tl.exp2(score - shift)
        total += tl.sum(weights, 1)
        v = load_factor(value, batch, kv_head, first_key, num_keys, E, BN, BE, PRECISION)
        out = add_product(out, weights, v, PRECISION)
    return out, total, maximum


@triton.jit
def forward_kernel(
    query, key, value, bias, out, lse, sink, scoring, terms, band, shift,
    D: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, BITS: tl.constexpr, SCORES: tl.constexpr,
    PRECISION: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """A program owns BM queries of one head, and normalises them if they are not unit vectors yet.

    `shift` None: the running maximum is subtracted. SCORES: the precision of queries and keys.
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
    if NORMALIZE:
        q = load_rows(query, batch, head, block * BM, num_queries, D, BM, BD)
        q = as_factor(unit_rows(q), SCORES)
    else:
        q = load_factor(query, batch, head, block * BM, num_queries, D, BM, BD, SCORES)
    total = tl.zeros([BM], tl.float32)
    maximum = tl.full([BM], float("-inf"), tl.float32)
    accumulator = tl.zeros([BM, BE], tl.float32)
    accumulator, total, maximum = _attend(
        accumulator, total, maximum, q, key, value, bias, scoring, terms, batch, head, queries,
        block * BM, factor, shift,
        None, None, full_begin, full_end - full_begin, 0, 0,
        D, E, BN, BD, BE, BITS, SCORES, PRECISION,
    )  # fmt: skip
    left, right = full_begin - begin, end - full_end
    accumulator, total, maximum = _attend(
        accumulator, total, maximum, q, key, value, bias, scoring, terms, batch, head, queries,
        block * BM, factor, shift,
        (first, past), num_keys, begin, left + right, left, full_end - full_begin,
        D, E, BN, BD, BE, BITS, SCORES, PRECISION,
    )  # fmt: skip

    if shift is not None:
        maximum = tl.zeros([BM], tl.float32) + shift
    row_lse = log_sum(total, maximum, BITS)
    normaliser = 1.0 / tl.where(total == 0.0, 1.0, total)
    if sink is not None:
        with_sink = log_add(row_lse, tl.load(sink + head))
        normaliser *= tl.where(total == 0.0, 0.0, tl.exp(row_lse - with_sink))
        row_lse = with_sink
    store_rows(
        out, batch, head, block * BM, num_queries, accumulator * normaliser[:, None], E, BM, BE
    )
    matrix = batch * scoring.num_heads + head
    tl.store(lse + matrix * num_queries + queries, row_lse, mask=queries < num_queries)
