"""Linear attention written down once more from its specification, to compare the ops with.

Dense, naive, in any dtype, with PyTorch's own derivatives. It imports nothing of attn_ops.
Letters: B batch, H query heads, Hk key/value heads, M queries, N keys, D, E widths, F features.
"""

import itertools
import math
from typing import Any

import torch
from torch import Tensor


def taylor(x: Tensor) -> Tensor:
    """1, u, and the products of u with itself, each pair once: u = x / D**(1/4)."""
    u = x / x.shape[-1] ** 0.25
    pairs = itertools.combinations_with_replacement(range(x.shape[-1]), 2)
    products = [u[..., i] * u[..., j] / (math.sqrt(2) if i == j else 1) for i, j in pairs]
    return torch.cat([torch.ones_like(u[..., :1]), u, torch.stack(products, -1)], -1)


FEATURES = {
    "identity": lambda x: x,
    "elu_plus_one": lambda x: torch.where(x > 0, x + 1, x.clamp_max(0).exp()),
    "relu": lambda x: torch.where(x > 0, x, 0),
    "softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "taylor": taylor,
}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class Parts:
    """What the law is made of, of public arguments, all of rank 4."""

    def __init__(self, args: dict[str, Any]) -> None:
        self.merged = args["query"].dim() == 3
        query, key, value = (
            x.unsqueeze(1) if x.dim() == 3 else x for x in (args[n] for n in self.tensors)
        )
        self.dtype, self.heads, self.kv_heads = query.dtype, query.shape[1], key.shape[1]
        self.query, self.key = query, key
        self.features = FEATURES[args.get("feature_map", "identity")]
        self.is_taylor = args.get("feature_map") == "taylor"
        self.eps = args.get("eps", 1e-5) if args.get("normalize", True) else None
        self.phi_query, self.phi_key = self.features(query), self.per_query_head(self.features(key))
        if args.get("mask") is not None:
            self.phi_key = self.phi_key * args["mask"][:, None, :, None]
        self.value = self.per_query_head(value)
        decay = args.get("decay")
        self.decay = query.new_ones(self.heads) if decay is None else decay
        num_queries, num_keys = query.shape[2], key.shape[2]
        self.m = torch.arange(num_queries, device=query.device)
        self.n = torch.arange(num_keys, device=query.device)
        seen = self.visible(args.get("causal", False), args.get("cu_seqlens"))
        self.power = seen * self.decayed((self.m[:, None] - self.n).clamp_min(0))  # [H, M, N]
        self.before = self.decayed(self.m + 1)  # [H, M]: what is left of the state given
        self.after = self.decayed(num_keys - 1 - self.n)  # [H, N]: ... of a key at the end
        self.left = self.decayed(self.n.new_tensor([num_keys]))  # [H, 1]
        self.with_state(args.get("state"), args.get("key_sum"))

    tensors = ("query", "key", "value")

    def with_state(self, state: Tensor | None, key_sum: Tensor | None) -> None:
        """Zeros for what is not given."""
        sums = compute_dtype(self.dtype)
        sizes = (*self.query.shape[:2], self.phi_query.shape[3], self.value.shape[3])
        self.state = self.query.new_zeros(sizes, dtype=sums) if state is None else state
        self.key_sum = self.query.new_zeros(sizes[:3], dtype=sums) if key_sum is None else key_sum
        self.state, self.key_sum = self.state.view(sizes), self.key_sum.view(sizes[:3])

    def per_query_head(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.heads // max(self.kv_heads, 1), dim=1)

    def per_kv_head(self, x: Tensor) -> Tensor:
        group = self.heads // max(self.kv_heads, 1)
        return x.unflatten(1, (self.kv_heads, group)).sum(2)

    def decayed(self, age: Tensor) -> Tensor:
        return self.decay.reshape(-1, *[1] * age.dim()) ** age.to(self.decay.dtype)

    def visible(self, causal: bool, cu_seqlens: Tensor | None) -> Tensor:
        """[M, N] bool."""
        offsets = [0, len(self.n)] if cu_seqlens is None else cu_seqlens.tolist()
        seen = torch.zeros(len(self.m), len(self.n), dtype=torch.bool, device=self.m.device)
        for first, last in zip(offsets, offsets[1:]):
            seen[first : last if cu_seqlens is not None else None, first:last] = True
        return seen & (self.n <= self.m[:, None]) if causal else seen

    def sums(self) -> tuple[Tensor, Tensor]:
        """Numerator [B, H, M, E] and denominator [B, H, M]."""
        weight = self.phi_query @ self.phi_key.mT * self.power
        before = self.phi_query * self.before.unsqueeze(-1)
        numerator = weight.to(self.value.dtype) @ self.value
        numerator = numerator + before.to(self.state.dtype) @ self.state
        denominator = weight.sum(-1) + (before * self.key_sum.unsqueeze(2)).sum(-1)
        return numerator, denominator

    def out(self) -> tuple[Tensor, Tensor]:
        """out, and what it was divided by: zero where that would be zero."""
        numerator, denominator = self.sums()
        if self.eps is None:
            return numerator, torch.ones_like(denominator)
        denominator = denominator + self.eps
        nothing = (denominator == 0).unsqueeze(-1)
        ratio = numerator / torch.where(nothing, 1, denominator.unsqueeze(-1))
        return torch.where(nothing, 0, ratio), denominator

    def unfold(self, x: Tensor) -> Tensor:
        return x.squeeze(1) if self.merged else x


def linear(**arguments: Any) -> tuple[Tensor]:
    """(out,) of the arguments of `attn::linear`."""
    parts = Parts(arguments)
    return (parts.unfold(parts.out()[0].to(parts.dtype)),)


def linear_with_state(**arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(out, state, key_sum) of the arguments of `attn::linear_with_state`."""
    parts = Parts(arguments | {"causal": True})
    still = parts.phi_key * parts.after.unsqueeze(-1)
    state = still.mT.to(parts.value.dtype) @ parts.value
    state = parts.left.unsqueeze(-1) * parts.state + state
    key_sum = parts.left * parts.key_sum + still.sum(2)
    sums = compute_dtype(parts.dtype)
    results = (parts.out()[0].to(parts.dtype), state.to(sums), key_sum.to(sums))
    out, state, key_sum = (parts.unfold(x) for x in results)
    return out, state, key_sum
