"""Which keys a query may see, folded into what kernels read.

`causal`, `window` and packed sequences all give each query one interval of keys, and intersections
of intervals are intervals. A kernel reads them as
  - a band: query m, at position p = m + (N - M), sees key n only if `p - left <= n <= p + right`;
  - for packed sequences `start, stop` [1, M]: it sees n only if `start[m] <= n < stop[m]`. Both
    never decrease along m, so a block's interval is read off its first and last row;
  - a bool mask [B, H, M, N], each size 1 or full, for everything that is not an interval.

Letters: B batch, H heads, M queries, N keys, S sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNBOUNDED = 1 << 40


def band(causal: bool, window: int | None) -> tuple[int, int]:
    """(left, right) of the band that `causal` and `window` describe."""
    left = UNBOUNDED if window is None else window - 1
    return left, 0 if causal else UNBOUNDED


def band_hides_nothing(num_queries: int, num_keys: int, left: int, right: int) -> bool:
    """Whether every query sees every key; False where that would ask about a symbolic size."""
    if any(type(size) is not int for size in (num_queries, num_keys, left, right)):
        return False
    return left >= num_keys - 1 and right >= num_queries - 1


def packed_intervals(
    num_queries: int,
    num_keys: int,
    causal: bool,
    window: int | None,
    cu_seqlens_q: Tensor,  # [S+1]
    cu_seqlens_k: Tensor,  # [S+1]
) -> tuple[Tensor, Tensor]:
    """start, stop [1, M] int32: the keys of a query's own sequence, causal and window included.

    Tokens after the last offset see nothing. Nothing is read on the host.
    """
    # A last, empty sequence holds the tokens after the last offset.
    offsets_q = torch.cat([cu_seqlens_q, cu_seqlens_q[-1:]]).to(torch.int32)
    offsets_k = torch.cat([cu_seqlens_k, cu_seqlens_k[-1:]]).to(torch.int32).clamp(0, num_keys)
    position = torch.arange(num_queries, device=offsets_q.device, dtype=torch.int32)
    last = offsets_q.shape[0] - 2
    sequence = torch.searchsorted(offsets_q[:-1], position, right=True).sub(1).clamp(0, last)
    first_key, past_key = offsets_k[sequence], offsets_k[sequence + 1]
    start, stop = first_key, past_key
    if causal:
        past_seen = position + 1 + past_key - offsets_q[sequence + 1]
        stop = torch.minimum(torch.maximum(past_seen, first_key), past_key)
        if window is not None:
            # The widest window of 32 bits: no sequence is longer.
            first_seen = past_seen - torch.sym_min(window, 1 << 30)
            start = torch.minimum(torch.maximum(first_seen, first_key), past_key)
    return start.unsqueeze(0), stop.unsqueeze(0)


def visible(
    num_queries: int,
    num_keys: int,
    mask: Tensor | None,
    start: Tensor | None,
    stop: Tensor | None,
    left: int,
    right: int,
    device: torch.device,
) -> Tensor:
    """The same as one bool tensor that broadcasts to [B, H, M, N]: what the references read."""
    key = torch.arange(num_keys, device=device)
    position = torch.arange(num_queries, device=device).unsqueeze(1) + (num_keys - num_queries)
    seen = ((key >= position - left) & (key <= position + right))[None, None]
    if start is not None and stop is not None:
        seen = seen & ((key >= start.unsqueeze(-1)) & (key < stop.unsqueeze(-1))).unsqueeze(1)
    return seen if mask is None else seen & mask
