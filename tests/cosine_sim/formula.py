"""Cosine-sim attention written down once more from its specification, to compare the op with.

Dense, naive, in any dtype, with PyTorch's own derivatives. It imports nothing of attn_ops.
Letters: B batch, H query heads, Hk key/value heads, M queries, N keys, D, E widths.
"""

from typing import Any

import torch
from torch import Tensor

from tests.softmax import (
    attention,
    largest_roots,
    largest_score,
    of_key_heads,
    of_query_heads,
    rank4,
    squares,
)


def unit(x: Tensor, groups: int) -> Tensor:
    """x / max(|x|, 1e-12) over each slice; zero stays zero, with a zero gradient."""
    slices = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (groups, -1))
    zero = (slices == 0).all(-1, keepdim=True)
    norm = torch.where(zero, 1, slices).square().sum(-1, keepdim=True).sqrt()
    return torch.where(zero, 0, slices / norm.clamp_min(1e-12)).flatten(-2).to(x.dtype)


def scores(args: dict[str, Any]) -> Tensor:
    """[B, H, M, N]: scale * q̂·k̂, before any bias, of arguments of rank 4."""
    query, key = args["query"], args["key"]
    if args.get("normalize", True):
        query, key = unit(query, args.get("groups", 1)), unit(key, args.get("groups", 1))
    if args.get("query_gain") is not None:
        query = query * torch.atleast_2d(args["query_gain"])[:, None, :]
    if args.get("key_gain") is not None:
        key = key * torch.atleast_2d(args["key_gain"])[:, None, :]
    key = of_query_heads(key, args)
    dtype = torch.promote_types(query.dtype, key.dtype)
    score = args.get("scale", 8.0) * (query.to(dtype) @ key.to(dtype).mT)
    return score if args.get("head_scale") is None else score * args["head_scale"][:, None, None]


def formula(**arguments: Any) -> tuple[Tensor, Tensor]:
    """(out, lse) of the public op's arguments."""
    return attention(scores, arguments)


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
    squared terms. Below, every number is the square of such one.
    """
    grad_score, terms = squares(scores, arguments, grad_out, grad_lse)
    args = rank4(arguments)
    (q, q_gain, q_inverse), (k, k_gain, k_inverse) = prepared(args, "query"), prepared(args, "key")
    per_head = args.get("head_scale")
    per_head = q.new_ones(1, 1, 1) if per_head is None else per_head.square()[:, None, None]
    scale = args.get("scale", 8.0) ** 2
    raw_u = grad_score @ of_query_heads(k * k_gain, args)
    u = scale * per_head * raw_u
    w = of_key_heads((scale * per_head * grad_score).mT @ (q * q_gain), args)
    terms |= {
        "query": u * q_gain * q_inverse,
        "key": w * k_gain * k_inverse,
        "head_scale": scale * (raw_u * q * q_gain).sum((0, 2, 3)),
        "query_gain": (u * q).sum((0, 1, 2)),
        "key_gain": (w * k).sum((0, 1, 2)),
    }
    return largest_score(scores(args)), largest_roots(terms)
