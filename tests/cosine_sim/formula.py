"""Cosine-sim attention written down once more from its specification, to compare the op with.

Dense, naive, in any dtype, with PyTorch's own derivatives. It imports nothing of attn_ops.
Letters: B batch, H query heads, Hk key/value heads, M queries, N keys, D, E widths.
"""

from typing import Any

import torch
from torch import Tensor


def unit(x: Tensor, groups: int) -> Tensor:
    """x / max(|x|, 1e-12) over each slice; zero stays zero, with a zero gradient."""
    slices = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (groups, -1))
    zero = (slices == 0).all(-1, keepdim=True)
    norm = torch.where(zero, 1, slices).square().sum(-1, keepdim=True).sqrt()
    return torch.where(zero, 0, slices / norm.clamp_min(1e-12)).flatten(-2).to(x.dtype)


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


def scores(args: dict[str, Any]) -> Tensor:
    """[B, H, M, N]: scale * q̂·k̂, before any bias, of arguments of rank 4."""
    query, key = args["query"], args["key"]
    if args.get("normalize", True):
        query, key = unit(query, args.get("groups", 1)), unit(key, args.get("groups", 1))
    if args.get("query_gain") is not None:
        query = query * torch.atleast_2d(args["query_gain"])[:, None, :]
    if args.get("key_gain") is not None:
        key = key * torch.atleast_2d(args["key_gain"])[:, None, :]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    dtype = torch.promote_types(query.dtype, key.dtype)
    score = args.get("scale", 8.0) * (query.to(dtype) @ key.to(dtype).mT)
    return score if args.get("head_scale") is None else score * args["head_scale"][:, None, None]


def biased(args: dict[str, Any]) -> Tensor:
    """[B, H, M, N]: the scores with every bias, -inf where the key is hidden."""
    score = scores(args)
    m, n = score.shape[2:]
    if args.get("bias") is not None:
        score = score + args["bias"]
    if args.get("relative_bias") is not None and m and n:
        offset = torch.arange(n)[None, :] - torch.arange(m)[:, None] + m - 1
        score = score + args["relative_bias"][:, offset.to(score.device)]
    return score.masked_fill(~visible(args), -torch.inf)


def formula(**arguments: Any) -> tuple[Tensor, Tensor]:
    """(out, lse) of the public op's arguments."""
    args = rank4(arguments)
    value = args["value"].repeat_interleave(args["query"].shape[1] // args["key"].shape[1], dim=1)
    score = biased(args)
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


def prepared(args: dict[str, Any], name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Squares: of x̂ before its gain, of the gain and of 1/|x|, all broadcastable to x."""
    x, gain = args[name], args.get(f"{name}_gain")
    gain = x.new_ones(1) if gain is None else torch.atleast_2d(gain)[:, None, :]
    if not args.get("normalize", True):
        return x.square(), gain.square(), torch.ones_like(x)
    groups = args.get("groups", 1)
    slices = x.unflatten(-1, (groups, -1))
    norm = slices.norm(dim=-1, keepdim=True)
    inverse = torch.where(norm > 0, 1 / norm.clamp_min(1e-12), 0)
    return unit(x, groups).square(), gain.square(), inverse.square().expand_as(slices).flatten(-2)


@torch.no_grad()
def magnitudes(
    arguments: dict[str, Any], grad_out: Tensor, grad_lse: Tensor
) -> tuple[float, dict[str, float]]:
    """How large the numbers are that rounding acts on, of float64 arguments.

    Returns the largest |scale * q̂·k̂|, and for each result the largest root of the sum of its
    squared terms: a gradient may be far smaller than the terms that it is the difference of, while
    their roundings add up like independent numbers. Below, every number is the square of such one.
    """
    args = rank4(arguments)
    batch, heads, m, _ = args["query"].shape
    kv_heads, n = args["key"].shape[1:3]
    lse = formula(**arguments)[1].reshape(batch, heads, m)
    finite = torch.where(lse.isinf(), 0, lse)
    weight = (2 * (biased(args) - finite.unsqueeze(-1))).exp()  # [B, H, M, N]
    value = args["value"].square().repeat_interleave(heads // kv_heads, dim=1)
    grad_out = grad_out.square().reshape(batch, heads, m, value.shape[-1])
    grad_weight = grad_out @ value.mT
    delta = (weight * grad_weight).sum(-1) + grad_lse.square().reshape(batch, heads, m)
    grad_score = weight * (grad_weight + delta.unsqueeze(-1))

    def grouped(x: Tensor) -> Tensor:
        return x.unflatten(1, (kv_heads, -1)).sum(2)

    (q, q_gain, q_inverse), (k, k_gain, k_inverse) = prepared(args, "query"), prepared(args, "key")
    per_head = args.get("head_scale")
    per_head = q.new_ones(1, 1, 1) if per_head is None else per_head.square()[:, None, None]
    scale = args.get("scale", 8.0) ** 2
    raw_u = grad_score @ (k * k_gain).repeat_interleave(heads // kv_heads, dim=1)
    u = scale * per_head * raw_u
    w = grouped((scale * per_head * grad_score).mT @ (q * q_gain))
    offset = torch.arange(n)[None, :] - torch.arange(m)[:, None] + m - 1
    diagonals = grad_score.new_zeros(max(m + n - 1, 0)).index_add(
        0, offset.flatten().to(grad_score.device), grad_score.sum((0, 1)).flatten()
    )
    bias = args.get("bias")
    terms = {
        "out": weight @ value,
        "lse": finite.square(),
        "query": u * q_gain * q_inverse,
        "key": w * k_gain * k_inverse,
        "value": grouped(weight.mT @ grad_out),
        "bias": grad_score if bias is None else grad_score.sum_to_size(bias.shape),
        "relative_bias": diagonals,
        "head_scale": scale * (raw_u * q * q_gain).sum((0, 2, 3)),
        "query_gain": (u * q).sum((0, 1, 2)),
        "key_gain": (w * k).sum((0, 1, 2)),
        "sink": delta.sum((0, 2)),
    }
    largest = {name: x.max().sqrt().item() if x.numel() else 0.0 for name, x in terms.items()}
    score = scores(args).abs()
    return score.max().item() if score.numel() else 0.0, largest
