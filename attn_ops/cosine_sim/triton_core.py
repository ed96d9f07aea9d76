"""What the launches of one call share: its arguments, unit queries and keys, and block sizes.

Letters: B batch, H query heads, Hk key/value heads, M queries, N keys, D query/key width,
E value width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from attn_ops._triton import descriptors
from attn_ops._triton.bias import PairTerms, expand_diagonals, pair_terms
from attn_ops._triton.descriptors import describable, descriptor, square_descriptor, tiles
from attn_ops._triton.launch import (
    LARGE,
    Launch,
    Table,
    choose,
    dot_precision,
    launch,
    shared_memory,
)
from attn_ops._triton.products import THREE, reads_terms, split
from attn_ops._triton.tiles import padded, row_major, strided
from attn_ops._triton.visibility import Band, keys_seen, queries_seeing
from attn_ops.cosine_sim import triton_normalize
from attn_ops.cosine_sim.cuda import BITS_PER_NAT, shift_of
from attn_ops.cosine_sim.triton_launches import SPLIT
from attn_ops.masks import UNBOUNDED

SQUARE = 64  # rows and columns of tiles that share a diagonal of blocks
FEWEST_ROWS = 512  # else few tiles share one of relative_bias
MOST_BYTES = 256 << 20  # that relative_bias is expanded to


class Inputs(NamedTuple):
    """The arguments of the private forward op, in its order (see ops.py)."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    bias: Tensor | None
    relative_bias: Tensor | None
    head_scale: Tensor | None
    query_gain: Tensor | None
    key_gain: Tensor | None
    sink: Tensor | None
    start: Tensor | None
    stop: Tensor | None
    left: int
    right: int
    scale: float
    groups: int

    def is_plain(self) -> bool:
        """Whether there is one norm over a row, and no other argument but causality."""
        causal_or_not = self.left == UNBOUNDED and self.right in (0, UNBOUNDED)
        return self.groups == 1 and causal_or_not and all(x is None for x in self[3:12])

    def are_bounded(self) -> bool:
        """Whether what enters the dot product is at most 1."""
        return self.groups > 0 and self.query_gain is None and self.key_gain is None

    def keys_seen(self) -> Band:
        lengths = self.query.shape[2], self.key.shape[2]
        return keys_seen(*lengths, self.left, self.right, self.start, self.stop)

    def queries_seeing(self) -> Band:
        lengths = self.query.shape[2], self.key.shape[2]
        return queries_seeing(*lengths, self.left, self.right, self.start, self.stop)


class Scoring(NamedTuple):
    """How kernels get from q̂·k̂ to a score: factor * head_scale[h] * q̂·k̂ and pair terms."""

    factor: Any
    head_scale: Any
    num_heads: Any
    heads_per_group: Any
    num_queries: Any
    num_keys: Any


