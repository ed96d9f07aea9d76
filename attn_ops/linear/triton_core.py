"""Leaves of the linear attention kernels: tokens of a program, features, states, decay.

A program marches over chunks of C tokens of one sequence and one query head, with a state [F, E]
(or some columns of it) in registers. Products take operands in OPERAND: bfloat16 for bfloat16, else
float32, of which float16 needs the range and, in tf32, no more than its own bits.

Letters: B batch, H query heads, Hk key/value heads, N tokens, D query/key width, F features,
E value width, S sequences, G segments of a sequence, C tokens of a chunk, P* padded widths.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attn_ops._triton.tiles import row_pointers


class Walk(NamedTuple):
    """How programs divide the work.

    heads: H; group: query heads per key/value head; parts: programs that share a head's value
    columns; segments of `length` tokens; states: matrices [F, E] per head, of which segment s
    starts from number s * step; spread: how far apart, in batches, the parts write their sums.
    """

    heads: Any
    group: Any
    parts: Any
    segments: Any
    length: Any
    states: Any
    step: Any
    spread: Any


class KeyMask(NamedTuple):
    """bool [B, 1 or H, 1, N]: False hides a key."""

    pointer: Any
    batch: Any
    head: Any
    column: Any


@triton.jit
def place(walk, offsets, num_tokens):
    """batch, sequence, head, part, segment, and the tokens [begin, end) of this program."""
    program = tl.program_id(0)
    part = program % walk.parts
    segment = program // walk.parts % walk.segments
    head = program // (walk.parts * walk.segments) % walk.heads
    sequence = program // (walk.parts * walk.segments) // walk.heads
    batch, first, last = sequence, 0, num_tokens
    if offsets is not None:
        batch, first, last = 0, tl.load(offsets + sequence), tl.load(offsets + sequence + 1)
    begin = first + segment * walk.length
    end = tl.minimum(begin + walk.length, last)
    return tl.cast(batch, tl.int64), sequence, head.to(tl.int64), part, segment, begin, end


@triton.jit
def first_slot(row, slots, offsets, sequence, begin, C: tl.constexpr):
    """Where the sums of a program's chunks begin, in units of [F].

    A head has `slots` of them. A packed sequence begins at its first token's chunk and two further
    for each sequence before it: one for a chunk that both have tokens of, one for the final sum.
    """
    slot = begin // C
    if offsets is not None:
        slot += 2 * sequence
    return row * slots + slot


@triton.jit
def total_slot(row, slots, offsets, sequence):
    """The same where there is one sum for each sequence."""
    slot = 0
    if offsets is not None:
        slot = sequence
    return row * slots + slot


@triton.jit
def product(a, b, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b, accumulated in float32."""
    return tl.dot(a.to(OPERAND), b.to(OPERAND), input_precision=PRECISION)


# --- tokens


@triton.jit
def not_hidden(mask, batch, head, first, end, C: tl.constexpr):
    """bool [C]: which tokens of the chunk exist and are seen."""
    rows = first + tl.arange(0, C)
    pointers = mask.pointer + batch * mask.batch + head * mask.head
    return tl.load(pointers + rows.to(tl.int64) * mask.column, mask=rows < end, other=0) != 0


