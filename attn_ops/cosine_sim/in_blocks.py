"""The private ops by the reference formulas, a block of queries at a time: no [M, N] tensor.

They serve wherever there is no kernel: CPUs without the native library, float64 on CUDA, and the
devices of other backends. 16-bit inputs are computed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from attn_ops._checks import compute_dtype
from attn_ops.cosine_sim import reference

# Scores of one block: 32 MiB of float32.
BLOCK_SCORES = 1 << 23


def _query_blocks(query: Tensor, key: Tensor) -> Iterator[tuple[int, int]]:
    batch, heads, num_queries, _ = query.shape
    size = max(1, BLOCK_SCORES // max(1, batch * heads * key.shape[2]))
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


_FORWARD = (
    "query key value mask bias relative_bias head_scale query_gain key_gain sink start stop "
    "left right scale groups"
).split()
_BACKWARD = (
    "grad_out grad_lse query key value mask bias relative_bias head_scale query_gain key_gain sink "
    "start stop out lse left right scale groups"
).split()
_GRADS = ("query key value bias relative_bias head_scale query_gain key_gain sink").split()
_PER_QUERY = ("query", "grad_out", "grad_lse", "out", "lse")


def _in_compute_dtype(names: list[str], values: tuple[Any, ...]) -> dict[str, Any]:
    args = dict(zip(names, values, strict=True))
    dtype = compute_dtype(args["query"].dtype)
    for name in ("query", "key", "value", "grad_out", "out"):
        if name in args:
            args[name] = args[name].to(dtype)
    return args


def forward_formula(*values: Any) -> tuple[Tensor, Tensor]:
    """`attn::_cosine_sim_fwd` as one differentiable formula that does hold [M, N] scores."""
    out, lse = reference.forward(**_in_compute_dtype(_FORWARD, values))
    return out.to(values[0].dtype), lse


def backward_formula(*values: Any) -> tuple[Tensor, ...]:
    """`attn::_cosine_sim_bwd` likewise."""
    inputs = dict(zip(_BACKWARD, values[:-1], strict=True))
    grads = reference.backward(**_in_compute_dtype(_BACKWARD, values[:-1]))
    return tuple(
        inputs["query"].new_empty(0) if grad is None or not needed else grad.to(inputs[name].dtype)
        for name, grad, needed in zip(_GRADS, grads, values[-1], strict=True)
    )


def forward(*values: Any) -> tuple[Tensor, Tensor]:
    """`attn::_cosine_sim_fwd`."""
    query, key, value = values[:3]
    batch, heads, num_queries, _ = query.shape
    out = query.new_empty(batch, heads, num_queries, value.shape[3])
    lse = query.new_empty(batch, heads, num_queries, dtype=compute_dtype(query.dtype))
    with torch.autocast(query.device.type, enabled=False):
        args = _in_compute_dtype(_FORWARD, values)
        for first, last in _query_blocks(query, key):
            block = args | _visibility_of_block(args, num_queries, key.shape[2], first, last)
            block["query"] = _rows(args["query"], 2, first, last)
            block_out, block_lse = reference.forward(**block)
            out[:, :, first:last] = block_out
            lse[:, :, first:last] = block_lse
    return out, lse


def backward(*values: Any) -> tuple[Tensor, ...]:
    """`attn::_cosine_sim_bwd`."""
    inputs, output_mask = dict(zip(_BACKWARD, values[:-1], strict=True)), values[-1]
    query, key = inputs["query"], inputs["key"]
    num_queries, num_keys = query.shape[2], key.shape[2]
    with torch.autocast(query.device.type, enabled=False):
        args = _in_compute_dtype(_BACKWARD, values[:-1])
        totals = {
            name: torch.zeros(inputs[name].shape, dtype=args[name].dtype, device=query.device)
            for name, needed in zip(_GRADS, output_mask, strict=True)
            if needed
        }
        for first, last in _query_blocks(query, key):
            place = _visibility_of_block(args, num_queries, num_keys, first, last)
            rows = {name: _rows(args[name], 2, first, last) for name in _PER_QUERY}
            grads = reference.backward(**(args | place | rows))
            for name, grad in zip(_GRADS, grads, strict=True):
                if name in totals and grad is not None:
                    _part_of_block(name, totals[name], first, last, num_queries, num_keys).add_(
                        grad
                    )
    return tuple(
        totals[name].to(inputs[name].dtype) if name in totals else query.new_empty(0)
        for name in _GRADS
    )


def _part_of_block(
    name: str, total: Tensor, first: int, last: int, num_queries: int, num_keys: int
) -> Tensor:
    """The part of a gradient that queries first..last add to."""
    if name == "query" or (name == "bias" and total.shape[2] != 1):
        return total.narrow(2, first, last - first)
    if name == "relative_bias":
        return total.narrow(1, num_queries - last, last - first + num_keys - 1)
    return total
