"""The forward of sparse L1 attention: a softmax over the edges of a row, and their values."""

from __future__ import annotations

import triton
import triton.language as tl

from attn_ops.l1.triton_sparse_core import (
    LOWEST,
    load_ends,
    load_row,
    pieces,
    slot_of,
    span,
    store_row,
)


@triton.jit
def _attend(
    q, k, k_row, v, v_row, keys, score, begin, stop, scale, lowest,
    D: tl.constexpr, E: tl.constexpr, PD: tl.constexpr, PE: tl.constexpr, EDGES: tl.constexpr,
    SOFTMAX: tl.constexpr,
):  # fmt: skip
    """The edges' largest score, sum of exp(score - largest), and the same of the values [PE].

    Writes the scores. Every lane goes by its own largest score, so that lanes meet only at the end.
    """
    lanes, d, e = tl.arange(0, EDGES), tl.arange(0, PD), tl.arange(0, PE)
    largest = tl.full([EDGES], lowest, tl.float32)
    total = tl.zeros([EDGES], tl.float32)
    values = tl.zeros([EDGES, PE], tl.float32)
    for first in range(begin, stop, EDGES):
        place = first + lanes
        live = place < stop
        key = tl.load(keys + place, mask=live, other=0)
        difference = q[None, :] - load_ends(k, k_row, key, live, d, D)
        z = -scale * tl.sum(tl.abs(difference), 1)
        z = tl.minimum(tl.maximum(z, LOWEST), -LOWEST)
        tl.store(score + place, z, mask=live)
        z = tl.where(live, z, lowest)
        if SOFTMAX:
            larger = tl.maximum(largest, z)
            shrunk = tl.exp(largest - larger)
            total *= shrunk
            values *= shrunk[:, None]
            largest = larger
        weight = tl.where(live, tl.exp(z - largest), 0.0)
        total += weight
        values += weight[:, None] * load_ends(v, v_row, key, live, e, E)
    overall = tl.max(largest, 0)
    shrunk = tl.exp(largest - overall)
    return overall, tl.sum(total * shrunk, 0), tl.sum(values * shrunk[:, None], 0)


@triton.jit
def _write_weights(score, begin, stop, largest, inverse, BLOCK: tl.constexpr):
    """Scores to weights, in place."""
    for first in range(begin, stop, BLOCK):
        place = first + tl.arange(0, BLOCK)
        z = tl.load(score + place, mask=place < stop, other=0.0)
        tl.store(score + place, tl.exp(z - largest) * inverse, mask=place < stop)


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    q, q_batch, q_head, q_row, k, k_batch, k_head, k_row, v, v_batch, v_head, v_row, start, keys,
    weight, out, parts, rows, programs, num_edges, heads, group, scale,
    D: tl.constexpr, E: tl.constexpr, PD: tl.constexpr, PE: tl.constexpr, EDGES: tl.constexpr,
    CHUNK: tl.constexpr, SOFTMAX: tl.constexpr, SINK: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """weight [BH, L], and out [BH, M, E] or, over pieces, parts [BH, slots, E + 2].

    A part is the sum of the values, the largest score and the sum of the weights. Rows that were
    cut leave their largest score and what their weights are multiplied with in their first part,
    for weights_kernel. Programs of one head stand together, so that its keys and values stay in
    the L2 cache.
    """
    program = tl.program_id(0).to(tl.int64)
    matrix = program // programs
    batch, head = matrix // heads, matrix % heads
    row, begin, end, stop = span(start, rows, num_edges, program % programs, CHUNK, PIECES)
    d, e = tl.arange(0, PD), tl.arange(0, PE)
    query = load_row(q + batch * q_batch + head * q_head + row * q_row, d, D)
    k += batch * k_batch + head // group * k_head
    v += batch * v_batch + head // group * v_head
    weight += matrix * num_edges
    lowest = LOWEST if SOFTMAX else 0.0
    largest, total, values = _attend(
        query, k, k_row, v, v_row, keys, weight, begin, stop, scale, lowest,
        D, E, PD, PE, EDGES, SOFTMAX,
    )  # fmt: skip
    if PIECES:
        part = parts + program * (E + 2)
        store_row(part, values, e, E)
        tl.store(part + E, largest)
        tl.store(part + E + 1, total)
    else:
        parts += matrix * (2 * tl.cdiv(num_edges, CHUNK)) * (E + 2)
        first_chunk, stop_chunk = pieces(begin, end, CHUNK)
        for chunk in range(first_chunk, stop_chunk):
            part = parts + slot_of(chunk, begin, CHUNK) * (E + 2)
            of_part = tl.load(part + E)
            larger = tl.maximum(largest, of_part)
            shrunk, grown = tl.exp(largest - larger), tl.exp(of_part - larger)
            total = total * shrunk + tl.load(part + E + 1) * grown
            values = values * shrunk + load_row(part, e, E) * grown
            largest = larger
        inverse = 1.0
        if SOFTMAX:
            if SINK:
                larger = tl.maximum(largest, 0.0)
                shrunk = tl.exp(largest - larger)
                total = total * shrunk + tl.exp(-larger)
                values *= shrunk
                largest = larger
            inverse = tl.where(total > 0.0, 1.0 / total, 0.0)
        store_row(out + (matrix * rows + row) * E, values * inverse, e, E)
        part = parts + slot_of(first_chunk, begin, CHUNK) * (E + 2) + E
        tl.store(part, largest, mask=stop < end)
        tl.store(part + 1, inverse, mask=stop < end)
        # What some threads have written others read.
        tl.debug_barrier()
        _write_weights(weight, begin, stop, largest, inverse, 32)


@triton.jit(do_not_specialize=["rows"])
def weights_kernel(
    start, weight, parts, rows, programs, num_edges, E: tl.constexpr, CHUNK: tl.constexpr
):
    """Scores to weights, in place, over the pieces of rows that were cut."""
    program = tl.program_id(0).to(tl.int64)
    matrix = program // programs
    row, begin, _, stop = span(start, rows, num_edges, program % programs, CHUNK, True)
    first = tl.load(start + row)
    part = parts + (matrix * programs + slot_of(first // CHUNK, first, CHUNK)) * (E + 2) + E
    _write_weights(weight + matrix * num_edges, begin, stop, tl.load(part), tl.load(part + 1), 128)
