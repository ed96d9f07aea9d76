"""Leaves of the linear attention kernels: tokens of a program, products, decay.

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
