"""The CUDA library's kernels for Hopper: which calls they serve. Triton serves the others.

csrc/cosine_sim/cuda has its kernels: one norm over rows of 8 to 256 elements of 16 bits, weights
without a running maximum, for each query one interval of the keys that a mask leaves, and
relative_bias for bfloat16. Its backward adds up gradients of queries and of relative_bias without
an order, and gives way to Triton's in deterministic mode.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attn_ops import _ahead, _autograd, _library

if TYPE_CHECKING:
    from attn_ops.cosine_sim.triton_core import Inputs

BITS_PER_NAT = math.log2(math.e)
DTYPES = (torch.bfloat16, torch.float16)
WIDTHS = range(8, 257, 8)
# Fewer fill less than half of a tile, and leave the second warpgroup without work.
FEWEST_QUERIES = 64
TANGENT_WIDTHS = (64, 128)
MOST_ROWS = 1 << 29  # rows are counted in 32 bits
# Beside relative_bias registers and shared memory hold no more.
WIDEST_WITH_BIAS = 128


def missing(device: torch.device) -> str | None:
    """What the kernels need and do not have, so that Triton serves; None if they serve."""
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return f"a GPU of compute capability 9.0 for the kernels in C++: it has {major}.{minor}"
    reason = _library.load_cuda_library()
    if reason is None and not hasattr(torch.ops.attn, "_cosine_sim_fwd_cuda"):
        return "kernels for compute capability 9.0: the CUDA library was built without them"
    return reason


@functools.cache
def _is_there(device: torch.device) -> bool:
    return device.type == "cuda" and missing(device) is None


def shift_of(scale: float, groups: int, dtype: torch.dtype) -> float | None:
    """What to subtract from scores, in bits, where their bound |scale| * groups is close enough.

    Weights then lie between exp(-2 |scale| groups) and 1, and have to be normal numbers as operands
    of the product with the values. float16 gets another 14 bits from the other end of its range.
    """
    bound = abs(scale) * groups * BITS_PER_NAT
    headroom, reach = (14, 28) if dtype == torch.float16 else (0, 120)
    return bound - headroom if 0 < groups and 2 * bound <= reach else None


def serves(inputs: Inputs, shift: float | None) -> bool:
    """Whether `forward` takes this call; `shift` is that of fixed_shift."""
    return (
        shift is not None  # then there are norms, and exponents are small
        and inputs.groups == 1
        and (inputs.relative_bias is None or _takes_relative_bias(inputs))
        and inputs.bias is None
        and all(x is None for x in inputs[6:10])
        and inputs.start is None
        and (inputs.mask is None or tuple(inputs.mask.shape[1:3]) == (1, 1))
        and (_may_take if _ahead.tracing() else _takes)(*inputs[:3])
    )


def _takes_relative_bias(inputs: Inputs) -> bool:
    """It goes with a band, and not with the order of keys that a mask makes.

    What a query's keys have at most is subtracted from it. The weight of the key that has it may
    still be exp(-|scale|), and others are less by far beside it: too little for float16.
    """
    query = inputs.query
    narrow = query.shape[3] <= WIDEST_WITH_BIAS
    return inputs.mask is None and query.dtype == torch.bfloat16 and narrow


def _takes_rows_like(query: Tensor, value: Tensor) -> bool:
    """What neither lengths nor strides decide."""
    width = query.shape[3]
    return (
        query.dtype in DTYPES
        and width in WIDTHS
        and value.shape[3] == width
        and _is_there(query.device)
    )


def _takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    batch, heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    return (
        _takes_rows_like(query, value)
        and num_queries >= FEWEST_QUERIES
        and 0 < batch * heads * num_keys <= MOST_ROWS
        and batch * heads * num_queries <= MOST_ROWS
        and _has_whole_rows(query)
        and _has_whole_rows(key)
        and _has_whole_rows(value)
    )


def _may_take(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether a package calls the kernels: they refuse sizes that they do not take."""
    batch, heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    return (
        _takes_rows_like(query, value)
        and _ahead.possible(num_queries >= FEWEST_QUERIES)
        and _ahead.known(batch * heads * num_keys > 0)
        and _ahead.possible(batch * heads * num_keys <= MOST_ROWS)
        and _ahead.possible(batch * heads * num_queries <= MOST_ROWS)
        and all(map(_may_have_whole_rows, (query, key, value)))
    )


def _may_have_whole_rows(x: Tensor) -> bool:
    return (
        _ahead.is_aligned(x)
        and _ahead.known(x.stride(3) == 1)
        and all(
            _ahead.known(size == 1) or (_ahead.known(step > 0) and _ahead.known(step % 8 == 0))
            for size, step in zip(x.shape[:3], x.stride())
        )
    )


