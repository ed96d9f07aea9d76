"""L1 attention written down once more from its specification, to compare the ops with.

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


def scores(args: dict[str, Any]) -> Tensor:
    """[B, H, M, N]: -dist or 1 / (eps + dist), before any bias, of arguments of rank 4."""
    query, key = args["query"], args["key"]
    key = of_query_heads(key, args)
    scale = args.get("scale", query.shape[3] ** -0.5)
    dist = scale * (query.unsqueeze(3) - key.unsqueeze(2)).abs().sum(-1)
    return -dist if args.get("score", "negative") == "negative" else 1 / (args["eps"] + dist)


def l1(**arguments: Any) -> tuple[Tensor, Tensor]:
    """(out, lse) of the public op's arguments."""
    return attention(scores, arguments)


def l1_scores(**arguments: Any) -> tuple[Tensor]:
    score = scores(rank4(arguments))
    return (score.squeeze(1) if arguments["query"].dim() == 3 else score,)


def slopes(score: Tensor, args: dict[str, Any]) -> Tensor:
    """|d score / d coordinate| for each score."""
    scale = args.get("scale", args["query"].shape[3] ** -0.5)
    slope = torch.full_like(score, scale)
    if args.get("score", "negative") == "inverse":
        slope = slope * score.square()
    return slope


def sums(terms: Tensor, args: dict[str, Any]) -> dict[str, Tensor]:
    """Of terms [B, H, M, N], over what the gradients of query and key are sums of."""
    return {"query": terms.sum(3), "key": of_key_heads(terms.sum(2, keepdim=True), args)}


def distance_terms(grad_score: Tensor, score: Tensor, args: dict[str, Any]) -> dict[str, Tensor]:
    """The squared terms of the gradients of query and key, from those of the scores."""
    return sums(grad_score * slopes(score, args).square(), args)


@torch.no_grad()
def magnitudes(
    arguments: dict[str, Any], grad_out: Tensor, grad_lse: Tensor
) -> tuple[float, dict[str, float]]:
    """How large the numbers are that rounding acts on, of float64 arguments.

    Returns the largest |score|, and for each result the largest root of the sum of its squared
    terms.
    """
    grad_score, terms = squares(scores, arguments, grad_out, grad_lse)
    args = rank4(arguments)
    score = scores(args)
    terms |= distance_terms(grad_score, score, args)
    return largest_score(score), largest_roots(terms)


@torch.no_grad()
def magnitudes_of_scores(
    arguments: dict[str, Any], grad_out: Tensor
) -> tuple[float, dict[str, float]]:
    """The same of `l1_scores`."""
    args = rank4(arguments)
    score = scores(args)
    grad = grad_out.reshape(score.shape)
    terms = distance_terms(grad.square(), score, args)
    if args.get("score", "negative") == "inverse":
        # Slopes come from scores that were rounded once, equal ones alike: their errors add up.
        terms = {
            name: total.square()
            for name, total in sums(grad.abs() * slopes(score, args), args).items()
        }
    return largest_score(score), largest_roots(terms | {"out": score.square()})
