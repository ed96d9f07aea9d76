"""One token of decoding: state and key_sum decay, take the token in, and are read by the query.

A program owns the state of one head, so nothing that another one reads is overwritten.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_ops import _ahead
from attn_ops._triton.launch import Launch, launch
from attn_ops._triton.tiles import strided
from attn_ops.feature_maps import num_features
from attn_ops.linear import in_blocks
from attn_ops.linear.triton_features import (
    elementwise,
    taylor_pairs,
    taylor_weights,
)


@triton.jit
def token_features(
    view, batch, head, FEATURES: tl.constexpr, D: tl.constexpr, PF: tl.constexpr
):  # fmt: skip
    """phi [PF] of one token, float32, zero beyond F."""
    pointer = view.pointer + batch * view.batch + head * view.head
    f = tl.arange(0, PF)
    if FEATURES == "taylor":
        first, second = taylor_pairs(0, D, PF)
        inside = first >= 0
        left = tl.load(pointer + first * view.column, mask=inside & (first < D), other=1.0)
        right = tl.load(pointer + second * view.column, mask=inside & (second < D), other=1.0)
        phi = left.to(tl.float32) * right.to(tl.float32) * taylor_weights(0, D, PF)
        return tl.where(inside, phi, 0.0)
    else:
        x = tl.load(pointer + f * view.column, mask=f < D, other=0.0).to(tl.float32)
        if FEATURES != "identity":
            x = tl.where(f < D, elementwise(x, FEATURES), 0.0)
        return x


@triton.jit
def step_kernel(
    q, k, v, state, key_sum, sum_batch, sum_head, sum_column, decay, out, heads, group, eps,
    FEATURES: tl.constexpr, D: tl.constexpr, E: tl.constexpr, F: tl.constexpr, PF: tl.constexpr,
    PE: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """state [F, E] and key_sum [F] in place, out [E]."""
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, row % heads
    phi_q = token_features(q, batch, head, FEATURES, D, PF)
    phi_k = token_features(k, batch, head // group, FEATURES, D, PF)
    f = tl.arange(0, PF)
    left = 1.0
    if decay is not None:
        left = tl.load(decay + head)
    sums = key_sum + batch * sum_batch + head * sum_head + f.to(tl.int64) * sum_column
    total = tl.load(sums, mask=f < F, other=0.0) * left + phi_k
    tl.store(sums, total, mask=f < F)
    factor = 1.0
    if NORMALIZE:
        denominator = tl.sum(phi_q * total, 0) + eps
        factor = tl.where(denominator == 0.0, 0.0, 1.0 / denominator)
    for first in range(0, E, PE):
        e = first + tl.arange(0, PE)
        value = v.pointer + batch * v.batch + head // group * v.head + e * v.column
        value = tl.load(value, mask=e < E, other=0.0).to(tl.float32)
        pointers = state.pointer + batch * state.batch + head * state.head
        pointers += f.to(tl.int64)[:, None] * state.row + e.to(tl.int64)[None, :] * state.column
        inside = (f < F)[:, None] & (e < E)[None, :]
        updated = tl.load(pointers, mask=inside, other=0.0) * left
        updated += phi_k[:, None] * value[None, :]
        tl.store(pointers, updated, mask=inside)
        result = tl.sum(updated * phi_q[:, None], 0) * factor
        tl.store(out + row * E + e, result.to(out.dtype.element_ty), mask=e < E)


def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor,
    key_sum: Tensor,
    decay: Tensor | None,
    eps: float | None,
    feature_map: str,
) -> Tensor:
    """`attn::_linear_step`."""
    batch, heads, _, width = query.shape
    features, columns = num_features(feature_map, width), value.shape[3]
    if features > 512:
        _ahead.leave()
        return in_blocks.step(query, key, value, state, key_sum, decay, eps, feature_map)
    out = query.new_empty(batch, heads, 1, columns)
    padded = max(16, triton.next_power_of_2(features))
    block = min(max(16, triton.next_power_of_2(columns)), max(16, 8192 // padded))
    with torch.cuda.device_of(query):
        launch(
            step_kernel, batch * heads, Launch(padded, block, 4, 3),
            strided(query), strided(key), strided(value), strided(state), key_sum,
            *key_sum.stride(), None if decay is None else decay.contiguous(), out, heads,
            heads // key.shape[1], 0.0 if eps is None else eps, FEATURES=feature_map, D=width,
            E=columns, F=features, PF=padded, PE=block, NORMALIZE=eps is not None,
            writes=(state, key_sum, out),
        )  # fmt: skip
    return out
