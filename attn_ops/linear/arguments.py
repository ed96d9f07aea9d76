"""The arguments of the public linear ops: checked, and folded into what the private ops read."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attn_ops._arguments import (
    autocast,
    check_mask,
    check_offsets,
    check_packed,
    fold_tensors,
)
from attn_ops._checks import (
    check_device,
    check_floating,
    check_parameter,
    check_shape,
    compute_dtype,
    fail,
    shape,
)
from attn_ops.feature_maps import FEATURE_MAPS, num_features


def fold_inputs(
    op: str, query: Tensor, key: Tensor, value: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of rank 4, in the autocast dtype."""
    query, key, value = fold_tensors(op, *autocast(query, key, value))
    check_causal(op, query, key, causal)
    return query, key, value


def check_causal(op: str, query: Tensor, key: Tensor, causal: bool) -> None:
    """Causal attention is among one sequence's tokens."""
    if causal and query.shape[2] != key.shape[2]:
        raise fail(op, "key", "have as many tokens as query in causal attention", shape(key))


def fold_mask(op: str, mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """[B, N] as [B, 1, 1, N]."""
    if mask is None:
        return None
    check_mask(op, mask, query)
    check_shape(op, "mask", mask, (key.shape[0], key.shape[2]), "[B, N]")
    return mask[:, None, None, :]


def fold_decay(op: str, decay: Tensor | None, query: Tensor) -> Tensor | None:
    """[H] in the dtype of sums. Its values are on the device and not looked at."""
    if decay is None:
        return None
    check_parameter(op, "decay", decay, query)
    check_shape(op, "decay", decay, (query.shape[1],), "[H]")
    return decay.to(compute_dtype(query.dtype))


def fold_eps(op: str, eps: float, normalize: bool) -> float | None:
    """None where nothing is divided."""
    if isinstance(eps, float) and not (math.isfinite(eps) and eps >= 0):
        raise fail(op, "eps", "be finite and at least 0", eps)
    return eps if normalize else None


def check_feature_map(op: str, feature_map: str) -> str:
    """The name, if there is such a map."""
    if feature_map not in FEATURE_MAPS:
        raise fail(op, "feature_map", f"be one of {', '.join(FEATURE_MAPS)}", repr(feature_map))
    return feature_map


def fold_state(
    op: str,
    state: Tensor | None,
    key_sum: Tensor | None,
    query: Tensor,
    value: Tensor,
    feature_map: str,
    merged: bool,
) -> tuple[Tensor, Tensor]:
    """state [B, H, F, E] and key_sum [B, H, F], zeros where there is none yet."""
    batch, heads, _, width = query.shape
    dtype = compute_dtype(query.dtype)
    features = num_features(feature_map, width)
    sizes = {"state": (features, value.shape[3]), "key_sum": (features,)}
    laws = {"state": "F, E]", "key_sum": "F]"}
    folded = []
    for name, tensor in (("state", state), ("key_sum", key_sum)):
        full = (batch, heads, *sizes[name])
        if tensor is None:
            folded.append(query.new_zeros(full, dtype=dtype))
            continue
        check_floating(op, name, tensor)
        check_device(op, name, tensor, query)
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: {name} must be {dtype} beside this query, got {tensor.dtype}")
        if merged:
            check_shape(op, name, tensor, (batch, *sizes[name]), f"[BH, {laws[name]}")
            tensor = tensor.unsqueeze(1)
        check_shape(op, name, tensor, full, f"[B, H, {laws[name]}")
        folded.append(tensor)
    return folded[0], folded[1]


def fold_offsets(op: str, cu_seqlens: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """Offsets [S+1] int32 from 0 on that no kernel need distrust."""
    if cu_seqlens is None:
        return None
    check_offsets(op, "cu_seqlens", cu_seqlens, query)
    check_packed(op, query)
    if query.shape[2] != key.shape[2]:
        raise fail(op, "key", "have as many tokens as query beside cu_seqlens", shape(key))
    first = torch.zeros_like(cu_seqlens[:1])
    return torch.cat([first, cu_seqlens[1:]]).clamp(0, key.shape[2]).to(torch.int32)
