"""Cosine-similarity attention: the public function."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from attn_ops._arguments import check_types
from attn_ops._checks import (
    check_bool,
    check_device,
    check_floating,
    check_int,
    check_number,
    check_rank,
    check_shape,
)
from attn_ops._plain import is_plain
from attn_ops.cosine_sim import ops


@overload
def cosine_sim_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = ...,
    bias: Tensor | None = ...,
    *,
    causal: bool = ...,
    scale: float | Tensor | None = ...,
    normalize: bool = ...,
    groups: int = ...,
    relative_bias: Tensor | None = ...,
    window: int | None = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    sink: Tensor | None = ...,
    head_scale: Tensor | None = ...,
    query_gain: Tensor | None = ...,
    key_gain: Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def cosine_sim_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = ...,
    bias: Tensor | None = ...,
    *,
    causal: bool = ...,
    scale: float | Tensor | None = ...,
    normalize: bool = ...,
    groups: int = ...,
    relative_bias: Tensor | None = ...,
    window: int | None = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    sink: Tensor | None = ...,
    head_scale: Tensor | None = ...,
    query_gain: Tensor | None = ...,
    key_gain: Tensor | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def cosine_sim_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | Tensor | None = None,
    normalize: bool = True,
    groups: int = 1,
    relative_bias: Tensor | None = None,
    window: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    sink: Tensor | None = None,
    head_scale: Tensor | None = None,
    query_gain: Tensor | None = None,
    key_gain: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention over cosine similarities.

    .. math::
        \hat q = q / \max(|q|, 10^{-12}), \quad \hat k = k / \max(|k|, 10^{-12})

        \mathrm{score}_{mn} = \mathrm{scale}\; \hat q_m \cdot \hat k_n + \mathrm{bias}_{mn}, \qquad
        \mathrm{out} = \mathrm{softmax}(\mathrm{score})\, v

    Scores and `lse` are in nats; `scale`, `bias` and `sink` are in the same unit. A query that
    sees no key gives zeros, its `lse` is -inf (or its sink), and every gradient through it is zero.

    Letters: B batch, H query heads, Hk key/value heads, M queries, N keys, D query/key width,
    E value width, S packed sequences. D and E are 1 to 256. Any strides; float64, float32,
    bfloat16, float16; sums are accumulated in float32 (float64 for float64).

    Args:
        query: [B, H, M, D]. Or [BH, M, D] with key and value of rank 3: batch and heads merged,
            which is a batch of BH with one head.
        key: [B, Hk, N, D], H a multiple of Hk: query head h reads head h // (H/Hk). Or [B, N, D],
            one head for all query heads.
        value: [B, Hk, N, E] or [B, N, E] like key.
        mask: bool, True = may attend. [B, N] hides keys; or broadcastable to [B, H, M, N].
        bias: added to the score, -inf hides a key. [H, M, N] ([BH, M, N] for merged heads) or
            broadcastable to [B, H, M, N]. Its gradient is summed over what was broadcast.
        causal: query m sees key n only if `n <= m + (N - M)` (aligned at the bottom right).
        scale: a finite float, 8.0 by default; or a tensor [H] (or of one element), learnable: the
            same as `head_scale`.
        normalize: False takes query and key as they are (see `attn_ops.l2_normalize`).
        groups: each of so many equal slices of D becomes a unit vector, |q̂·k̂| <= groups.
        relative_bias: [H or 1, M+N-1], `score[m, n] += relative_bias[h, n - m + M - 1]`.
        window: with causal, query m sees key n only if `n > m + (N - M) - window`.
        cu_seqlens_q: [S+1] int32 or int64 offsets: S sequences packed into B = 1. A query sees its
            own sequence only, and causal aligns per sequence. Tokens after the last offset see
            nothing.
        cu_seqlens_k: [S+1], the same for the keys. With relative_bias the offsets must be equal.
        sink: [H] logits: one extra key with that score and no value, counted in lse.
        head_scale: [H], learnable, multiplied with `scale`.
        query_gain: [D] or [H, D], learnable factors after the norm.
        key_gain: [D] or [Hk, D], likewise. RMSNorm with `weight` is the gain `sqrt(D) * weight`.
        return_lse: also return the logarithm of each row's sum of exp(score).

    Bias, relative_bias, sink, head_scale and gains may be float32 beside 16-bit inputs.

    Returns:
        out [B, H, M, E] (or [BH, M, E]) in query's dtype; with return_lse also lse [B, H, M],
        float32 (float64 for float64).

    Raises:
        ValueError: a shape, a device or a value that the above does not allow.
        TypeError: a dtype that the above does not allow.
        NotImplementedError: nested and sparse tensors.

    Source: Henry et al., Query-Key Normalization for Transformers, 2020; Liu et al., Swin
    Transformer V2, 2022 (learned temperature per head).
    """
    if (
        mask is bias is relative_bias is window is cu_seqlens_q is cu_seqlens_k is sink is None
        and head_scale is query_gain is key_gain is None
        and type(causal) is bool
        and normalize is True
        and type(groups) is int
        and (scale is None or type(scale) is float)
        and is_plain(query, key, value)
    ):
        out, lse = ops.plain(query, key, value, causal, 8.0 if scale is None else scale, groups)
        return (out, lse) if return_lse else out
    op = "cosine_sim_attention"
    options = check_types(
        op,
        query,
        key,
        value,
        causal,
        mask=mask,
        bias=bias,
        relative_bias=relative_bias,
        window=window,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        sink=sink,
        head_scale=head_scale,
        query_gain=query_gain,
        key_gain=key_gain,
    )
    check_bool(op, "normalize", normalize)
    check_int(op, "groups", groups)
    if not normalize:
        options["normalize"] = False
    if groups != 1:
        options["groups"] = groups
    # The compiler would read a default of 8.0 off this function as a symbolic float, and trace
    # again when the op makes it a number; the op's own default is a number from the start.
    if isinstance(scale, Tensor):
        options |= {"head_scale": _per_head(op, scale, head_scale, query), "scale": 1.0}
    elif scale is not None:
        check_number(op, "scale", scale)
        options["scale"] = scale
    if return_lse:
        return ops.cosine_sim_with_lse(query, key, value, **options)
    return ops.cosine_sim(query, key, value, **options)


def _per_head(op: str, scale: Tensor, head_scale: Tensor | None, query: Tensor) -> Tensor:
    """A scale that is a tensor, as head_scale."""
    check_rank(op, "query", query, (3, 4), "[B, H, M, D] or [BH, M, D]")
    heads = query.shape[1] if query.dim() == 4 else 1
    check_floating(op, "scale", scale)
    check_device(op, "scale", scale, query)
    if scale.numel() == 1:
        scale = scale.reshape(1).expand(heads)
    check_shape(op, "scale", scale, (heads,), "[H]")
    if head_scale is None:
        return scale
    check_device(op, "head_scale", head_scale, query)
    check_shape(op, "head_scale", head_scale, (heads,), "[H]")
    return scale * head_scale
