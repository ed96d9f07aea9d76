"""What is added to products of queries and keys, and what is hidden pair by pair."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attn_ops._triton.tiles import load_pairs


class PairTerms(NamedTuple):
    """`Strided` tensors that broadcast to [B, H, M, N], or None where there is none.

    relative_bias [1, H, 1, M+N-1] holds one number per diagonal.
    """

    bias: Any
    relative_bias: Any
    mask: Any


@triton.jit
def load_diagonals(view, head, queries, keys, num_queries, num_keys):
    """relative_bias at the pairs that `queries` and `keys` span."""
    diagonals = (keys - queries + (num_queries - 1)).to(tl.int64)
    inside = (queries < num_queries) & (keys < num_keys)
    pointers = view.pointer + head * view.head + diagonals * view.column
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def add_pair_terms(score, terms, batch, head, queries, keys, num_queries, num_keys):
    """score + bias + relative_bias, -inf where the mask hides; with a bias the score is in nats."""
    if terms.bias is not None:
        bias = load_pairs(terms.bias, batch, head, queries, keys, num_queries, num_keys)
        score += bias.to(tl.float32)
    if terms.relative_bias is not None:
        score += load_diagonals(terms.relative_bias, head, queries, keys, num_queries, num_keys)
    if terms.mask is not None:
        seen = load_pairs(terms.mask, batch, head, queries, keys, num_queries, num_keys)
        score = tl.where(seen, score, float("-inf"))
    return score
