"""FLOP formulas of the private ops, for `torch.utils.flop_counter.FlopCounterMode`.

A multiplication, an addition and an absolute value count one each; exponentials, norms, masks and
feature maps count nothing, as elsewhere in PyTorch. Counted is what the mathematics needs, not what
a kernel does: a softmax-like backward computes the scores again, a chunk's scores of linear
attention count nothing. All gradients are counted, whichever are wanted.

P, the pairs of a query and a key that it sees, are counted exactly for `causal`, `window` and
packed sequences (these are read from the device). A bool mask is not looked at, and where packed
sequences have no values (fake and meta tensors) every key counts: upper bounds both.

Letters: B batch, H query heads, M queries, N keys, D query/key width, F features, E value width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from attn_ops.feature_maps import num_features


def _up_to(last: int, num_queries: int, num_keys: int) -> int:
    """Pairs with `n - p <= last`, where query m stands at p = m + (N - M)."""

    def triangle(side: int) -> int:
        side = torch.sym_max(side, 0)
        return side * (side + 1) // 2

    # Query m sees m + c of them, but at least none and at most all.
    longest = num_queries + num_keys
    c = num_keys - num_queries + 1 + torch.sym_max(torch.sym_min(last, longest), -longest)
    positive = triangle(num_queries - 1 + c) - triangle(c - 1)
    beyond = triangle(num_queries - 1 + c - num_keys) - triangle(c - 1 - num_keys)
    return positive - beyond


def visible_pairs(num_queries: int, num_keys: int, left: int, right: int) -> int:
    """Pairs within the band of masks.py, `p - left <= n <= p + right`."""
    beyond_left = _up_to(-left - 1, num_queries, num_keys)
    return torch.sym_max(_up_to(right, num_queries, num_keys) - beyond_left, 0)


class Call:
    """One call of a private op: what its laws are made of."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        query, key, value = (arguments.get(name) for name in ("query", "key", "value"))
        if query is not None and key is not None:
            self.B, self.H, self.M, self.D = query.shape
            self.N = key.shape[2]
        self.E = 0 if value is None else value.shape[3]

    @property
    def P(self) -> int:
        """Visible pairs of all heads and batches."""
        start, stop = self.arguments.get("start"), self.arguments.get("stop")
        if start is not None and stop is not None and not (start.is_meta or is_fake(start)):
            pairs = int((stop - start).clamp_min(0).sum())
            return self.B // start.shape[0] * self.H * pairs
        left, right = self.arguments.get("left"), self.arguments.get("right")
        if left is None or right is None:
            return self.B * self.H * self.M * self.N
        return self.B * self.H * visible_pairs(self.M, self.N, left, right)

    @property
    def edges(self) -> int:
        """Edges of all heads and batches."""
        return self.B * self.H * self.arguments["row_keys"].shape[0]

    @property
    def states(self) -> int:
        """Elements of the states F x E that keys are written to and queries read from."""
        features = num_features(self.arguments["feature_map"], self.D)
        return self.B * self.H * (self.M + self.N) * features * self.E

    @property
    def tangents(self) -> int:
        """How many of query and key have a tangent."""
        names = ("tangent_query", "tangent_key")
        return sum(self.arguments[name] is not None for name in names)

    @property
    def directions(self) -> int:
        """How many ways values go along an edge."""
        return 1 if self.arguments["value_reverse"] is None else 2


LAWS: dict[str, Callable[[Call], int]] = {
    # Scores and weighted values; backwards the scores again and one product per factor of each.
    "_cosine_sim_fwd": lambda a: 2 * a.P * (a.D + a.E),
    "_cosine_sim_bwd": lambda a: 2 * a.P * (3 * a.D + 2 * a.E),
    # Scores, their tangents, and two products with values or tangents of values.
    "_cosine_sim_jvp": lambda a: 2 * a.P * (a.D + a.tangents * a.D + 2 * a.E),
    "_cosine_sim_unit_jvp": lambda a: 0,
    # A difference, an absolute value and a sum; backwards these again, and two per gradient.
    "_l1_fwd": lambda a: a.P * (3 * a.D + 2 * a.E),
    "_l1_bwd": lambda a: a.P * (7 * a.D + 4 * a.E),
    "_l1_jvp": lambda a: a.P * (3 * a.D + 3 * bool(a.tangents) * a.D + 4 * a.E),
    "_l1_scores_fwd": lambda a: 3 * a.P * a.D,
    "_l1_scores_bwd": lambda a: 5 * a.P * a.D,  # the scores are not needed, the difference is
    # Values are added once per direction, the weights are kept.
    "_l1_edges": lambda a: 0,
    "_l1_sparse_fwd": lambda a: a.edges * (3 * a.D + 2 * a.E * a.directions),
    "_l1_sparse_bwd": lambda a: a.edges * (5 * a.D + 4 * a.E * a.directions),
    # Writing and reading the state; backwards five such products.
    "_linear_fwd": lambda a: 2 * a.states,
    "_linear_bwd": lambda a: 5 * a.states,
    "_linear_grad_decay": lambda a: 3 * a.states,  # the states, their gradients, and their products
    "_linear_step": lambda a: 2 * a.states,
}


def _formula(packet: Any, law: Callable[[Call], int]) -> Callable[..., int]:
    names = [argument.name for argument in packet.default._schema.arguments]

    def formula(*args: Any, out_val: Tensor | None = None, **kwargs: Any) -> int:
        return law(Call(dict(zip(names, args)) | kwargs))

    return formula


def register() -> None:
    """Makes the laws known to FlopCounterMode; called once that is imported."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for op, law in LAWS.items():
        packet = getattr(torch.ops.attn, op, None)
        if packet is not None and packet not in flop_registry:
            register_flop_formula(packet, get_raw=True)(_formula(packet, law))
