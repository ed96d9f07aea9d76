"""vmap over packed sequences whose lengths differ from copy to copy: they cannot be folded."""

import torch
from torch import Tensor
from torch.func import grad, vmap

import attn_ops
from tests.comparison import assert_same

OFFSETS = [[0, 3, 8], [0, 5, 8], [0, 1, 8]]


def loss(query: Tensor, offsets: Tensor) -> Tensor:
    out = attn_ops.cosine_sim_attention(
        query, query, query, causal=True, cu_seqlens_q=offsets, cu_seqlens_k=offsets
    )
    return out.square().sum()


def test_vmap_over_offsets_equals_a_loop(device: torch.device) -> None:
    query = torch.randn(3, 1, 2, 8, 4, dtype=torch.float64, device=device)
    offsets = torch.tensor(OFFSETS, dtype=torch.int32, device=device)
    for function in (loss, grad(loss)):
        expected = torch.stack([function(q, o) for q, o in zip(query, offsets)])
        assert_same("result", vmap(function)(query, offsets), expected)
