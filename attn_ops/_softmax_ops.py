"""The private forward and backward of a softmax-like room: fakes, derivatives, batching, kernels.

What the private ops read, beside query, key and value [B, H, M, D], [B, Hk, N, D], [B, Hk, N, E]:
  mask bool, bias [B, H, M, N], each size 1 or full; relative_bias [H, M+N-1]; sink [H];
  start, stop [1 or B, M]; left, right: the band of masks.py; and what the room adds.
All outputs are contiguous: out in query's dtype, lse [B, H, M] in the dtype of sums.

Forward mode has an op of its own, `attn::_room_jvp` (see _forward_mode.py).

The backward takes grad_out, grad_lse, the tensors of the forward, out, lse, the options of the
forward and which gradients are needed; it returns those gradients, and tensors of size [0].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attn_ops import _ahead, _autograd, _library, _plain, _vmap
from attn_ops._checks import compute_dtype
from attn_ops._forward_mode import PLACES, ForwardMode
from attn_ops._in_blocks import InBlocks

Kernel = Callable[..., Any]


class PrivateOps:
    """`attn::_room_fwd`, `_room_bwd` and `_room_jvp`; schemas say all that differs among rooms."""

    def __init__(self, room: str, blocks: InBlocks, forward_mode: ForwardMode) -> None:
        self.forward, self.backward, self.jvp = f"_{room}_fwd", f"_{room}_bwd", f"_{room}_jvp"
        self.blocks, self.forward_mode = blocks, forward_mode
        self.call_backward: Kernel  # known when its own derivatives are
        schemas = [
            getattr(torch.ops.attn, op).default._schema for op in (self.forward, self.backward)
        ]
        # The tensors come first, the options after them.
        self.arguments = [a.name for a in schemas[0].arguments]
        self.tensors = [a.name for a in schemas[0].arguments if "Tensor" in str(a.type)]
        # The differentiable ones, in the order of the backward's results.
        self.differentiable = [
            self.tensors.index(r.name.removeprefix("grad_")) for r in schemas[1].returns
        ]

    def fake_forward(
        self, query: Tensor, key: Tensor, value: Tensor, *_: Any
    ) -> tuple[Tensor, Tensor]:
        batch, heads, num_queries, _width = query.shape
        out = query.new_empty(batch, heads, num_queries, value.shape[3])
        return out, query.new_empty(batch, heads, num_queries, dtype=compute_dtype(query.dtype))

    def fake_jvp(self, query: Tensor, _: Tensor, value: Tensor, *__: Any) -> tuple[Tensor, Tensor]:
        out = value.new_empty(*query.shape[:3], value.shape[3])
        return out, value.new_empty(query.shape[:3], dtype=compute_dtype(value.dtype))

    def fake_backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, *args: Any
    ) -> tuple[Tensor, ...]:
        inputs = [args[i] for i in self.differentiable]
        return tuple(
            x.new_empty(x.shape) if needed else args[0].new_empty(0)
            for x, needed in zip(inputs, args[-1], strict=True)
        )

    def save_forward(self, ctx: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*args[: len(self.tensors)], *output)
        ctx.options = args[len(self.tensors) :]
        ctx.set_materialize_grads(False)

    def forward_backward(
        self, ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        given = len(tensors)  # three of a plain call
        needed = _autograd.needed(ctx)
        grads: list[Tensor | None] = [None] * len(needed)
        if grad_out is None and grad_lse is None:
            return tuple(grads)
        output_mask = [i < given and needed[i] for i in self.differentiable]
        results = self.call_backward(
            torch.zeros_like(out) if grad_out is None else grad_out,
            grad_lse,
            *tensors,
            *[None] * (len(self.tensors) - given),
            out,
            lse,
            *ctx.options,
            output_mask,
        )
        for i, result, need in zip(self.differentiable, results, output_mask, strict=True):
            if need:
                grads[i] = result
        return tuple(grads)

    def backward_backward(self, ctx: Any, *cotangents: Tensor | None) -> list[Tensor | None]:
        # The backward is a function of grad_out, grad_lse, the forward's tensors, out and lse.
        count = len(self.tensors)
        places = (0, 1, *(i + 2 for i in self.differentiable), count + 2, count + 3)
        args = (*ctx.saved_tensors, *ctx.options)
        return _autograd.vjp_of_formula(self.blocks.backward_formula, args, cotangents, places)

    def forward_tangents(self, outputs: tuple[Tensor, Tensor], *args: Any) -> tuple[Tensor, Tensor]:
        named = dict(zip(self.arguments, args, strict=True))
        return self.forward_mode.tangents(getattr(torch.ops.attn, self.jvp), named, *outputs)

    def results_and_tangents(self, *args: Any) -> Any:
        return self.forward_mode.at_once(dict(zip(self.arguments, args, strict=True)))

    def jvp_backward(self, ctx: Any, *cotangents: Tensor | None) -> list[Tensor | None]:
        mode, args = self.forward_mode, (*ctx.saved_tensors, *ctx.options)
        return _autograd.vjp_of_formula(mode.formula, args, cotangents, mode.differentiable)

    def batch(self) -> None:
        """Registers where the heads stand in every tensor."""
        rows = [_vmap.BATCH_HEADS] * 2
        places = [PLACES.get(name, _vmap.HEADS) for name in self.tensors]
        _vmap.register(self.forward, places, rows)
        _vmap.register(
            self.backward,
            (*rows, *places, *rows),
            [places[i] for i in self.differentiable],
            gradient_of=[i + 2 for i in self.differentiable],
        )
        _vmap.register(self.jvp, [PLACES[name] for name in self.forward_mode.tensors], rows)


def register(
    room: str,
    blocks: InBlocks,
    forward_mode: ForwardMode,
    forward_cuda: Kernel,
    backward_cuda: Kernel,
    jvp_cuda: Kernel | None = None,
    plain_cuda: Kernel | None = None,
) -> tuple[Kernel, Kernel]:
    """Everything about the private ops of `room` but their kernels for the CPU.

    Returns what calls the private forward, and what calls it for plain calls.
    """
    ops = PrivateOps(room, blocks, forward_mode)
    _library.fake(ops.forward)(ops.fake_forward)
    _library.fake(ops.backward)(ops.fake_backward)
    _library.fake(ops.jvp)(ops.fake_jvp)
    call_forward = _autograd.differentiable(
        ops.forward,
        ops.save_forward,
        ops.forward_backward,
        blocks.forward_formula,
        tangents=ops.forward_tangents,
        at_once=ops.results_and_tangents,
    )
    ops.call_backward = _autograd.differentiable(
        ops.backward,
        _autograd.saving(len(ops.tensors) + 4),
        ops.backward_backward,
        blocks.backward_formula,
    )
    _autograd.differentiable(
        ops.jvp,
        _autograd.saving(len(forward_mode.tensors)),
        ops.jvp_backward,
        forward_mode.formula,
        plain=True,
    )
    ops.batch()
    implement(ops.jvp, forward_mode.in_blocks, jvp_cuda)
    on_cuda = implement(ops.forward, blocks.forward, forward_cuda)
    _ahead.trace_into(ops.forward, forward_cuda)
    _library.fake_cuda(f"{ops.forward}_cuda", ops.fake_forward)
    implement(ops.backward, blocks.backward, backward_cuda)
    plain = _plain.forward(room, len(ops.tensors), on_cuda, ops.forward_backward, plain_cuda)
    return call_forward, plain


def implement(op: str, blocks: Kernel, cuda: Kernel | None) -> Kernel:
    """`blocks` serves wherever there is no kernel; on CUDA `cuda` does, but not in float64.

    Returns what serves on CUDA.
    """
    _library.implement(op, blocks, "CompositeExplicitAutograd")
    if cuda is None:
        return blocks

    def on_cuda(first: Tensor, *args: Any) -> Any:
        return (blocks if first.dtype == torch.float64 else cuda)(first, *args)

    _library.implement(op, on_cuda, "CUDA")
    return on_cuda
