"""What ContextParallel refuses, and in which words: asked by the processes of a mesh of two."""

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, distribute_tensor

from attn_ops.distributed.context_parallel import ContextParallel
from tests.errors import ones

Q, K, V = ones(2, 4, 6, 8), ones(2, 2, 6, 8), ones(2, 2, 6, 5)
PACKED = ones(1, 4, 6, 8), ones(1, 2, 6, 8), ones(1, 2, 6, 5)
OFFSETS = torch.tensor([0, 5, 12])
BOTH = {"cu_seqlens_q": OFFSETS, "cu_seqlens_k": OFFSETS}
ODD = [x[:, :, :5] for x in (Q, K, V)]

Call = Callable[..., Any]
MAKING: dict[str, Call] = {
    "mesh must be a DeviceMesh, got str": lambda grid: ContextParallel("world"),  # type: ignore[arg-type]
    'mesh must have one dimension, like mesh["context"], got': lambda grid: ContextParallel(grid),
    "load_balance must be a bool, got int": lambda grid: ContextParallel(grid["context"], 1),  # type: ignore[arg-type]
}
BALANCED: dict[str, Call] = {
    "ContextParallel.shard: tensor must have a number of tokens that 4 divides, got (3, 6)": (
        lambda context: context.shard(ones(3, 6), 1)
    ),
    "ContextParallel.l1_attention: key must have a number of tokens that 2 divides": (
        lambda context: context.l1_attention(*ODD)
    ),
}
IN_ORDER: dict[str, Call] = {
    "ContextParallel.shard: tensor must have a number of tokens that 2 divides, got (3, 5)": (
        lambda context: context.shard(ones(3, 5), 1)
    ),
    "ContextParallel.l1_attention: key must have as many tokens as query in causal attention": (
        lambda context: context.l1_attention(Q[:, :, :4], K, V, causal=True)
    ),
    "ContextParallel.l1_attention: query must be a plain tensor with this rank's tokens, got": (
        lambda context: context.l1_attention(
            distribute_tensor(Q, context.mesh, [Replicate()]), K, V
        )
    ),
    "ContextParallel.cosine_sim_attention: value must have [Hk, N]=(2, 6) like key, got": (
        lambda context: context.cosine_sim_attention(Q, K, V[:, :, :5])
    ),
    "ContextParallel.cosine_sim_attention: mask must have shape [B, L]=(2, 6), got (2, 12)": (
        lambda context: context.cosine_sim_attention(Q, K, V, ones(2, 12).bool())
    ),
    "ContextParallel.cosine_sim_attention: mask must have L=6 rows, of this rank, and N=12": (
        lambda context: context.cosine_sim_attention(Q, K, V, ones(1, 1, 6, 6).bool())
    ),
    "ContextParallel.cosine_sim_attention: relative_bias must have M+N-1=23 distances, of all": (
        lambda context: context.cosine_sim_attention(Q, K, V, relative_bias=ones(4, 11))
    ),
    "ContextParallel.cosine_sim_attention: relative_bias must be None beside cu_seqlens_q": (
        lambda context: context.cosine_sim_attention(*PACKED, relative_bias=ones(4, 23), **BOTH)
    ),
    "cosine_sim: cu_seqlens_q must be given beside the other cu_seqlens, got None": (
        lambda context: context.cosine_sim_attention(*PACKED, cu_seqlens_k=OFFSETS)
    ),
    "ContextParallel.cosine_sim_attention: window must be an int, got float": (
        lambda context: context.cosine_sim_attention(Q, K, V, causal=True, window=2.0)
    ),
    "cosine_sim: window must be at least 1, got 0": (
        lambda context: context.cosine_sim_attention(Q, K, V, causal=True, window=0)
    ),
    "l1_attention() got an unexpected keyword argument 'head_scale'": (
        lambda context: context.l1_attention(Q, K, V, head_scale=ones(4))
    ),
    "ContextParallel.linear_attention: cu_seqlens must be None over ranks, got a Tensor": (
        lambda context: context.linear_attention(*PACKED, cu_seqlens=OFFSETS)
    ),
    "ContextParallel.linear_attention: decay must come with causal=True, got causal=False": (
        lambda context: context.linear_attention(Q, K, V, decay=ones(4))
    ),
    "ContextParallel.linear_attention: mask must have shape [B, L]=(2, 6), got (2, 12)": (
        lambda context: context.linear_attention(Q, K, V, mask=ones(2, 12).bool())
    ),
}


def check_refusals(grid: DeviceMesh) -> None:
    in_order = ContextParallel(grid["context"])
    balanced = ContextParallel(grid["context"], load_balance=True)
    for calls, argument in ((MAKING, grid), (IN_ORDER, in_order), (BALANCED, balanced)):
        for words, call in calls.items():
            try:
                call(argument)
            except (ValueError, TypeError, NotImplementedError) as error:
                assert words in str(error), f"expected {words!r}, got {error!r}"
            else:
                raise AssertionError(f"nothing was refused: {words}")
