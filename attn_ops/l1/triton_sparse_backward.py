"""The backward of sparse L1 attention, by rows and by columns; the latter serve the forward too."""

from __future__ import annotations

import triton
import triton.language as tl

from attn_ops.l1.triton_sparse_core import (
    load_ends,
    load_row,
    span,
    store_row,
    sum_of_pieces,
    times_sign,
)


@triton.jit
def _grad_weights(
    v, v_row, g, g_row, r, keys, weight, grad_score, grad_reverse, grad_out, begin, stop,
    E: tl.constexpr, PE: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of the weights; returns their sum by weight, and sum A g[key] [PE]."""
    lanes, e = tl.arange(0, EDGES), tl.arange(0, PE)
    delta = tl.zeros([EDGES], tl.float32)
    arriving = tl.zeros([EDGES, PE], tl.float32)
    reverse = grad_out
    if r is not None:
        reverse = load_row(r, e, E)
    for first in range(begin, stop, EDGES):
        place = first + lanes
        live = place < stop
        key = tl.load(keys + place, mask=live, other=0)
        a = tl.load(weight + place, mask=live, other=0.0)
        grad = tl.zeros([EDGES], tl.float32)
        if grad_score is not None:
            grad += tl.sum(load_ends(v, v_row, key, live, e, E) * grad_out[None, :], 1)
        if r is not None:
            grad_at_key = load_ends(g, g_row, key, live, e, E)
            if grad_score is not None:
                grad += tl.sum(grad_at_key * reverse[None, :], 1)
            if grad_reverse is not None:
                arriving += a[:, None] * grad_at_key
        if grad_score is not None:
            tl.store(grad_score + place, grad, mask=live)
            delta += a * grad
    return tl.sum(delta, 0), tl.sum(arriving, 0)


@triton.jit
def _grad_scores(
    query, k, k_row, keys, weight, grad_score, grad_query, begin, stop, delta,
    D: tl.constexpr, PD: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """Gradients of the weights to those of the scores, in place; returns sum dz sign(q - k)."""
    lanes, d = tl.arange(0, EDGES), tl.arange(0, PD)
    total = tl.zeros([EDGES, PD], tl.float32)
    for first in range(begin, stop, EDGES):
        place = first + lanes
        live = place < stop
        a = tl.load(weight + place, mask=live, other=0.0)
        grad = a * (tl.load(grad_score + place, mask=live, other=0.0) - delta)
        tl.store(grad_score + place, grad, mask=live)
        if grad_query is not None:
            key = tl.load(keys + place, mask=live, other=0)
            total += times_sign(grad, query[None, :] - load_ends(k, k_row, key, live, d, D))
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["rows"])
def rows_kernel(
    q, q_batch, q_head, q_row, k, k_batch, k_head, k_row, v, v_batch, v_head, v_row,
    g, g_batch, g_head, g_row, r, r_batch, r_head, r_row, start, keys, weight, grad_score,
    grad_query, grad_reverse, delta_parts, query_parts, reverse_parts, rows, programs, num_edges,
    heads, group, scale,
    D: tl.constexpr, E: tl.constexpr, PD: tl.constexpr, PE: tl.constexpr, EDGES: tl.constexpr,
    CHUNK: tl.constexpr, SOFTMAX: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """grad_score [BH, L], grad_query [BH, M, D], grad_reverse [BH, M, E]; None if not wanted.

    STEP 1: over pieces, up to the gradients of the weights; 2: over pieces, from there; 3: over
    rows.
    """
    program = tl.program_id(0).to(tl.int64)
    matrix = program // programs
    batch, head = matrix // heads, matrix % heads
    row, begin, end, stop = span(start, rows, num_edges, program % programs, CHUNK, STEP < 3)
    row_begin, row_end = begin, end
    if STEP == 2:
        row_begin, row_end = tl.load(start + row), tl.load(start + row + 1)
    slots = matrix * (2 * tl.cdiv(num_edges, CHUNK))
    d, e = tl.arange(0, PD), tl.arange(0, PE)
    weight += matrix * num_edges
    if grad_score is not None:
        grad_score += matrix * num_edges
    delta = 0.0
    if STEP != 2:
        g += batch * g_batch + head * g_head
        if r is not None:
            r += batch * r_batch + head // group * r_head + row * r_row
        delta, arriving = _grad_weights(
            v + batch * v_batch + head // group * v_head, v_row, g, g_row, r, keys, weight,
            grad_score, grad_reverse, load_row(g + row * g_row, e, E), begin, stop, E, PE, EDGES,
        )  # fmt: skip
        if grad_reverse is not None:
            if STEP == 1:
                store_row(reverse_parts + program * E, arriving, e, E)
            else:
                arriving += sum_of_pieces(
                    reverse_parts + slots * E, row_begin, row_end, e, E, CHUNK
                )
                store_row(grad_reverse + (matrix * rows + row) * E, arriving, e, E)
        if STEP == 1:
            tl.store(delta_parts + program, delta)
    if grad_score is not None and STEP != 1:
        if STEP == 2:
            one = tl.arange(0, 1)
            delta += tl.sum(
                sum_of_pieces(delta_parts + slots, row_begin, row_end, one, 1, CHUNK), 0
            )
        if not SOFTMAX:
            delta = 0.0
        # What some threads have written others read.
        tl.debug_barrier()
        query = load_row(q + batch * q_batch + head * q_head + row * q_row, d, D)
        total = _grad_scores(
            query, k + batch * k_batch + head // group * k_head, k_row, keys, weight, grad_score,
            grad_query, begin, stop, delta, D, PD, EDGES,
        )  # fmt: skip
        if grad_query is not None:
            if STEP == 2:
                store_row(query_parts + program * D, total, d, D)
            else:
                total += sum_of_pieces(query_parts + slots * D, row_begin, row_end, d, D, CHUNK)
                store_row(grad_query + (matrix * rows + row) * D, -scale * total, d, D)


@triton.jit(do_not_specialize=["columns"])
def columns_kernel(
    q, q_batch, q_head, q_row, k, k_batch, k_head, k_row, x, x_batch, x_head, x_row, start, queries,
    edges, weight, grad_score, grad_key, sums, added, key_parts, sum_parts, columns, programs,
    num_edges, heads, group, x_group, scale,
    D: tl.constexpr, E: tl.constexpr, PD: tl.constexpr, PE: tl.constexpr, EDGES: tl.constexpr,
    CHUNK: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """grad_key [BH, N, D], and sums [BH, N, E] = sum of A x[query] over the edges of a key.

    x is the gradient of out for grad_value, and value_reverse in the forward: there `added`
    [BH, N, E] comes on top. grad_key and sums are None if not wanted.
    """
    program = tl.program_id(0).to(tl.int64)
    matrix = program // programs
    batch, head = matrix // heads, matrix % heads
    column, begin, end, stop = span(start, columns, num_edges, program % programs, CHUNK, PIECES)
    lanes, d, e = tl.arange(0, EDGES), tl.arange(0, PD), tl.arange(0, PE)
    q += batch * q_batch + head * q_head
    x += batch * x_batch + head // x_group * x_head
    key = load_row(k + batch * k_batch + head // group * k_head + column * k_row, d, D)
    weight += matrix * num_edges
    if grad_key is not None:
        grad_score += matrix * num_edges
    total_key = tl.zeros([EDGES, PD], tl.float32)
    total = tl.zeros([EDGES, PE], tl.float32)
    for first in range(begin, stop, EDGES):
        place = first + lanes
        live = place < stop
        query = tl.load(queries + place, mask=live, other=0)
        edge = tl.load(edges + place, mask=live, other=0)
        if grad_key is not None:
            grad = tl.load(grad_score + edge, mask=live, other=0.0)
            difference = load_ends(q, q_row, query, live, d, D) - key[None, :]
            total_key += times_sign(grad, difference)
        if sums is not None:
            a = tl.load(weight + edge, mask=live, other=0.0)
            total += a[:, None] * load_ends(x, x_row, query, live, e, E)
    of_key, of_x = tl.sum(total_key, 0), tl.sum(total, 0)
    slots = matrix * (2 * tl.cdiv(num_edges, CHUNK))
    to = matrix * columns + column
    if grad_key is not None:
        if PIECES:
            store_row(key_parts + program * D, of_key, d, D)
        else:
            of_key += sum_of_pieces(key_parts + slots * D, begin, end, d, D, CHUNK)
            store_row(grad_key + to * D, scale * of_key, d, D)
    if sums is not None:
        if PIECES:
            store_row(sum_parts + program * E, of_x, e, E)
        else:
            of_x += sum_of_pieces(sum_parts + slots * E, begin, end, e, E, CHUNK)
            if added is not None:
                of_x += load_row(added + to * E, e, E)
            store_row(sums + to * E, of_x, e, E)
