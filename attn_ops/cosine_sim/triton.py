"""Cosine-sim attention on CUDA: launches the Triton kernels for the two private ops.

Imported at the first CUDA launch. Queries and keys are normalised once (triton_normalize.py), the
core works on unit vectors in the input's dtype (triton_forward.py, triton_backward.py,
triton_bias.py), and the gradients go back through the norm. `scale` stays out of the 16-bit operands.

Letters: B batch, H query heads, Hk key/value heads, M queries, N keys, D query/key width,
E value width. Arguments are those of the private ops (see ops.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from attn_ops._triton.bias import PairTerms
from attn_ops._triton.launch import Launch, Table, choose, dot_precision, launch
from attn_ops._triton.softmax import LOG2_E
from attn_ops._triton.tiles import padded, strided
from attn_ops._triton.visibility import Band, keys_seen, queries_seeing
from attn_ops.cosine_sim import triton_backward, triton_bias, triton_forward, triton_normalize
from attn_ops.cosine_sim.triton_launches import (
    FORWARD,
    GRAD_BIAS,
    GRAD_KEY_VALUE,
    GRAD_QUERY,
    GRAD_RELATIVE_BIAS,
)

_BITS_PER_NAT = LOG2_E.value
# Elements of a tile of the kernels that only read and write.
_STREAM = 4096


class Scoring(NamedTuple):
    """How kernels get from q̂·k̂ to a score: factor * head_scale[h] * q̂·k̂, then the pair terms."""

    factor: Any
    head_scale: Any
    terms: PairTerms
    num_heads: Any
    heads_per_group: Any
    num_queries: Any
    num_keys: Any


@dataclass
class _Core:
    """What the core kernels of one call share."""

    query: Tensor  # as it enters the dot product [B, H, M, D]
    key: Tensor
    value: Tensor
    scoring: Scoring
    constants: dict[str, Any]

    def operands(self) -> tuple[Any, ...]:
        return strided(self.query), strided(self.key), strided(self.value)

    def tiles(self, sizes: Launch, rows: str, columns: str) -> dict[str, Any]:
        return self.constants | {rows: sizes.rows, columns: sizes.columns}

    def sizes(self, table: Table) -> Launch:
        widths = self.query.shape[3], self.value.shape[3]
        plain = all(term is None for term in self.scoring.terms)
        return choose(table, self.query, *widths, plain=plain)


def _normalized(x: Tensor, gain: Tensor | None, groups: int) -> Tensor:
    """x [B, H, M, D] as it enters the dot product."""
    if not groups:
        return x
    batch, heads, rows, width = x.shape
    unit = x.new_empty(x.shape)
    columns = triton.next_power_of_2(width // groups)
    sizes = Launch(_STREAM // columns, columns, 4, 1)
    launch(
        triton_normalize.normalize_kernel, batch * heads * triton.cdiv(rows * groups, sizes.rows),
        sizes, strided(x), gain, unit, rows, heads, groups,
        WIDTH=width // groups, ROWS=sizes.rows, PADDED=columns,
    )  # fmt: skip
    return unit


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _core(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None,
    relative_bias: Tensor | None, head_scale: Tensor | None, query_gain: Tensor | None,
    key_gain: Tensor | None, scale: float, groups: int,
) -> _Core:  # fmt: skip
    batch, heads, num_queries, width = query.shape
    num_keys = key.shape[2]
    query = _normalized(query, _contiguous(query_gain), groups)
    key = _normalized(key, _contiguous(key_gain), groups)
    pairs = (batch, heads, num_queries, num_keys)
    terms = PairTerms(
        None if bias is None else strided(bias.expand(pairs)),
        None if relative_bias is None else strided(relative_bias[None, :, None]),
        None if mask is None else strided(mask.expand(pairs)),
    )
    bits = 1.0 if bias is None and relative_bias is None else _BITS_PER_NAT
    factor = scale * (_BITS_PER_NAT / bits)
    scoring = Scoring(
        factor, _contiguous(head_scale), terms, heads, heads // key.shape[1], num_queries, num_keys
    )
    constants = {
        "D": width, "E": value.shape[3], "BD": padded(width), "BE": padded(value.shape[3]),
        "BITS": bits, "PRECISION": dot_precision(),
    }  # fmt: skip
    return _Core(query, key, value, scoring, constants)


def _fixed_shift(core: _Core, unit: bool, scale: float, groups: int) -> float | None:
    """What to subtract from scores, in bits, where their bound |scale| * groups is close enough.

    Weights then lie between exp(-2 |scale| groups) and 1, and have to be normal numbers as operands
    of the product with the values. float16 gets another 14 bits from the other end of its range.
    """
    bound = abs(scale) * groups * _BITS_PER_NAT
    head_room, range_ = (14, 28) if core.query.dtype == torch.float16 else (0, 120)
    known = unit and core.scoring.head_scale is None and core.constants["BITS"] == 1.0
    return bound - head_room if known and 2 * bound <= range_ else None


def forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None,
    relative_bias: Tensor | None, head_scale: Tensor | None, query_gain: Tensor | None,
    key_gain: Tensor | None, sink: Tensor | None, start: Tensor | None, stop: Tensor | None,
    left: int, right: int, scale: float, groups: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`attn::_cosine_sim_fwd`: out [B, H, M, E] and lse [B, H, M] float32."""
    batch, heads, num_queries, _ = query.shape
    out = query.new_empty(batch, heads, num_queries, value.shape[3])
    lse = query.new_empty(batch, heads, num_queries, dtype=torch.float32)
    with torch.cuda.device_of(query):
        core = _core(
            query, key, value, mask, bias, relative_bias, head_scale, query_gain, key_gain, scale,
            groups,
        )  # fmt: skip
        unit = groups > 0 and query_gain is None and key_gain is None
        band = keys_seen(num_queries, key.shape[2], left, right, start, stop)
        sizes = core.sizes(FORWARD)
        launch(
            triton_forward.forward_kernel, batch * heads * triton.cdiv(num_queries, sizes.rows),
            sizes, *core.operands(), strided(out), lse, _contiguous(sink), core.scoring, band,
            _fixed_shift(core, unit, scale, groups), **core.tiles(sizes, "BM", "BN"),
        )  # fmt: skip
    return out, lse


