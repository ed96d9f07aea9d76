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
    """Where this program works: batch, head, kv_head, part, tokens [begin, end), and rows.

    row, matrix: of a [B, H, ...] tensor and of a state; entry: of its state before segment 0.
    """
    program = tl.program_id(0)
    part = program % walk.parts
    segment = program // walk.parts % walk.segments
    head = (program // (walk.parts * walk.segments) % walk.heads).to(tl.int64)
    sequence = program // (walk.parts * walk.segments) // walk.heads
    batch, first, last = sequence, 0, num_tokens
    if offsets is not None:
        batch, first, last = 0, tl.load(offsets + sequence), tl.load(offsets + sequence + 1)
    batch = tl.cast(batch, tl.int64)
    begin = first + segment * walk.length
    end = tl.minimum(begin + walk.length, last)
    row = batch * walk.heads + head
    matrix = sequence.to(tl.int64) * walk.heads + head
    entry = matrix * walk.states + segment * walk.step
    return batch, head, head // walk.group, part, begin, end, row, matrix, entry


@triton.jit
def nearest_tf32(x):
    """float32 rounded to the 10 bits that tensor cores take: by themselves they cut the rest."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def product(a, b, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b, accumulated in float32."""
    if PRECISION == "tf32" and OPERAND == tl.float32:
        a, b = nearest_tf32(a.to(OPERAND)), nearest_tf32(b.to(OPERAND))
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
        inside = columns < WIDTH
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
        inside = (columns < WIDTH) & (first + tl.arange(0, C) < end)[:, None]
        tl.store(pointers, tile.to(view.pointer.dtype.element_ty), mask=inside)


@triton.jit
def load_per_token(pointer, matrix, num_tokens, first, exists, C: tl.constexpr):
    """[C] of a contiguous [matrices, num_tokens] tensor; exists: bool [C], None where all do."""
    pointers = pointer + matrix * num_tokens + first + tl.arange(0, C)
    if exists is None:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=exists, other=0.0)


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
    pointer, matrix, row, column, FEATURES: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    F: tl.constexpr, PF: tl.constexpr, PE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """BLOCKS tiles [PF, PE]; zeros where there is no state."""
    tiles = ()
    for i in tl.static_range(BLOCKS):
        if pointer is None:
            tiles = tiles + (tl.zeros([PF, PE], tl.float32),)
        else:
            pointers, inside = state_pointers(pointer, matrix, row + i * PF, column, E, F, PF, PE)
            tile = tl.load(pointers, mask=inside, other=0.0)
            if FEATURES == "taylor":
                tile /= taylor_weights(i * PF, D, PF)[:, None]
            tiles = tiles + (tile,)
    return tiles


