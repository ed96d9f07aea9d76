"""The marches of the backward: forward in time for grad_query, in reverse for grad_key, grad_value.

They know no denominator: with g = grad_out / denominator the gradient of what was divided, and d of
what it was divided by, every product of v and g is one of (v, 1) and (g, d).
"""

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
    through_features,
    through_pairs,
)
from attn_ops.linear.triton_state import (
    load_state,
    load_sum,
    partial_sums,
    read,
    store_state,
    store_sum,
    times_sum,
)


@triton.jit
def rows_kernel(
    grad_out, out, denominator, inverse, d, num_tokens, heads,
    E: tl.constexpr, PE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """inverse = 1 / denominator, zero where that is, and d = -(grad_out · out) * inverse."""
    blocks = tl.cdiv(num_tokens, C)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = row // heads, row % heads
    first = tl.program_id(0) % blocks * C
    tokens = first + tl.arange(0, C)
    seen = tokens < num_tokens
    total = tl.load(denominator + row * num_tokens + tokens, mask=seen, other=0.0)
    factor = tl.where(total == 0.0, 0.0, 1.0 / total)
    grad = load_tokens(grad_out, batch, head, first, seen, 0, E, C, PE, False).to(tl.float32)
    values = load_tokens(out, batch, head, first, seen, 0, E, C, PE, False).to(tl.float32)
    tl.store(inverse + row * num_tokens + tokens, factor, mask=seen)
    tl.store(d + row * num_tokens + tokens, -factor * tl.sum(grad * values, 1), mask=seen)


@triton.jit
def grad_query_kernel(
    g, d, inverse, q, k, v, mask, decay, offsets, state, key_sum, grad_q, num_tokens, walk,
    FEATURES: tl.constexpr, D: tl.constexpr, E: tl.constexpr, F: tl.constexpr, PD: tl.constexpr,
    PE: tl.constexpr, PF: tl.constexpr, C: tl.constexpr, BLOCKS: tl.constexpr,
    EVEN: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, BY_FEATURES: tl.constexpr,
):  # fmt: skip
    """grad_phi(q) = g S^T + d z + sum over keys of (g·v + d) phi(k), S and z before the chunk.

    inverse, d: of `rows_kernel`, None where nothing is divided; g is multiplied by `inverse`.
    Parts are PF of the features (BY_FEATURES), or PE of the value columns, each with a sum of its
    own. k None: S and z are of all keys.
    """
    batch, head, kv_head, part, begin, end, row, _, entry = place(walk, offsets, num_tokens)
    rate = None
    if decay is not None:
        rate = log2_of(decay, head)
    feature, column, once = part * PF, 0, True
    if not BY_FEATURES:
        feature, column, once = 0, part * PE, part == 0
    LATE: tl.constexpr = BLOCKS > 1  # as in forward_kernel
    running = load_state(state, entry, feature, column, FEATURES, D, E, F, PF, PE, BLOCKS)
    if d is not None:
        running_sum = load_sum(key_sum, entry, feature, FEATURES, D, F, PF, BLOCKS)
    for first in range(begin, end, C):
        exists = None
        if not EVEN:
            exists = first + tl.arange(0, C) < end
        count = tl.minimum(end - first, C)
        if k is not None:
            seen = exists
            if mask is not None:
                seen = not_hidden(mask, batch, head, first, end, C)
            y = load_inputs(
                k, batch, kv_head, first, seen, feature, FEATURES, D, C, PD, mask is not None
            )
            weight = None
            if rate is not None:
                weight = what_is_left(rate, count, C)
            if d is not None and not LATE:
                phi_k = features(y, seen, feature, 0, FEATURES, D, PD, PF, OPERAND, PRECISION)
                added_sum = partial_sums(phi_k, weight, FEATURES, C, PF, OPERAND, PRECISION)
            values = load_tokens(v, batch, kv_head, first, exists, column, E, C, PE, False)
        grad = load_tokens(g, batch, head, first, exists, column, E, C, PE, False)
        x = None
        if FEATURES != "identity":
            x = load_inputs(q, batch, head, first, exists, feature, FEATURES, D, C, PD, False)
        if inverse is not None:
            factor = load_per_token(inverse, row, num_tokens, first, exists, C)[:, None]
        if d is not None:
            # One part of the columns adds what does not depend on them.
            grad_sum = load_per_token(d, row, num_tokens, first, exists, C)
            grad_sum = tl.where(once, grad_sum, 0.0)
        acc = tl.zeros([C, PD], tl.float32)
        for j in tl.static_range(BLOCKS):
            seen_state = read(running[j], j * PF, FEATURES, D, PF)
            grad_phi = product(grad, tl.trans(seen_state), OPERAND, PRECISION)
            if inverse is not None:
                grad_phi *= factor
            if d is not None:
                grad_phi += times_sum(
                    grad_sum, running_sum[j], j * PF, FEATURES, D, PF, C, OPERAND, PRECISION
                )
            grad_phi = since_begin(grad_phi, rate, C)
            acc = through_features(
                acc, grad_phi, x, j * PF, FEATURES, D, PD, PF, OPERAND, PRECISION
            )
        if k is not None:
            score = product(grad, tl.trans(values), OPERAND, PRECISION)
            if inverse is not None:
                score *= factor
            if d is not None:
                score += grad_sum[:, None]
            score = pair_weights(score, rate, False, C)
            if seen is not None and FEATURES == "taylor":
                score = tl.where(seen[None, :], score, 0.0)
            phi_k = features(y, seen, feature, 0, FEATURES, D, PD, PF, OPERAND, PRECISION)
            acc += through_pairs(score, x, y, phi_k, FEATURES, D, OPERAND, PRECISION)
            if not BY_FEATURES:
                values = until_end(values, rate, count, C)
            states, sums = (), ()
            for j in tl.static_range(BLOCKS):
                phi_k = features(y, seen, feature, j, FEATURES, D, PD, PF, OPERAND, PRECISION)
                if BY_FEATURES:
                    phi_k = until_end(phi_k, rate, count, C)
                added = product(tl.trans(phi_k), values, OPERAND, PRECISION)
                states = states + (over(running[j], rate, count) + added,)
                if d is not None:
                    if LATE:
                        added_sum = partial_sums(phi_k, weight, FEATURES, C, PF, OPERAND, PRECISION)
                    sums = sums + (over(running_sum[j], rate, count) + added_sum,)
            running = states
            if d is not None:
                running_sum = sums
        target = batch + part * walk.spread
        store_tokens(grad_q, target, head, first, end, feature, acc, D, C, PD)


@triton.jit
def grad_key_value_kernel(
    g, d, inverse, q, k, v, mask, decay, offsets, grad_state, grad_key_sum, grad_k, grad_v,
    first_state, first_sum, num_tokens, walk,
    FEATURES: tl.constexpr, D: tl.constexpr, E: tl.constexpr, F: tl.constexpr, PD: tl.constexpr,
    PE: tl.constexpr, PF: tl.constexpr, C: tl.constexpr, BLOCKS: tl.constexpr,
    EVEN: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, BY_FEATURES: tl.constexpr,
):  # fmt: skip
    """With R and u the gradients of state and key_sum after the chunk, and later queries m in it:

    grad_v = phi(k) R + sum of (phi(k)·phi(q)) g, grad_phi(k) = v R^T + u + sum of (v·g + d) phi(q),
    where g is multiplied by `inverse`. Either may be None. q None: R and u
    are of all queries. first_state, first_sum: R and u before the first token.
    """
    batch, head, kv_head, part, begin, end, row, matrix, entry = place(walk, offsets, num_tokens)
    entry += walk.step
    rate = None
    if decay is not None:
        rate = log2_of(decay, head)
    feature, column, once = part * PF, 0, True
    if not BY_FEATURES:
        feature, column, once = 0, part * PE, part == 0
    LATE: tl.constexpr = BLOCKS > 1  # as in forward_kernel
    sums_queries: tl.constexpr = d is not None and (grad_k is not None or first_sum is not None)
    running = load_state(grad_state, entry, feature, column, FEATURES, D, E, F, PF, PE, BLOCKS)
    if sums_queries:
        running_sum = load_sum(grad_key_sum, entry, feature, FEATURES, D, F, PF, BLOCKS)
    chunks = tl.cdiv(end - begin, C)
    for i in range(chunks):
        first = begin + (chunks - 1 - i) * C
        count = tl.minimum(end - first, C)
        exists = None
        if not EVEN:
            exists = first + tl.arange(0, C) < end
        seen = exists
        if mask is not None:
            seen = not_hidden(mask, batch, head, first, end, C)
        y = load_inputs(
            k, batch, kv_head, first, seen, feature, FEATURES, D, C, PD, mask is not None
        )
        values = load_tokens(v, batch, kv_head, first, exists, column, E, C, PE, False)
        if q is not None:
            x = load_inputs(q, batch, head, first, exists, feature, FEATURES, D, C, PD, False)
            grad = load_tokens(g, batch, head, first, exists, column, E, C, PE, False)
            if inverse is not None:
                factor = load_per_token(inverse, row, num_tokens, first, exists, C)
                grad = (grad * factor[:, None]).to(OPERAND)
            if sums_queries:
                grad_sum = load_per_token(d, row, num_tokens, first, exists, C)
                weight = grad_sum
                if rate is not None:
                    weight *= what_was_left(rate, C)
                if not LATE:
                    phi_q = features(x, exists, feature, 0, FEATURES, D, PD, PF, OPERAND, PRECISION)
                    added_sum = partial_sums(phi_q, weight, FEATURES, C, PF, OPERAND, PRECISION)
        target = batch + part * walk.spread
        if grad_v is not None:
            for j in tl.static_range(BLOCKS):
                phi_k = features(y, seen, feature, j, FEATURES, D, PD, PF, OPERAND, PRECISION)
                seen_state = read(running[j], j * PF, FEATURES, D, PF)
                if j == 0:
                    acc = product(phi_k, seen_state, OPERAND, PRECISION)
                else:
                    acc += product(phi_k, seen_state, OPERAND, PRECISION)
            acc = until_end(acc, rate, count, C)
            if q is not None:
                phi_q = features(x, exists, feature, 0, FEATURES, D, PD, PF, OPERAND, PRECISION)
                score = pair_scores(y, x, phi_k, phi_q, seen, True, FEATURES, D, OPERAND, PRECISION)
                score = pair_weights(score, rate, True, C)
                acc += product(score, grad, OPERAND, PRECISION)
            store_tokens(grad_v, batch, head, first, end, column, acc, E, C, PE)
        if grad_k is not None:
            acc = tl.zeros([C, PD], tl.float32)
            for j in tl.static_range(BLOCKS):
                seen_state = read(running[j], j * PF, FEATURES, D, PF)
                grad_phi = product(values, tl.trans(seen_state), OPERAND, PRECISION)
                if sums_queries:
                    ones = tl.where(once, tl.full([C], 1.0, tl.float32), 0.0)
                    grad_phi += times_sum(
                        ones, running_sum[j], j * PF, FEATURES, D, PF, C, OPERAND, PRECISION
                    )
                grad_phi = until_end(grad_phi, rate, count, C)
                acc = through_features(
                    acc, grad_phi, y, j * PF, FEATURES, D, PD, PF, OPERAND, PRECISION
                )
            if q is not None:
                score = product(values, tl.trans(grad), OPERAND, PRECISION)
                if sums_queries:
                    score += tl.where(once, grad_sum, 0.0)[None, :]
                score = pair_weights(score, rate, True, C)
                phi_q = features(x, exists, feature, 0, FEATURES, D, PD, PF, OPERAND, PRECISION)
                acc += through_pairs(score, y, x, phi_q, FEATURES, D, OPERAND, PRECISION)
            if seen is not None:
                acc = tl.where(seen[:, None], acc, 0.0)
            store_tokens(grad_k, target, head, first, end, feature, acc, D, C, PD)
        if q is not None:
            if not BY_FEATURES:
                grad = since_begin(grad, rate, C)
            states, sums = (), ()
            for j in tl.static_range(BLOCKS):
                phi_q = features(x, exists, feature, j, FEATURES, D, PD, PF, OPERAND, PRECISION)
                if BY_FEATURES:
                    phi_q = since_begin(phi_q, rate, C)
                added = product(tl.trans(phi_q), grad, OPERAND, PRECISION)
                states = states + (over(running[j], rate, count) + added,)
                if sums_queries:
                    if LATE:
                        added_sum = partial_sums(phi_q, weight, FEATURES, C, PF, OPERAND, PRECISION)
                    sums = sums + (over(running_sum[j], rate, count) + added_sum,)
            running = states
            if sums_queries:
                running_sum = sums
    if first_state is not None:
        store_state(
            first_state, matrix, feature, column, running, FEATURES, D, E, F, PF, PE, BLOCKS
        )
    if first_sum is not None:
        store_sum(first_sum, matrix, feature, running_sum, FEATURES, D, F, PF, BLOCKS)
