"""L1 attention."""

from attn_ops.l1 import ops as _ops  # noqa: F401  # registers attn::l1
from attn_ops.l1.api import l1_attention, l1_scores

__all__ = ["l1_attention", "l1_scores"]
