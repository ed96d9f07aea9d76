"""L1 attention: the public functions."""

from __future__ import annotations

from typing import Any, Literal, overload

from torch import Tensor

from attn_ops._arguments import check_types
from attn_ops._checks import check_number, check_tensor, check_text
from attn_ops._plain import is_plain
from attn_ops.l1 import ops


@overload
def l1_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = ...,
    bias: Tensor | None = ...,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    score: str = ...,
    eps: float | None = ...,
    relative_bias: Tensor | None = ...,
    window: int | None = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    sink: Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def l1_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = ...,
    bias: Tensor | None = ...,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    score: str = ...,
    eps: float | None = ...,
    relative_bias: Tensor | None = ...,
    window: int | None = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    sink: Tensor | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def l1_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    score: str = "negative",
    eps: float | None = None,
    relative_bias: Tensor | None = None,
    window: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    sink: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention over L1 distances: equal tokens attract, whatever their length.

    .. math::
        \mathrm{dist}_{mn} = \mathrm{scale} \sum_d |q_{md} - k_{nd}|

        \mathrm{score}_{mn} = -\mathrm{dist}_{mn} + \mathrm{bias}_{mn}
        \quad\text{or}\quad \frac{1}{\mathrm{eps} + \mathrm{dist}_{mn}} + \mathrm{bias}_{mn},
        \qquad \mathrm{out} = \mathrm{softmax}(\mathrm{score})\, v

    Scores and `lse` are in nats, `scale` in nats per unit of distance; `bias` and `sink` are in
    nats. Where q = k the derivative of the distance is zero. A query that sees no key gives zeros,
    its `lse` is -inf (or its sink), and every gradient through it is zero.

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
        scale: a finite float, 1/sqrt(D) by default; at least 0 with score="inverse".
        score: "negative" for -dist, "inverse" for 1 / (eps + dist).
        eps: of the inverse score, 0.001 by default; above 0. The largest score is 1/eps.
        relative_bias: [H or 1, M+N-1], `score[m, n] += relative_bias[h, n - m + M - 1]`.
        window: with causal, query m sees key n only if `n > m + (N - M) - window`.
        cu_seqlens_q: [S+1] int32 or int64 offsets: S sequences packed into B = 1. A query sees its
            own sequence only, and causal aligns per sequence. Tokens after the last offset see
            nothing.
        cu_seqlens_k: [S+1], the same for the keys. With relative_bias the offsets must be equal.
        sink: [H] logits: one extra key with that score and no value, counted in lse.
        return_lse: also return the logarithm of each row's sum of exp(score).

    Bias, relative_bias and sink may be float32 beside 16-bit inputs.

    Returns:
        out [B, H, M, E] (or [BH, M, E]) in query's dtype; with return_lse also lse [B, H, M],
        float32 (float64 for float64).

    Raises:
        ValueError: a shape, a device or a value that the above does not allow.
        TypeError: a dtype that the above does not allow.
        NotImplementedError: nested and sparse tensors.

    Source: the Laplace attention of Kim et al., Attentive Neural Processes, 2019.
    """
    if (
        mask is bias is relative_bias is window is cu_seqlens_q is cu_seqlens_k is sink is None
        and type(causal) is bool
        and (scale is None or type(scale) is float)
        and type(score) is str
        and score == "negative"
        and eps is None
        and is_plain(query, key, value)
    ):
        out, lse = ops.plain(query, key, value, causal, scale)
        return (out, lse) if return_lse else out
    op = "l1_attention"
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
    )
    options |= _score_options(op, scale, score, eps)
    if return_lse:
        return ops.l1_with_lse(query, key, value, **options)
    return ops.l1(query, key, value, **options)


def l1_scores(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    score: str = "negative",
    eps: float | None = None,
) -> Tensor:
    r"""The scores of `l1_attention` alone, before any bias and mask.

    .. math::
        \mathrm{dist}_{mn} = \mathrm{scale} \sum_d |q_{md} - k_{nd}|, \qquad
        \mathrm{score}_{mn} = -\mathrm{dist}_{mn}
        \quad\text{or}\quad \frac{1}{\mathrm{eps} + \mathrm{dist}_{mn}}

    Where q = k the derivative of the distance is zero.

    Args:
        query: [B, H, M, D], or [BH, M, D] with a key of rank 3.
        key: [B, Hk, N, D], H a multiple of Hk: query head h reads head h // (H/Hk). Or [B, N, D].
        scale, score, eps: as in `l1_attention`; 1/eps must be a number of query's dtype.

    Returns:
        [B, H, M, N] (or [BH, M, N]) in query's dtype, in nats.

    Raises:
        ValueError, TypeError, NotImplementedError: as `l1_attention`.
    """
    op = "l1_scores"
    check_tensor(op, "query", query)
    check_tensor(op, "key", key)
    return ops.l1_scores(query, key, **_score_options(op, scale, score, eps))


def _score_options(op: str, scale: float | None, score: str, eps: float | None) -> dict[str, Any]:
    """What differs from the defaults of the op, whose numbers the compiler takes for numbers."""
    check_text(op, "score", score)
    options: dict[str, Any] = {} if score == "negative" else {"score": score}
    if scale is not None:
        check_number(op, "scale", scale)
        options["scale"] = scale
    if eps is not None:
        check_number(op, "eps", eps)
        options["eps"] = eps
    return options
