"""Query heads and the key/value heads that groups of them share: query head h reads h // (H/Hk)."""

from __future__ import annotations

from torch import Tensor


def per_query_head(x: Tensor, heads: int) -> Tensor:
    """[B, Hk, N, D] -> [B, H, N, D]."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def per_kv_head(x: Tensor, kv_heads: int) -> Tensor:
    """The adjoint of `per_query_head`: sums over the query heads of a group."""
    return x if x.shape[1] == kv_heads else x.unflatten(1, (kv_heads, -1)).sum(2)
