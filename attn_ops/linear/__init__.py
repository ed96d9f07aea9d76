"""Linear attention."""

from attn_ops.linear import ops as _ops  # noqa: F401  # registers attn::linear
from attn_ops.linear.api import (
    linear_attention,
    linear_attention_step,
    linear_attention_with_state,
)

__all__ = ["linear_attention", "linear_attention_step", "linear_attention_with_state"]
