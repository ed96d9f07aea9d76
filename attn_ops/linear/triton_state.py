"""The state [F, E] of a program's columns, in blocks of features, and key_sum [F]."""

# mypy: disable-error-code="assignment"
# since tuples of tiles grow as a loop over blocks is unrolled.

from __future__ import annotations

import triton
import triton.language as tl

from attn_ops.linear.triton_core import product
from attn_ops.linear.triton_features import taylor_weights


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