@triton.jit
def load_tokens(
    view, batch, head, first, seen, first_column, WIDTH: tl.constexpr, C: tl.constexpr,
    PADDED: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """[C, PADDED] columns from `first_column` on, zero where not seen and outside of WIDTH.

    HIDES: `seen` is more than the end of the sequence, where descriptors read zeros anyway.
    """
    if isinstance(view, tl.tensor_descriptor):
        tile = view.load([batch.to(tl.int32), head.to(tl.int32), first, first_column])
        tile = tile.reshape([C, PADDED])
        if HIDES:
            tile = tl.where(seen[:, None], tile, 0.0)
        return tile
    else:
        columns = first_column + tl.arange(0, PADDED)[None, :]
        pointers = row_pointers(view, batch, head, first, C, PADDED)
        pointers += tl.cast(first_column, tl.int64) * view.column
        inside = (columns >= 0) & (columns < WIDTH)
        if seen is not None:
            inside = inside & seen[:, None]
        return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def store_tokens(
    view, batch, head, first, end, first_column, tile, WIDTH: tl.constexpr, C: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """Writes the part of the tile [C, PADDED] that exists, in the tensor's dtype."""
    if isinstance(view, tl.tensor_descriptor):
        at = [batch.to(tl.int32), head.to(tl.int32), first, first_column]
        view.store(at, tile.to(view.dtype).reshape([1, 1, C, PADDED]))
    else:
        columns = first_column + tl.arange(0, PADDED)[None, :]
        pointers = row_pointers(view, batch, head, first, C, PADDED)
        pointers += tl.cast(first_column, tl.int64) * view.column
        inside = (columns >= 0) & (columns < WIDTH) & (first + tl.arange(0, C) < end)[:, None]
        tl.store(pointers, tile.to(view.pointer.dtype.element_ty), mask=inside)


@triton.jit
def load_per_token(pointer, matrix, num_tokens, first, end, C: tl.constexpr):
    """[C] of a contiguous [matrices, num_tokens] tensor, zero past the end."""
    rows = first + tl.arange(0, C)
    return tl.load(pointer + matrix * num_tokens + rows, mask=rows < end, other=0.0)


# --- the state [F, E] of a program's columns, and key_sum [F]


@triton.jit
def state_pointers(
    pointer, matrix, row, column, E: tl.constexpr, F: tl.constexpr, PF: tl.constexpr,
    PE: tl.constexpr,
):  # fmt: skip
    """Pointers [PF, PE] from (row, column) on into a contiguous [matrices, F, E]; which exist."""
    rows, columns = row + tl.arange(0, PF)[:, None], column + tl.arange(0, PE)[None, :]
    return pointer + matrix * (F * E) + rows * E + columns, (rows < F) & (columns < E)


@triton.jit
def load_state(
    pointer, matrix, row, column, E: tl.constexpr, F: tl.constexpr, PF: tl.constexpr,
    PE: tl.constexpr,
):  # fmt: skip
    """[PF, PE]; zeros where there is no state."""
    if pointer is None:
        return tl.zeros([PF, PE], tl.float32)
    else:
        pointers, inside = state_pointers(pointer, matrix, row, column, E, F, PF, PE)
        return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def store_state(
    pointer, matrix, row, column, state, E: tl.constexpr, F: tl.constexpr, PF: tl.constexpr,
    PE: tl.constexpr,
):  # fmt: skip
    """Writes [PF, PE]."""
    pointers, inside = state_pointers(pointer, matrix, row, column, E, F, PF, PE)
    tl.store(pointers, state, mask=inside)


# The fewest rows of an operand that tensor cores take: of these tiles only row 0 is not zero.
ROWS = tl.constexpr(16)


@triton.jit
def load_sums(view, slot, column, F: tl.constexpr, PF: tl.constexpr):
    """[ROWS, PF] whose row 0 is entry `slot` of [slots, F], from `column` on; below are zeros."""
    if isinstance(view, tl.tensor_descriptor):
        return view.load([slot.to(tl.int32), 0, column]).reshape([ROWS, PF])
    else:
        rows, columns = tl.arange(0, ROWS)[:, None], column + tl.arange(0, PF)[None, :]
        inside = (rows == 0) & (columns < F)
        return tl.load(view + (slot + rows) * F + columns, mask=inside, other=0.0)


@triton.jit
def in_row_0(row, C: tl.constexpr):
    """[ROWS, C] with `row` on top and zeros below."""
    return tl.where((tl.arange(0, ROWS) == 0)[:, None], row[None, :], 0.0)


@triton.jit
def in_column_0(column, C: tl.constexpr):
    """[C, ROWS] with `column` in front and zeros beside it: times `load_sums`, an outer product."""
    return tl.where((tl.arange(0, ROWS) == 0)[None, :], column[:, None], 0.0)


# --- decay


@triton.jit
def pair_weights(score, rate, REVERSE: tl.constexpr, C: tl.constexpr):
    """score [C, C] times decay^(age), zero where the age is negative; REVERSE: rows are keys."""
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    age = row - column
    if REVERSE:
        age = column - row
    if rate is not None:
        score *= tl.exp2(tl.maximum(age, 0).to(tl.float32) * rate)
    return tl.where(age >= 0, score, 0.0)


@triton.jit
def log2_of(decay, head):
    """log2 of the head's decay."""
    return tl.log2(tl.load(decay + head))


@triton.jit
def since_begin(tile, rate, C: tl.constexpr):
    """tile [C, W] times decay^(i+1): how much token i sees of the state before the chunk."""
    if rate is None:
        return tile
    else:
        return tile * tl.exp2((tl.arange(0, C) + 1).to(tl.float32) * rate)[:, None]


@triton.jit
def what_is_left(rate, count, C: tl.constexpr):
    """decay^(count-1-i) [C], of token i when the chunk's `count` tokens are over."""
    if rate is None:
        return tl.full([C], 1.0, tl.float32)
    else:
        return tl.exp2(tl.maximum(count - 1 - tl.arange(0, C), 0).to(tl.float32) * rate)


@triton.jit
def until_end(tile, rate, count, C: tl.constexpr):
    """tile [C, W] times `what_is_left`."""
    if rate is None:
        return tile
    else:
        return tile * what_is_left(rate, count, C)[:, None]


@triton.jit
def over(state, rate, count):
    """What is left of a state after `count` tokens."""
    if rate is None:
        return state
    else:
        return state * tl.exp2(tl.cast(count, tl.float32) * rate)


# --- features


@triton.jit
def elementwise(x, FEATURES: tl.constexpr):
    """phi(x) of the maps that have as many features as inputs."""
    if FEATURES == "relu":
        return tl.maximum(x, 0.0)
    elif FEATURES == "elu_plus_one":
        return tl.where(x > 0.0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
    else:
        small = tl.exp(tl.minimum(x, 20.0))
        # Where 1 + small rounds, its logarithm is scaled back: log(1 + y) = y log(u) / (u - 1).
        above = (1.0 + small) - 1.0
        log = small * (tl.log(1.0 + small) / tl.where(above == 0.0, 1.0, above))
        return tl.where(x > 20.0, x, tl.where(above == 0.0, small, log))


@triton.jit
def slope(x, FEATURES: tl.constexpr):
    """The derivative of `elementwise`."""
    if FEATURES == "relu":
        return tl.where(x > 0.0, 1.0, 0.0)
    elif FEATURES == "elu_plus_one":
        return tl.exp(tl.minimum(x, 0.0))
    else:
        return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def taylor_pairs(D: tl.constexpr, PF: tl.constexpr):
    """first, second, weight [PF]: feature f of x = (1, input) is x[first] * x[second] * weight."""
    f = tl.arange(0, PF)
    n: tl.constexpr = D + 1
    first = tl.zeros([PF], tl.int32)
    for i in tl.static_range(1, n):
        first += tl.where(f >= i * n - i * (i - 1) // 2, 1, 0)
    second = f - (first * n - first * (first - 1) // 2) + first
    quarter: tl.constexpr = D**-0.25
    weight = tl.where(first > 0, quarter, 1.0) * tl.where(second > 0, quarter, 1.0)
    weight = tl.where((first == second) & (first > 0), weight * 0.5**0.5, weight)
    return first, second, tl.where(f < n * (n + 1) // 2, weight, 0.0)


@triton.jit
def picked(x, choice, PD: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """[C, PF]: the columns `choice` [PF] of x, as a product with a one-hot matrix: exact."""
    one_hot = tl.arange(0, PD)[:, None] == choice[None, :]
    return tl.dot(x.to(OPERAND), one_hot.to(OPERAND), input_precision=PRECISION)


@triton.jit
def load_inputs(
    view, batch, head, first, seen, column, FEATURES: tl.constexpr, D: tl.constexpr,
    C: tl.constexpr, PD: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """[C, PD] of what features are made of: columns, for taylor all, with a one in front."""
    if FEATURES != "taylor":
        return load_tokens(view, batch, head, first, seen, column, D, C, PD, HIDES)
    else:
        x = load_tokens(view, batch, head, first, seen, -1, D, C, PD, HIDES)
        ones = tl.full([C], 1.0, x.dtype)
        if seen is not None:
            ones = seen.to(x.dtype)
        return tl.where((tl.arange(0, PD) == 0)[None, :], ones[:, None], x)


@triton.jit
def features(
    x, seen, column, FEATURES: tl.constexpr, D: tl.constexpr, PD: tl.constexpr, PF: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """phi [C, PF] of `load_inputs`, zero where not seen and beyond F."""
    if FEATURES == "identity":
        return x
    elif FEATURES == "taylor":
        first, second, weight = taylor_pairs(D, PF)
        product_of = picked(x, first, PD, OPERAND, PRECISION)
        product_of *= picked(x, second, PD, OPERAND, PRECISION)
        return (product_of * weight[None, :]).to(OPERAND)
    else:
        phi = elementwise(x.to(tl.float32), FEATURES)
        if FEATURES != "relu":  # the others are not zero at zero
            phi = tl.where((column + tl.arange(0, PD) < D)[None, :], phi, 0.0)
            if seen is not None:
                phi = tl.where(seen[:, None], phi, 0.0)
        return phi.to(OPERAND)


@triton.jit
def features_backward(
    grad, x, FEATURES: tl.constexpr, D: tl.constexpr, PD: tl.constexpr, PF: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of `load_inputs` [C, PD] from that of phi [C, PF]."""
    if FEATURES == "identity":
        return grad
    elif FEATURES == "taylor":
        first, second, weight = taylor_pairs(D, PF)
        weighted = grad * weight[None, :]
        to_first = weighted * picked(x, second, PD, OPERAND, PRECISION)
        to_second = weighted * picked(x, first, PD, OPERAND, PRECISION)
        columns = tl.arange(0, PD)[None, :]
        result = product(to_first, first[:, None] == columns, OPERAND, PRECISION)
        return result + product(to_second, second[:, None] == columns, OPERAND, PRECISION)
    else:
        return grad * slope(x.to(tl.float32), FEATURES)
