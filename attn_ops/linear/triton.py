"""Linear attention on CUDA: launches the Triton kernels for the private ops.

Imported at the first CUDA launch. Without a denominator a pass is one march per result. With one,
and where a sequence is cut into segments because there are few heads, sums over chunks and segments
come first (triton_sums.py).

Letters: B batch, H query heads, Hk key/value heads, M queries, N keys, D query/key width,
F features, E value width, S packed sequences. Arguments are those of the private ops (see ops.py).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from attn_ops._heads import per_kv_head
from attn_ops._triton.tiles import strided
from attn_ops.linear import in_blocks
from attn_ops.linear.triton_backward import (
    grad_key_value_kernel,
    grad_numerator_kernel,
    grad_query_kernel,
)
from attn_ops.linear.triton_forward import forward_kernel
from attn_ops.linear.triton_problem import MAX_FEATURES, Problem, Tiles, describable
from attn_ops.linear.triton_step import step

__all__ = ["backward", "forward", "step"]


def forward(*args: Any) -> tuple[Tensor, ...]:
    """`attn::_linear_fwd`."""
    p = Problem(args)
    if p.features > MAX_FEATURES:
        return in_blocks.forward(*args)
    query, state, length = p.query, p.state, p.query.shape[2]
    normalized = p.eps is not None
    # No program reaches tokens behind the last packed sequence.
    new = query.new_empty if p.offsets is None else query.new_zeros
    out = new(*query.shape[:3], p.value_width)
    denominator = new(query.shape[:3] if normalized else (0,), dtype=torch.float32)
    final_state = query.new_empty(0 if state is None else state.shape, dtype=torch.float32)
    final_sum = query.new_empty(0, dtype=torch.float32)
    with torch.cuda.device_of(query):
        state_before = None if state is None else state.contiguous()
        states, final = p.segment_states(p.key, p.value, p.mask, state_before, reverse=False)
        sums = None
        if state is not None or (normalized and not p.adds_up_keys()):
            sums, final_sum = p.chunk_sums(p.key, None, p.mask, p.key_sum, reverse=False)
        key, value = (p.key, p.value) if p.causal else (None, None)
        tiles = p.by_columns()
        p.launch(
            forward_kernel, _walk(p, tiles, length, states), tiles.rows(query), tiles.rows(key),
            tiles.columns(value), p.mask, p.decay, p.offsets, states, tiles.sums(sums),
            tiles.columns(out),
            denominator if normalized else None,
            final_state if state is not None and final is None else None,
            length, _slots(sums), p.eps if normalized else 0.0,
            **tiles.constants(length),
        )  # fmt: skip
    if state is None:
        return out, denominator, final_state, query.new_empty(0, dtype=torch.float32)
    if final is not None:
        final_state = final.view(state.shape)
    return out, denominator, final_state, final_sum.view(p.key_sum.shape)


def _slots(sums: Tensor | None) -> int:
    """Slots per head."""
    return 0 if sums is None else sums.shape[1]


def _walk(p: Problem, tiles: Tiles, length: int, states: Tensor | None, spread: int = 0) -> Any:
    """The march over this many tokens; each segment has an entry of `states`, or all share one."""
    spread = 0 if tiles.by_features else spread
    if not p.causal or states is None or p.segments(length) == 1:
        return p.walk(length, p.kv_heads, tiles.parts, spread=spread)
    entries = states.shape[1]
    return p.walk(length, p.kv_heads, tiles.parts, states=entries, step=1, spread=spread)


# --- backward


def backward(*args: Any) -> tuple[Tensor, ...]:
    """`attn::_linear_bwd`: five gradients, of size [0] where the output mask says no."""
    (grad_out, grad_state, grad_key_sum), inputs, output_mask = args[:3], args[3:11], args[16]
    grad_out = grad_out if describable(grad_out) else grad_out.contiguous()
    p = Problem((*inputs, *args[13:16]), grad_out)
    if p.features > MAX_FEATURES:
        return in_blocks.backward(*args)
    wanted = {name for name, wants in zip(in_blocks.GRADS, output_mask) if wants}
    with torch.cuda.device_of(p.query):
        g, d = _grad_numerator(grad_out, *args[11:13])
        if d is None and grad_key_sum is not None:
            d = torch.zeros(p.query.shape[:3], dtype=torch.float32, device=p.query.device)
        grads: dict[str, Tensor] = {}
        if "query" in wanted:
            grads["query"] = _grad_query(p, g, d)
        if wanted - {"query"}:
            grads |= _grad_key_side(p, g, d, grad_state, grad_key_sum, wanted)
    return tuple(grads[n] if n in wanted else grad_out.new_empty(0) for n in in_blocks.GRADS)


def _grad_numerator(
    grad_out: Tensor, out: Tensor | None, denominator: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The gradient of what was divided, and of what it was divided by."""
    if out is None or denominator is None:
        return grad_out, None
    # A query that sees next to nothing is divided by eps: too much for float16.
    dtype = torch.float32 if grad_out.dtype == torch.float16 else grad_out.dtype
    g = grad_out.new_empty(grad_out.shape, dtype=dtype)
    d = torch.empty(denominator.shape, dtype=torch.float32, device=g.device)
    batch, heads, length, width = g.shape
    padded = triton.next_power_of_2(width)
    rows = max(8, 4096 // padded)
    programs = batch * heads * triton.cdiv(length, rows)
    if programs:
        grad_numerator_kernel[(programs,)](
            strided(grad_out), strided(out), denominator.contiguous(), strided(g), d, length, heads,
            E=width, PE=padded, C=rows, num_warps=4,
        )  # fmt: skip
    return g, d


def _new_gradient(p: Problem, x: Tensor, sums: int) -> Tensor:
    """A result for all query heads of x's rows and width; `sums` > 1 of them are added up."""
    sizes = (sums * x.shape[0], p.heads, *x.shape[2:])
    dtype = torch.float32 if sums > 1 or x.shape[1] != p.heads else x.dtype
    new = x.new_empty if p.offsets is None else x.new_zeros
    return new(sizes, dtype=dtype)


def _added(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x, from one for every part and query head."""
    grad = grad.unflatten(0, (-1, x.shape[0])).sum(0) if grad.shape[0] != x.shape[0] else grad
    return per_kv_head(grad, x.shape[1]).to(x.dtype)


def _grad_query(p: Problem, g: Tensor, d: Tensor | None) -> Tensor:
    length = g.shape[2]
    state = None if p.state is None else p.state.contiguous()
    states, _ = p.segment_states(p.key, p.value, p.mask, state, reverse=False)
    sums = None
    if d is not None:
        sums, _ = p.chunk_sums(p.key, None, p.mask, p.key_sum, reverse=False)
    tiles = p.by_features()
    grad = _new_gradient(p, p.query, 1 if tiles.by_features else tiles.parts)
    key, value = (p.key, p.value) if p.causal else (None, None)
    p.launch(
        grad_query_kernel, _walk(p, tiles, length, states, p.query.shape[0]),
        tiles.columns(g), d, tiles.rows(p.query), tiles.rows(key), tiles.columns(value), p.mask,
        p.decay, p.offsets, states, tiles.sums(sums), tiles.rows(grad), length, _slots(sums),
        **tiles.constants(length), BY_FEATURES=tiles.by_features,
    )  # fmt: skip
    return _added(grad, p.query)


March = tuple[Tiles, Tensor | None, Tensor | None]


def _marches(p: Problem, grads: dict[str, Tensor]) -> list[March]:
    """The reverse marches, and what each writes of the gradients of key and value.

    Both at once where one program has the whole state of a head, and registers for two results.
    """
    key, value = grads.get("key"), grads.get("value")
    by_features, by_columns = p.by_features(), p.by_columns()
    if by_features.parts == by_columns.parts == 1 and p.padded_features * p.padded_value <= 1 << 12:
        return [(by_columns, key, value)]
    marches: list[March] = []
    if key is not None:
        marches.append((by_features, key, None))
    if value is not None or key is None:
        marches.append((by_columns, None, value))
    return marches


def _grad_key_side(
    p: Problem,
    g: Tensor,
    d: Tensor | None,
    grad_state: Tensor | None,
    grad_key_sum: Tensor | None,
    wanted: set[str],
) -> dict[str, Tensor]:
    """Gradients of key, value, state and key_sum."""
    length = p.key.shape[2]
    grad_state = None if grad_state is None else grad_state.contiguous()
    states, before = p.segment_states(p.query, g, None, grad_state, reverse=True)
    sums = None
    if d is not None:
        sums, sum_before = p.chunk_sums(p.query, d, None, grad_key_sum, reverse=p.causal)
    grads: dict[str, Tensor] = {}
    if "key" in wanted:
        tiles = p.by_features()
        grads["key"] = _new_gradient(p, p.key, 1 if tiles.by_features else tiles.parts)
    if "value" in wanted:
        grads["value"] = _new_gradient(p, p.value, 1)
    initial = None
    if "state" in wanted:
        if before is None:
            initial = before = torch.empty(p.state.shape, dtype=torch.float32, device=g.device)
        grads["state"] = before.view(p.state.shape)
    if "key_sum" in wanted:
        if sums is None:
            sum_before = torch.zeros(p.key_sum.shape, dtype=torch.float32, device=g.device)
        grads["key_sum"] = sum_before.view(p.key_sum.shape)
    query, numerator = (p.query, g) if p.causal else (None, None)
    for tiles, key, value in _marches(p, grads):
        p.launch(
            grad_key_value_kernel, _walk(p, tiles, length, states, p.key.shape[0]),
            tiles.columns(numerator), d, tiles.rows(query), tiles.rows(p.key),
            tiles.columns(p.value), p.mask, p.decay, p.offsets, states, tiles.sums(sums),
            tiles.rows(key), tiles.columns(value), initial, length, _slots(sums),
            **tiles.constants(length), BY_FEATURES=tiles.by_features,
        )  # fmt: skip
    inputs = {"key": p.key, "value": p.value}
    return grads | {name: _added(grads[name], x) for name, x in inputs.items() if name in grads}
