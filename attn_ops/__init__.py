"""Attention that is not softmax of dot products, visible to PyTorch's compiler."""

from attn_ops.cosine_sim import cosine_sim_attention, l2_normalize

__version__ = "0.1.0"
__all__ = ["cosine_sim_attention", "l2_normalize"]
