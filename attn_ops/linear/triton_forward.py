"""The forward march: out = (phi(q) S + scores v) / denominator, S the state before the chunk."""

from __future__ import annotations

import triton
import triton.language as tl

from attn_ops.linear.triton_core import (
    ROWS,
    features,
    first_slot,
    in_row_0,
    load_inputs,
    load_state,
    load_sums,
    load_tokens,
    log2_of,
    not_hidden,
    over,
    pair_weights,
    place,
    product,
    since_begin,
    store_state,
    store_tokens,
    total_slot,
    until_end,
    what_is_left,
)


@triton.jit
def forward_kernel(
    q, k, v, mask, decay, offsets, state, sums, out, denominator, final_state, num_tokens, slots,
    eps, walk,
    FEATURES: tl.constexpr, D: tl.constexpr, E: tl.constexpr, F: tl.constexpr, PD: tl.constexpr,
    PE: tl.constexpr, PF: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program walks the tokens of one segment. k None: queries see the state alone.

    denominator None: nothing is divided. sums [slots, F] per head: key_sum before each chunk, or,
    without k, one for each sequence. None: the march adds keys up itself, from zero.
    """
    batch, sequence, head, part, segment, begin, end = place(walk, offsets, num_tokens)
    kv_head = head // walk.group
    row = batch * walk.heads + head
    rate = None
    if decay is not None:
        rate = log2_of(decay, head)
    matrix = sequence.to(tl.int64) * walk.heads + head
    column = part * PE
    entry = matrix * walk.states + segment * walk.step
    running = load_state(state, entry, 0, column, E, F, PF, PE)
    slot = first_slot(row, slots, offsets, sequence, begin, C)
    if k is None:
        slot = total_slot(row, slots, offsets, sequence)
    if denominator is not None and sums is None:
        running_sum = tl.zeros([ROWS, PF], tl.float32)
    for first in range(begin, end, C):
        exists = None
        if not EVEN:
            exists = first + tl.arange(0, C) < end
        x = load_inputs(q, batch, head, first, exists, 0, FEATURES, D, C, PD, False)
        phi_q = features(x, exists, 0, FEATURES, D, PD, PF, OPERAND, PRECISION)
        acc = since_begin(product(phi_q, running, OPERAND, PRECISION), rate, C)
        if denominator is not None:
            if sums is None:
                rows = running_sum
            else:
                rows = load_sums(sums, slot, 0, F, PF)
            seen_before = product(phi_q, tl.trans(rows), OPERAND, PRECISION)
            total = tl.sum(since_begin(seen_before, rate, C), 1) + eps
        if k is not None:
            seen = exists
            if mask is not None:
                seen = not_hidden(mask, batch, head, first, end, C)
            y = load_inputs(k, batch, kv_head, first, seen, 0, FEATURES, D, C, PD, mask is not None)
            phi_k = features(y, seen, 0, FEATURES, D, PD, PF, OPERAND, PRECISION)
            values = load_tokens(v, batch, kv_head, first, exists, column, E, C, PE, False)
            score = product(phi_q, tl.trans(phi_k), OPERAND, PRECISION)
            score = pair_weights(score, rate, False, C)
            if denominator is not None:
                total += tl.sum(score, 1)
            acc += product(score, values, OPERAND, PRECISION)
        if denominator is not None:
            acc *= tl.where(total == 0.0, 0.0, 1.0 / total)[:, None]
            tokens = first + tl.arange(0, C)
            tl.store(denominator + row * num_tokens + tokens, total, mask=tokens < end)
        store_tokens(out, batch, head, first, end, column, acc, E, C, PE)
        if k is not None:
            count = tl.minimum(end - first, C)
            kept = until_end(values, rate, count, C)
            added = product(tl.trans(phi_k), kept, OPERAND, PRECISION)
            running = over(running, rate, count) + added
            slot += 1
            if denominator is not None and sums is None:
                weights = in_row_0(what_is_left(rate, count, C), C)
                added = product(weights, phi_k, OPERAND, PRECISION)
                running_sum = over(running_sum, rate, count) + added
    if final_state is not None:
        store_state(final_state, matrix, 0, column, running, E, F, PF, PE)
