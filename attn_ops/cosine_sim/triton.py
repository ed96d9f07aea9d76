"""Cosine-sim attention on CUDA: launches the Triton kernels for the two private ops.

Imported at the first CUDA launch. Queries and keys are normalised once (triton_normalize.py), the
core works on unit vectors in the input's dtype (triton_forward.py, triton_backward.py,
triton_bias.py), and the gradients go back through the norm. `scale` stays out of 16-bit operands.
What the CUDA library has kernels for goes there (cuda.py).

Letters: B batch, H query heads, Hk key/value heads, M queries, N keys, D query/key width,
E value width. Arguments are those of the private ops (see ops.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from attn_ops._triton.descriptors import describable, tiles
from attn_ops._triton.launch import Launch, choose, launch
from attn_ops._triton.products import THREE, TWO, split
from attn_ops._triton.tiles import row_major, strided
from attn_ops._triton.visibility import Band
from attn_ops.cosine_sim import (
    cuda,
    triton_backward,
    triton_bias,
    triton_decode,
    triton_diagonals,
    triton_forward,
    triton_normalize,
)
from attn_ops.cosine_sim.triton_core import (
    Core,
    Inputs,
    contiguous,
    fixed_shift,
    prepare,
    splits,
    stream,
)
from attn_ops.cosine_sim.triton_launches import (
    FORWARD,
    GRAD_BIAS,
    GRAD_KEY_VALUE,
    GRAD_QUERY,
    GRAD_QUERY_BIAS,
    GRAD_RELATIVE_BIAS,
)

# What the private backward returns, in order.
GRADS = "query key value bias relative_bias head_scale query_gain key_gain sink".split()


def forward(*args: Any) -> tuple[Tensor, Tensor]:
    """`attn::_cosine_sim_fwd`: out [B, H, M, E] and lse [B, H, M] float32."""
    inputs = Inputs(*args)
    shift = fixed_shift(inputs)
    if cuda.serves(inputs, shift):
        return cuda.forward(inputs)
    if inputs.relative_bias is not None:
        shift = None  # Triton's kernels find the running maximum
    if shift is not None and triton_decode.serves(inputs):
        return triton_decode.forward(inputs, shift)
    batch, heads, num_queries, _ = inputs.query.shape
    out = inputs.query.new_empty(batch, heads, num_queries, inputs.value.shape[3])
    lse = inputs.query.new_empty(batch, heads, num_queries, dtype=torch.float32)
    with torch.cuda.device_of(inputs.query):
        # Queries of 16 bits go to the matrix units from registers, where they can be normalised.
        raw = inputs.groups == 1 and inputs.query_gain is None
        raw = raw and (out.element_size() == 2 or splits(inputs, FORWARD))
        core = prepare(inputs, raw_query=raw, squares=True)
        if splits(inputs, FORWARD):
            scores = TWO if inputs.are_bounded() else THREE
            core = core.split(scores, *(["key"] if raw else ["query", "key"]))
        sizes = core.sizes(FORWARD)
        launch(
            triton_forward.forward_kernel, batch * heads * triton.cdiv(num_queries, sizes.rows),
            sizes, *core.operands(sizes.rows, sizes.columns),
            tiles(out, sizes.rows, core.constants["BE"]), lse, contiguous(inputs.sink),
            core.scoring, core.terms, inputs.keys_seen(), shift, writes=(out, lse),
            **core.constants, BM=sizes.rows, BN=sizes.columns, SCORES=core.scores, NORMALIZE=raw,
        )  # fmt: skip
    return out, lse


def backward(grad_out: Tensor, grad_lse: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    """`attn::_cosine_sim_bwd`: nine gradients, of size [0] where the output mask says no."""
    inputs = Inputs(*args[:12], *args[14:18])
    out, lse, output_mask = args[12], args[13], args[18]
    wanted = {name for name, wants in zip(GRADS, output_mask) if wants}
    if cuda.serves_backward(inputs, fixed_shift(inputs), wanted):
        found = cuda.backward(inputs, grad_out, grad_lse, out, lse, wanted)
        return tuple(found[x] if x in found else inputs.query.new_empty(0) for x in GRADS)
    with torch.cuda.device_of(inputs.query):
        core, gradient = prepare(inputs, squares=True), row_major(grad_out)
        if splits(inputs, GRAD_KEY_VALUE):
            core, gradient = core.split(THREE, "query", "key"), split(gradient, THREE)
        rows = Rows(gradient, lse.contiguous(), _delta(out, grad_out, grad_lse))
        grads: dict[str, Tensor | None] = {}
        batches = _shares_rows(inputs, inputs.keys_seen())
        if batches and "bias" in wanted and "query" in wanted:
            grads |= _query_and_bias(inputs, core, rows, inputs.keys_seen(), batches)
        elif wanted & {"query", "query_gain", "head_scale"}:
            grads |= _query_side(inputs, core, rows, wanted)
        if wanted & {"key", "key_gain", "value"}:
            grads |= _key_side(inputs, core, rows, wanted)
        if "bias" in wanted - grads.keys() and inputs.bias is not None:
            grads["bias"] = _grad_bias(core, rows, inputs.keys_seen(), inputs.bias)
        if "relative_bias" in wanted and inputs.relative_bias is not None:
            grads["relative_bias"] = _grad_relative_bias(core, rows, inputs.keys_seen())
        if "sink" in wanted and inputs.sink is not None:
            # lse is at least the sink, so these weights are at most 1.
            weights = torch.exp(inputs.sink[:, None] - rows.lse)
            grads["sink"] = -(weights * rows.delta).sum((0, 2))
    results = [grads.get(name) if name in wanted else None for name in GRADS]
    return tuple(inputs.query.new_empty(0) if x is None else x for x in results)


@dataclass
class Rows:
    """What the backward kernels read per query."""

    grad_out: Tensor
    lse: Tensor
    delta: Tensor

    def operands(self, queries: int, width: int) -> tuple[Any, ...]:
        """All three; grad_out in tiles [queries, width]."""
        return tiles(self.grad_out, queries, width), self.lse, self.delta


def _delta(out: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Tensor:
    batch, heads, num_queries, width = out.shape
    delta = out.new_empty(batch, heads, num_queries, dtype=torch.float32)
    sizes = stream(width)
    launch(
        triton_backward.delta_kernel, batch * heads * triton.cdiv(num_queries, sizes.rows), sizes,
        strided(out), strided(grad_out),
        None if grad_lse is None else strided(grad_lse.unsqueeze(3)),
        delta, num_queries, heads, E=width, BM=sizes.rows, BE=sizes.columns,
    )  # fmt: skip
    return delta


def _target(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _direct(inputs: Inputs, x: Tensor, gain: Tensor | None) -> bool:
    """Whether the core's gradient of queries or keys, x, becomes final where it is summed.

    There is one factor, and no norm, or a norm over the whole row. Rows of 16 bits that do not
    begin at multiples of 16 bytes are left out: Triton 3.6 reads them back from shared memory at
    addresses that are no multiples of what it reads (benchmarks/LOG.md).
    """
    return (
        inputs.groups <= 1
        and inputs.head_scale is None
        and gain is None
        and (x.element_size() > 2 or describable(x))
    )


def _query_side(
    inputs: Inputs, core: Core, rows: Rows, wanted: set[str]
) -> dict[str, Tensor | None]:
    """Gradients of query, query_gain and head_scale."""
    query = inputs.query
    direct = _direct(inputs, query, inputs.query_gain)
    grad = _target(query, query.dtype if direct else torch.float32)
    sizes = core.sizes(GRAD_QUERY)
    batch, heads, num_queries, _ = query.shape
    launch(
        triton_backward.grad_query_kernel, batch * heads * triton.cdiv(num_queries, sizes.rows),
        sizes, *core.operands(sizes.rows, sizes.columns),
        *rows.operands(sizes.rows, core.constants["BE"]),
        tiles(grad, sizes.rows, core.constants["BD"]), inputs.scale if direct else 1.0,
        tiles(query, sizes.rows, core.constants["BD"]) if direct and inputs.groups else None,
        core.scoring, core.terms, inputs.keys_seen(), **core.constants, BM=sizes.rows,
        BN=sizes.columns,
    )  # fmt: skip
    if direct:
        return {"query": grad}
    asks = tuple(name in wanted for name in ("query", "query_gain", "head_scale"))
    grad_query, grad_gain, grad_scale = _through_norm(
        grad, query, inputs.query_gain, inputs.head_scale, inputs.scale, inputs.groups, *asks
    )
    return {"query": grad_query, "query_gain": grad_gain, "head_scale": grad_scale}


def _key_side(inputs: Inputs, core: Core, rows: Rows, wanted: set[str]) -> dict[str, Tensor | None]:
    """Gradients of key, key_gain and value."""
    key, value = inputs.key, inputs.value
    direct = _direct(inputs, key, inputs.key_gain)
    share, largest = _head_shares(inputs.head_scale, key.shape[1])
    grad = grad_value = None
    if wanted & {"key", "key_gain"}:
        grad = _target(key, key.dtype if direct else torch.float32)
    if "value" in wanted:
        grad_value = _target(value, value.dtype)
    sizes = core.sizes(GRAD_KEY_VALUE)
    batch, kv_heads, num_keys, _ = key.shape
    launch(
        triton_backward.grad_key_value_kernel, batch * kv_heads * triton.cdiv(num_keys, sizes.rows),
        sizes, *core.operands(sizes.columns, sizes.rows),
        *rows.operands(sizes.columns, core.constants["BE"]),
        None if grad is None else tiles(grad, sizes.rows, core.constants["BD"]),
        None if grad_value is None else tiles(grad_value, sizes.rows, core.constants["BE"]),
        inputs.scale if direct else 1.0, share,
        tiles(key, sizes.rows, core.constants["BD"]) if direct and inputs.groups else None,
        core.scoring, core.terms, inputs.queries_seeing(),
        **core.constants, BN=sizes.rows, BM=sizes.columns,
    )  # fmt: skip
    if grad is None or direct:
        return {"key": grad, "value": grad_value}
    asks = ("key" in wanted, "key_gain" in wanted, False)
    grad_key, grad_gain, _ = _through_norm(
        grad, key, inputs.key_gain, largest, inputs.scale, inputs.groups, *asks
    )
    return {"key": grad_key, "key_gain": grad_gain, "value": grad_value}


def _head_shares(
    head_scale: Tensor | None, kv_heads: int
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """head_scale [H] as (factors of at most 1 [H], the largest of each group [Hk]).

    The sum over the heads of a group is taken with the first, so that 16 bits hold its terms.
    """
    if head_scale is None:
        return None, None
    by_group = head_scale.reshape(kv_heads, -1)
    largest = by_group.abs().amax(1)
    tiny = torch.finfo(head_scale.dtype).tiny
    return (by_group / largest.clamp_min(tiny)[:, None]).flatten(), largest


def _through_norm(
    raw: Tensor, x: Tensor, gain: Tensor | None, head_scale: Tensor | None, scale: float,
    groups: int, ask_x: bool, ask_gain: bool, ask_head_scale: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x, gain and head_scale (those that are asked for) from the core's, `raw`."""
    batch, heads, rows, width = x.shape
    slices = max(groups, 1)
    sizes = stream(width // slices)
    parts = (batch, heads, slices, triton.cdiv(rows, sizes.rows))
    grad_x = _target(x, x.dtype) if ask_x else None
    gain_parts = raw.new_empty(*parts, width // slices) if ask_gain else None
    scale_parts = raw.new_empty(parts) if ask_head_scale else None
    launch(
        triton_normalize.normalize_backward_kernel, batch * heads * slices * parts[3], sizes,
        raw, strided(x), contiguous(gain), contiguous(head_scale), scale, grad_x, gain_parts,
        scale_parts, rows, heads, slices,
        WIDTH=width // slices, ROWS=sizes.rows, PADDED=sizes.columns, NORM=groups or None,
    )  # fmt: skip
    grad_gain = None if gain_parts is None else gain_parts.sum((0, 3)).flatten(1)
    return grad_x, grad_gain, None if scale_parts is None else scale_parts.sum((0, 2, 3)) * scale


def _grad_bias(core: Core, rows: Rows, band: Band, bias: Tensor) -> Tensor:
    grad = _target(bias, bias.dtype)
    sizes = core.sizes(GRAD_BIAS)
    # In each dimension programs own the tiles, or each of them sums over all.
    full = (*core.query.shape[:3], core.key.shape[2])
    tile = (1, 1, sizes.rows, sizes.columns)
    counts = [triton.cdiv(size, step) for size, step in zip(full, tile)]
    own = [1 if size == 1 else count for size, count in zip(bias.shape, counts)]
    summed = [count if size == 1 else 1 for size, count in zip(bias.shape, counts)]
    launch(
        triton_bias.grad_bias_kernel, own[0] * own[1] * own[2] * own[3], sizes,
        *core.operands(sizes.rows, sizes.columns),
        *rows.operands(sizes.rows, core.constants["BE"]), tiles(grad, sizes.rows, sizes.columns),
        bias.shape[2], bias.shape[3], *own[1:], *summed, core.scoring, core.terms, band,
        **core.constants, BM=sizes.rows, BN=sizes.columns,
    )  # fmt: skip
    return grad


def _grad_relative_bias(core: Core, rows: Rows, band: Band) -> Tensor:
    batch, heads, num_queries, _ = core.query.shape
    num_keys = core.key.shape[2]
    grad = core.query.new_empty(heads, max(num_queries + num_keys - 1, 0), dtype=torch.float32)
    widths = core.query.shape[3], core.value.shape[3]
    sizes = choose(
        GRAD_RELATIVE_BIAS, core.query.device, core.query.element_size(), *widths, plain=True
    )
    block = sizes.rows
    diagonals = triton.cdiv(num_queries, block) + triton.cdiv(num_keys, block) - 1
    if grad.numel() == 0 or num_queries == 0 or num_keys == 0:
        return grad.zero_()
    parts = core.query.new_empty(heads, diagonals, block, block, dtype=torch.float32)
    launch(
        triton_diagonals.grad_relative_bias_kernel, heads * diagonals, sizes,
        *core.operands(block, block),
        *rows.operands(block, core.constants["BE"]), parts, batch, core.scoring, core.terms, band,
        **core.constants, BLOCK=block,
    )  # fmt: skip
    launch(
        triton_diagonals.add_diagonals_kernel, heads * (diagonals + 1), Launch(block, block, 4, 1),
        parts, grad, num_queries, num_keys, heads, BLOCK=block,
    )  # fmt: skip
    return grad


def _shares_rows(inputs: Inputs, band: Band) -> int:
    """Batches that share a row of bias, if the program that owns it can sum over them, else 0."""
    batch, heads, num_queries, _ = inputs.query.shape
    if (
        inputs.bias is None
        or band.start is not None
        or not _direct(inputs, inputs.query, inputs.query_gain)
    ):
        return 0
    widest = max(inputs.query.shape[3], inputs.value.shape[3])
    if inputs.query.element_size() > 2 or widest > max(GRAD_QUERY_BIAS[2]):
        return 0
    if inputs.bias.shape[1:] != (heads, num_queries, inputs.key.shape[2]):
        return 0
    return 1 if inputs.bias.shape[0] == batch else 2 if batch == 2 else 0


def _query_and_bias(
    inputs: Inputs, core: Core, rows: Rows, band: Band, batches: int
) -> dict[str, Tensor | None]:
    """Gradients of query and bias."""
    query, bias = inputs.query, inputs.bias
    assert bias is not None
    grad, grad_bias = _target(query, query.dtype), _target(bias, bias.dtype)
    sizes = core.sizes(GRAD_QUERY_BIAS)
    batch, heads, num_queries, _ = query.shape
    width = core.constants["BD"]
    launch(
        triton_bias.grad_query_bias_kernel,
        batch // batches * heads * triton.cdiv(num_queries, sizes.rows), sizes,
        *core.operands(sizes.rows, sizes.columns),
        *rows.operands(sizes.rows, core.constants["BE"]),
        tiles(grad, sizes.rows, width), inputs.scale,
        tiles(query, sizes.rows, width) if inputs.groups else None,
        tiles(grad_bias, sizes.rows, sizes.columns), core.scoring, core.terms, band,
        **core.constants, BM=sizes.rows, BN=sizes.columns, BATCHES=batches,
    )  # fmt: skip
    return {"query": grad, "bias": grad_bias}
