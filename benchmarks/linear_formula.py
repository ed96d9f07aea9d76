"""Linear attention in plain PyTorch, as a user would write it for speed.

C chunks of T tokens, F features, E width of values. States between chunks are in float32 (float64
for float64).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def divided(out: Tensor, denominator: Tensor, eps: float) -> Tensor:
    """`out / (denominator + eps)` in the dtype of out."""
    return (out / (denominator + eps)).to(out.dtype)


def whole(query: Tensor, key: Tensor, value: Tensor, eps: float | None) -> Tensor:
    """Every query sees every key: one state. `[B, H, N, F or E]`."""
    out = query @ (key.mT @ value)
    if eps is None:
        return out
    wide = wide_dtype(query)
    key_sum = key.sum(2, dtype=wide)[..., None]  # [B, H, F, 1]
    return divided(out, query.to(wide) @ key_sum, eps)


class Powers:
    """What a decay multiplies with, for B*H heads and chunks of T tokens; each None without one."""

    def __init__(
        self, decay: Tensor | None, batch: int, tokens: int, chunks: int, like: Tensor
    ) -> None:
        self.scores = self.query = self.key = self.start = self.after = None
        options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        self.chunks = torch.ones(1, chunks, chunks, **options).tril(-1)  # earlier chunks, one each
        if decay is None:
            return
        log = decay.to(like.dtype).log().repeat(batch)[:, None, None]  # [B*H, 1, 1]
        t, c = torch.arange(tokens, **options), torch.arange(chunks, **options)
        self.scores = torch.exp(log * (t[:, None] - t).clamp_min(0)).repeat_interleave(chunks, 0)
        self.query = torch.exp(log * (t[:, None] + 1)).repeat_interleave(chunks, 0)
        self.key = torch.exp(log * (tokens - 1 - t[:, None])).repeat_interleave(chunks, 0)
        between = (c[:, None] - 1 - c).clamp_min(0)
        self.chunks = self.chunks * torch.exp(log * tokens * between)
        self.start = torch.exp(log * tokens * c[:, None])  # [B*H, C, 1]
        self.after = torch.exp(log * tokens)


def carried(per_chunk: Tensor, start: Tensor, powers: Powers) -> tuple[Tensor, Tensor]:
    """Sums before each chunk and after the last: per_chunk `[BH, C, X]`, start `[BH, 1, X]`."""
    chunks = per_chunk.shape[1]
    if chunks == 1:
        before = start
    elif powers.start is None and per_chunk.is_cuda:  # on CPUs the product is the faster one
        before = start + F.pad(per_chunk.cumsum(1)[:, :-1], (0, 0, 1, 0))
    else:
        if powers.start is not None:
            start = start * powers.start
        before = torch.baddbmm(start, powers.chunks.expand(len(per_chunk), -1, -1), per_chunk)
    last = before[:, -1:]
    return before, (last if powers.after is None else last * powers.after) + per_chunk[:, -1:]


def scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    """`x * factor` in the dtype of x."""
    return x if factor is None else x * factor.to(x.dtype)


def padded(length: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """`[B, H, N, X]` as `[BH, a multiple of length, X]`, zeros at the end."""
    flat = (x.flatten(0, 1) for x in tensors)
    extra = -tensors[0].shape[2] % length
    return tuple(F.pad(x, (0, 0, 0, extra)) if extra else x for x in flat)


def wide_dtype(x: Tensor) -> torch.dtype:
    """That of states."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def chunked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor | None,
    eps: float | None,
    chunk: int,
    segment: int | None,
) -> Tensor:
    """Causal, `[B, H, N, F or E]`: all chunks at once, or `segment` tokens at a time."""
    batch, heads, length, features = query.shape
    chunk = min(chunk, length)
    segment = -(-min(segment or length, length) // chunk) * chunk
    query, key, value = padded(segment, query, key, value)
    wide, chunks, width = wide_dtype(query), segment // chunk, value.shape[-1]
    state = query.new_zeros(len(query), 1, features * width, dtype=wide)
    key_sum = query.new_zeros(len(query), 1, features, dtype=wide)
    powers = Powers(decay, batch, chunk, chunks, state)
    parts = []
    for tensors in zip(*(x.split(segment, 1) for x in (query, key, value)), strict=True):
        q, k, v = (x.reshape(-1, chunk, x.shape[-1]) for x in tensors)  # [BHC, T, F or E]
        scores = scaled(torch.bmm(q, k.mT).tril(), powers.scores)
        q, k = scaled(q, powers.query), scaled(k, powers.key)
        states = torch.bmm(k.mT, v).view(-1, chunks, features * width).to(wide)
        before, state = carried(states, state, powers)
        before = before.reshape(-1, features, width).to(q.dtype)
        out = torch.baddbmm(torch.bmm(scores, v), q, before)
        if eps is not None:
            sums = k.sum(1, dtype=wide).view(-1, chunks, features)
            before, key_sum = carried(sums, key_sum, powers)
            seen = scores.sum(-1, keepdim=True, dtype=wide)
            seen = seen + torch.bmm(q, before.reshape(-1, features, 1).to(q.dtype))
            out = divided(out, seen, eps)
        parts.append(out.view(-1, segment, width))
    joined = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return joined[:, :length].unflatten(0, (batch, heads))


def march(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor | None,
    eps: float | None,
    chunk: int,
) -> Tensor:
    """The same, a chunk at a time: in inference in place, which saves a third of the time."""
    if torch.is_grad_enabled():
        return chunked(query, key, value, decay, eps, chunk, chunk)
    batch, heads, length, features = query.shape
    query, key, value = padded(chunk, query, key, value)
    out, wide = torch.empty_like(value), wide_dtype(query)
    state = query.new_zeros(len(query), features, value.shape[-1], dtype=wide)
    key_sum = query.new_zeros(len(query), features, 1, dtype=wide)
    powers = Powers(decay, batch, chunk, 1, state)
    for tensors in zip(*(x.split(chunk, 1) for x in (query, key, value, out)), strict=True):
        q, k, v, part = tensors
        scores = scaled(torch.bmm(q, k.mT).tril_(), powers.scores)
        q, k = scaled(q, powers.query), scaled(k, powers.key)
        result = torch.bmm(scores, v).baddbmm_(q, state.to(q.dtype))
        if eps is not None:
            seen = torch.bmm(q, key_sum.to(q.dtype)) + scores.sum(-1, keepdim=True, dtype=wide)
            result = divided(result, seen, eps)
        part.copy_(result)
        if powers.after is not None:
            state, key_sum = state.mul_(powers.after), key_sum.mul_(powers.after)
        key_sum.add_(k.sum(1, dtype=wide)[..., None])
        state.baddbmm_(k.mT, v) if k.dtype == wide else state.add_(torch.bmm(k.mT, v))
    return out[:, :length].unflatten(0, (batch, heads))
