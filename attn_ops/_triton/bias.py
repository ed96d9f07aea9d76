"""What is added to products of queries and keys, and what is hidden pair by pair."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

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
