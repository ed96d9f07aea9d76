"""One call of a private op as the kernels see it, and the launches that both passes share.

Letters: B batch, H query heads, Hk key/value heads, M queries, N keys, D query/key width,
F features, E value width, S packed sequences, G segments of a sequence, C tokens of a chunk.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from attn_ops._triton.launch import dot_precision
from attn_ops._triton.tiles import padded, strided
from attn_ops.feature_maps import num_features
from attn_ops.linear.triton_core import ROWS, KeyMask, Walk
from attn_ops.linear.triton_launches import halves_suffice, num_segments, plan
from attn_ops.linear.triton_sums import chunk_sums_kernel, scan_kernel, segment_states_kernel

MAX_FEATURES = 256  # beyond, a state's rows do not fit a program's registers


def has_descriptors(device: torch.device) -> bool:
    """Whether the device fetches tiles by descriptors: Hopper and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def describable(tensor: Tensor) -> bool:
    """Whether a tensor descriptor can express these strides."""
    aligned = 16 // tensor.element_size()
    strides = [s for size, s in zip(tensor.shape[:-1], tensor.stride()) if size > 1]
    return (
        tensor.numel() > 0
        and tensor.stride(-1) == 1
        and tensor.data_ptr() % 16 == 0
        and all(stride > 0 and stride % aligned == 0 for stride in strides)
        and max(tensor.shape) < 1 << 31
    )


SUM_ROWS = ROWS.value

_bound = threading.local()


