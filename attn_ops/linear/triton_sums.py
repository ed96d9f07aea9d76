"""Sums over segments, and what of them each segment sees of those before it."""

# mypy: disable-error-code="assignment"
# since tuples of tiles grow as a loop over blocks is unrolled.

from __future__ import annotations

import triton
import triton.language as tl

from attn_ops.linear.triton_core import (
    load_per_token,
    load_tokens,
    log2_of,
    not_hidden,
    over,
    place,
    product,
    since_begin,
    until_end,
    what_is_left,
    what_was_left,
)
from attn_ops.linear.triton_features import (
    features,
    load_inputs,
)
from attn_ops.linear.triton_state import (
    load_state,
    load_sum,
    partial_sums,
    store_state,
    store_sum,
)


@triton.jit
def segment_sums_kernel(
    x, y, coefficient, factor, mask, decay, offsets, states, sums, num_tokens, walk,
    FEATURES: tl.constexpr, D: tl.constexpr, E: tl.constexpr, F: tl.constexpr, PD: tl.constexpr,
    PE: tl.constexpr, PF: tl.constexpr, C: tl.constexpr, BLOCKS: tl.constexpr,
    EVEN: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """states [S*H, G, F, E] and, unless None, sums [S*H, G, F] of each segment.

    They are the sums of phi(x) y^T and of phi(x), y times the tokens' factors unless None, and the
    latter times their coefficients unless None. Decayed up to the end of the segment; REVERSE: down
    to its begin, x and y having all H heads.
    """
    batch, head, kv_head, part, begin, end, row, _, entry = place(walk, offsets, num_tokens)
    rate = None
    if decay is not None:
        rate = log2_of(decay, head)
    running = load_state(None, 0, 0, 0, FEATURES, D, E, F, PF, PE, BLOCKS)
    if sums is not None:
        running_sum = load_sum(None, 0, 0, FEATURES, D, F, PF, BLOCKS)
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
        tile = load_inputs(x, batch, kv_head, first, seen, 0, FEATURES, D, C, PD, mask is not None)
        values = load_tokens(y, batch, kv_head, first, exists, part * PE, E, C, PE, False)
        if factor is not None:
            weight = load_per_token(factor, row, num_tokens, first, exists, C)
            values = (values * weight[:, None]).to(OPERAND)
        if REVERSE:
            values = since_begin(values, rate, C)
        else:
            values = until_end(values, rate, count, C)
        if sums is not None:
            weight = tl.full([C], 1.0, tl.float32)
            if coefficient is not None:
                weight = load_per_token(coefficient, row, num_tokens, first, exists, C)
            if rate is not None:
                if REVERSE:
                    weight *= what_was_left(rate, C)
                else:
                    weight *= what_is_left(rate, count, C)
        new_states, new_sums = (), ()
        for j in tl.static_range(BLOCKS):
            phi = features(tile, seen, 0, j, FEATURES, D, PD, PF, OPERAND, PRECISION)
            added = product(tl.trans(phi), values, OPERAND, PRECISION)
            new_states = new_states + (over(running[j], rate, count) + added,)
            if sums is not None:
                added = partial_sums(phi, weight, FEATURES, C, PF, OPERAND, PRECISION)
                new_sums = new_sums + (over(running_sum[j], rate, count) + added,)
        running = new_states
        if sums is not None:
            running_sum = new_sums
    store_state(states, entry, 0, part * PE, running, FEATURES, D, E, F, PF, PE, BLOCKS)
    if sums is not None:
        store_sum(sums, entry, 0, running_sum, FEATURES, D, F, PF, BLOCKS)


@triton.jit
def _continued(left_a, left_b, right_a, right_b):
    """Composition of x -> a x + b: first the left one."""
    return left_a * right_a, left_b * right_a + right_b


@triton.jit
def scan_kernel(
    parts, initial, decay, result, num_tokens, heads, length, slots,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """result[i] = what is left, at part i, of the parts before it and of `initial`.

    parts, result: [slots, WIDTH] per head, a part being the sum over `length` tokens. The last row
    that is written is what is left at the end. REVERSE: of the parts behind: result[i + 1] belongs
    to part i, and result[0] is what is left at the begin.
    """
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0) // blocks
    head, base = row % heads, row.to(tl.int64) * slots
    rate = 0.0
    if decay is not None:
        rate = log2_of(decay, head)
    count = tl.cdiv(num_tokens, length)
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
        tokens = tl.minimum(num_tokens - part * length, length)
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
        tl.store(result + offset, scanned, mask=inside)
        carried = tl.sum(tl.where((tl.arange(0, ROWS) == ROWS - 1)[:, None], scanned, 0.0), 0)
