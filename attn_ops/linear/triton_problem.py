"""One call of a private op as the kernels see it, and the launches that both passes share.

Letters: B batch, H query heads, Hk key/value heads, M queries, N keys, D query/key width,
F features, E value width, S packed sequences, G segments of a sequence, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_ops._ahead import known
from attn_ops._triton import descriptors
from attn_ops._triton.launch import Launch, dot_precision, launch
from attn_ops._triton.tiles import padded, strided
from attn_ops.feature_maps import num_features
from attn_ops.linear.triton_core import (
    KeyMask,
    Walk,
)
from attn_ops.linear.triton_launches import halves_suffice, num_segments, num_stages, plan
from attn_ops.linear.triton_sums import scan_kernel, segment_sums_kernel

MAX_FEATURES = 256  # beyond, a state's rows do not fit a program's registers


class Sums(NamedTuple):
    """Sums of phi(k) v^T and of phi(k), or gradients of those, contiguous or None."""

    states: Tensor | None
    sums: Tensor | None


class Weights(NamedTuple):
    """Whether there are sums without values; what tokens are multiplied by there, and values."""

    sums: bool
    coefficient: Tensor | None = None
    factor: Tensor | None = None


class Tiles(NamedTuple):
    """How a march divides a head: tiles of inputs, features and value columns, and their parts."""

    problem: Problem
    parts: int
    inputs: int
    features: int
    width: int
    by_features: bool

    def rows(self, tensor: Tensor | None) -> Any:
        """The kernel argument for query, key or their gradients."""
        return self.problem.tiles(tensor, self.inputs)

    def columns(self, tensor: Tensor | None) -> Any:
        """The kernel argument for value, out or their gradients."""
        return self.problem.tiles(tensor, self.width)

    def constants(self, length: int) -> dict[str, Any]:
        """The constants of a kernel with a state."""
        sizes = {"PD": self.inputs, "PF": self.features, "PE": self.width}
        return self.problem.constants(length) | sizes | {"E": self.problem.value_width}


class Problem:
    """Arguments of `attn::_linear_fwd`; `tensors`: what else is read in tiles."""

    def __init__(self, args: Sequence[Any], *tensors: Tensor) -> None:
        self.query, self.key, self.value = args[:3]
        mask, decay, self.state, self.key_sum, self.offsets = args[3:8]
        self.causal, self.eps, self.feature_map = args[8:]
        batch, self.heads, _, self.width = self.query.shape
        self.kv_heads, self.value_width = self.key.shape[1], self.value.shape[3]
        self.sequences = batch if self.offsets is None else self.offsets.shape[0] - 1
        self.features = num_features(self.feature_map, self.width)
        self.mask = None
        if mask is not None:
            head = 0 if mask.shape[1] == 1 else mask.stride(1)
            self.mask = KeyMask(mask, mask.stride(0), head, mask.stride(3))
        self.decay = None if decay is None else decay.contiguous()
        # Tiles are read from the end of one packed sequence to the next: never by descriptors.
        self.described = (
            descriptors.has_descriptors(self.query.device)
            and self.offsets is None
            and all(
                descriptors.describable(x) for x in (self.query, self.key, self.value, *tensors)
            )
            and self.width * self.query.element_size() % 16 == 0
            and self.value_width * self.query.element_size() % 16 == 0
        )
        if self.described:
            descriptors.bind_context(self.query.device)
        extended = self.width + (self.feature_map == "taylor")
        # What tiles become before they are multiplied: a float16 loses nothing in tf32.
        bfloat16 = self.query.dtype == torch.bfloat16
        self.operand = torch.bfloat16 if bfloat16 else torch.float32
        self.padded_input = padded(extended, self.operand)
        self.padded_features, self.blocks = padded(self.features, self.operand), 1
        if self.feature_map == "taylor":
            # Tiles of features are made of inputs: in blocks, few registers hold them.
            self.padded_features = min(64, self.padded_features)
            self.blocks = triton.cdiv(self.features, self.padded_features)
        self.padded_value = padded(self.value_width, self.operand)
        plain = self.feature_map == "identity" and decay is None
        plain = plain and not halves_suffice(self.sequences * self.heads, self.query.device)
        self.plan = plan(
            self.query,
            self.padded_input,
            self.padded_features * self.blocks,
            self.padded_value,
            descriptors.has_descriptors(self.query.device),
            self.described,
            plain,
            self.eps is not None,
            decay is not None,
        )

    # --- what kernels take

    def by_columns(self) -> Tiles:
        """Parts are value columns, of all features."""
        columns = self.plan.columns
        parts = triton.cdiv(self.value_width, columns)
        return Tiles(self, parts, self.padded_input, self.padded_features, columns, False)

    def by_features(self) -> Tiles:
        """Parts are features, of all value columns; but taylor's need all inputs at once."""
        if self.feature_map == "taylor":
            return self.by_columns()
        width = self.plan.features
        parts = triton.cdiv(self.width, width)
        return Tiles(self, parts, width, width, self.padded_value, True)

    def tiles(self, tensor: Tensor | None, width: int) -> Any:
        """The kernel argument for tiles of `width` columns."""
        if tensor is None:
            return None
        if not self.described:
            return strided(tensor)
        return descriptors.descriptor(tensor, self.plan.chunk, width)

    def constants(self, length: int) -> dict[str, Any]:
        """The constants of a kernel that walks sequences of this many tokens."""
        half = self.query.dtype == torch.float16
        return {
            "FEATURES": self.feature_map,
            "D": self.width,
            "F": self.features,
            "C": self.plan.chunk,
            "BLOCKS": self.blocks,
            "EVEN": self.offsets is None and known(length % self.plan.chunk == 0),
            "OPERAND": tl.bfloat16 if self.operand == torch.bfloat16 else tl.float32,
            "PRECISION": "tf32" if half else dot_precision(),
        }

    def segments(self, length: int) -> int:
        """Into how many segments the march over this many tokens is cut."""
        if self.offsets is not None:
            return 1
        programs = self.sequences * self.heads * self.by_columns().parts
        return num_segments(programs, length, self.plan.chunk, self.query.device)

    def walk(
        self,
        length: int,
        kv_heads: int,
        parts: int,
        *,
        states: int = 1,
        step: int = 0,
        spread: int = 0,
    ) -> Walk:
        """`length`: tokens of a sequence; the other numbers as in Walk."""
        segments, chunk = self.segments(length), self.plan.chunk
        of_segment = triton.cdiv(triton.cdiv(length, chunk), segments) * chunk
        group = self.heads // max(1, kv_heads)
        return Walk(self.heads, group, parts, segments, of_segment, states, step, spread)

    def launch(
        self, kernel: Any, walk: Walk, *args: Any, spared: int = 0, **constants: Any
    ) -> None:
        """One program per sequence, head, segment and part; `spared`: stages less than planned."""
        programs = self.sequences * self.heads * walk.segments * walk.parts
        stages = num_stages(self.plan, programs, walk.parts, self.query.device)
        sizes = Launch(self.plan.chunk, 0, self.plan.warps, max(1, stages - spared))
        launch(kernel, programs, sizes, *args, walk, **constants)

    # --- sums over segments

    def segment_sums(
        self, x: Tensor, y: Tensor, mask: Any, weights: Weights, initial: Sums, reverse: bool
    ) -> tuple[Sums, Sums]:
        """What segments see of those before them, and what is left at the end (at the begin).

        Causal: of the former, [S*H, entries, ...], segment g sees entry g; `reverse`: entry g + 1.
        Not causal: one entry, the sum over all. One segment alone sees `initial`, nothing is summed
        up, and the march finds out what is left.
        """
        length, segments = x.shape[2], self.segments(x.shape[2])
        if self.causal and segments == 1:
            return initial, Sums(None, None)
        entries, rows = segments + 1, self.sequences * self.heads
        size = self.features * self.value_width
        states = x.new_empty(rows, entries, size, dtype=torch.float32)
        sums = None
        if weights.sums:
            sums = x.new_empty(rows, entries, self.features, dtype=torch.float32)
        tiles = self.by_columns()
        walk = self.walk(length, x.shape[1], tiles.parts, states=entries, step=1)
        self.launch(
            segment_sums_kernel, walk, tiles.rows(x), tiles.columns(y), weights.coefficient,
            weights.factor, mask, self.decay, self.offsets, states, sums, length,
            **tiles.constants(length), REVERSE=reverse, writes=(states, sums),
        )  # fmt: skip
        if not self.causal:
            parts = (None if x is None else x.narrow(1, 0, segments) for x in (states, sums))
            totals = (None if x is None else x.sum(1) for x in parts)
            return Sums(*totals), Sums(None, None)
        last = 0 if reverse else triton.cdiv(length, walk.length)
        before = Sums(
            self._scan(states, initial.states, length, walk.length, reverse),
            None if sums is None else self._scan(sums, initial.sums, length, walk.length, reverse),
        )
        return before, Sums(*(None if x is None else x.select(1, last) for x in before))

    def _scan(
        self, parts: Tensor, initial: Tensor | None, length: int, part_length: int, reverse: bool
    ) -> Tensor:
        """What is left, at each of the parts, of those before it, and after all of them."""
        result = torch.empty_like(parts)
        rows, slots, width = parts.shape
        block = min(32, triton.next_power_of_2(width))
        programs = rows * triton.cdiv(width, block)
        launch(
            scan_kernel, programs, Launch(16, block, 4, 3),
            parts, initial, self.decay, result, length, self.heads, part_length, slots,
            WIDTH=width, BLOCK=block, ROWS=16, REVERSE=reverse, writes=(result,),
        )  # fmt: skip
        return result
