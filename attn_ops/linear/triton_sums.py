"""Sums over chunks and segments, and what of them each chunk or segment sees of those before it.

They are few, so they are computed ahead of the marches, which then divide by what is in memory: a
march that sums up keys itself waits for each sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attn_ops.linear.triton_core import (
    features,
    first_slot,
    load_inputs,
    load_per_token,
    load_state,
    load_tokens,
    log2_of,
    not_hidden,
    over,
    place,
    product,
    since_begin,
    store_state,
    until_end,
)


@triton.jit
def segment_states_kernel(
    x, y, mask, decay, offsets, states, num_tokens, walk,
    FEATURES: tl.constexpr, D: tl.constexpr, E: tl.constexpr, F: tl.constexpr, PD: tl.constexpr,
    PE: tl.constexpr, PF: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """states [B or S, H, G, F, E] = sum of phi(x) y^T over each segment.

    Decayed up to the end of the segment; REVERSE: down to its begin, x and y having all H heads.
    """
    batch, sequence, head, part, segment, begin, end = place(walk, offsets, num_tokens)
    rate = None
    if decay is not None:
        rate = log2_of(decay, head)
    running = load_state(None, 0, 0, 0, E, F, PF, PE)
    chunks = tl.cdiv(end - begin, C)
    for i in range(chunks):
        first = begin + i * C
        if REVERSE:
            first = begin + (chunks - 1 - i) * C
        count = tl.minimum(end - first, C)
        exists = None
        if not EVEN:
            exists = first + tl.arange(0, C) < end
        seen = exists
        if mask is not None:
            seen = not_hidden(mask, batch, head, first, end, C)
        tile_head = head // walk.group
        tile = load_inputs(
            x, batch, tile_head, first, seen, 0, FEATURES, D, C, PD, mask is not None
        )
        phi = features(tile, seen, 0, FEATURES, D, PD, PF, OPERAND, PRECISION)
        values = load_tokens(y, batch, tile_head, first, exists, part * PE, E, C, PE, False)
        if REVERSE:
            values = since_begin(values, rate, C)
        else:
            values = until_end(values, rate, count, C)
        running = over(running, rate, count) + product(tl.trans(phi), values, OPERAND, PRECISION)
    matrix = (sequence.to(tl.int64) * walk.heads + head) * walk.states + segment
    store_state(states, matrix, 0, part * PE, running, E, F, PF, PE)


@triton.jit
def chunk_sums_kernel(
    x, coefficient, mask, decay, offsets, sums, num_tokens, slots, walk,
    FEATURES: tl.constexpr, D: tl.constexpr, F: tl.constexpr, PD: tl.constexpr, PF: tl.constexpr,
    C: tl.constexpr, EVEN: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """sums [slots, F] per head: of phi(x), times the tokens' coefficients unless None, per chunk.

    Decayed up to the end of the chunk, or, REVERSE, down to its begin.
    """
    batch, sequence, head, _, _, begin, end = place(walk, offsets, num_tokens)
    row = batch * walk.heads + head
    rate = None
    if decay is not None:
        rate = log2_of(decay, head)
    slot = first_slot(row, slots, offsets, sequence, begin, C)
    columns = tl.arange(0, PF)
    for first in range(begin, end, C):
        exists = None
        if not EVEN:
            exists = first + tl.arange(0, C) < end
        seen = exists
        if mask is not None:
            seen = not_hidden(mask, batch, head, first, end, C)
        tile = load_inputs(
            x, batch, head // walk.group, first, seen, 0, FEATURES, D, C, PD, mask is not None
        )
        phi = features(tile, seen, 0, FEATURES, D, PD, PF, OPERAND, PRECISION).to(tl.float32)
        if coefficient is not None:
            phi *= load_per_token(coefficient, row, num_tokens, first, end, C)[:, None]
        if REVERSE:
            phi = since_begin(phi, rate, C)
        else:
            phi = until_end(phi, rate, tl.minimum(end - first, C), C)
        tl.store(sums + slot * F + columns, tl.sum(phi, 0), mask=columns < F)
        slot += 1


@triton.jit
def _continued(left_a, left_b, right_a, right_b):
    """Composition of x -> a x + b: first the left one."""
    return left_a * right_a, left_b * right_a + right_b


@triton.jit
def scan_kernel(
    parts, initial, decay, offsets, result, final, num_tokens, heads, length, slots,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """result[i] = what is left, at part i, of the parts before it and of `initial`.

    parts, result: [slots, WIDTH] per head, a part being the sum over `length` tokens. The last row
    of a sequence is what is left after its end. REVERSE: of the parts behind, the row before the
    first one coming last: result[i + 1] belongs to part i, and result[0] to what was before.
    final [sequences, heads, WIDTH]: the last sum that was made, in float32, unless None.
    """
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0) // blocks
    head, sequence = row % heads, row // heads
    first, last = 0, num_tokens
    base = row.to(tl.int64) * slots
    if offsets is not None:
        first, last = tl.load(offsets + sequence), tl.load(offsets + sequence + 1)
        base = head.to(tl.int64) * slots + first // length + 2 * sequence
    rate = 0.0
    if decay is not None:
        rate = log2_of(decay, head)
    count = tl.cdiv(last - first, length)
    carried = tl.zeros([BLOCK], tl.float32)
    if initial is not None:
        pointers = initial + row.to(tl.int64) * WIDTH + columns
        carried = tl.load(pointers, mask=columns < WIDTH, other=0.0)
    for begin in range(0, count + 1, ROWS):
        # Step i joins part i - 1 (from the other end, if REVERSE) to what came before it.
        step = begin + tl.arange(0, ROWS)
        part = step - 1
        if REVERSE:
            part = count - step
        exists = (step > 0) & (step <= count)
        tokens = tl.minimum(last - first - part * length, length)
        left = tl.where(exists, tl.exp2(tokens.to(tl.float32) * rate), 1.0)
        inside = exists[:, None] & (columns < WIDTH)[None, :]
        offset = (base + part)[:, None] * WIDTH + columns[None, :]
        added = tl.load(parts + offset, mask=inside, other=0.0)
        factors = tl.zeros([ROWS, BLOCK], tl.float32) + left[:, None]
        factors, added = tl.associative_scan((factors, added), 0, _continued)
        scanned = factors * carried[None, :] + added
        target = step
        if REVERSE:
            target = count - step
        offset = (base + target)[:, None] * WIDTH + columns[None, :]
        inside = (step <= count)[:, None] & (columns < WIDTH)[None, :]
        tl.store(result + offset, scanned.to(result.dtype.element_ty), mask=inside)
        if final is not None:
            at = final + row.to(tl.int64) * WIDTH + columns[None, :] + step[:, None] * 0
            tl.store(at, scanned, mask=inside & (step == count)[:, None])
        carried = tl.sum(tl.where((tl.arange(0, ROWS) == ROWS - 1)[:, None], scanned, 0.0), 0)