@triton.jit
def store_state(
    pointer, matrix, row, column, state, FEATURES: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    F: tl.constexpr, PF: tl.constexpr, PE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Writes BLOCKS tiles [PF, PE]."""
    for i in tl.static_range(BLOCKS):
        tile = state[i]
        if FEATURES == "taylor":
            tile *= taylor_weights(i * PF, D, PF)[:, None]
        pointers, inside = state_pointers(pointer, matrix, row + i * PF, column, E, F, PF, PE)
        tl.store(pointers, tile, mask=inside)


@triton.jit
def read(tile, begin, FEATURES: tl.constexpr, D: tl.constexpr, PF: tl.constexpr):
    """A tile of a state as features read it: taylor's carry no weights, which are in here twice."""
    if FEATURES != "taylor":
        return tile
    else:
        weight = taylor_weights(begin, D, PF)
        return tile * (weight * weight)[:, None]


# A key_sum [F] is carried as ROWS partial sums, whose sum it is: the fewest rows of an operand that
# tensor cores take. Threads add up tokens of their own, and a product adds the rows up.
ROWS = tl.constexpr(16)


@triton.jit
def in_rows(vector):
    """[ROWS, W] whose sum of rows is the vector [W]: as bfloat16 has it, and below it the rest."""
    row = tl.arange(0, ROWS)[:, None]
    rounded = vector.to(tl.bfloat16).to(tl.float32)
    rest = tl.where(row == 1, (vector - rounded)[None, :], 0.0)
    return tl.where(row == 0, rounded[None, :], rest)


@triton.jit
def load_sum(
    pointer, matrix, column, FEATURES: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    PF: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """BLOCKS of [ROWS, PF] whose rows sum up to entry `matrix` of [matrices, F], or zeros."""
    tiles = ()
    for i in tl.static_range(BLOCKS):
        if pointer is None:
            tiles = tiles + (tl.zeros([ROWS, PF], tl.float32),)
        else:
            columns = column + i * PF + tl.arange(0, PF)
            total = tl.load(pointer + matrix * F + columns, mask=columns < F, other=0.0)
            if FEATURES == "taylor":
                total /= taylor_weights(i * PF, D, PF)
            tiles = tiles + (in_rows(total),)
    return tiles


@triton.jit
def store_sum(
    pointer, matrix, column, rows, FEATURES: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    PF: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Writes the sum of the rows [ROWS, PF] of every block."""
    for i in tl.static_range(BLOCKS):
        columns = column + i * PF + tl.arange(0, PF)
        total = tl.sum(rows[i], 0)
        if FEATURES == "taylor":
            total *= taylor_weights(i * PF, D, PF)
        tl.store(pointer + matrix * F + columns, total, mask=columns < F)


@triton.jit
def partial_sums(
    phi, weight, FEATURES: tl.constexpr, C: tl.constexpr, PF: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """[ROWS, PF] whose rows sum up to the sum of phi [C, PF], times weight [C] unless None."""
    if FEATURES == "taylor":
        # Its features come out of a product, and threads hold few tokens of each.
        if weight is None:
            weight = tl.full([C], 1.0, tl.float32)
        return product(in_rows(weight), phi, OPERAND, PRECISION)
    else:
        tile = phi.to(tl.float32)
        if weight is not None:
            tile *= weight[:, None]
        return tl.sum(tl.reshape(tile, [C // ROWS, ROWS, PF]), 0)


@triton.jit
def read_sum(rows, begin, FEATURES: tl.constexpr, D: tl.constexpr, PF: tl.constexpr):
    """`read` of a tile of partial sums."""
    if FEATURES != "taylor":
        return rows
    else:
        weight = taylor_weights(begin, D, PF)
        return rows * (weight * weight)[None, :]


@triton.jit
def dot_sum(
    phi, rows, begin, FEATURES: tl.constexpr, D: tl.constexpr, PF: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[C]: phi [C, PF] times the sum of the rows."""
    read_rows = read_sum(rows, begin, FEATURES, D, PF)
    return tl.sum(product(phi, tl.trans(read_rows), OPERAND, PRECISION), 1)


@triton.jit
def times_sum(
    column, rows, begin, FEATURES: tl.constexpr, D: tl.constexpr, PF: tl.constexpr,
    C: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[C, PF]: column [C] times the sum of the rows."""
    repeated = tl.broadcast_to(column[:, None], [C, ROWS])
    return product(repeated, read_sum(rows, begin, FEATURES, D, PF), OPERAND, PRECISION)


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
def what_was_left(rate, C: tl.constexpr):
    """decay^(i+1) [C], of what was before the chunk when token i is over."""
    return tl.exp2((tl.arange(0, C) + 1).to(tl.float32) * rate)


@triton.jit
def since_begin(tile, rate, C: tl.constexpr):
    """tile [C, W] times `what_was_left`: how much tokens see of the state before the chunk."""
    if rate is None:
        return tile
    else:
        return tile * what_was_left(rate, C)[:, None]


@triton.jit
def what_is_left(rate, count, C: tl.constexpr):
    """decay^(count-1-i) [C], of token i when the chunk's `count` tokens are over."""
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
def taylor_pairs(begin, D: tl.constexpr, PF: tl.constexpr):
    """first, second [PF]: from `begin` on, a feature of x = (input, 1) is x[first] * x[second].

    Beyond the last feature they are no column of x; `taylor_weights` has its weight.
    """
    f = begin + tl.arange(0, PF)
    n: tl.constexpr = D + 1
    first = tl.zeros([PF], tl.int32)
    for i in tl.static_range(1, n + 1):
        first += tl.where(f >= i * n - i * (i - 1) // 2, 1, 0)
    second = f - (first * n - first * (first - 1) // 2) + first
    # So far 0 is the one, which stands behind the inputs.
    first, second = tl.where(first > 0, first - 1, D), tl.where(second > 0, second - 1, D)
    last: tl.constexpr = n * (n + 1) // 2
    return tl.where(f < last, first, -1), tl.where(f < last, second, -1)


@triton.jit
def taylor_weights(begin, D: tl.constexpr, PF: tl.constexpr):
    """[PF]: what the products of `taylor_pairs` are multiplied by; ones where there are none."""
    first, second = taylor_pairs(begin, D, PF)
    quarter: tl.constexpr = D**-0.25
    weight = tl.where(first != D, quarter, 1.0) * tl.where(second != D, quarter, 1.0)
    weight = tl.where((first == second) & (first != D), weight * 0.5**0.5, weight)
    return tl.where(first < 0, 1.0, weight)


@triton.jit
def one_hot(choice, PD: tl.constexpr, OPERAND: tl.constexpr):
    """[PD, PF]: x [C, PD] times it are the columns `choice` [PF] of x, exactly."""
    return (tl.arange(0, PD)[:, None] == choice[None, :]).to(OPERAND)


@triton.jit
def load_inputs(
    view, batch, head, first, seen, column, FEATURES: tl.constexpr, D: tl.constexpr,
    C: tl.constexpr, PD: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """[C, PD] of what features are made of: columns, for taylor with a one behind the last."""
    x = load_tokens(view, batch, head, first, seen, column, D, C, PD, HIDES)
    if FEATURES != "taylor":
        return x
    else:
        ones = tl.full([C], 1.0, x.dtype)
        if seen is not None:
            ones = seen.to(x.dtype)
        return tl.where((tl.arange(0, PD) == D)[None, :], ones[:, None], x)


@triton.jit
def features(
    x, seen, column, block: tl.constexpr, FEATURES: tl.constexpr, D: tl.constexpr,
    PD: tl.constexpr, PF: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of phi [C, PF] of `load_inputs`, zero where not seen and beyond F.

    taylor's come without their weights, see `read`.
    """
    if FEATURES == "identity":
        return x
    elif FEATURES == "taylor":
        first, second = taylor_pairs(block * PF, D, PF)
        tile = tl.dot(x.to(OPERAND), one_hot(first, PD, OPERAND), input_precision=PRECISION)
        tile *= tl.dot(x.to(OPERAND), one_hot(second, PD, OPERAND), input_precision=PRECISION)
        return tile.to(OPERAND)
    else:
        phi = elementwise(x.to(tl.float32), FEATURES)
        if FEATURES != "relu":  # the others are not zero at zero
            phi = tl.where((column + tl.arange(0, PD) < D)[None, :], phi, 0.0)
            if seen is not None:
                phi = tl.where(seen[:, None], phi, 0.0)
        return phi.to(OPERAND)


@triton.jit
def through_features(
    acc, grad, x, begin, FEATURES: tl.constexpr, D: tl.constexpr, PD: tl.constexpr,
    PF: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [C, PD] plus the gradient of `load_inputs` from that of the features from `begin` on."""
    if FEATURES == "identity":
        return acc + grad
    elif FEATURES == "taylor":
        first, second = taylor_pairs(begin, D, PF)
        to_first = one_hot(first, PD, OPERAND)
        to_second = one_hot(second, PD, OPERAND)
        other = tl.dot(x.to(OPERAND), to_second, input_precision=PRECISION)
        acc += product(grad * other, tl.trans(to_first), OPERAND, PRECISION)
        other = tl.dot(x.to(OPERAND), to_first, input_precision=PRECISION)
        return acc + product(grad * other, tl.trans(to_second), OPERAND, PRECISION)
    else:
        return acc + grad * slope(x.to(tl.float32), FEATURES)


@triton.jit
def half_of_taylor(x, y, D: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """s = x·y / sqrt(D) of every pair, each with a one behind; taylor's products are 1+s+s²/2."""
    return (product(x, tl.trans(y), OPERAND, PRECISION) - 1.0) * (D**-0.5)


@triton.jit
def pair_scores(
    x, y, phi_x, phi_y, seen, ROWS_SEEN: tl.constexpr, FEATURES: tl.constexpr, D: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """phi(x)·phi(y) of every pair of two chunks, zero where a key is not seen.

    Keys are the columns, or the rows. taylor takes it from the inputs: they are fewer.
    """
    if FEATURES != "taylor":
        return product(phi_x, tl.trans(phi_y), OPERAND, PRECISION)
    else:
        s = half_of_taylor(x, y, D, OPERAND, PRECISION)
        score = 1.0 + s + 0.5 * s * s
        if seen is not None:
            if ROWS_SEEN:
                score = tl.where(seen[:, None], score, 0.0)
            else:
                score = tl.where(seen[None, :], score, 0.0)
        return score


@triton.jit
def through_pairs(
    grad, x, y, phi_y, FEATURES: tl.constexpr, D: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of x [C, PD] from that of the pairs' scores; y are the keys or queries of a pair."""
    if FEATURES == "taylor":
        s = half_of_taylor(x, y, D, OPERAND, PRECISION)
        return product(grad * ((1.0 + s) * (D**-0.5)), y, OPERAND, PRECISION)
    else:
        grad_phi = product(grad, phi_y, OPERAND, PRECISION)
        if FEATURES != "identity":
            grad_phi *= slope(x.to(tl.float32), FEATURES)
        return grad_phi
