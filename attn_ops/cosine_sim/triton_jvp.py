"""Forward mode on CUDA: the tangents of out and lse in one pass over the keys.

With S = scale * q·k + biases, S' its tangent and P = exp(S - lse):
lse' = sum_n P S', out' = sum_n (P S') value + P value' - lse' out.
Products whose tangent is absent are left out.

Letters: B batch, H query heads, M queries, N keys, D query/key width, E value width; BM x BN scores
at a time. Arguments are those of the private op (see ops.py).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_ops._checks import compute_dtype
from attn_ops._triton.bias import add_pair_terms, load_bias_tile, pair_terms
from attn_ops._triton.descriptors import tiles
from attn_ops._triton.launch import launch
from attn_ops._triton.softmax import LOG2_E, probabilities
from attn_ops._triton.tiles import load_per_row, load_rows, padded, row_major, store_rows, strided
from attn_ops._triton.visibility import block_range, hide_outside, interval
from attn_ops.cosine_sim.in_blocks import FORWARD_MODE
from attn_ops.cosine_sim.triton_core import Inputs, contiguous, prepare, stream, unit
from attn_ops.cosine_sim.triton_launches import JVP
from attn_ops.cosine_sim.triton_normalize import normalize_backward_kernel


def jvp(*args: Any) -> tuple[Tensor, Tensor]:
    """`attn::_cosine_sim_jvp`: in one pass, or by the formula where its blocks would not fit."""
    query, _, value = args[:3]
    widest = max(padded(x.shape[3], torch.bfloat16) for x in (query, value))
    dtype = _operands_dtype(value.dtype)
    return (_jvp if widest in JVP[dtype.itemsize] else FORWARD_MODE.in_blocks)(*args)


def _jvp(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None,
    relative_bias: Tensor | None, sink: Tensor | None, start: Tensor | None, stop: Tensor | None,
    out: Tensor, lse: Tensor, tangent_query: Tensor | None, tangent_key: Tensor | None,
    tangent_value: Tensor | None, tangent_bias: Tensor | None,
    tangent_relative_bias: Tensor | None, tangent_sink: Tensor | None,
    left: int, right: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """tangent_out [B, H, M, E] and tangent_lse [B, H, M] float32."""
    batch, heads, num_queries, _ = query.shape
    dtype = _operands_dtype(value.dtype)
    query, key, value = (x.to(dtype) for x in (query, key, value))
    tangents = [tangent_query, tangent_key, tangent_value]
    tangents = [None if x is None else row_major(x.to(dtype)) for x in tangents]
    # What comes here is normalised already.
    inputs = Inputs(
        query, key, value, mask, bias, relative_bias, None, None, None, sink, start, stop,
        left, right, scale, 0,
    )  # fmt: skip
    tangent_out = torch.empty(out.shape, dtype=out.dtype, device=out.device)
    tangent_lse = out.new_empty(lse.shape, dtype=compute_dtype(out.dtype))
    with torch.cuda.device_of(query):
        core = prepare(inputs)
        constants, sizes = core.constants, core.sizes(JVP)
        pairs = (batch, heads, num_queries, key.shape[2])
        widths = (constants["BD"], constants["BD"], constants["BE"])
        rows = (sizes.rows, sizes.columns, sizes.columns)
        launch(
            jvp_kernel, batch * heads * triton.cdiv(num_queries, sizes.rows), sizes,
            *core.operands(sizes.rows, sizes.columns),
            *(None if x is None else tiles(x, r, w) for x, r, w in zip(tangents, rows, widths)),
            tiles(out, sizes.rows, constants["BE"]), lse.contiguous(), contiguous(sink),
            contiguous(tangent_sink), tiles(tangent_out, sizes.rows, constants["BE"]), tangent_lse,
            core.scoring, scale, core.terms,
            pair_terms(pairs, tangent_bias, None, tangent_relative_bias),
            inputs.keys_seen(), **constants, BM=sizes.rows, BN=sizes.columns,
        )  # fmt: skip
    return tangent_out, tangent_lse


def unit_jvp(x: Tensor, tangent: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """`attn::_cosine_sim_unit_jvp`: x [B, H, M, D] in unit slices, and their tangent."""
    batch, heads, rows, width = x.shape
    tangent_unit = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sizes = stream(width // groups)
    with torch.cuda.device_of(x):
        # The derivative of the norm is symmetric: tangents go through it as gradients do.
        launch(
            normalize_backward_kernel,
            batch * heads * groups * triton.cdiv(rows, sizes.rows), sizes,
            tangent.contiguous(), strided(x), None, None, 1.0, tangent_unit, None, None,
            rows, heads, groups,
            WIDTH=width // groups, ROWS=sizes.rows, PADDED=sizes.columns, NORM=groups,
        )  # fmt: skip
        return unit(x, None, groups), tangent_unit


def _operands_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is multiplied.

    float16 has not the range for tangents, and tf32 not the digits: sums of P S' value cancel
    against what all S' of a row share.
    """
    return torch.float32 if dtype == torch.float16 else dtype


