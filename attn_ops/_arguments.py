"""The arguments that all softmax-like ops share: checked, and folded into what kernels read.

Letters: B batch, H query heads, Hk key/value heads, M queries, N keys, D query/key width,
E value width, S packed sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_ops import masks
from attn_ops._checks import (
    FLOATING,
    MAX_WIDTH,
    check_bool,
    check_broadcastable,
    check_dense,
    check_device,
    check_floating,
    check_int,
    check_like_query,
    check_parameter,
    check_rank,
    check_shape,
    check_tensor,
    check_width,
    compute_dtype,
    fail,
    shape,
)

# Finite whatever sums are accumulated in.
_MAX_FLOAT32 = torch.finfo(torch.float32).max


@dataclass
class Folded:
    """What a private op receives."""

    query: Tensor  # [B, H, M, D]
    key: Tensor  # [B, Hk, N, D]
    value: Tensor  # [B, Hk, N, E]
    mask: Tensor | None  # [B, H, M, N], each size 1 or full
    bias: Tensor | None  # [B, H, M, N], each size 1 or full
    relative_bias: Tensor | None  # [H, M+N-1]
    sink: Tensor | None  # [H]
    start: Tensor | None  # [1, M]
    stop: Tensor | None  # [1, M]
    left: int
    right: int
    merged: bool  # batch and heads came as one dimension

    def unfold(self, tensor: Tensor) -> Tensor:
        """A result [B, H, M, ...] in the layout that the caller's query had."""
        return tensor.squeeze(1) if self.merged else tensor


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast an op runs in the autocast dtype; float64 is left alone."""
    device = tensors[0].device.type
    # Dynamo of torch 2.11 cannot trace the question whether a device knows autocast.
    known = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    if not (known and torch.is_autocast_enabled(device)):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


def fold(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    causal: bool = False,
    relative_bias: Tensor | None = None,
    window: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    sink: Tensor | None = None,
) -> Folded:
    """Checks the shared arguments of `op` and folds them."""
    query, key, value = autocast(query, key, value)
    merged = query.dim() == 3
    query, key, value = fold_tensors(op, query, key, value)
    batch, heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    full = (batch, heads, num_queries, num_keys)

    if window is not None and not causal:
        raise ValueError(f"{op}: window must come with causal=True, got causal=False")
    if window is not None and window < 1:
        raise fail(op, "window", "be at least 1", window)
    start, stop, left, right = None, None, *masks.band(causal, window)
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        offsets = _check_both_offsets(op, query, cu_seqlens_q, cu_seqlens_k)
        start, stop = masks.packed_intervals(num_queries, num_keys, causal, window, *offsets)
        left = right = masks.UNBOUNDED

    if relative_bias is not None:
        relative_bias = _fold_relative_bias(op, relative_bias, query, num_keys)
        if start is not None and num_queries != num_keys:
            expected = "have as many keys as queries beside relative_bias"
            raise fail(op, "cu_seqlens_k", expected, f"{num_queries} queries, {num_keys} keys")
    if sink is not None:
        check_parameter(op, "sink", sink, query)
        check_shape(op, "sink", sink, (heads,), "[H]")
        sink = sink.to(compute_dtype(query.dtype))
    return Folded(
        query,
        key,
        value,
        None if mask is None else _fold_mask(op, mask, query, full),
        None if bias is None else _fold_bias(op, bias, query, full, merged),
        relative_bias,
        sink,
        start,
        stop,
        left,
        right,
        merged,
    )


def check_types(
    op: str, query: object, key: object, value: object, causal: object = False, **options: object
) -> dict[str, Any]:
    """What an op's schema would refuse as a RuntimeError, or would read off a tensor.

    options: those of `fold`, and optional tensors of the op's own.

    Returns the options that differ from their defaults: an op converts every argument that it is
    given, which takes longer than to leave it out.
    """
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            check_tensor(op, name, tensor)
    given = {name: option for name, option in options.items() if option is not None}
    for name, option in given.items():
        if name == "window":
            check_int(op, name, option)
        else:
            check_tensor(op, name, option, optional=True)
    if causal is not False:
        check_bool(op, "causal", causal)
        given["causal"] = causal
    return given


def check_scale(op: str, scale: float, query: Tensor) -> None:
    """A finite number; to the compiler it may be a symbol, which has no value yet."""
    if not isinstance(scale, float) or -_MAX_FLOAT32 <= scale <= _MAX_FLOAT32:
        return
    if not math.isfinite(scale):
        raise fail(op, "scale", "be finite", scale)
    dtype = compute_dtype(query.dtype)
    if abs(scale) > torch.finfo(dtype).max:
        raise fail(op, "scale", f"be finite in {dtype}", scale)


def fold_tensors(
    op: str, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as rank 4, checked."""
    if not are_as_usual(query, key, value):
        query, key, value = fold_layout(op, query, key, value)
        check_sizes(op, query, key, value)
    return query, key, value


