"""Sparse L1 attention written down once more, as a dense matrix of how often each edge is there.

Naive, in any dtype, with PyTorch's own derivatives. It imports nothing of attn_ops.
Letters: B batch, H query heads, Hk key/value heads, M queries, N keys, L edges, D, E widths.
"""

from typing import Any

import torch
from torch import Tensor

from tests.l1.formula import scores
from tests.softmax import largest_roots, largest_score, of_key_heads, rank4


def folded(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with all tensors of rank 4."""
    args = rank4(arguments)
    reverse = args.get("value_reverse")
    if reverse is not None and reverse.dim() == 3:
        args["value_reverse"] = reverse.unsqueeze(1)
    return args


def counts(args: dict[str, Any]) -> Tensor:
    """[M, N]: how often each edge is there."""
    m, n = args["query"].shape[2], args["key"].shape[2]
    count = torch.zeros(m * n, dtype=args["query"].dtype, device=args["query"].device)
    places = args["edges"][:, 0].long() * n + args["edges"][:, 1].long()
    return count.index_add(0, places, torch.ones_like(places, dtype=count.dtype)).view(m, n)


def weights(args: dict[str, Any]) -> Tensor:
    """A [B, H, M, N], times how often the edge is there."""
    score, count = scores(args), counts(args)
    if not args.get("softmax", True):
        return count * score.exp()
    there = torch.where(count > 0, score, -torch.inf)
    if args.get("sink", True):
        there = torch.cat([there, score.new_zeros(*score.shape[:3], 1)], -1)
    elif score.shape[3] == 0:
        return score
    largest = there.amax(-1, keepdim=True).detach()
    largest = torch.where(largest == -torch.inf, 0, largest)
    raised = count * torch.where(count > 0, score - largest, 0).exp()
    total = raised.sum(-1, keepdim=True)
    total = total + (-largest).exp() if args.get("sink", True) else total
    return raised / torch.where(total == 0, 1, total)


def l1_sparse(**arguments: Any) -> tuple[Tensor]:
    """The result of the public op's arguments."""
    args = folded(arguments)
    group = args["query"].shape[1] // args["key"].shape[1]
    weight = weights(args).to(args["value"].dtype)
    out = weight @ args["value"].repeat_interleave(group, dim=1)
    if args.get("value_reverse") is not None:
        reverse = args["value_reverse"].to(weight.dtype)
        out = out + weight.mT @ reverse.repeat_interleave(group, dim=1)
    return (out.squeeze(1) if arguments["query"].dim() == 3 else out,)


@torch.no_grad()
def magnitudes(arguments: dict[str, Any], grad_out: Tensor) -> tuple[float, dict[str, float]]:
    """How large the numbers are that rounding acts on, of float64 arguments.

    Returns the largest |score| of an edge, and for each result the largest root of the sum of its
    squared terms.
    """
    args = folded(arguments)
    heads, kv_heads = args["query"].shape[1], args["key"].shape[1]
    group, scale = heads // kv_heads, args.get("scale", args["query"].shape[3] ** -0.5)
    score = torch.where(counts(args) > 0, scores(args), 0)
    weight = weights(args).square()
    value = args["value"].square().repeat_interleave(group, dim=1)
    grad_out = grad_out.square().reshape(*args["query"].shape[:3], value.shape[-1])
    out, grad_weight = weight @ value, grad_out @ value.mT
    terms = {"value": of_key_heads(weight.mT @ grad_out, args)}
    if args.get("value_reverse") is not None:
        reverse = args["value_reverse"].square().repeat_interleave(group, dim=1)
        out = out + weight.mT @ reverse
        grad_weight = grad_weight + reverse @ grad_out.mT
        terms["value_reverse"] = of_key_heads(weight @ grad_out, args)
    grad_score = weight * grad_weight
    if args.get("softmax", True):
        grad_score = grad_score + weight * grad_score.sum(-1, keepdim=True)
    grad_score = grad_score * scale**2
    terms |= {
        "out": out,
        "query": grad_score.sum(3),
        "key": of_key_heads(grad_score.sum(2, keepdim=True), args),
    }
    return largest_score(score), largest_roots(terms)
