"""A byte-level GPT whose attention is an argument.

B batch, M length, V = 256 byte values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attn_ops
from attn_ops.nn import MultiheadAttention


def linear_options(query: Tensor) -> dict[str, Any]:
    """Averages of positive weights, in which the heads forget at paces from 2 to 128 bytes.

    Forgetting is what makes it learn: without, a mean over all of the past differs little from
    byte to byte (2.9 against 3.5 bits per byte after 200 steps). Rotary embeddings come before the
    feature map, which keeps the weights positive, though no longer functions of distances alone;
    the loss is the same with and without them, since the decay tells distances already.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    decay = 1 - torch.exp2(-torch.linspace(7, 1, query.shape[1], device=query.device, dtype=dtype))
    return {"decay": decay, "feature_map": "elu_plus_one"}


def linear(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attn_ops.linear_attention(query, key, value, causal=True, **linear_options(query))


# One line per family. Each takes [B, H, M, D] and lets no byte see a later one.
ATTENTIONS: dict[str, Callable[..., Tensor]] = {
    "cosine_sim": partial(attn_ops.cosine_sim_attention, causal=True),
    "l1": partial(attn_ops.l1_attention, causal=True),
    "linear": linear,
    "softmax": partial(F.scaled_dot_product_attention, is_causal=True),
}


@dataclass(frozen=True)
class GPTConfig:
    attention: str = "cosine_sim"
    dim: int = 128
    layers: int = 4
    heads: int = 4
    post_norm: bool = False


class GPT(nn.Module):
    """Logits of the next byte, ``[B, M, 256]``, from the bytes so far, int64 ``[B, M]``.

    Positions come from rotary embeddings, so that no length is built into the weights.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        # Blocks with post-norm end in a norm already.
        self.norm = nn.Identity() if config.post_norm else nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, 256, bias=False)
        nn.init.normal_(self.embedding.weight, std=1.0 if config.post_norm else 0.5)
        # Logits of variance 1. From zero, AdamW moves the whole head one way before anything else
        # learns: slower with pre-norm, and post-norm never leaves the byte frequencies.
        nn.init.normal_(self.head.weight, std=config.dim**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean nats per byte over ``tokens[:, 1:]``, each predicted from the bytes before it."""
        logits = self(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


class Block(nn.Module):
    """Attention and feed-forward, each with its residual.

    pre-norm: ``x + f(norm(x))``. post-norm: ``norm(alpha * x + f(x))`` with DeepNet's
    ``alpha = (2 * layers)**(1/4)`` and its initialisation, where the matrices that values pass
    through start smaller by ``beta = (8 * layers)**(-1/4)`` (https://arxiv.org/abs/2203.00555).
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        dim = config.dim
        attention = ATTENTIONS[config.attention]
        self.attention = MultiheadAttention(
            dim, config.heads, attention=attention, rotary_base=10000.0
        )
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.down = nn.Linear(4 * dim, dim, bias=False)
        self.attention_norm, self.feed_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.post_norm = config.post_norm
        self.alpha = (2 * config.layers) ** 0.25 if config.post_norm else 1.0
        beta = (8 * config.layers) ** -0.25 if config.post_norm else 1.0
        for linear in (self.attention.q_proj, self.attention.k_proj):
            nn.init.xavier_normal_(linear.weight)
        for linear in (self.attention.v_proj, self.attention.out_proj, self.up, self.down):
            nn.init.xavier_normal_(linear.weight, gain=beta)

    def forward(self, x: Tensor) -> Tensor:
        x = self.residual(x, self.attention_norm, self.attention)
        return self.residual(x, self.feed_norm, self.feed_forward)

    def residual(self, x: Tensor, norm: nn.Module, f: Callable[[Tensor], Tensor]) -> Tensor:
        return norm(self.alpha * x + f(x)) if self.post_norm else x + f(norm(x))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square())
