"""Softmax over masked scores, written down once more from its specification, for the formulas.

Dense, naive, in any dtype, with PyTorch's own derivatives. It imports nothing of attn_ops.
Letters: B batch, H query heads, Hk key/value heads, M queries, N keys, D, E widths.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Scores = Callable[[dict[str, Any]], Tensor]  # of arguments of rank 4, before any bias: [B, H, M, N]


def sees(
    num_queries: int,
    num_keys: int,
    causal: bool,
    window: int | None,
    offsets_q: list[int] | None = None,
    offsets_k: list[int] | None = None,
) -> Tensor:
    """[M, N] bool: a sequence by itself, or every packed sequence by itself."""
    if offsets_q is None or offsets_k is None:
        m, n = torch.arange(num_queries)[:, None], torch.arange(num_keys)
        seen = torch.ones(num_queries, num_keys, dtype=torch.bool)
        if causal:
            seen &= n <= m + (num_keys - num_queries)
        if window is not None:
            seen &= n > m + (num_keys - num_queries) - window
        return seen
    seen = torch.zeros(num_queries, num_keys, dtype=torch.bool)
    for q0, q1, k0, k1 in zip(offsets_q, offsets_q[1:], offsets_k, offsets_k[1:]):
        seen[q0:q1, k0:k1] = sees(q1 - q0, k1 - k0, causal, window)
    return seen


def rank4(args: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with query, key, value, mask and bias of rank 4."""
    args = dict(args)
    merged = args["query"].dim() == 3
    for name in ("query", "key", "value"):
        if name in args:
            args[name] = args[name].unsqueeze(1) if args[name].dim() == 3 else args[name]
    if args.get("mask") is not None and args["mask"].dim() == 2:
        args["mask"] = args["mask"][:, None, None, :]
    if args.get("bias") is not None and args["bias"].dim() == 3:
        args["bias"] = args["bias"].unsqueeze(1 if merged else 0)
    return args


def visible(args: dict[str, Any]) -> Tensor:
    """[B, H, M, N] bool, of arguments of rank 4."""
    (batch, heads, m, _), n = args["query"].shape, args["key"].shape[2]
    offsets = (args.get("cu_seqlens_q"), args.get("cu_seqlens_k"))
    lists = (None if x is None else x.tolist() for x in offsets)
    seen = sees(m, n, args.get("causal", False), args.get("window"), *lists)
    seen = seen.to(args["query"].device).expand(batch, heads, m, n)
    return seen if args.get("mask") is None else seen & args["mask"]


def biased(score: Tensor, args: dict[str, Any]) -> Tensor:
    """[B, H, M, N]: the scores with every bias, -inf where the key is hidden."""
    m, n = score.shape[2:]
    if args.get("bias") is not None:
        score = score + args["bias"]
    if args.get("relative_bias") is not None and m and n:
        offset = torch.arange(n)[None, :] - torch.arange(m)[:, None] + m - 1
        score = score + args["relative_bias"][:, offset.to(score.device)]
    return score.masked_fill(~visible(args), -torch.inf)


def of_query_heads(x: Tensor, args: dict[str, Any]) -> Tensor:
    """Every query head gets the key head that it reads; there may be none of either."""
    heads, kv_heads = args["query"].shape[1], args["key"].shape[1]
    return x.repeat_interleave(heads // max(1, kv_heads), dim=1)


def of_key_heads(x: Tensor, args: dict[str, Any]) -> Tensor:
    """Sums over the query heads that share a key head."""
    kv_heads = args["key"].shape[1]
    return x if x.shape[1] == kv_heads else x.unflatten(1, (kv_heads, -1)).sum(2)


def attention(scores: Scores, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(out, lse) of the public op's arguments."""
    args = rank4(arguments)
    value = of_query_heads(args["value"], args)
    score = biased(scores(args), args)
    if args.get("sink") is not None:
        sink = args["sink"][:, None, None].expand(*score.shape[:3], 1)
        score = torch.cat([score, sink.to(torch.promote_types(sink.dtype, score.dtype))], -1)
    nothing = (score == -torch.inf).all(-1, keepdim=True)
    score = torch.where(nothing, 0, score)  # the softmax of nothing is NaN
    weight = torch.where(nothing, 0, score.softmax(-1))[..., : value.shape[2]]
    lse = torch.where(nothing.squeeze(-1), -torch.inf, score.logsumexp(-1))
    out = weight.to(value.dtype) @ value
    lse = lse.to(torch.promote_types(lse.dtype, torch.float32))
    merged = arguments["query"].dim() == 3
    return (out.squeeze(1), lse.squeeze(1)) if merged else (out, lse)


@torch.no_grad()
def squares(
    scores: Scores, arguments: dict[str, Any], grad_out: Tensor, grad_lse: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sums of the squared terms of what float64 arguments give: roundings add up likewise.

    Returns the squares of the gradient of the scores [B, H, M, N], and by name those sums for the
    results, value, bias, relative_bias and sink. A gradient may be far smaller than the terms that
    it is the difference of, while their roundings add up like independent numbers.
    """
    args = rank4(arguments)
    batch, heads, m, _ = args["query"].shape
    n = args["key"].shape[2]
    lse = attention(scores, arguments)[1].reshape(batch, heads, m)
    finite = torch.where(lse.isinf(), 0, lse)
    weight = (2 * (biased(scores(args), args) - finite.unsqueeze(-1))).exp()  # [B, H, M, N]
    value = of_query_heads(args["value"].square(), args)
    grad_out = grad_out.square().reshape(batch, heads, m, value.shape[-1])
    grad_weight = grad_out @ value.mT
    delta = (weight * grad_weight).sum(-1) + grad_lse.square().reshape(batch, heads, m)
    grad_score = weight * (grad_weight + delta.unsqueeze(-1))
    offset = torch.arange(n)[None, :] - torch.arange(m)[:, None] + m - 1
    diagonals = grad_score.new_zeros(max(m + n - 1, 0)).index_add(
        0, offset.flatten().to(grad_score.device), grad_score.sum((0, 1)).flatten()
    )
    bias = args.get("bias")
    return grad_score, {
        "out": weight @ value,
        "lse": finite.square(),
        "value": of_key_heads(weight.mT @ grad_out, args),
        "bias": grad_score if bias is None else grad_score.sum_to_size(bias.shape),
        "relative_bias": diagonals,
        "sink": delta.sum((0, 2)),
    }


def largest_roots(terms: dict[str, Tensor]) -> dict[str, float]:
    return {name: x.max().sqrt().item() if x.numel() else 0.0 for name, x in terms.items()}


def largest_score(score: Tensor) -> float:
    return score.abs().max().item() if score.numel() else 0.0
