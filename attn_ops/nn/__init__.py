"""Modules over any of the library's attention functions."""

from attn_ops.nn.multihead import MultiheadAttention

__all__ = ["MultiheadAttention"]
