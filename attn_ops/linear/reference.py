"""Linear attention as a plain PyTorch formula: the specification, for every dtype and device.

Every kernel is compared with `forward` in float64, and with the gradients that PyTorch derives from
it. It holds [M, N] scores; `in_blocks.py` bounds that.

Letters: B batch, H query heads, Hk key/value heads, M queries, N keys, D query/key width,
F features, E value width, S packed sequences. Arguments are those of the private ops (see ops.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from attn_ops import masks
from attn_ops._heads import per_query_head
from attn_ops.feature_maps import FEATURE_MAPS


def power(decay: Tensor, exponent: Tensor) -> Tensor:
    """decay ** exponent, [H, *exponent]."""
    return decay.reshape(-1, *[1] * exponent.dim()) ** exponent.to(decay.dtype)


def seen(m: Tensor, n: Tensor, offsets: Tensor | None, causal: bool) -> Tensor:
    """bool [M, N]: which of the keys at positions n count for the queries at positions m."""
    if offsets is None:
        return n <= m[:, None] if causal else (n >= 0).expand(m.shape[0], -1)
    start, stop = masks.packed_intervals(len(n), len(n), causal, None, offsets, offsets)
    return (n >= start[0, m, None]) & (n < stop[0, m, None])


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    decay: Tensor | None,
    state: Tensor | None,
    key_sum: Tensor | None,
    offsets: Tensor | None,
    causal: bool,
    eps: float | None,
    feature_map: str,
    first: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out [B, H, M, E], its denominator [B, H, M], and the state and key_sum after the last key.

    first: the position of the first query; it may differ from 0 where there is no state.
    """
    heads, num_queries, num_keys = query.shape[1], query.shape[2], key.shape[2]
    features = FEATURE_MAPS[feature_map]
    phi_query, phi_key = features(query), per_query_head(features(key), heads)
    if mask is not None:
        phi_key = phi_key * mask.mT
    value = per_query_head(value, heads)
    decay = query.new_ones(heads) if decay is None else decay

    m = torch.arange(first, first + num_queries, device=query.device)
    n = torch.arange(num_keys, device=query.device)
    age = (m[:, None] - n).clamp_min(0)  # where it is negative nothing is seen
    weight = seen(m, n, offsets, causal) * power(decay, age)
    score = phi_query @ phi_key.mT * weight
    out, denominator = score @ value, score.sum(-1)

    final_state = final_key_sum = query.new_empty(0)
    if state is not None and key_sum is not None:
        seen_before = phi_query * power(decay, m + 1).unsqueeze(-1)
        out = out + seen_before @ state
        denominator = denominator + (seen_before @ key_sum.unsqueeze(-1)).squeeze(-1)
        still_seen = phi_key * power(decay, num_keys - 1 - n).unsqueeze(-1)
        left = power(decay, n.new_full((), num_keys))[:, None]
        final_key_sum = left * key_sum + still_seen.sum(2)
        final_state = left.unsqueeze(-1) * state + still_seen.mT @ value
    if eps is None:
        return out, query.new_empty(0), final_state, final_key_sum
    denominator = denominator + eps
    # Products of any sign can cancel out exactly: then there is no average.
    empty = (denominator == 0).unsqueeze(-1)
    out = torch.where(empty, 0, out / torch.where(empty, 1, denominator.unsqueeze(-1)))
    return out, denominator, final_state, final_key_sum