def bind_context(device: torch.device) -> None:
    """Gives this thread a CUDA context, once.

    Descriptors are encoded by the driver, which does not do that, and the backward runs in threads
    of autograd's in which nothing else may have been launched yet.
    """
    if device.type == "cuda" and device not in _bound.__dict__.setdefault("devices", set()):
        torch.zeros(1, device=device)
        _bound.devices.add(device)


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

    def sums(self, tensor: Tensor | None) -> Any:
        """The kernel argument for `chunk_sums`."""
        if tensor is None or not (self.problem.described and describable(tensor)):
            return tensor
        slots, width = tensor.shape[0] * tensor.shape[1], tensor.shape[2]
        # Rows of a dimension of one: all but the first are outside, and zeros.
        block = [1, SUM_ROWS, self.features]
        return TensorDescriptor(tensor, [slots, 1, width], [width, width, 1], block)

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
            has_descriptors(self.query.device)
            and self.offsets is None
            and self.feature_map != "taylor"  # whose tiles begin one column before the first
            and all(describable(x) for x in (self.query, self.key, self.value, *tensors))
            and self.width * self.query.element_size() % 16 == 0
            and self.value_width * self.query.element_size() % 16 == 0
        )
        if self.described:
            bind_context(self.query.device)
        extended = self.width + (self.feature_map == "taylor")
        # What tiles become before they are multiplied: a float16 loses nothing in tf32.
        bfloat16 = self.query.dtype == torch.bfloat16
        self.operand = torch.bfloat16 if bfloat16 else torch.float32
        self.padded_input = padded(extended, self.operand)
        self.padded_features = padded(self.features, self.operand)
        self.padded_value = padded(self.value_width, self.operand)
        plain = self.feature_map == "identity" and decay is None
        plain = plain and not halves_suffice(self.sequences * self.heads, self.query.device)
        self.plan = plan(
            self.query,
            self.padded_input,
            self.padded_features,
            self.padded_value,
            has_descriptors(self.query.device),
            self.described,
            plain,
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
        # A dimension of size 1 may have any stride, also one that a descriptor refuses.
        strides = [s if n > 1 else 16 for n, s in zip(tensor.shape[:-1], tensor.stride())]
        block = [1, 1, self.plan.chunk, width]
        return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], block)

    def constants(self, length: int) -> dict[str, Any]:
        """The constants of a kernel that walks sequences of this many tokens."""
        half = self.query.dtype == torch.float16
        return {
            "FEATURES": self.feature_map,
            "D": self.width,
            "F": self.features,
            "C": self.plan.chunk,
            "EVEN": self.offsets is None and length % self.plan.chunk == 0,
            "OPERAND": tl.bfloat16 if self.operand == torch.bfloat16 else tl.float32,
            "PRECISION": "tf32" if half else dot_precision(),
        }

    def segments(self, length: int) -> int:
        """Into how many segments the march over this many tokens is cut."""
        if self.offsets is not None:
            return 1
        programs = self.sequences * self.heads * self.by_columns().parts
        return num_segments(programs, length, self.plan.chunk, self.query.device)

    def adds_up_keys(self) -> bool:
        """Whether a forward march has registers for key_sum, and none to begin with."""
        alone = self.causal and self.segments(self.key.shape[2]) == 1 and self.state is None
        return alone and self.padded_features <= 64

    def walk(
        self,
        length: int,
        kv_heads: int,
        parts: int,
        *,
        states: int = 1,
        step: int = 0,
        spread: int = 0,
        segments: int | None = None,
    ) -> Walk:
        """`length`: tokens of a sequence; the other numbers as in Walk."""
        segments = self.segments(length) if segments is None else segments
        chunk = self.plan.chunk
        of_segment = triton.cdiv(triton.cdiv(length, chunk), segments) * chunk
        group = self.heads // max(1, kv_heads)
        return Walk(self.heads, group, parts, segments, of_segment, states, step, spread)

    def launch(self, kernel: Any, walk: Walk, *args: Any, **constants: Any) -> None:
        """One program per sequence, head, segment and part."""
        programs = self.sequences * self.heads * walk.segments * walk.parts
        if programs:
            kernel[(programs,)](
                *args, walk, **constants, num_warps=self.plan.warps, num_stages=self.plan.stages
            )

    # --- sums over segments and chunks

    def segment_states(
        self, x: Tensor, y: Tensor, mask: Any, initial: Tensor | None, reverse: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """[S*H, entries, F, E]: sums of phi(x) y^T, of which a segment sees its entry.

        Causal: entry g is what segment g sees; `reverse`: entry g + 1. And what is left at the end
        (at the begin), [S*H, F, E]. Not causal: one entry, the sum over all. One segment alone sees
        `initial`, nothing is summed up, and the march finds out what is left.
        """
        length, segments = x.shape[2], self.segments(x.shape[2])
        if self.causal and segments == 1:
            return initial, None
        entries, size = segments + 1, self.features * self.value_width
        states = x.new_empty(self.sequences * self.heads, entries, size, dtype=torch.float32)
        tiles = self.by_columns()
        walk = self.walk(length, x.shape[1], tiles.parts, states=entries)
        self.launch(
            segment_states_kernel, walk, tiles.rows(x), tiles.columns(y), mask, self.decay,
            self.offsets, states, length, **tiles.constants(length), REVERSE=reverse,
        )  # fmt: skip
        if not self.causal:
            return states[:, :segments].sum(1), None
        return self._scan(states, initial, length, walk.length, reverse, torch.float32)

    def chunk_sums(
        self,
        x: Tensor,
        coefficient: Tensor | None,
        mask: Any,
        initial: Tensor | None,
        reverse: bool,
    ) -> tuple[Tensor, Tensor]:
        """[B*H, slots, F]: sums of phi(x) times the coefficients, of which a chunk sees its slot.

        As `segment_states`, for key_sum and its gradient, in the dtype of operands; packed
        sequences leave slots unused. Not causal: one slot per sequence, the sum over all of it.
        """
        length, chunk = x.shape[2], self.plan.chunk
        chunks = triton.cdiv(length, chunk)
        heads = x.shape[0] * self.heads
        sums = x.new_empty(heads, self.num_slots(length), self.features, dtype=torch.float32)
        # A program per chunk: there is nothing to carry.
        segments = 1 if self.offsets is not None else max(1, chunks)
        walk = self.walk(length, x.shape[1], 1, segments=segments)
        self.launch(
            chunk_sums_kernel, walk, strided(x), coefficient, mask,
            self.decay, self.offsets, sums, length, sums.shape[1], **self.constants(length),
            PD=self.padded_input, PF=self.padded_features, REVERSE=reverse,
        )  # fmt: skip
        if not self.causal and self.offsets is None:
            total = sums[:, :chunks].sum(1)
            return total.unsqueeze(1).to(self.operand), total
        seen, final = self._scan(sums, initial, length, chunk, reverse, self.operand)
        if not self.causal:
            # [S*H, F] -> [H, S, F]: one slot per sequence of a head
            seen = final.unflatten(0, (self.sequences, -1)).transpose(0, 1).to(self.operand)
        return seen.contiguous(), final

    def num_slots(self, length: int) -> int:
        """Room for the sums of a head's chunks, and for what is left after them."""
        chunk = self.plan.chunk
        if self.offsets is None:
            return triton.cdiv(length, chunk) + 1
        return length // chunk + 2 * self.sequences + 2

    def _scan(
        self,
        parts: Tensor,
        initial: Tensor | None,
        length: int,
        part_length: int,
        reverse: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """What is left, at each of the parts, of those before it; and after all of them."""
        result = torch.empty_like(parts, dtype=dtype)
        _, slots, width = parts.shape
        rows = self.sequences * self.heads
        final = torch.empty(rows, width, dtype=torch.float32, device=parts.device)
        block = min(32, triton.next_power_of_2(width))
        programs = rows * triton.cdiv(width, block)
        initial = None if initial is None else initial.contiguous()
        if programs:
            scan_kernel[(programs,)](
                parts, initial, self.decay, self.offsets, result, final, length, self.heads,
                part_length, slots, WIDTH=width, BLOCK=block, ROWS=16, REVERSE=reverse,
            )  # fmt: skip
        return result, final
