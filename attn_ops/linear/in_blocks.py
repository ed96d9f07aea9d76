"""The private ops by the reference formula, a block of tokens at a time: no [M, N] tensor.

They serve wherever there is no kernel: CPUs without the native library, float64 on CUDA, and the
devices of other backends. 16-bit inputs are computed in float32. The state carries what earlier
blocks have seen; packed sequences see their keys block by block instead, in quadratic time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from attn_ops import _autograd
from attn_ops._checks import compute_dtype
from attn_ops.feature_maps import num_features
from attn_ops.linear import reference, reference_backward

BLOCK = 256
_FORWARD = "query key value mask decay state key_sum offsets causal eps feature_map".split()
GRADS = "query key value state key_sum".split()  # what the private backward returns, in order
Step = tuple[int, int, int, int]  # queries first..last, keys first..last


def _in_compute_dtype(values: Sequence[Any]) -> dict[str, Any]:
    args = dict(zip(_FORWARD, values, strict=True))
    dtype = compute_dtype(args["query"].dtype)
    return args | {name: args[name].to(dtype) for name in ("query", "key", "value")}


def forward_formula(*values: Any) -> tuple[Tensor, ...]:
    """`attn::_linear_fwd` as one differentiable formula that does hold [M, N] scores."""
    out, *rest = reference.forward(**_in_compute_dtype(values))
    return out.to(values[0].dtype), *rest


def _gradients(grads: Sequence[Tensor | None], values: Sequence[Any], names: Sequence[str]) -> Any:
    """Gradients of the named arguments, from those of (out, final_state, final_key_sum)."""
    places = [_FORWARD.index(name) for name in names]

    def results(*args: Any) -> tuple[Tensor, ...]:
        out, _, *finals = forward_formula(*args)
        return (out, *finals)

    return _autograd.vjp_of_formula(results, values, grads, places)


def backward_formula(*values: Any) -> tuple[Tensor, ...]:
    """`attn::_linear_bwd` as a differentiable formula: the gradients of `forward_formula`."""
    grads, inputs, options, output_mask = values[:3], values[3:11], values[13:16], values[16]
    wanted = [n for n, needed in zip(GRADS, output_mask) if needed]
    results = _gradients(grads, (*inputs, *options), wanted)
    return tuple(
        values[0].new_empty(0) if grad is None else grad
        for grad in (results[_FORWARD.index(name)] for name in GRADS)
    )


def grad_decay_formula(*values: Any) -> Tensor:
    """`attn::_linear_grad_decay` as a differentiable formula."""
    grads, inputs, options = values[:3], values[3:11], (True, *values[11:])
    return _gradients(grads, (*inputs, *options), ["decay"])[_FORWARD.index("decay")]


# --- in blocks


def _steps(args: dict[str, Any]) -> Iterator[Step]:
    """Parts of queries and keys, such that the state carries all that connects them."""
    num_queries, num_keys = args["query"].shape[2], args["key"].shape[2]

    def blocks(length: int) -> Iterator[tuple[int, int]]:
        for first in range(0, length, BLOCK):
            yield first, min(first + BLOCK, length)

    if args["offsets"] is not None:
        for first, last in blocks(num_queries):
            yield first, last, 0, num_keys
    elif args["causal"]:
        for first, last in blocks(num_queries):
            yield first, last, first, last
    else:
        for first, last in blocks(num_keys):
            yield 0, 0, first, last
        for first, last in blocks(num_queries):
            yield first, last, 0, 0


def _of_step(args: dict[str, Any], step: Step) -> dict[str, Any]:
    first_query, last_query, first_key, last_key = step
    mask = args["mask"]
    return args | {
        "query": args["query"][:, :, first_query:last_query],
        "key": args["key"][:, :, first_key:last_key],
        "value": args["value"][:, :, first_key:last_key],
        "mask": None if mask is None else mask[..., first_key:last_key],
        "first": 0 if args["offsets"] is None else first_query,
    }


def _initial_state(args: dict[str, Any]) -> dict[str, Any]:
    """The state before the first step; packed sequences have none."""
    if args["offsets"] is not None or args["state"] is not None:
        return {"state": args["state"], "key_sum": args["key_sum"]}
    query, value = args["query"], args["value"]
    features = num_features(args["feature_map"], query.shape[3])
    key_sum = query.new_zeros(*query.shape[:2], features)
    return {"state": query.new_zeros(*key_sum.shape, value.shape[3]), "key_sum": key_sum}


def forward(*values: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`attn::_linear_fwd`."""
    query, value = values[0], values[2]
    args = _in_compute_dtype(values)
    out = query.new_empty(*query.shape[:3], value.shape[3])
    dtype = args["query"].dtype
    normalized = args["eps"] is not None
    denominator = query.new_empty(query.shape[:3] if normalized else (0,), dtype=dtype)
    carried = _initial_state(args)
    with torch.autocast(query.device.type, enabled=False):
        for step in _steps(args):
            rows = slice(step[0], step[1])
            results = reference.forward(**(_of_step(args, step) | carried))
            out[:, :, rows] = results[0]
            if normalized:
                denominator[:, :, rows] = results[1]
            if carried["state"] is not None:
                carried = {"state": results[2], "key_sum": results[3]}
    if args["state"] is None:
        return out, denominator, query.new_empty(0, dtype=dtype), query.new_empty(0, dtype=dtype)
    # Without a single step they are the arguments themselves, which an op may not return.
    finals = (carried[name].clone(memory_format=torch.contiguous_format) for name in carried)
    return out, denominator, *finals


