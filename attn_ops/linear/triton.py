"""Linear attention on CUDA: launches the Triton kernels for the private ops.

Imported at the first CUDA launch. Without a denominator a pass is one march per result. With one,
and where a sequence is cut into segments because there are few heads, sums over chunks and segments
come first (triton_sums.py).

Letters: B batch, H query heads, Hk key/value heads, M queries, N keys, D query/key width,
F features, E value width, S packed sequences. Arguments are those of the private ops (see ops.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from attn_ops import _ahead
from attn_ops._heads import per_kv_head
from attn_ops._triton.descriptors import describable
from attn_ops._triton.tiles import strided
from attn_ops.linear import in_blocks
from attn_ops.linear.triton_backward import (
    grad_key_value_kernel,
    grad_query_kernel,
    rows_kernel,
)
from attn_ops.linear.triton_forward import forward_kernel
from attn_ops.linear.triton_problem import MAX_FEATURES, Problem, Sums, Tiles, Weights
from attn_ops.linear.triton_step import step

__all__ = ["backward", "forward", "step"]


def forward(*args: Any) -> tuple[Tensor, ...]:
    """`attn::_linear_fwd`."""
    p = Problem(args)
    if p.features > MAX_FEATURES:
        _ahead.leave()
        return in_blocks.forward(*args)
    query, state, length = p.query, p.state, p.query.shape[2]
    normalized, carried = p.eps is not None, state is not None
    # No program reaches tokens behind the last packed sequence.
    new = query.new_empty if p.offsets is None else query.new_zeros
    out = new(*query.shape[:3], p.value_width)
    denominator = new(query.shape[:3] if normalized else (0,), dtype=torch.float32)
    with torch.cuda.device_of(query):
        before, final = p.segment_sums(
            p.key, p.value, p.mask, Weights(normalized or carried), _contiguous(state, p.key_sum),
            reverse=False,
        )  # fmt: skip
        written = Sums(None, None)
        if carried and final.states is None:
            final = written = _like(state, p.key_sum)
        key, value = (p.key, p.value) if p.causal else (None, None)
        tiles = p.by_columns()
        p.launch(
            forward_kernel, _walk(p, tiles, length, before), tiles.rows(query), tiles.rows(key),
            tiles.columns(value), p.mask, p.decay, p.offsets, *before, tiles.columns(out),
            denominator if normalized else None, *written, length, p.eps if normalized else 0.0,
            writes=(out, denominator, *written), **tiles.constants(length),
        )  # fmt: skip
    none = query.new_empty(0, dtype=torch.float32)
    if state is None:
        return out, denominator, none, none.clone()
    return out, denominator, *_shaped(final, state, p.key_sum)


def _contiguous(state: Tensor | None, key_sum: Tensor | None) -> Sums:
    """As kernels take them."""
    return Sums(*(None if x is None else x.contiguous() for x in (state, key_sum)))


def _like(state: Tensor, key_sum: Tensor) -> Sums:
    """Room for their like, contiguous."""
    return Sums(*(x.new_empty(x.shape) for x in (state, key_sum)))


def _shaped(sums: Sums, state: Tensor, key_sum: Tensor) -> tuple[Tensor, ...]:
    """[S*H, ...] as state and key_sum are."""
    pairs = zip(sums, (state, key_sum))
    return tuple(x.reshape(y.shape).contiguous() for x, y in pairs if x is not None)


def _walk(p: Problem, tiles: Tiles, length: int, before: Sums, spread: int = 0) -> Any:
    """The march over this many tokens; each segment has an entry of its own, or all share one."""
    spread = 0 if tiles.by_features else spread
    segments = p.segments(length)
    if not p.causal or before.states is None or segments == 1:
        return p.walk(length, p.kv_heads, tiles.parts, spread=spread)
    return p.walk(length, p.kv_heads, tiles.parts, states=segments + 1, step=1, spread=spread)


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
        rows = _rows(grad_out, args[11], args[12], grad_key_sum)
        grads: dict[str, Tensor] = {}
        if "query" in wanted:
            grads["query"] = _grad_query(p, rows)
        if wanted - {"query"}:
            grads |= _grad_key_side(p, rows, _contiguous(grad_state, grad_key_sum), wanted)
    return tuple(grads[n] if n in wanted else grad_out.new_empty(0) for n in in_blocks.GRADS)


class Rows(NamedTuple):
    """What the backward knows of queries: grad_out, and of `rows_kernel` d and 1 / denominator.

    d is None where no gradient goes through key sums, the last where nothing was divided.
    """

    grad_out: Tensor
    d: Tensor | None
    inverse: Tensor | None


def _rows(
    grad_out: Tensor, out: Tensor | None, denominator: Tensor | None, grad_key_sum: Tensor | None
) -> Rows:
    batch, heads, length, width = grad_out.shape
    d = torch.empty(batch, heads, length, dtype=torch.float32, device=grad_out.device)
    if out is None or denominator is None:
        return Rows(grad_out, None if grad_key_sum is None else d.zero_(), None)
    inverse = torch.empty_like(d)
    padded = triton.next_power_of_2(width)
    rows = max(8, 4096 // padded)
    programs = batch * heads * triton.cdiv(length, rows)
    if programs:
        rows_kernel[(programs,)](
            strided(grad_out), strided(out), denominator.contiguous(), inverse, d, length, heads,
            E=width, PE=padded, C=rows, num_warps=4,
        )  # fmt: skip
    return Rows(grad_out, d, inverse)


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


def _grad_query(p: Problem, rows: Rows) -> Tensor:
    length = p.query.shape[2]
    before, _ = p.segment_sums(
        p.key, p.value, p.mask, Weights(rows.d is not None),
        _contiguous(p.state, p.key_sum), reverse=False,
    )  # fmt: skip
    tiles = p.by_features()
    grad = _new_gradient(p, p.query, 1 if tiles.by_features else tiles.parts)
    key, value = (p.key, p.value) if p.causal else (None, None)
    p.launch(
        grad_query_kernel, _walk(p, tiles, length, before, p.query.shape[0]),
        tiles.columns(rows.grad_out), *rows[1:], tiles.rows(p.query), tiles.rows(key),
        tiles.columns(value), p.mask, p.decay, p.offsets, *before, tiles.rows(grad), length,
        **tiles.constants(length), BY_FEATURES=tiles.by_features, spared=_spared(p),
    )  # fmt: skip
    return _added(grad, p.query)


def _spared(p: Problem) -> int:
    """Stages that gradients of taylor's features leave no shared memory for."""
    return 1 if p.blocks > 1 else 0


