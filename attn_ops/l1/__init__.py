"""L1 attention."""

from attn_ops.l1 import ops as _ops  # noqa: F401  # registers attn::l1
from attn_ops.l1 import sparse_ops as _sparse_ops  # noqa: F401  # registers attn::l1_sparse
from attn_ops.l1.api import l1_attention, l1_scores
from attn_ops.l1.edge_list import EdgeList
from attn_ops.l1.sparse import l1_sparse_attention

__all__ = ["EdgeList", "l1_attention", "l1_scores", "l1_sparse_attention"]