@dataclass
class _Rows:
    """What the backward kernels read per query."""

    grad_out: Tensor
    lse: Tensor
    delta: Tensor

    def operands(self) -> tuple[Any, ...]:
        return strided(self.grad_out), self.lse, self.delta


def _delta(out: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Tensor:
    batch, heads, num_queries, width = out.shape
    delta = out.new_empty(batch, heads, num_queries, dtype=torch.float32)
    sizes = Launch(_STREAM // padded(width), padded(width), 4, 1)
    launch(
        triton_backward.delta_kernel, batch * heads * triton.cdiv(num_queries, sizes.rows), sizes,
        strided(out), strided(grad_out),
        None if grad_lse is None else strided(grad_lse.unsqueeze(3)),
        delta, num_queries, heads, E=width, BM=sizes.rows, BE=sizes.columns,
    )  # fmt: skip
    return delta


def _grad_target(x: Tensor, raw: bool) -> Tensor:
    """Where the core writes: the gradient itself, or what `_through_norm` starts from."""
    return torch.empty(x.shape, dtype=torch.float32 if raw else x.dtype, device=x.device)


def _grad_query(core: _Core, rows: _Rows, band: Band, query: Tensor, raw: bool, scale: float) -> Tensor:
    grad = _grad_target(query, raw)
    sizes = core.sizes(GRAD_QUERY)
    batch, heads, num_queries, _ = query.shape
    launch(
        triton_backward.grad_query_kernel, batch * heads * triton.cdiv(num_queries, sizes.rows),
        sizes, *core.operands(), *rows.operands(), strided(grad), 1.0 if raw else scale,
        core.scoring, band, **core.tiles(sizes, "BM", "BN"),
    )  # fmt: skip
    return grad


def _grad_key_value(
    core: _Core, rows: _Rows, band: Band, key: Tensor | None, value: Tensor | None,
    head_share: Tensor | None, raw: bool, scale: float,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of `key` and `value`; None where they are None."""
    grad_key = None if key is None else _grad_target(key, raw)
    grad_value = None if value is None else _grad_target(value, False)
    batch, kv_heads, num_keys, _ = core.key.shape
    sizes = core.sizes(GRAD_KEY_VALUE)
    launch(
        triton_backward.grad_key_value_kernel, batch * kv_heads * triton.cdiv(num_keys, sizes.rows),
        sizes, *core.operands(), *rows.operands(),
        None if grad_key is None else strided(grad_key),
        None if grad_value is None else strided(grad_value),
        1.0 if raw else scale, head_share, core.scoring, band, **core.tiles(sizes, "BN", "BM"),
    )  # fmt: skip
    return grad_key, grad_value


def _through_norm(
    raw: Tensor, x: Tensor, gain: Tensor | None, head_scale: Tensor | None, scale: float,
    groups: int, wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x, gain and head_scale (those that are wanted) from the core's raw gradient."""
    batch, heads, rows, width = x.shape
    pieces = max(groups, 1)
    columns = triton.next_power_of_2(width // pieces)
    sizes = Launch(_STREAM // columns, columns, 4, 1)
    parts = (batch, heads, pieces, triton.cdiv(rows, sizes.rows))
    grad_x = _grad_target(x, False) if wanted[0] else None
    gain_parts = raw.new_empty(*parts, width // pieces) if wanted[1] else None
    scale_parts = raw.new_empty(parts) if wanted[2] else None
    launch(
        triton_normalize.normalize_backward_kernel, parts[0] * parts[1] * parts[2] * parts[3], sizes,
        raw, strided(x), gain, head_scale, scale, grad_x, gain_parts, scale_parts, rows, heads,
        pieces, WIDTH=width // pieces, ROWS=sizes.rows, PADDED=columns, NORM=groups or None,
    )  # fmt: skip
    grad_gain = None if gain_parts is None else gain_parts.sum((0, 3)).flatten(1)
    return grad_x, grad_gain, None if scale_parts is None else scale_parts.sum((0, 2, 3)) * scale


def _head_shares(head_scale: Tensor, kv_heads: int) -> tuple[Tensor, Tensor]:
    """head_scale [H] as (factors of at most 1 [H], the largest of each group [Hk]).

    The sum over the heads of a group is taken with the first, so that 16 bits hold its terms.
    """
    by_group = head_scale.view(kv_heads, -1)
    largest = by_group.abs().amax(1)
    tiny = torch.finfo(head_scale.dtype).tiny
    return (by_group / largest.clamp_min(tiny)[:, None]).flatten(), largest


def _grad_bias(core: _Core, rows: _Rows, band: Band, bias: Tensor) -> Tensor:
    grad = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    sizes = core.sizes(GRAD_BIAS)
    full = (*core.query.shape[:3], core.key.shape[2])
    tile = (1, 1, sizes.rows, sizes.columns)
    # In each dimension programs own the tiles, or each of them sums over all.
    counts = [triton.cdiv(size, step) for size, step in zip(full, tile)]
    own = [1 if bias.shape[dim] == 1 else counts[dim] for dim in range(4)]
    summed = [counts[dim] if bias.shape[dim] == 1 else 1 for dim in range(4)]
    launch(
        triton_bias.grad_bias_kernel, own[0] * own[1] * own[2] * own[3], sizes,
        *core.operands(), *rows.operands(), grad, bias.shape[2], bias.shape[3], *own[1:], *summed,
        core.scoring, band, **core.tiles(sizes, "BM", "BN"),
    )  # fmt: skip
    return grad


def _grad_relative_bias(core: _Core, rows: _Rows, band: Band, relative_bias: Tensor) -> Tensor:
    heads, diagonals = relative_bias.shape
    grad = relative_bias.new_empty(heads, diagonals)
    sizes = core.sizes(GRAD_RELATIVE_BIAS)
    launch(
        triton_bias.grad_relative_bias_kernel, heads * triton.cdiv(diagonals, sizes.columns), sizes,
        *core.operands(), *rows.operands(), grad, core.query.shape[0], core.scoring, band,
        **core.tiles(sizes, "BM", "BO"),
    )  # fmt: skip
    return grad


def _grad_sink(sink: Tensor, rows: _Rows) -> Tensor:
    weights = torch.exp(sink[:, None] - rows.lse)  # lse is at least the sink
    return -(weights * rows.delta).sum((0, 2))


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
    mask: Tensor | None, bias: Tensor | None, relative_bias: Tensor | None,
    head_scale: Tensor | None, query_gain: Tensor | None, key_gain: Tensor | None,
    sink: Tensor | None, start: Tensor | None, stop: Tensor | None, out: Tensor, lse: Tensor,
    left: int, right: int, scale: float, groups: int, output_mask: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """`attn::_cosine_sim_bwd`: nine gradients, of size [0] where output_mask says no."""
    wants = dict(zip(_GRADS, output_mask))
    grads: dict[str, Tensor | None] = {}
    num_queries, num_keys = query.shape[2], key.shape[2]
    head_scale, query_gain, key_gain = map(_contiguous, (head_scale, query_gain, key_gain))
    with torch.cuda.device_of(query):
        core = _core(
            query, key, value, mask, bias, relative_bias, head_scale, query_gain, key_gain, scale,
            groups,
        )  # fmt: skip
        rows = _Rows(grad_out, lse.contiguous(), _delta(out, grad_out, grad_lse))
        band = keys_seen(num_queries, num_keys, left, right, start, stop)
        raw = groups > 0 or head_scale is not None
        wanted = wants["query"], wants["query_gain"], wants["head_scale"]
        if any(wanted):
            grad = _grad_query(core, rows, band, query, raw, scale)
            grads["query"], grads["query_gain"], grads["head_scale"] = (
                _through_norm(grad, query, query_gain, head_scale, scale, groups, wanted)
                if raw else (grad, None, None)
            )  # fmt: skip
        wanted = wants["key"], wants["key_gain"], False
        if any(wanted) or wants["value"]:
            share = largest = None
            if head_scale is not None:
                share, largest = _head_shares(head_scale, key.shape[1])
            grads["key"], grads["value"] = _grad_key_value(
                core, rows, queries_seeing(num_queries, num_keys, left, right, start, stop),
                key if any(wanted) else None, value if wants["value"] else None, share, raw, scale,
            )  # fmt: skip
            if any(wanted) and raw:
                grads["key"], grads["key_gain"], _ = _through_norm(
                    grads["key"], key, key_gain, largest, scale, groups, wanted
                )
        if wants["bias"]:
            grads["bias"] = _grad_bias(core, rows, band, bias)
        if wants["relative_bias"]:
            grads["relative_bias"] = _grad_relative_bias(core, rows, band, relative_bias)
        if wants["sink"]:
            grads["sink"] = _grad_sink(sink, rows)
    return tuple(grads[name] if wants[name] else query.new_empty(0) for name in _GRADS)


_GRADS = "query key value bias relative_bias head_scale query_gain key_gain sink".split()