def are_as_usual(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """True only of tensors of rank 4 that pass all checks; other tensors may pass them too.

    One expression takes half of the time of the checks, which are worded.
    """
    if query.is_nested or key.is_nested or value.is_nested:
        return False
    sizes, kv_sizes, value_sizes = query.shape, key.shape, value.shape
    if not len(sizes) == len(kv_sizes) == len(value_sizes) == 4:
        return False
    batch, heads, _, width = sizes
    kv_batch, kv_heads, length, kv_width = kv_sizes
    value_batch, value_heads, value_length, value_width = value_sizes
    return (
        query.layout == key.layout == value.layout == torch.strided
        and query.dtype == key.dtype == value.dtype
        and query.dtype in FLOATING
        and query.device == key.device == value.device
        and 1 <= width <= MAX_WIDTH
        and kv_width == width
        and 1 <= value_width <= MAX_WIDTH
        and kv_batch == batch
        and value_batch == batch
        and value_heads == kv_heads
        and value_length == length
        and (kv_heads == heads or (kv_heads != 0 and heads % kv_heads == 0))
    )


def fold_layout(
    op: str, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Every layout as rank 4."""
    check_floating(op, "query", query)
    check_like_query(op, "key", key, query)
    check_like_query(op, "value", value, query)
    check_rank(op, "query", query, (3, 4), "[B, H, M, D] or [BH, M, D]")
    if query.dim() == 3:
        check_rank(op, "key", key, (3,), "[BH, N, D] beside a query of rank 3")
        check_rank(op, "value", value, (3,), "[BH, N, E] beside a query of rank 3")
        return query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
    check_rank(op, "key", key, (3, 4), "[B, Hk, N, D] or [B, N, D]")
    law = "[B, Hk, N, E]" if key.dim() == 4 else "[B, N, E]"
    check_rank(op, "value", value, (key.dim(),), f"{law} beside a key of rank {key.dim()}")
    if key.dim() == 3:
        return query, key.unsqueeze(1), value.unsqueeze(1)
    return query, key, value


def check_sizes(op: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    batch, heads, _, width = query.shape
    check_width(op, "query", "D", width)
    if key.shape[3] != width:
        raise fail(op, "key", f"have width D={width} like query", shape(key))
    check_width(op, "value", "E", value.shape[3])
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape[0] != batch:
            raise fail(op, name, f"have batch size B={batch} like query", shape(tensor))
    if value.shape[1:3] != key.shape[1:3]:
        expected = f"have [Hk, N]={tuple(key.shape[1:3])} like key"
        raise fail(op, "value", expected, shape(value))
    kv_heads = key.shape[1]
    if kv_heads != heads and (kv_heads == 0 or heads % kv_heads != 0):
        raise fail(op, "key", f"have a number of heads that divides H={heads}", shape(key))


def check_mask(op: str, mask: Tensor, query: Tensor, hint: str = "") -> None:
    """A bool tensor beside the query."""
    if mask.dtype != torch.bool:
        raise TypeError(f"{op}: mask must be bool (True = may attend), got {mask.dtype}{hint}")
    check_dense(op, "mask", mask)
    check_device(op, "mask", mask, query)


def _fold_mask(op: str, mask: Tensor, query: Tensor, full: tuple[int, ...]) -> Tensor:
    check_mask(op, mask, query, "; an additive mask is a bias" if mask.is_floating_point() else "")
    check_rank(op, "mask", mask, (2, 4), "[B, N] or broadcastable to [B, H, M, N]")
    if mask.dim() == 2:
        check_shape(op, "mask", mask, (full[0], full[3]), "[B, N]")
        return mask[:, None, None, :]
    check_broadcastable(op, "mask", mask, full, "[B, H, M, N]")
    return mask


def _fold_bias(op: str, bias: Tensor, query: Tensor, full: tuple[int, ...], merged: bool) -> Tensor:
    check_parameter(op, "bias", bias, query)
    law = "[BH, M, N]" if merged else "[H, M, N]"
    check_rank(op, "bias", bias, (3, 4), f"{law} or broadcastable to [B, H, M, N]")
    if bias.dim() == 3:
        sizes = (full[0] if merged else full[1], *full[2:])
        check_shape(op, "bias", bias, sizes, law)
        return bias.unsqueeze(1 if merged else 0)
    check_broadcastable(op, "bias", bias, full, "[B, H, M, N]")
    return bias


def _fold_relative_bias(op: str, relative_bias: Tensor, query: Tensor, num_keys: int) -> Tensor:
    check_parameter(op, "relative_bias", relative_bias, query)
    heads, num_queries = query.shape[1:3]
    law = "[H or 1, M+N-1]"
    check_rank(op, "relative_bias", relative_bias, (2,), law)
    length = num_queries + num_keys - 1 if num_queries or num_keys else 0
    if relative_bias.shape[0] not in (1, heads) or relative_bias.shape[1] != length:
        expected = f"have shape {law}={(heads, length)}"
        raise fail(op, "relative_bias", expected, shape(relative_bias))
    return relative_bias.to(compute_dtype(query.dtype)).expand(heads, -1)


def check_offsets(op: str, name: str, offsets: Tensor, query: Tensor) -> None:
    """Offsets [S+1] of sequences packed into a batch of one."""
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {name} must be int32 or int64, got {offsets.dtype}")
    check_dense(op, name, offsets)
    check_device(op, name, offsets, query)
    check_rank(op, name, offsets, (1,), "[S+1]")
    if offsets.shape[0] < 2:
        raise fail(op, name, "have at least 2 offsets, [0, length]", shape(offsets))


def check_packed(op: str, query: Tensor) -> None:
    """Sequences are packed into one batch."""
    if query.shape[0] != 1:
        expected = "be packed into batch size B=1 beside cu_seqlens"
        raise fail(op, "query", expected, shape(query))


def _check_both_offsets(
    op: str, query: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> tuple[Tensor, Tensor]:
    if cu_seqlens_q is None or cu_seqlens_k is None:
        missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
        raise ValueError(f"{op}: {missing} must be given beside the other cu_seqlens, got None")
    check_offsets(op, "cu_seqlens_q", cu_seqlens_q, query)
    check_offsets(op, "cu_seqlens_k", cu_seqlens_k, query)
    check_shape(op, "cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.shape, "[S+1] like cu_seqlens_q")
    check_packed(op, query)
    return cu_seqlens_q, cu_seqlens_k
