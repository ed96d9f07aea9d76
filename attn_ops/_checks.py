"""The one wording of shape, dtype and device errors: what the op expects, and what it got."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH = 256
MAX_FLOAT = sys.float_info.max


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are accumulated in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def fail(op: str, argument: str, expected: str, got: Any) -> ValueError:
    return ValueError(f"{op}: {argument} must {expected}, got {got}")


def check_dense(op: str, argument: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "a nested tensor" if tensor.is_nested else str(tensor.layout)
        raise NotImplementedError(
            f"{op}: {argument} must be a dense tensor, got {layout}; "
            "pack sequences of several lengths with cu_seqlens"
        )


def check_floating(op: str, argument: str, tensor: Tensor) -> None:
    check_dense(op, argument, tensor)
    if tensor.dtype not in FLOATING:
        raise TypeError(
            f"{op}: {argument} must be float64, float32, bfloat16 or float16, got {tensor.dtype}"
        )


def check_rank(op: str, argument: str, tensor: Tensor, ranks: Sequence[int], law: str) -> None:
    if tensor.dim() not in ranks:
        raise fail(op, argument, f"have shape {law}", shape(tensor))


def check_like_query(op: str, argument: str, tensor: Tensor, query: Tensor) -> None:
    """Query, key and value share dtype and device."""
    check_floating(op, argument, tensor)
    check_device(op, argument, tensor, query)
    if tensor.dtype != query.dtype:
        raise TypeError(f"{op}: {argument} must be {query.dtype} like query, got {tensor.dtype}")


def check_parameter(op: str, argument: str, tensor: Tensor, query: Tensor) -> None:
    """A bias, sink, scale or gain: query's dtype, or the dtype that sums are accumulated in."""
    check_floating(op, argument, tensor)
    check_device(op, argument, tensor, query)
    allowed = {query.dtype: None, compute_dtype(query.dtype): None}  # an ordered set
    if tensor.dtype not in allowed:
        names = " or ".join(str(dtype) for dtype in allowed)
        raise TypeError(f"{op}: {argument} must be {names} beside this query, got {tensor.dtype}")


def check_device(op: str, argument: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.device != query.device:
        raise fail(op, argument, f"be on {query.device} like query", tensor.device)


def check_shape(op: str, argument: str, tensor: Tensor, expected: Sequence[Any], law: str) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise fail(op, argument, f"have shape {law}={tuple(expected)}", shape(tensor))


def check_broadcastable(
    op: str, argument: str, tensor: Tensor, full: Sequence[Any], law: str
) -> None:
    for size, limit in zip(tensor.shape, full, strict=True):
        if size != 1 and size != limit:
            expected = f"be broadcastable to {law}={tuple(full)}"
            raise fail(op, argument, expected, shape(tensor))


def check_width(op: str, argument: str, letter: str, width: int) -> None:
    if not 1 <= width <= MAX_WIDTH:
        raise fail(op, argument, f"have width {letter} from 1 to {MAX_WIDTH}", width)


def check_tensor(op: str, argument: str, value: object, *, optional: bool = False) -> None:
    """The Python functions meet arguments of any type; the ops' schemas know only tensors."""
    if not isinstance(value, Tensor) and not (optional and value is None):
        or_none = " or None" if optional else ""
        raise TypeError(f"{op}: {argument} must be a Tensor{or_none}, got {type(value).__name__}")


def check_bool(op: str, argument: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {argument} must be a bool, got {type(value).__name__}")


def check_text(op: str, argument: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{op}: {argument} must be a str, got {type(value).__name__}")


def check_int(op: str, argument: str, value: object, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    # The schema's integers have 64 bits.
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {argument} must be an int, got {type(value).__name__}")
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise fail(op, argument, "be an int of 64 bits", value)


def check_number(op: str, argument: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{op}: {argument} must be a float, got {type(value).__name__}")
    if isinstance(value, int) and abs(value) > MAX_FLOAT:
        raise fail(op, argument, "be finite", "an int beyond every float")
