"""Tiles that are fetched and written by tensor descriptors: no registers for addresses.

The unit that moves them exists on Hopper and later. Elsewhere, and for strides that a descriptor
cannot express, kernels take the tensor's pointer and strides (tiles.py) in the same place.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from attn_ops._ahead import tracing
from attn_ops._triton.tiles import strided


def has_descriptors(device: torch.device) -> bool:
    """Whether the device fetches tiles by descriptors, which packages have nobody to make for."""
    if device.type != "cuda" or tracing():
        return False
    return torch.cuda.get_device_capability(device)[0] >= 9


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


def descriptor(tensor: Tensor, rows: int, width: int) -> TensorDescriptor:
    """Tiles [rows, width] of a tensor [B, H, rows, columns]; zeros outside of it."""
    # A dimension of size 1 may have any stride, also one that a descriptor refuses.
    strides = [s if n > 1 else 16 for n, s in zip(tensor.shape[:-1], tensor.stride())]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, 1, rows, width])


def square_descriptor(tensor: Tensor) -> TensorDescriptor:
    """Tiles [width, width] of a contiguous tensor [H, rows, width]."""
    bind_context(tensor.device)
    width = tensor.shape[2]
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [1, width, width])


def tiles(tensor: Tensor, rows: int, width: int) -> Any:
    """The kernel argument for a tensor [B, H, rows, columns] that is read or written in tiles.

    Products of float32 take their operands from registers, and gain nothing from descriptors.
    """
    half = tensor.element_size() == 2
    if half and has_descriptors(tensor.device) and describable(tensor):
        bind_context(tensor.device)
        return descriptor(tensor, rows, width)
    return strided(tensor)


_bound = threading.local()


def bind_context(device: torch.device) -> None:
    """Gives this thread a CUDA context, once.

    Descriptors are encoded by the driver, which does not do that, and the backward runs in threads
    of autograd's in which nothing else may have been launched yet.
    """
    if device.type == "cuda" and device not in _bound.__dict__.setdefault("devices", set()):
        torch.zeros(1, device=device)
        _bound.devices.add(device)
