"""`linear_attention` and its kin: `torch.ops.attn.linear*` with docstrings and checked types."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attn_ops._arguments import check_types
from attn_ops._checks import check_bool, check_number, check_tensor, check_text
from attn_ops._plain import is_plain
from attn_ops.linear import ops


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    normalize: bool = True,
    eps: float | None = None,
    decay: Tensor | None = None,
    feature_map: str = "identity",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    r"""Attention whose weights are plain products: time and memory grow linearly with the length.

    .. math::
        w_{mn} = \gamma_h^{\,m-n}\; \phi(q_m) \cdot \phi(k_n), \qquad
        \mathrm{out}_m = \frac{\sum_n w_{mn}\, v_n}{\mathrm{eps} + \sum_n w_{mn}}

    The sums run over all keys, or over `n <= m` when causal. `normalize=False` leaves the
    denominator out, and without `decay` :math:`\gamma = 1`. Where products of any sign make the
    denominator exactly zero the result and its gradients are zero; close to zero it is as large
    as the formula says. A query that sees no key gives zeros.

    Letters: B batch, H query heads, Hk key/value heads, M queries, N keys, D query/key width,
    F features, E value width, S packed sequences. D and E are 1 to 256. Any strides; float64,
    float32, bfloat16, float16; sums and the carried state are float32 (float64 for float64).

    Args:
        query: [B, H, M, D]. Or [BH, M, D] with key and value of rank 3: batch and heads merged,
            which is a batch of BH with one head.
        key: [B, Hk, N, D], H a multiple of Hk: query head h reads head h // (H/Hk). Or [B, N, D],
            one head for all query heads.
        value: [B, Hk, N, E] or [B, N, E] like key.
        mask: bool [B, N] ([BH, N] for merged heads), False hides a key: it adds nothing, but the
            decay still advances.
        causal: query m sees keys n <= m; needs M = N.
        normalize: divide by the sum of the weights.
        eps: added to that sum, 1e-5 by default; at least 0.
        decay: [H] in (0, 1], with causal; float32 beside 16-bit inputs is fine. It has a gradient.
            Values outside of that range are not checked, since that would wait for the device.
        feature_map: identity, elu_plus_one, relu, softplus or taylor, see `attn_ops.feature_maps`;
            applied inside, so that the features are not stored.
        cu_seqlens: [S+1] int32 or int64 offsets, the first one 0: S sequences packed into B = 1. A
            query sees its own sequence only. Tokens after the last offset see nothing.

    Returns:
        [B, H, M, E] (or [BH, M, E]) in query's dtype.

    Raises:
        ValueError: a shape, a device or a value that the above does not allow.
        TypeError: a dtype that the above does not allow.
        NotImplementedError: nested and sparse tensors.

    Source: Katharopoulos et al., Transformers are RNNs, 2020; with a decay: Sun et al., Retentive
    Network, 2023, and Qin et al., Lightning Attention-2, 2024.
    """
    if (
        mask is decay is cu_seqlens is None
        and type(causal) is bool
        and normalize is True
        and (eps is None or type(eps) is float)
        and type(feature_map) is str
        and is_plain(query, key, value)
    ):
        return ops.plain(query, key, value, causal, 1e-5 if eps is None else eps, feature_map)
    op = "linear_attention"
    options = _options(op, normalize, eps, feature_map)
    tensors = {"mask": mask, "decay": decay, "cu_seqlens": cu_seqlens}
    options |= check_types(op, query, key, value, causal, **tensors)
    return ops.linear(query, key, value, **options)


def linear_attention_with_state(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor | None = None,
    key_sum: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    normalize: bool = True,
    eps: float | None = None,
    decay: Tensor | None = None,
    feature_map: str = "identity",
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Causal linear attention that continues where an earlier call has ended.

    .. math::
        S_m = \gamma_h S_{m-1} + \phi(k_m) v_m^T, \qquad z_m = \gamma_h z_{m-1} + \phi(k_m), \qquad
        \mathrm{out}_m = \frac{\phi(q_m)^T S_m}{\mathrm{eps} + \phi(q_m) \cdot z_m}

    Feeding the returned state and key_sum to the next call continues the sequence exactly.

    Args:
        query, key, value, mask, normalize, eps, decay, feature_map: as in `linear_attention`, with
            M = N.
        state: [B, H, F, E], float32 (float64 for float64), per query head; zeros if None. For
            merged heads [BH, F, E]. F is D, and 1 + D + D(D+1)/2 for taylor.
        key_sum: [B, H, F] ([BH, F]) likewise.

    Returns:
        out like `linear_attention`, and state and key_sum after the last token. All have gradients.

    Raises:
        ValueError, TypeError, NotImplementedError: as `linear_attention`.
    """
    op = "linear_attention_with_state"
    options = _options(op, normalize, eps, feature_map)
    tensors = {"state": state, "key_sum": key_sum, "mask": mask, "decay": decay}
    options |= check_types(op, query, key, value, **tensors)
    return ops.linear_with_state(query, key, value, **options)


def linear_attention_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor,
    key_sum: Tensor,
    *,
    normalize: bool = True,
    eps: float | None = None,
    decay: Tensor | None = None,
    feature_map: str = "identity",
) -> Tensor:
    """One token of decoding: the last row of `linear_attention` in constant time and memory.

    Args:
        query, key, value: as in `linear_attention`, one token each.
        state: [B, H, F, E], float32 (float64 for float64), **updated in place**.
        key_sum: [B, H, F], likewise.
        normalize, eps, decay, feature_map: as in `linear_attention`.

    Returns:
        [B, H, 1, E] in query's dtype, without gradient: `linear_attention_with_state` has one.

    Raises:
        ValueError, TypeError, NotImplementedError: as `linear_attention`.
    """
    op = "linear_attention_step"
    options = _options(op, normalize, eps, feature_map)
    options |= check_types(op, query, key, value, decay=decay)
    check_tensor(op, "state", state)
    check_tensor(op, "key_sum", key_sum)
    return ops.linear_step(query, key, value, state, key_sum, **options)


def _options(op: str, normalize: bool, eps: float | None, feature_map: str) -> dict[str, Any]:
    """Those that all ops of this room have, where they differ from the ops' defaults."""
    check_bool(op, "normalize", normalize)
    check_text(op, "feature_map", feature_map)
    options: dict[str, Any] = {}
    if not normalize:
        options["normalize"] = False
    if feature_map != "identity":
        options["feature_map"] = feature_map
    # A default of 1e-5 read off this function would be a symbolic float to the compiler.
    if eps is not None:
        check_number(op, "eps", eps)
        options["eps"] = eps
    return options
