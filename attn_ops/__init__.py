"""Attention that is not softmax of dot products, visible to PyTorch's compiler."""

from attn_ops import _late, checkpointing, feature_maps
from attn_ops.cosine_sim import cosine_sim_attention, l2_normalize
from attn_ops.l1 import EdgeList, l1_attention, l1_scores, l1_sparse_attention
from attn_ops.linear import (
    linear_attention,
    linear_attention_step,
    linear_attention_with_state,
)

__version__ = "0.1.0"
__all__ = [
    "EdgeList",
    "checkpointing",
    "cosine_sim_attention",
    "feature_maps",
    "l1_attention",
    "l1_scores",
    "l1_sparse_attention",
    "l2_normalize",
    "linear_attention",
    "linear_attention_step",
    "linear_attention_with_state",
]

_late.install()
