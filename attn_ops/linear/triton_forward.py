"""The forward march: out = (phi(q) S + scores v) / denominator, S the state before the chunk."""

# mypy: disable-error-code="assignment"
# since tuples of tiles grow as a loop over blocks is unrolled.

from __future__ import annotations

import triton
import triton.language as tl

from attn_ops.linear.triton_core import (
    load_tokens,
    log2_of,
    not_hidden,
    over,
    pair_weights,
    place,
    product,
    since_begin,
    store_tokens,
    until_end,
    what_is_left,
    what_was_left,
)
from attn_ops.linear.triton_features import (
    features,
    load_inputs,
    pair_scores,
)
from attn_ops.linear.triton_state import (
    dot_sum,
    load_state,
    load_sum,
    partial_sums,
    read,
    store_state,
    store_sum,
)


@triton.jit
def forward_kernel(
    q, k, v, mask, decay, offsets, state, key_sum, out, denominator, final_state, final_sum,
    num_tokens, eps, walk,
    FEATURES: tl.constexpr, D: tl.constexpr, E: tl.constexpr, F: tl.constexpr, PD: tl.constexpr,
    PE: tl.constexpr, PF: tl.constexpr, C: tl.constexpr, BLOCKS: tl.constexpr,
    EVEN: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program walks the tokens of one segment. k None: queries see the state alone.

    denominator None: nothing is divided, and keys are summed up only for final_sum.
    """
    batch, head, kv_head, part, begin, end, row, matrix, entry = place(walk, offsets, num_tokens)
    column = part * PE
    rate = None
    if decay is not None:
        rate = log2_of(decay, head)
    # Sums come before the products, which take the registers, but with blocks, which do then.
    LATE: tl.constexpr = BLOCKS > 1
    sums_keys: tl.constexpr = denominator is not None or final_sum is not None
    running = load_state(state, entry, 0, column, FEATURES, D, E, F, PF, PE, BLOCKS)
    if sums_keys:
        running_sum = load_sum(key_sum, entry, 0, FEATURES, D, F, PF, BLOCKS)
    for first in range(begin, end, C):
        exists = None
        if not EVEN:
            exists = first + tl.arange(0, C) < end
        count = tl.minimum(end - first, C)
        x = load_inputs(q, batch, head, first, exists, 0, FEATURES, D, C, PD, False)
        if denominator is not None:
            total = tl.full([C], 0.0, tl.float32)
            if not LATE:
                phi_q = features(x, exists, 0, 0, FEATURES, D, PD, PF, OPERAND, PRECISION)
                total += dot_sum(phi_q, running_sum[0], 0, FEATURES, D, PF, OPERAND, PRECISION)
        weight = None
        if rate is not None:
            weight = what_is_left(rate, count, C)
        if k is not None:
            seen = exists
            if mask is not None:
                seen = not_hidden(mask, batch, head, first, end, C)
            y = load_inputs(k, batch, kv_head, first, seen, 0, FEATURES, D, C, PD, mask is not None)
            if sums_keys and not LATE:
                phi_k = features(y, seen, 0, 0, FEATURES, D, PD, PF, OPERAND, PRECISION)
                added = partial_sums(phi_k, weight, FEATURES, C, PF, OPERAND, PRECISION)
                running_sum = (over(running_sum[0], rate, count) + added,)
            values = load_tokens(v, batch, kv_head, first, exists, column, E, C, PE, False)
        acc = tl.zeros([C, PE], tl.float32)
        for i in tl.static_range(BLOCKS):
            phi_q = features(x, exists, 0, i, FEATURES, D, PD, PF, OPERAND, PRECISION)
            if denominator is not None and LATE:
                total += dot_sum(phi_q, running_sum[i], i * PF, FEATURES, D, PF, OPERAND, PRECISION)
            acc += product(phi_q, read(running[i], i * PF, FEATURES, D, PF), OPERAND, PRECISION)
        if denominator is not None:
            if rate is not None:
                total *= what_was_left(rate, C)
            total += eps
        acc = since_begin(acc, rate, C)
        if k is not None:
            phi_k = features(y, seen, 0, 0, FEATURES, D, PD, PF, OPERAND, PRECISION)
            score = pair_scores(x, y, phi_q, phi_k, seen, False, FEATURES, D, OPERAND, PRECISION)
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
            kept = until_end(values, rate, count, C)
            states, sums = (), ()
            for i in tl.static_range(BLOCKS):
                phi_k = features(y, seen, 0, i, FEATURES, D, PD, PF, OPERAND, PRECISION)
                added = product(tl.trans(phi_k), kept, OPERAND, PRECISION)
                states = states + (over(running[i], rate, count) + added,)
                if sums_keys and LATE:
                    added = partial_sums(phi_k, weight, FEATURES, C, PF, OPERAND, PRECISION)
                    sums = sums + (over(running_sum[i], rate, count) + added,)
            running = states
            if sums_keys and LATE:
                running_sum = sums
    if final_state is not None:
        store_state(final_state, matrix, 0, column, running, FEATURES, D, E, F, PF, PE, BLOCKS)
    if final_sum is not None:
        store_sum(final_sum, matrix, 0, running_sum, FEATURES, D, F, PF, BLOCKS)