@triton.jit
def _sweep_keys(
    grown, total, moved, q, dq, key, value, bias, tangent_key, tangent_value, row_lse, scoring,
    terms, moves, batch, head, first_query, queries, scale, limits, num_keys, begin, count, before,
    gap,
    D: tl.constexpr, E: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr,
    BITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what `count` blocks of keys from `begin` on give: grown, the sum of (P S') value and
    P value'; total, that of P; moved, that of P S'. See `_attend` in triton_forward.py.
    """
    kv_head = head // scoring.heads_per_group
    for i in range(count):
        first_key = (begin + i + tl.where(i < before, 0, gap)) * BN
        keys = first_key + tl.arange(0, BN)
        k = load_rows(key, batch, kv_head, first_key, num_keys, D, BN, q.shape[1])
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scoring.factor
        if bias is not None:
            tile = load_bias_tile(bias, batch, head, first_query, first_key, scoring.num_queries)
            score += tile.to(tl.float32)
        score = add_pair_terms(
            score, terms, batch, head, queries[:, None], keys[None, :],
            scoring.num_queries, scoring.num_keys,
        )  # fmt: skip
        score = hide_outside(score, keys[None, :], limits)
        weights = probabilities(score, row_lse[:, None], BITS)
        total += tl.sum(weights, 1)

        tangent = tl.zeros([q.shape[0], BN], tl.float32)
        if dq is not None:
            tangent = tl.dot(dq, tl.trans(k), tangent, input_precision=PRECISION)
        if tangent_key is not None:
            dk = load_rows(tangent_key, batch, kv_head, first_key, num_keys, D, BN, q.shape[1])
            tangent = tl.dot(q, tl.trans(dk), tangent, input_precision=PRECISION)
        tangent = add_pair_terms(
            tangent * scale, moves, batch, head, queries[:, None], keys[None, :],
            scoring.num_queries, scoring.num_keys,
        )  # fmt: skip
        weighted = weights * tangent
        moved += tl.sum(weighted, 1)
        v = load_rows(value, batch, kv_head, first_key, num_keys, E, BN, BE)
        grown = tl.dot(weighted.to(v.dtype), v, grown, input_precision=PRECISION)
        if tangent_value is not None:
            dv = load_rows(tangent_value, batch, kv_head, first_key, num_keys, E, BN, BE)
            grown = tl.dot(weights.to(dv.dtype), dv, grown, input_precision=PRECISION)
    return grown, total, moved


@triton.jit
def _load_lse(lse, scoring, batch, head, first_query, BM: tl.constexpr):
    """lse [BM] in nats, +inf where no weight may come out."""
    matrix = batch * scoring.num_heads + head
    row_lse = load_per_row(lse, matrix, first_query, scoring.num_queries, float("inf"), BM)
    return tl.where(row_lse == float("-inf"), float("inf"), row_lse)


@triton.jit
def jvp_kernel(
    query, key, value, bias, tangent_query, tangent_key, tangent_value, out, lse, sink,
    tangent_sink,
    tangent_out, tangent_lse, scoring, scale, terms, moves, band,
    D: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, BITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns BM queries of one head."""
    num_queries, num_keys = scoring.num_queries, scoring.num_keys
    blocks = tl.cdiv(num_queries, BM)
    program = tl.program_id(0)
    block = blocks - 1 - program % blocks  # the longest rows of causal attention first
    head = (program // blocks % scoring.num_heads).to(tl.int64)
    batch = (program // blocks // scoring.num_heads).to(tl.int64)
    queries = block * BM + tl.arange(0, BM)
    first, past = interval(band, batch, queries, num_queries, num_keys)
    begin, full_begin, full_end, end = block_range(first, past, BN)

    q = load_rows(query, batch, head, block * BM, num_queries, D, BM, BD)
    dq = None
    if tangent_query is not None:
        dq = load_rows(tangent_query, batch, head, block * BM, num_queries, D, BM, BD)
    nats = _load_lse(lse, scoring, batch, head, block * BM, BM)
    row_lse = nats * (LOG2_E / BITS)
    total = tl.zeros([BM], tl.float32)
    moved = tl.zeros([BM], tl.float32)
    grown = tl.zeros([BM, BE], tl.float32)
    grown, total, moved = _sweep_keys(
        grown, total, moved, q, dq, key, value, bias, tangent_key, tangent_value, row_lse, scoring,
        terms, moves, batch, head, block * BM, queries, scale, None, None, full_begin,
        full_end - full_begin, 0, 0,
        D, E, BN, BE, BITS, PRECISION,
    )  # fmt: skip
    left, right = full_begin - begin, end - full_end
    grown, total, moved = _sweep_keys(
        grown, total, moved, q, dq, key, value, bias, tangent_key, tangent_value, row_lse, scoring,
        terms, moves, batch, head, block * BM, queries, scale, (first, past), num_keys, begin,
        left + right, left,
        full_end - full_begin, D, E, BN, BE, BITS, PRECISION,
    )  # fmt: skip

    if sink is not None:
        of_sink = tl.exp(tl.load(sink + head) - nats)
        total += of_sink
        if tangent_sink is not None:
            moved += of_sink * tl.load(tangent_sink + head)
    # lse only shifts the scores: the sum is 1 but for rounding, or 0 where nothing is seen.
    normaliser = 1.0 / tl.where(total == 0.0, 1.0, total)
    moved *= normaliser
    o = load_rows(out, batch, head, block * BM, num_queries, E, BM, BE).to(tl.float32)
    grown = grown * normaliser[:, None] - moved[:, None] * o
    store_rows(tangent_out, batch, head, block * BM, num_queries, grown, E, BM, BE)
    matrix = batch * scoring.num_heads + head
    tl.store(tangent_lse + matrix * num_queries + queries, moved, mask=queries < num_queries)