def _has_whole_rows(x: Tensor) -> bool:
    """Whether the copy engine takes x: rows of neighbours, at multiples of 16 bytes."""
    if x.data_ptr() % 16 != 0:
        return False
    if x.is_contiguous():
        return x.shape[3] % 8 == 0
    batch, head, row, last = strides = x.stride()
    if last != 1:
        return False
    if (batch | head | row) % 8 == 0 and min(strides) > 0:
        return True
    # A dimension that is expanded has stride 0; that of one element means nothing.
    pairs = zip(x.shape[:3], strides)
    return all(size == 1 or (stride > 0 and stride % 8 == 0) for size, stride in pairs)


@functools.cache
def _kernel() -> Callable[..., Any]:
    return _autograd.kernel("_cosine_sim_fwd_cuda", "CUDA")


def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    left: int,
    right: int,
    scale: float,
    groups: int,
) -> tuple[Tensor, Tensor] | None:
    """`forward` of a plain call (_plain.py), past the dispatcher; None if it is not served."""
    served = groups == 1 and _takes(query, key, value)
    if not served or shift_of(scale, groups, query.dtype) is None:
        return None
    return _kernel()(query, key, value, None, None, left, right, scale)


def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """`attn::_cosine_sim_fwd` of a call that is served: out and lse."""
    out, lse = torch.ops.attn._cosine_sim_fwd_cuda(
        *inputs[:3], _mask(inputs), inputs.relative_bias, inputs.left, inputs.right, inputs.scale
    )
    return out, lse


def _mask(inputs: Inputs) -> Tensor | None:
    """[1 or B, N]."""
    mask = inputs.mask
    return None if mask is None else mask[:, 0, 0].expand(-1, inputs.key.shape[2]).contiguous()


def serves_backward(inputs: Inputs, shift: float | None, wanted: set[str]) -> bool:
    """Whether `backward` takes this call: `wanted` has the names of the gradients asked for."""
    return (
        wanted - {"relative_bias"} == {"query", "key", "value"}
        and not torch.are_deterministic_algorithms_enabled()
        and serves(inputs, shift)
    )


def backward(
    inputs: Inputs,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    wanted: set[str],
) -> dict[str, Tensor]:
    """Gradients of a call that is served: of relative_bias only where it is wanted."""
    grads = {}
    if inputs.relative_bias is not None and "relative_bias" in wanted:  # sums are added to zeros
        zeros = torch.zeros_like(inputs.relative_bias, memory_format=torch.contiguous_format)
        grads["relative_bias"] = zeros
    grads["query"], grads["key"], grads["value"] = torch.ops.attn._cosine_sim_bwd_cuda(
        grad_out if _has_whole_rows(grad_out) else grad_out.contiguous(),
        None if grad_lse is None else grad_lse.float().contiguous(),
        *inputs[:3],
        out if _has_whole_rows(out) else out.contiguous(),
        lse.contiguous(),
        _mask(inputs),
        inputs.relative_bias,
        grads.get("relative_bias"),
        inputs.left,
        inputs.right,
        inputs.scale,
    )
    return grads


def serves_tangents(
    args: dict[str, Any], rows: Sequence[Tensor], tangents: Sequence[Tensor | None]
) -> bool:
    """Whether `with_tangents` takes the private forward's arguments, by their names.

    rows: query, key and value. float16 has not the range for tangents.
    """
    if rows[0].dtype != torch.bfloat16 or rows[0].shape[3] not in TANGENT_WIDTHS:
        return False
    if args["groups"] != 1:
        return False
    others = (x for name, x in args.items() if name not in ("query", "key", "value"))
    if any(isinstance(x, Tensor) for x in others) or any(x is None for x in tangents):
        return False
    # Below the wrappers of a transform.
    plain = [_autograd.unwrapped(x) for x in (*rows, *tangents) if x is not None]
    return (
        shift_of(args["scale"], 1, rows[0].dtype) is not None
        and _takes(*plain[:3])
        and not any(x._is_zerotensor() for x in plain[3:])
        and all(_has_whole_rows(x) for x in plain[3:])
    )


def with_tangents(*args: Any) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """out and lse, and their tangents, of a call that is served.

    args: query, key and value, their tangents, left, right and scale.
    """
    out, lse, tangent_out, tangent_lse = torch.ops.attn._cosine_sim_fwd_jvp_cuda(*args)
    return (out, lse), (tangent_out, tangent_lse)
