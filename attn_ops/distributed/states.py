"""States of linear attention that travel between ranks: a chunk of tokens as [..., F, E+1].

The last column is the sum of the keys' features, which normalises, beside that of their products
with values. In the dtype of sums.

Letters: H query heads, C tokens of a chunk, D query/key width, E value width, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attn_ops import linear_attention_with_state


def state_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    decay: Tensor | None,
    feature_map: str,
) -> Tensor:
    """What these keys leave behind. Of query only the number of heads matters."""
    queries = query.new_zeros(()).expand(*query.shape[:-2], *key.shape[-2:])
    _, state, key_sum = linear_attention_with_state(
        queries, key, value, mask=mask, normalize=False, decay=decay, feature_map=feature_map
    )
    return torch.cat([state, key_sum.unsqueeze(-1)], -1)


def state_before(
    earlier: Sequence[Tensor], own: Tensor, length: int, decay: Tensor | None
) -> Tensor:
    """The state that earlier chunks, `length` tokens each, leave to the one that left `own`."""
    # Zeros, but zeros that depend on what was gathered: also the first rank goes backward through
    # the collective.
    before = own.unsqueeze(0)[:0].sum(0)
    factor = None if decay is None else decay.to(own.dtype)[:, None, None] ** length
    for state in earlier:
        before = state + (before if factor is None else factor * before)
    return before


def attend_after(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, before: Tensor, **options: Any
) -> Tensor:
    """Causal attention after the tokens whose state this is."""
    state, key_sum = before[..., :-1], before[..., -1]
    out, *_ = linear_attention_with_state(query, key, value, state, key_sum, mask=mask, **options)
    return out


def attend_to(query: Tensor, value: Tensor, state: Tensor, **options: Any) -> Tensor:
    """Attention to the tokens whose state this is, and to no other."""
    zero = query.new_zeros(())
    values = zero.expand(*query.shape[:-1], value.shape[-1])
    hidden = query.new_zeros((query.shape[0], query.shape[-2]), dtype=torch.bool)
    return attend_after(query, zero.expand(query.shape), values, hidden, state, **options)
