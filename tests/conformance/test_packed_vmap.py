"""vmap over packed sequences whose lengths differ from copy to copy: they cannot be folded."""

import torch
from torch import Tensor
from torch.func import grad, vmap

from tests.comparison import assert_same
from tests.conformance.spec import OpSpec

SOFTMAX_LIKE = True
OFFSETS = [[0, 3, 8], [0, 5, 8], [0, 1, 8]]


def test_vmap_over_offsets_equals_a_loop(spec: OpSpec, device: torch.device) -> None:
    def loss(query: Tensor, offsets: Tensor) -> Tensor:
        packed = {"causal": True, "cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
        return spec.function(query, query, query, **packed).square().sum()

    query = torch.randn(3, 1, 2, 8, 4, dtype=torch.float64, device=device)
    offsets = torch.tensor(OFFSETS, dtype=torch.int32, device=device)
    for function in (loss, grad(loss)):
        expected = torch.stack([function(q, o) for q, o in zip(query, offsets)])
        assert_same("result", vmap(function)(query, offsets), expected)
