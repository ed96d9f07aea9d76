"""Sparse L1 attention as a PyTorch user writes it: rows gathered by edge, sums scattered by index.

Scores are at most 0 and the sink counts 1, so that this law needs no maximum of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor


def formula(query: Tensor, key: Tensor, value: Tensor, edges: Tensor) -> Tensor:
    """[B, H, M, E] from query [B, H, M, D], key, value [B, H, N, D or E], edges [L, 2]."""
    queries, keys = edges.unbind(1)
    distance = (query[:, :, queries] - key[:, :, keys]).abs().sum(-1)
    raised = (distance * -(query.shape[3] ** -0.5)).exp()  # [B, H, L]
    total = raised.new_ones(query.shape[:3]).index_add(2, queries, raised)
    terms = raised.unsqueeze(-1) * value[:, :, keys]
    out = value.new_zeros(*query.shape[:3], value.shape[3]).index_add(2, queries, terms)
    return out / total.unsqueeze(-1)


def random_edges(tokens: int, count: int, device: str, power: bool, seed: int = 0) -> Tensor:
    """[L, 2], uniformly; or ends whose number of edges falls with the square root of their rank."""
    generator = torch.Generator(device).manual_seed(seed)
    ends = torch.rand(count, 2, generator=generator, device=device)
    if power:
        ends = ends.square()
    return (ends * tokens).long().clamp_max(tokens - 1)


def hub_edges(tokens: int, count: int, device: str) -> Tensor:
    """Half of all edges at one query, and the other half at one key."""
    edges = random_edges(tokens, count, device, False)
    edges[: count // 2, 0] = tokens // 2
    edges[count // 2 :, 1] = tokens // 3
    return edges
