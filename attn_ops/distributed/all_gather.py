"""An all-gather whose derivatives of every order are collectives too.

`torch.distributed._functional_collectives` has a differentiable one, under a name that torch 2.13
deprecates and with a backward that refuses strided gradients in torch 2.11; DTensor's cannot be
exported. These two functions call the same ops, so that eager mode, the compiler and exported
programs agree.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


def all_gather(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """The tensors [n, ...] of all ranks of a mesh of one dimension as [R * n, ...], rank by rank.

    The gradient is the sum of what all ranks ask of this rank's tensor.
    """
    return _AllGather.apply(tensor, mesh.size(), mesh.get_group().group_name)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(tensor: Tensor, size: int, group: str) -> Tensor:
        ops = torch.ops._c10d_functional
        return ops.wait_tensor(ops.all_gather_into_tensor(tensor.contiguous(), size, group))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group = inputs[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _ReduceScatter.apply(grad, *ctx.group), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(tensor: Tensor, size: int, group: str) -> Tensor:
        ops = torch.ops._c10d_functional
        return ops.wait_tensor(ops.reduce_scatter_tensor(tensor.contiguous(), "sum", size, group))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group = inputs[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _AllGather.apply(grad, *ctx.group), None, None