def _backward(
    grads: Sequence[Tensor | None], values: Sequence[Any], wanted: Sequence[str]
) -> dict[str, Tensor]:
    """The wanted gradients, from those of out and of the final state and key_sum."""
    args = _in_compute_dtype(values)
    dtype = args["query"].dtype
    with torch.autocast(values[0].device.type, enabled=False):
        steps, carried = list(_steps(args)), [_initial_state(args)]
        for step in steps[:-1]:  # nothing comes after the last one
            results = reference.forward(**(_of_step(args, step) | carried[-1]))
            with_state = carried[-1]["state"] is not None
            after = {"state": results[2], "key_sum": results[3]}
            carried.append(after if with_state else carried[-1])
        totals = {
            name: torch.zeros_like(args[name], memory_format=torch.contiguous_format)
            for name in wanted
            if args[name] is not None
        }
        grad_carried: dict[str, Tensor | None] = {"state": grads[1], "key_sum": grads[2]}
        for step, before in zip(reversed(steps), reversed(carried)):
            block = _of_step(args, step) | before
            grad_out = grads[0][:, :, step[0] : step[1]].to(dtype)  # type: ignore[index]
            of_block = reference_backward.backward(block, grad_out, *grad_carried.values())
            for name in ("query", "key", "value", "decay"):
                if name in totals:
                    first, last = step[:2] if name == "query" else step[2:]
                    part = totals[name]
                    part = part if name == "decay" else part[:, :, first:last]
                    part += of_block[name]
            grad_carried = {name: of_block.get(name) for name in grad_carried}
    for name, grad in grad_carried.items():
        if name in totals and grad is not None:
            totals[name] += grad
    inputs = dict(zip(_FORWARD, values))
    return {name: total.to(inputs[name].dtype) for name, total in totals.items()}


def backward(*values: Any) -> tuple[Tensor, ...]:
    """`attn::_linear_bwd`."""
    grads, inputs, options, output_mask = values[:3], values[3:11], values[13:16], values[16]
    wanted = [name for name, needed in zip(GRADS, output_mask) if needed]
    results = _backward(grads, (*inputs, *options), wanted)
    return tuple(results.get(name, values[0].new_empty(0)) for name in GRADS)


def grad_decay(*values: Any) -> Tensor:
    """`attn::_linear_grad_decay`: for every device, since a learnable decay is rare."""
    grads, inputs, options = values[:3], values[3:11], (True, *values[11:])
    return _backward(grads, (*inputs, *options), ["decay"])["decay"]


def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor,
    key_sum: Tensor,
    decay: Tensor | None,
    eps: float | None,
    feature_map: str,
) -> Tensor:
    """`attn::_linear_step`: one token, the state and key_sum updated in place."""
    options = (None, decay, state, key_sum, None, True, eps, feature_map)
    args = _in_compute_dtype((query, key, value, *options))
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        out, _, new_state, new_key_sum = reference.forward(**args)
        state.copy_(new_state)
        key_sum.copy_(new_key_sum)
    return out.to(query.dtype)
