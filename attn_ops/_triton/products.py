"""How float32 matrices are multiplied on matrix units that take fewer digits.

A PRECISION is one of `tl.dot`, or names what a factor is the sum of:
  THREE: three bfloat16, any float32 to its last digit; six products.
  TWO: two float16, numbers up to 1, exact to 2^-23 of a row of them; three products.
Such tensors are made once: `input_precision="bf16x6"` splits every tile in every program. A tensor
[B, H, N, D] of P terms is [P B, H, N, D], those of batch b from P b on, and a tile of it a tuple.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_ops._triton import descriptors
from attn_ops._triton import launch as launches
from attn_ops._triton.launch import Launch, launch
from attn_ops._triton.tiles import load_rows, strided

THREE, TWO = "3 bfloat16", "2 float16"
TERMS = {THREE: (3, torch.bfloat16), TWO: (2, torch.float16)}
IS_THREE, IS_TWO = tl.constexpr(THREE), tl.constexpr(TWO)
# Keeps the low terms of numbers up to 1 normal: they are 2^-12 of the high ones, and less.
UNIT = tl.constexpr(2.0**15)


@triton.jit
def as_factor(x, PRECISION: tl.constexpr):
    """A tile that was computed in float32, as load_factor would give it."""
    if PRECISION == IS_THREE:
        high = x.to(tl.bfloat16)
        rest = x - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)
    elif PRECISION == IS_TWO:
        x *= UNIT
        high = x.to(tl.float16)
        return high, (x - high.to(tl.float32)).to(tl.float16)
    else:
        return x


@triton.jit
def split_kernel(
    x, terms, num_rows, num_heads, COUNT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """terms [P B, H, N, D] contiguous, of x [B, H, N, D]; a program takes ROWS rows of one head."""
    blocks = tl.cdiv(num_rows, ROWS)
    program = tl.program_id(0)
    first_row = program % blocks * ROWS
    head = (program // blocks % num_heads).to(tl.int64)
    batch = (program // blocks // num_heads).to(tl.int64)
    tile = load_rows(x, batch, head, first_row, num_rows, WIDTH, ROWS, PADDED).to(tl.float32)
    factor = as_factor(tile, PRECISION)
    rows = first_row + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, PADDED)[None, :]
    inside = (rows < num_rows) & (columns < WIDTH)
    for i in tl.static_range(COUNT):
        # Of an infinity nothing is left, and inf - inf would be NaN.
        term = tl.where(tl.abs(tile) == float("inf"), 0.0, factor[i]) if i else factor[i]
        matrix = (COUNT * batch + i) * num_heads + head
        tl.store(terms + (matrix * num_rows + rows) * WIDTH + columns, term, mask=inside)


def reads_terms(device: torch.device) -> bool:
    """Whether matrix units read tiles of so many terms from shared memory."""
    return descriptors.has_descriptors(device) and launches.shared_memory(device) >= launches.LARGE


def split(x: Tensor, precision: str) -> Tensor:
    """The terms of x [B, H, N, D] float32."""
    batch, heads, rows, width = x.shape
    count, dtype = TERMS[precision]
    terms = x.new_empty(count * batch, heads, rows, width, dtype=dtype)
    columns = triton.next_power_of_2(width)
    sizes = Launch(4096 // columns, columns, 4, 1)
    launch(
        split_kernel, batch * heads * triton.cdiv(rows, sizes.rows), sizes,
        strided(x), terms, rows, heads, COUNT=count, WIDTH=width, ROWS=sizes.rows, PADDED=columns,
        PRECISION=precision,
    )  # fmt: skip
    return terms


@triton.jit
def load_factor(
    view, batch, head, first_row, num_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """load_rows of what enters a product; a tuple where that has terms."""
    if PRECISION == IS_THREE:
        high = load_rows(view, 3 * batch, head, first_row, num_rows, WIDTH, BLOCK, PADDED)
        middle = load_rows(view, 3 * batch + 1, head, first_row, num_rows, WIDTH, BLOCK, PADDED)
        low = load_rows(view, 3 * batch + 2, head, first_row, num_rows, WIDTH, BLOCK, PADDED)
        return high, middle, low
    elif PRECISION == IS_TWO:
        high = load_rows(view, 2 * batch, head, first_row, num_rows, WIDTH, BLOCK, PADDED)
        low = load_rows(view, 2 * batch + 1, head, first_row, num_rows, WIDTH, BLOCK, PADDED)
        return high, low
    else:
        return load_rows(view, batch, head, first_row, num_rows, WIDTH, BLOCK, PADDED)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a @ b of two factors."""
    # The smallest terms first: matrix units cut the digits below those of their sum.
    if PRECISION == IS_THREE:
        total = tl.dot(a[2], b[0])
        total = tl.dot(a[1], b[1], total)
        total = tl.dot(a[0], b[2], total)
        total = tl.dot(a[1], b[0], total)
        total = tl.dot(a[0], b[1], total)
        return tl.dot(a[0], b[0], total)
    elif PRECISION == IS_TWO:
        total = tl.dot(a[1], b[0])
        total = tl.dot(a[0], b[1], total)
        return tl.dot(a[0], b[0], total) * (1.0 / (UNIT * UNIT))
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def transposed(factor, PRECISION: tl.constexpr):
    """A factor with rows for columns."""
    if PRECISION == IS_THREE:
        return tl.trans(factor[0]), tl.trans(factor[1]), tl.trans(factor[2])
    elif PRECISION == IS_TWO:
        return tl.trans(factor[0]), tl.trans(factor[1])
    else:
        return tl.trans(factor)


@triton.jit
def add_product(total, computed, b, PRECISION: tl.constexpr):
    """total + computed @ b: a tile in float32 times a factor."""
    if PRECISION == IS_THREE:
        # In `total` every step of the matrix units would cut digits.
        return total + product(as_factor(computed, PRECISION), b, PRECISION)
    else:
        return tl.dot(computed.to(b.dtype), b, total, input_precision=PRECISION)