March = tuple[Tiles, Tensor | None, Tensor | None]


def _marches(p: Problem, grads: dict[str, Tensor]) -> list[March]:
    """The reverse marches, and what each writes of the gradients of key and value.

    Both at once where one program has the whole state of a head, and registers for two results.
    """
    key, value = grads.get("key"), grads.get("value")
    by_features, by_columns = p.by_features(), p.by_columns()
    if (
        by_features.parts == by_columns.parts == 1
        and p.padded_features * p.blocks * p.padded_value <= 1 << 12
    ):
        return [(by_columns, key, value)]
    marches: list[March] = []
    if key is not None:
        marches.append((by_features, key, None))
    if value is not None or key is None:
        marches.append((by_columns, None, value))
    return marches


def _grad_key_side(p: Problem, rows: Rows, after: Sums, wanted: set[str]) -> dict[str, Tensor]:
    """Gradients of key, value, state and key_sum; `after`: those of the final ones."""
    length = p.key.shape[2]
    before, final = p.segment_sums(
        p.query, rows.grad_out, None, Weights(rows.d is not None, *rows[1:]), after,
        reverse=True,
    )  # fmt: skip
    grads: dict[str, Tensor] = {}
    if "key" in wanted:
        tiles = p.by_features()
        grads["key"] = _new_gradient(p, p.key, 1 if tiles.by_features else tiles.parts)
    if "value" in wanted:
        grads["value"] = _new_gradient(p, p.value, 1)
    written = Sums(None, None)
    if wanted & {"state", "key_sum"}:
        if final.states is None:
            final = written = _like(p.state, p.key_sum)
        if rows.d is None:
            written = Sums(written.states, None)
            final = Sums(final.states, torch.zeros_like(p.key_sum))
        grads["state"], grads["key_sum"] = _shaped(final, p.state, p.key_sum)
    query, grad_out = (p.query, rows.grad_out) if p.causal else (None, None)
    for tiles, key, value in _marches(p, grads):
        p.launch(
            grad_key_value_kernel, _walk(p, tiles, length, before, p.key.shape[0]),
            tiles.columns(grad_out), *rows[1:], tiles.rows(query), tiles.rows(p.key),
            tiles.columns(p.value), p.mask, p.decay, p.offsets, *before, tiles.rows(key),
            tiles.columns(value), *written, length,
            **tiles.constants(length), BY_FEATURES=tiles.by_features,
            spared=0 if key is None else _spared(p),
        )  # fmt: skip
    inputs = {"key": p.key, "value": p.value}
    return grads | {name: _added(grads[name], x) for name, x in inputs.items() if name in grads}
