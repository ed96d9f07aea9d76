"""The private ops by the reference formulas, a block of queries at a time."""

from __future__ import annotations

from attn_ops._forward_mode import ForwardMode
from attn_ops._in_blocks import InBlocks
from attn_ops.cosine_sim import reference

ATTENTION = InBlocks(
    reference.forward,
    reference.backward,
    "query key value bias relative_bias head_scale query_gain key_gain sink",
    block_scores=1 << 23,  # 32 MiB of float32
)
FORWARD_MODE = ForwardMode(reference.tangent, reference.score_operands, reference.score_tangents)
