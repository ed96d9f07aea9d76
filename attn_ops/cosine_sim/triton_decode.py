"""The forward of few queries and many keys: spans of keys in parallel, then their sums.

Weights are relative to a fixed shift, so that the sums of spans simply add. A program takes all
query heads of a group and all queries as its rows, and reads keys and values once for all of them;
keys are not written normalised: 1 / |k| multiplies their scores.

Of 16 bits tiles of scores are [keys, rows], and of sums [values, rows]: the matrix units then take
keys and values from shared memory, and as few rows as there are. float32 is split in registers, and
is quicker as the right operand.

Letters: B batch, H query heads, Hk key/value heads, M queries, N keys, D query/key width, E value
width, S spans; R = H / Hk * M rows, BR x BN scores at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from attn_ops._triton import descriptors
from attn_ops._triton.descriptors import tiles
from attn_ops._triton.launch import choose, launch
from attn_ops._triton.softmax import log_sum
from attn_ops._triton.tiles import load_rows, padded, row_major, strided
from attn_ops._triton.visibility import interval
from attn_ops.cosine_sim.triton_core import BITS_PER_NAT, Inputs, precision, stream
from attn_ops.cosine_sim.triton_launches import DECODE
from attn_ops.cosine_sim.triton_normalize import inverse_norm, unit_rows

MOST_ROWS = {2: 64, 4: 32}  # by bytes per element; more of float32 would spill
FEWEST_KEYS = 1024
# Two for each multiprocessor of an H200, which its shared memory holds side by side.
PROGRAMS = 264


@triton.jit
def _add_keys(
    out, total, q, key, value, batch, kv_head, begin, end, factor, shift, past, num_keys,
    D: tl.constexpr, E: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, PRECISION: tl.constexpr,
    LEFT: tl.constexpr,
):  # fmt: skip
    """Adds keys [begin, end).

    LEFT: they are the left operand, out is [BE, BR] and total [BN, BR]; else [BR, BE] and [BR].
    past [BR] and num_keys are None where every row sees all of these keys.
    """
    for first_key in range(begin, end, BN):
        k = load_rows(key, batch, kv_head, first_key, num_keys, D, BN, q.shape[1])
        inverse, _ = inverse_norm(k.to(tl.float32))
        keys = first_key + tl.arange(0, BN)
        if LEFT:
            score = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (inverse * factor)[:, None]
            if past is not None:
                score = tl.where(keys[:, None] < past[None, :], score, float("-inf"))
        else:
            score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (inverse * factor)[None, :]
            if past is not None:
                score = tl.where(keys[None, :] < past[:, None], score, float("-inf"))
        weights = tl.exp2(score - shift)
        v = load_rows(value, batch, kv_head, first_key, num_keys, E, BN, BE)
        if LEFT:
            total += weights
            out = tl.dot(tl.trans(v), weights.to(v.dtype), out, input_precision=PRECISION)
        else:
            total += tl.sum(weights, 1)
            out = tl.dot(weights.to(v.dtype), v, out, input_precision=PRECISION)
    return out, total


@triton.jit
def span_kernel(
    query, key, value, out, total, num_heads, heads_per_group, num_queries, num_keys, span, spans,
    band, factor, shift,
    D: tl.constexpr, E: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out [S, B, H, M, E] and total [S, B, H, M]: the sums over one span of keys of one head."""
    if OVERLAP:
        gdc_launch_dependents()
    program = tl.program_id(0)
    kv_heads = num_heads // heads_per_group
    part = program % spans
    kv_head = (program // spans % kv_heads).to(tl.int64)
    batch = (program // spans // kv_heads).to(tl.int64)

    rows = tl.arange(0, BR)
    exists = rows < heads_per_group * num_queries
    heads = kv_head * heads_per_group + rows // num_queries
    columns = tl.arange(0, BD)
    pointers = query.pointer + batch * query.batch + heads * query.head
    pointers += (rows % num_queries).to(tl.int64) * query.row
    inside = exists[:, None] & (columns < D)[None, :]
    q = tl.load(pointers[:, None] + columns[None, :] * query.column, mask=inside, other=0.0)
    q = unit_rows(q)

    _, past = interval(band, batch, rows % num_queries, num_queries, num_keys)
    begin = part * span
    end = tl.minimum(begin + span, tl.max(past))
    full_end = begin + tl.maximum(tl.minimum(end, tl.min(past)) - begin, 0) // BN * BN
    LEFT: tl.constexpr = q.dtype.primitive_bitwidth == 16
    accumulator = tl.zeros([BE, BR] if LEFT else [BR, BE], tl.float32)
    sums = tl.zeros([BN, BR] if LEFT else [BR], tl.float32)
    accumulator, sums = _add_keys(
        accumulator, sums, q, key, value, batch, kv_head, begin, full_end, factor, shift,
        None, None, D, E, BN, BE, PRECISION, LEFT,
    )  # fmt: skip
    accumulator, sums = _add_keys(
        accumulator, sums, q, key, value, batch, kv_head, full_end, end, factor, shift,
        past, num_keys, D, E, BN, BE, PRECISION, LEFT,
    )  # fmt: skip

    # The rows of a group are neighbours.
    batches = tl.num_programs(0) // spans // kv_heads
    matrix = (part * batches + batch) * num_heads + kv_head * heads_per_group
    at = matrix * num_queries + rows
    columns = tl.arange(0, BE)
    if LEFT:
        tl.store(total + at, tl.sum(sums, 0), mask=exists)
        inside = exists[None, :] & (columns < E)[:, None]
        tl.store(out + at[None, :] * E + columns[:, None], accumulator, mask=inside)
    else:
        tl.store(total + at, sums, mask=exists)
        inside = exists[:, None] & (columns < E)[None, :]
        tl.store(out + at[:, None] * E + columns[None, :], accumulator, mask=inside)


@triton.jit
def add_spans_kernel(
    part_out, part_total, out, lse, num_rows, spans, shift,
    E: tl.constexpr, BS: tl.constexpr, BE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out [E] and lse of one query, from part_out [S, B, H, M, E] and part_total [S, B, H, M]."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BE)
    accumulator = tl.zeros([BE], tl.float32)
    total = 0.0
    if OVERLAP:
        gdc_wait()
    for first in range(0, spans, BS):
        parts = first + tl.arange(0, BS)
        at = parts.to(tl.int64) * num_rows + row
        total += tl.sum(tl.load(part_total + at, mask=parts < spans, other=0.0), 0)
        inside = (parts < spans)[:, None] & (columns < E)[None, :]
        tile = tl.load(part_out + at[:, None] * E + columns[None, :], mask=inside, other=0.0)
        accumulator += tl.sum(tile, 0)
    result = accumulator / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * E + columns, result.to(out.dtype.element_ty), mask=columns < E)
    tl.store(lse + row, log_sum(total, shift, 1.0))


def serves(inputs: Inputs) -> bool:
    """Whether `forward` takes this call, which has a fixed shift and therefore norms."""
    batch, heads, num_queries = inputs.query.shape[:3]
    kv_heads, num_keys = inputs.key.shape[1:3]
    return (
        inputs.is_plain()
        and isinstance(batch * heads * num_queries * num_keys, int)  # spans depend on all of them
        and heads // kv_heads * num_queries <= MOST_ROWS[inputs.query.element_size()]
        and num_keys >= FEWEST_KEYS
    )


def _span(num_keys: int, matrices: int, step: int) -> int:
    """Keys of a program, whole tiles of `step`: as few as PROGRAMS allow."""
    spans = max(1, PROGRAMS // max(matrices, 1))
    return triton.cdiv(triton.cdiv(num_keys, spans), step) * step


def forward(inputs: Inputs, shift: float) -> tuple[Tensor, Tensor]:
    """`attn::_cosine_sim_fwd` of a call that is served: out and lse."""
    query, key, value = (row_major(x) for x in inputs[:3])
    batch, heads, num_queries, width = query.shape
    kv_heads, num_keys, value_width = value.shape[1:]
    group = heads // kv_heads
    sizes = choose(DECODE, query.device, query.element_size(), width, value_width, plain=True)
    span = _span(num_keys, batch * kv_heads, sizes.columns)
    spans = triton.cdiv(num_keys, span)
    widths = {"BD": padded(width, torch.bfloat16), "BE": padded(value_width, torch.bfloat16)}
    rows = (batch, heads, num_queries)
    out = query.new_empty(*rows, value_width)
    lse = query.new_empty(rows, dtype=torch.float32)
    part_out = lse.new_empty(spans, *rows, value_width)
    part_total = lse.new_empty(spans, *rows)
    # Hopper starts the second kernel during the first; Triton's interpreter cannot.
    overlap = query.device.type != "cpu" and descriptors.has_descriptors(query.device)
    with torch.cuda.device_of(query):
        launch(
            span_kernel, batch * kv_heads * spans, sizes,
            strided(query), tiles(key, sizes.columns, widths["BD"]),
            tiles(value, sizes.columns, widths["BE"]), part_out, part_total,
            heads, group, num_queries, num_keys, span, spans, inputs.keys_seen(),
            inputs.scale * BITS_PER_NAT, shift, D=width, E=value_width,
            BR=max(16, triton.next_power_of_2(group * num_queries)), BN=sizes.columns,
            PRECISION=precision(inputs), OVERLAP=overlap, writes=(part_out, part_total), **widths,
        )  # fmt: skip
        sizes = stream(value_width)
        launch(
            add_spans_kernel, batch * heads * num_queries, sizes,
            part_out, part_total, out, lse, batch * heads * num_queries, spans, shift,
            E=value_width, BS=min(sizes.rows, triton.next_power_of_2(spans)), BE=sizes.columns,
            OVERLAP=overlap, launch_pdl=overlap, writes=(out, lse),
        )  # fmt: skip
    return out, lse
