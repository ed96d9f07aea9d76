"""Cosine-similarity attention."""

from attn_ops.cosine_sim import ops as _ops  # noqa: F401  # registers attn::cosine_sim
from attn_ops.cosine_sim.api import cosine_sim_attention
from attn_ops.cosine_sim.normalize import l2_normalize

__all__ = ["cosine_sim_attention", "l2_normalize"]
