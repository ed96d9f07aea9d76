"""The marches of the backward: forward in time for grad_query, in reverse for grad_key, grad_value.

They know no denominator: `grad_numerator_kernel` turns grad_out into g, the gradient of what was
divided, and d, that of the denominator, and every product of v and g is one of (v, 1) and (g, d).
"""

from __future__ import annotations

import triton
import triton.language as tl

from attn_ops.linear.triton_core import (
    features,
    features_backward,
    first_slot,
    in_column_0,
    load_inputs,
    load_per_token,
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
)


@triton.jit
def grad_numerator_kernel(
    grad_out, out, denominator, g, d, num_tokens, heads,
    E: tl.constexpr, PE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """g = grad_out / denominator and d = -(g · out), zero where the denominator is."""
    blocks = tl.cdiv(num_tokens, C)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = row // heads, row % heads
    first = tl.program_id(0) % blocks * C
    tokens = first + tl.arange(0, C)
    seen = tokens < num_tokens
    total = tl.load(denominator + row * num_tokens + tokens, mask=seen, other=0.0)
    inverse = tl.where(total == 0.0, 0.0, 1.0 / total)
    tile = load_tokens(grad_out, batch, head, first, seen, 0, E, C, PE, False).to(tl.float32)
    tile *= inverse[:, None]
    store_tokens(g, batch, head, first, num_tokens, 0, tile, E, C, PE)
    result = load_tokens(out, batch, head, first, seen, 0, E, C, PE, False).to(tl.float32)
    tl.store(d + row * num_tokens + tokens, -tl.sum(tile * result, 1), mask=seen)


@triton.jit
def grad_query_kernel(
    g, d, q, k, v, mask, decay, offsets, state, sums, grad_q, num_tokens, slots, walk,
    FEATURES: tl.constexpr, D: tl.constexpr, E: tl.constexpr, F: tl.constexpr, PD: tl.constexpr,
    PE: tl.constexpr, PF: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, BY_FEATURES: tl.constexpr,
):  # fmt: skip
    """grad_phi(q) = g S^T + d z + sum over keys of (g·v + d) phi(k), S and z before the chunk.

    Parts are PF of the features (BY_FEATURES), or PE of the value columns, each with a sum of its
    own. k None: S and z are of all keys.
    """
    batch, sequence, head, part, segment, begin, end = place(walk, offsets, num_tokens)
    kv_head = head // walk.group
    row = batch * walk.heads + head
    rate = None
    if decay is not None:
        rate = log2_of(decay, head)
    matrix = sequence.to(tl.int64) * walk.heads + head
    feature, column, once = part * PF, 0, True
    if not BY_FEATURES:
        feature, column, once = 0, part * PE, part == 0
    entry = matrix * walk.states + segment * walk.step
    running = load_state(state, entry, feature, column, E, F, PF, PE)
    slot = first_slot(row, slots, offsets, sequence, begin, C)
    if k is None:
        slot = total_slot(row, slots, offsets, sequence)
    for first in range(begin, end, C):
        exists = None
        if not EVEN:
            exists = first + tl.arange(0, C) < end
        grad = load_tokens(g, batch, head, first, exists, column, E, C, PE, False)
        acc = product(grad, tl.trans(running), OPERAND, PRECISION)
        if d is not None:
            # One part of the columns adds what does not depend on them.
            grad_sum = load_per_token(d, row, num_tokens, first, end, C)
            grad_sum = tl.where(once, grad_sum, 0.0)
            rows = load_sums(sums, slot, feature, F, PF)
            acc += product(in_column_0(grad_sum, C), rows, OPERAND, PRECISION)
        acc = since_begin(acc, rate, C)
        if k is not None:
            seen = exists
            if mask is not None:
                seen = not_hidden(mask, batch, head, first, end, C)
            y = load_inputs(
                k, batch, kv_head, first, seen, feature, FEATURES, D, C, PD, mask is not None
            )
            phi_k = features(y, seen, feature, FEATURES, D, PD, PF, OPERAND, PRECISION)
            values = load_tokens(v, batch, kv_head, first, exists, column, E, C, PE, False)
            score = product(grad, tl.trans(values), OPERAND, PRECISION)
            if d is not None:
                score += grad_sum[:, None]
            score = pair_weights(score, rate, False, C)
            acc += product(score, phi_k, OPERAND, PRECISION)
            count = tl.minimum(end - first, C)
            if BY_FEATURES:
                phi_k = until_end(phi_k, rate, count, C)
            else:
                values = until_end(values, rate, count, C)
            added = product(tl.trans(phi_k), values, OPERAND, PRECISION)
            running = over(running, rate, count) + added
            slot += 1
        x = None
        if FEATURES != "identity":
            x = load_inputs(q, batch, head, first, exists, feature, FEATURES, D, C, PD, False)
        acc = features_backward(acc, x, FEATURES, D, PD, PF, OPERAND, PRECISION)
        at = feature
        if FEATURES == "taylor":
            at = -1
        target = batch + part * walk.spread
        store_tokens(grad_q, target, head, first, end, at, acc, D, C, PD)


@triton.jit
def grad_key_value_kernel(
    g, d, q, k, v, mask, decay, offsets, grad_state, sums, grad_k, grad_v, grad_initial,
    num_tokens, slots, walk,
    FEATURES: tl.constexpr, D: tl.constexpr, E: tl.constexpr, F: tl.constexpr, PD: tl.constexpr,
    PE: tl.constexpr, PF: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, BY_FEATURES: tl.constexpr,
):  # fmt: skip
    """With R and u the gradients of state and key_sum after the chunk, and later queries m in it:

    grad_v = phi(k) R + sum of (phi(k)·phi(q)) g, grad_phi(k) = v R^T + u + sum of (v·g + d) phi(q).
    Either may be None. q None: R and u are of all queries. grad_initial: R before the first token.
    """
    batch, sequence, head, part, segment, begin, end = place(walk, offsets, num_tokens)
    kv_head = head // walk.group
    row = batch * walk.heads + head
    rate = None
    if decay is not None:
        rate = log2_of(decay, head)
    matrix = sequence.to(tl.int64) * walk.heads + head
    feature, column, once = part * PF, 0, True
    if not BY_FEATURES:
        feature, column, once = 0, part * PE, part == 0
    entry = matrix * walk.states + (segment + 1) * walk.step
    running = load_state(grad_state, entry, feature, column, E, F, PF, PE)
    chunks = tl.cdiv(end - begin, C)
    slot = first_slot(row, slots, offsets, sequence, begin, C) + chunks
    if q is None:
        slot = total_slot(row, slots, offsets, sequence)
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
        phi_k = features(y, seen, feature, FEATURES, D, PD, PF, OPERAND, PRECISION)
        values = load_tokens(v, batch, kv_head, first, exists, column, E, C, PE, False)
        if q is not None:
            x = load_inputs(q, batch, head, first, exists, feature, FEATURES, D, C, PD, False)
            phi_q = features(x, exists, feature, FEATURES, D, PD, PF, OPERAND, PRECISION)
            grad = load_tokens(g, batch, head, first, exists, column, E, C, PE, False)
        target = batch + part * walk.spread
        if grad_v is not None:
            acc = product(phi_k, running, OPERAND, PRECISION)
            acc = until_end(acc, rate, count, C)
            if q is not None:
                score = product(phi_k, tl.trans(phi_q), OPERAND, PRECISION)
                score = pair_weights(score, rate, True, C)
                acc += product(score, grad, OPERAND, PRECISION)
            store_tokens(grad_v, batch, head, first, end, column, acc, E, C, PE)
        if grad_k is not None:
            acc = product(values, tl.trans(running), OPERAND, PRECISION)
            if sums is not None:
                ones = tl.where(once, tl.full([C], 1.0, tl.float32), 0.0)
                rows = load_sums(sums, slot, feature, F, PF)
                acc += product(in_column_0(ones, C), rows, OPERAND, PRECISION)
            acc = until_end(acc, rate, count, C)
            if q is not None:
                score = product(values, tl.trans(grad), OPERAND, PRECISION)
                if d is not None:
                    grad_sum = load_per_token(d, row, num_tokens, first, end, C)
                    score += tl.where(once, grad_sum, 0.0)[None, :]
                score = pair_weights(score, rate, True, C)
                acc += product(score, phi_q, OPERAND, PRECISION)
            if seen is not None:
                acc = tl.where(seen[:, None], acc, 0.0)
            acc = features_backward(acc, y, FEATURES, D, PD, PF, OPERAND, PRECISION)
            at = feature
            if FEATURES == "taylor":
                at = -1
            store_tokens(grad_k, target, head, first, end, at, acc, D, C, PD)
        if q is not None:
            if BY_FEATURES:
                phi_q = since_begin(phi_q, rate, C)
            else:
                grad = since_begin(grad, rate, C)
            added = product(tl.trans(phi_q), grad, OPERAND, PRECISION)
            running = over(running, rate, count) + added
            slot -= 1
    if grad_initial is not None:
        store_state(grad_initial, matrix, feature, column, running, E, F, PF, PE)