@dataclass
class Core:
    """What the core kernels read. query and key are as they enter the dot product.

    scores: how those two are multiplied, as constants["PRECISION"] says of the others.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scoring: Scoring
    bias: Tensor | None  # if it comes in tiles: then the terms have none
    terms: PairTerms
    scores: str
    constants: dict[str, Any]

    def operands(self, queries: int, keys: int) -> tuple[Any, ...]:
        """query, key and value in tiles of so many rows, and the bias if it comes in tiles."""
        width, value_width = self.constants["BD"], self.constants["BE"]
        return (
            tiles(self.query, queries, width),
            tiles(self.key, keys, width),
            tiles(self.value, keys, value_width),
            self._tiles_of_bias(queries, keys),
        )

    def _tiles_of_bias(self, queries: int, keys: int) -> Any:
        if self.bias is None or self.bias.dim() == 4:
            return None if self.bias is None else descriptor(self.bias, queries, keys)
        assert queries == keys == SQUARE, (queries, keys)
        return square_descriptor(self.bias)

    def sizes(self, table: Table) -> Launch:
        widths = self.query.shape[3], self.value.shape[3]
        size = SPLIT if self.constants["PRECISION"] == THREE else self.value.element_size()
        plain, biased = self.terms.absent(), self.bias is not None
        return choose(table, self.value.device, size, *widths, plain=plain, biased=biased)

    def split(self, scores: str, *names: str) -> Core:
        """The same with float32 as terms of 16 bits: value, and, by `scores`, `names`.

        These are query and key, but for one that is to be normalised yet.
        """
        query, key = (
            split(x, scores) if name in names else x
            for name, x in (("query", self.query), ("key", self.key))
        )
        value, constants = split(self.value, THREE), self.constants | {"PRECISION": THREE}
        return replace(self, query=query, key=key, value=value, scores=scores, constants=constants)


def contiguous(x: Tensor | None) -> Tensor | None:
    """A small parameter without strides."""
    return None if x is None else x.contiguous()


def stream(width: int) -> Launch:
    """Block sizes of the kernels that only read and write: 4096 elements, all of a row."""
    columns = triton.next_power_of_2(width)
    return Launch(4096 // columns, columns, 4, 1)


def unit(x: Tensor, gain: Tensor | None, groups: int) -> Tensor:
    """x [B, H, M, D] as it enters the dot product."""
    if not groups:
        return row_major(x)
    batch, heads, rows, width = x.shape
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sizes = stream(width // groups)
    launch(
        triton_normalize.normalize_kernel, batch * heads * triton.cdiv(rows * groups, sizes.rows),
        sizes, strided(x), contiguous(gain), result, rows, heads, groups, writes=(result,),
        WIDTH=width // groups, ROWS=sizes.rows, PADDED=sizes.columns,
    )  # fmt: skip
    return result


def precision(inputs: Inputs) -> str:
    """How float32 is multiplied: as three bfloat16 each, in six products on the matrix units.

    The parts of wider rows do not fit the registers, and Triton's interpreter does not know it.
    """
    query, chosen = inputs.query, dot_precision()
    narrow = max(query.shape[3], inputs.value.shape[3]) <= 128 and query.device.type != "cpu"
    split = chosen == "ieee" and narrow and query.dtype == torch.float32
    return "bf16x6" if split else chosen


def splits(inputs: Inputs, table: Table) -> bool:
    """Whether float32 is split once, into tensors of terms that matrix units read from memory.

    table: of the kernel, which has launches for these widths.
    """
    widths = inputs.query.shape[3], inputs.value.shape[3]
    return (
        precision(inputs) == "bf16x6"
        and inputs.mask is inputs.bias is inputs.relative_bias is None
        and reads_terms(inputs.value.device)
        and all(width % 8 == 0 for width in widths)
        and max(padded(width, torch.bfloat16) for width in widths) in table[SPLIT]
    )


def prepare(inputs: Inputs, *, raw_query: bool = False, squares: bool = False) -> Core:
    """Normalises queries, unless they are wanted raw, and keys, and describes the rest.

    squares: every kernel takes tiles of SQUARE x SQUARE scores where a bias comes in tiles.
    """
    batch, heads, num_queries, width = inputs.query.shape
    kv_heads, num_keys, value_width = inputs.value.shape[1:]
    pairs = (batch, heads, num_queries, num_keys)
    bias, relative_bias, tiles_of_bias = inputs.bias, inputs.relative_bias, None
    if bias is not None and _in_tiles(bias, inputs.query, num_keys):
        tiles_of_bias, bias = bias, None
    elif squares and _in_squares(inputs):
        assert relative_bias is not None
        tiles_of_bias = expand_diagonals(relative_bias, num_queries, num_keys, SQUARE)
        relative_bias = None
    terms = pair_terms(pairs, bias, inputs.mask, relative_bias)
    # Scores are in nats where there is a bias, in bits elsewhere: see _triton/softmax.py.
    bits = 1.0 if inputs.bias is None and inputs.relative_bias is None else BITS_PER_NAT
    factor = inputs.scale * (BITS_PER_NAT / bits)
    head_scale = contiguous(inputs.head_scale)
    scoring = Scoring(factor, head_scale, heads, heads // kv_heads, num_queries, num_keys)
    multiplied = precision(inputs)
    constants = {
        "D": width, "E": value_width, "BD": padded(width, torch.bfloat16),
        "BE": padded(value_width, torch.bfloat16), "BITS": bits, "PRECISION": multiplied,
    }  # fmt: skip
    query = inputs.query
    if not raw_query:
        query = unit(query, inputs.query_gain, inputs.groups)
    key = unit(inputs.key, inputs.key_gain, inputs.groups)
    value = row_major(inputs.value)
    return Core(row_major(query), key, value, scoring, tiles_of_bias, terms, multiplied, constants)


def _in_tiles(bias: Tensor, query: Tensor, num_keys: int) -> bool:
    """Whether tiles of a bias are fetched by a descriptor; it may be broadcast over B and H."""
    half = query.element_size() == 2 and bias.element_size() <= 4
    if not half or not descriptors.has_descriptors(bias.device):
        return False
    return bias.shape[2:] == (query.shape[2], num_keys) and describable(bias)


def _in_squares(inputs: Inputs) -> bool:
    """Whether relative_bias is expanded to a tile for each diagonal of blocks."""
    query, value, device = inputs.query, inputs.value, inputs.query.device
    if inputs.relative_bias is None or inputs.bias is not None or inputs.mask is not None:
        return False
    lengths = query.shape[2], value.shape[2]
    expanded = query.shape[1] * sum(lengths) * SQUARE * inputs.relative_bias.element_size()
    narrow = query.element_size() == 2 and max(query.shape[3], value.shape[3]) <= 128
    large = descriptors.has_descriptors(device) and shared_memory(device) >= LARGE
    return narrow and large and min(lengths) >= FEWEST_ROWS and expanded <= MOST_BYTES


def fixed_shift(inputs: Inputs) -> float | None:
    """What to subtract from scores, in bits, where a bound of them is known and close enough.

    That is, of scores without relative_bias, which has none.
    """
    unbounded = (inputs.bias, inputs.head_scale, inputs.query_gain, inputs.key_gain)
    if any(x is not None for x in unbounded):
        return None
    return shift_of(inputs.scale, inputs.groups, inputs.query.dtype)
