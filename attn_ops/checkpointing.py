"""Activation checkpointing that does not run attention twice.

    from functools import partial
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
    from attn_ops.checkpointing import save_list

    contexts = partial(create_selective_checkpoint_contexts, save_list())
    y = checkpoint(block, x, use_reentrant=False, context_fn=contexts)

Eager and compiled alike. A policy of one's own asks `op in save_list()`; torchtitan's policy takes
them into the set of ops that it saves.
"""

from __future__ import annotations

from typing import Any

import torch

# What is dear to compute and small to keep: M rows, not M x N scores. `attn::_l1_scores_fwd` is
# absent because its result is the scores.
_SAVED = ("_cosine_sim_fwd", "_l1_fwd", "_l1_edges", "_l1_sparse_fwd", "_linear_fwd")


def save_list() -> list[Any]:
    """The ops whose results selective activation checkpointing should save.

    Returns:
        `OpOverload`s: the private forward of every attention, as they appear below autograd and in
        compiled graphs. The results of each are as many numbers as its queries and values.
    """
    packets = (getattr(torch.ops.attn, op, None) for op in _SAVED)
    return [packet.default for packet in packets if packet is not None]
