"""Private ops of softmax-like attention by their reference formulas, a block of queries at a time.

They serve wherever there is no kernel: CPUs without the native library, float64 on CUDA, and the
devices of other backends. No [M, N] tensor exists. 16-bit inputs are computed in float32.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from attn_ops._checks import compute_dtype

_PER_QUERY = ("query", "grad_out", "grad_lse", "out", "lse")
_IN_QUERYS_DTYPE = ("query", "key", "value", "grad_out", "out")


def query_blocks(query: Tensor, key: Tensor, block_scores: int) -> Iterator[tuple[int, int]]:
    """First and last query of blocks that have at most so many scores, or one query."""
    batch, heads, num_queries, _ = query.shape
    size = max(1, block_scores // max(1, batch * heads * key.shape[2]))
    for first in range(0, num_queries, size):
        yield first, min(first + size, num_queries)


def _rows(x: Any, dim: int, first: int, last: int) -> Any:
    """Rows first..last of an optional tensor whose query dimension may be broadcast."""
    if x is None or x.shape[dim] == 1:
        return x
    return x.narrow(dim, first, last - first)


def _visibility_of_block(
    args: dict[str, Any], num_queries: int, num_keys: int, first: int, last: int
) -> dict[str, Any]:
    """The arguments whose meaning depends on a query's place, for queries first..last."""
    shift = last - num_queries  # how far the block's last query stands from the last of all
    relative_bias = args["relative_bias"]
    if relative_bias is not None:
        relative_bias = relative_bias.narrow(1, -shift, last - first + num_keys - 1)
    return {
        "mask": _rows(args["mask"], 2, first, last),
        "bias": _rows(args["bias"], 2, first, last),
        "relative_bias": relative_bias,
        "start": _rows(args["start"], 1, first, last),
        "stop": _rows(args["stop"], 1, first, last),
        "left": args["left"] - shift,
        "right": args["right"] + shift,
    }


def _part_of_block(
    name: str, total: Tensor, first: int, last: int, num_queries: int, num_keys: int
) -> Tensor:
    """The part of a gradient that queries first..last add to."""
    if name == "query" or (name == "bias" and total.shape[2] != 1):
        return total.narrow(2, first, last - first)
    if name == "relative_bias":
        return total.narrow(1, num_queries - last, last - first + num_keys - 1)
    return total


def _in_compute_dtype(names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    args = dict(zip(names, values, strict=True))
    dtype = compute_dtype(args["query"].dtype)
    return args | {name: args[name].to(dtype) for name in _IN_QUERYS_DTYPE if name in args}


class InBlocks:
    """A room's private forward and backward, from the formulas of its reference.

    forward, backward: take the arguments of the private ops by their names; the backward returns a
        gradient or None for each name of `grads`.
    block_scores: how many scores a block has at most, unless one query has more.
    """

    def __init__(
        self,
        forward: Callable[..., tuple[Tensor, Tensor]],
        backward: Callable[..., tuple[Tensor | None, ...]],
        grads: str,
        block_scores: int,
    ) -> None:
        self._forward, self._backward = forward, backward
        self._forward_names = list(inspect.signature(forward).parameters)
        self._backward_names = list(inspect.signature(backward).parameters)
        self._grads = grads.split()
        self.block_scores = block_scores

    def forward_formula(self, *values: Any) -> tuple[Tensor, Tensor]:
        """The private forward as one differentiable formula that does hold [M, N] scores."""
        out, lse = self._forward(**_in_compute_dtype(self._forward_names, values))
        return out.to(values[0].dtype), lse

    def backward_formula(self, *values: Any) -> tuple[Tensor, ...]:
        """The private backward likewise."""
        inputs = dict(zip(self._backward_names, values[:-1], strict=True))
        grads = self._backward(**_in_compute_dtype(self._backward_names, values[:-1]))
        return tuple(
            inputs["query"].new_empty(0)
            if grad is None or not needed
            else grad.to(inputs[name].dtype)
            for name, grad, needed in zip(self._grads, grads, values[-1], strict=True)
        )

    def forward(self, *values: Any) -> tuple[Tensor, Tensor]:
        """The private forward."""
        query, key, value = values[:3]
        batch, heads, num_queries, _ = query.shape
        out = query.new_empty(batch, heads, num_queries, value.shape[3])
        lse = query.new_empty(batch, heads, num_queries, dtype=compute_dtype(query.dtype))
        with torch.autocast(query.device.type, enabled=False):
            args = _in_compute_dtype(self._forward_names, values)
            for first, last in query_blocks(query, key, self.block_scores):
                block = args | _visibility_of_block(args, num_queries, key.shape[2], first, last)
                block["query"] = _rows(args["query"], 2, first, last)
                block_out, block_lse = self._forward(**block)
                out[:, :, first:last] = block_out
                lse[:, :, first:last] = block_lse
        return out, lse

    def backward(self, *values: Any) -> tuple[Tensor, ...]:
        """The private backward."""
        inputs = dict(zip(self._backward_names, values[:-1], strict=True))
        query, key = inputs["query"], inputs["key"]
        num_queries, num_keys = query.shape[2], key.shape[2]
        with torch.autocast(query.device.type, enabled=False):
            args = _in_compute_dtype(self._backward_names, values[:-1])
            totals = {
                name: torch.zeros(inputs[name].shape, dtype=args[name].dtype, device=query.device)
                for name, needed in zip(self._grads, values[-1], strict=True)
                if needed
            }
            for first, last in query_blocks(query, key, self.block_scores):
                place = _visibility_of_block(args, num_queries, num_keys, first, last)
                rows = {name: _rows(args[name], 2, first, last) for name in _PER_QUERY}
                grads = self._backward(**(args | place | rows))
                for name, grad in zip(self._grads, grads, strict=True):
                    if name in totals and grad is not None:
                        part = _part_of_block(
                            name, totals[name], first, last, num_queries, num_keys
                        )
                        part += grad
        return tuple(
            totals[name].to(inputs[name].dtype) if name in totals else query.new_empty(0)
            for name in self._grads
        )
