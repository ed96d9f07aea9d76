"""What is added to products of queries and keys, and what is hidden pair by pair."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from attn_ops._triton.launch import Launch, launch
from attn_ops._triton.tiles import load_pairs, strided


class PairTerms(NamedTuple):
    """bias and mask broadcast to [B, H, M, N], relative_bias [H, M+N-1], each None where absent.

    One flat tuple: in nested ones Triton 3.6 loses a stride of 1, which it makes a constant.
    """

    bias: Any
    bias_batch: Any
    bias_head: Any
    bias_row: Any
    bias_column: Any
    mask: Any
    mask_batch: Any
    mask_head: Any
    mask_row: Any
    mask_column: Any
    relative_bias: Any
    relative_bias_head: Any
    relative_bias_diagonal: Any

    def absent(self) -> bool:
        """Whether scores are products of queries and keys alone."""
        return self.bias is None and self.mask is None and self.relative_bias is None


def pair_terms(
    pairs: tuple[int, ...], bias: Tensor | None, mask: Tensor | None, relative_bias: Tensor | None
) -> PairTerms:
    """The kernel argument; pairs is [B, H, M, N]."""
    absent = (None,) * 5
    return PairTerms(
        *(absent if bias is None else strided(bias.expand(pairs))),
        *(absent if mask is None else strided(mask.expand(pairs))),
        *((None,) * 3 if relative_bias is None else (relative_bias, *relative_bias.stride())),
    )


@triton.jit
def load_bias_tile(bias, batch, head, first_query, first_key, num_queries):
    """[queries, keys] by a descriptor of [1 or B, 1 or H, M, N].

    Or of [H, diagonals of blocks * BLOCK, BLOCK], a tile for each diagonal: see expand_diagonals.
    """
    if len(bias.block_shape) == 3:
        last_query = (num_queries - 1) // bias.block_shape[1] * bias.block_shape[1]
        tile = bias.load([head.to(tl.int32), last_query - first_query + first_key, 0])
        return tile.reshape([bias.block_shape[1], bias.block_shape[2]])
    else:
        batch = tl.minimum(batch.to(tl.int32), bias.shape[0] - 1)
        head = tl.minimum(head.to(tl.int32), bias.shape[1] - 1)
        tile = bias.load([batch, head, first_query, first_key])
        return tile.reshape([bias.block_shape[2], bias.block_shape[3]])


@triton.jit
def add_pair_terms(score, terms, batch, head, queries, keys, num_queries, num_keys):
    """score + bias + relative_bias, -inf where the mask hides; with a bias the score is in nats."""
    inside = (queries < num_queries) & (keys < num_keys)
    if terms.bias is not None:
        start = terms.bias + batch * terms.bias_batch + head * terms.bias_head
        bias = load_pairs(start, terms.bias_row, terms.bias_column, queries, keys, inside)
        score += bias.to(tl.float32)
    if terms.relative_bias is not None:
        diagonals = (keys - queries + (num_queries - 1)).to(tl.int64)
        start = terms.relative_bias + head * terms.relative_bias_head
        pointers = start + diagonals * terms.relative_bias_diagonal
        score += tl.load(pointers, mask=inside, other=0.0)
    if terms.mask is not None:
        start = terms.mask + batch * terms.mask_batch + head * terms.mask_head
        seen = load_pairs(start, terms.mask_row, terms.mask_column, queries, keys, inside)
        score = tl.where(seen, score, float("-inf"))
    return score


@triton.jit
def expand_diagonals_kernel(
    relative_bias, expanded, num_queries, num_keys, num_heads, BLOCK: tl.constexpr
):
    """A program writes the tile of a diagonal of blocks; the last queries have the first one."""
    query_blocks, key_blocks = tl.cdiv(num_queries, BLOCK), tl.cdiv(num_keys, BLOCK)
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    number = tl.program_id(0) // num_heads
    rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    ahead = number - (query_blocks - 1)
    diagonals = ahead * BLOCK + columns - rows + (num_queries - 1)
    inside = (diagonals >= 0) & (diagonals < num_queries + num_keys - 1)
    start = relative_bias.pointer + head * relative_bias.head
    tile = tl.load(start + diagonals.to(tl.int64) * relative_bias.column, mask=inside, other=0.0)
    start = expanded + (head * (query_blocks + key_blocks - 1) + number) * (BLOCK * BLOCK)
    tl.store(start + rows * BLOCK + columns, tile)


def expand_diagonals(relative_bias: Tensor, num_queries: int, num_keys: int, block: int) -> Tensor:
    """relative_bias [H, M+N-1] as [H, diagonals of blocks * block, block].

    Tiles of scores on one diagonal of blocks have the same tile of it: linear in M + N, and fetched
    by the copy engine. Entry by entry it takes as long as all else.
    """
    heads = relative_bias.shape[0]
    diagonals = triton.cdiv(num_queries, block) + triton.cdiv(num_keys, block) - 1
    result = relative_bias.new_empty(heads, diagonals * block, block)
    launch(
        expand_diagonals_kernel, heads * diagonals, Launch(block, block, 4, 1),
        strided(relative_bias[None, :, None]), result, num_queries, num_keys, heads, BLOCK=block,
    )  # fmt: skip
    return result
