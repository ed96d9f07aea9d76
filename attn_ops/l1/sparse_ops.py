"""`attn::l1_sparse`: the public op, and the private ops that carry all the rest.

The public op checks its arguments, sorts the edges (`attn::_l1_edges`) and calls the private
forward; compiled graphs keep these two. schemas.txt has the schemas.

What the private ops read, beside query, key, value [B, H, M, D], [B, Hk, N, D], [B, Hk, N, E] and
value_reverse like value: the edges in both orders, five int64 tensors (see edge_list.py). Beside
out the forward returns `weight` [B, H, L], the A of every edge in row order, in the dtype of sums;
it has no gradient, and the backward reads it. All outputs are contiguous.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from attn_ops import _ahead, _autograd, _library, _vmap
from attn_ops._arguments import autocast, check_scale, fold_tensors
from attn_ops._checks import check_device, check_like_query, check_shape, compute_dtype, fail
from attn_ops.l1 import edge_list, sparse_in_blocks
from attn_ops.l1.edge_list import EdgeList, check_edges


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edges: Tensor | EdgeList,
    value_reverse: Tensor | None,
    softmax: bool,
    sink: bool,
    scale: float | None,
) -> Tensor:
    """`attn::l1_sparse` over raw or prepared edges."""
    op = "l1_sparse"
    _autograd.check_forward_mode(op, query, key, value, value_reverse)
    merged, rank = query.dim() == 3, value.dim()
    query, key, value = autocast(query, key, value)
    query, key, value = fold_tensors(op, query, key, value)
    if value_reverse is not None:
        value_reverse = _fold_reverse(op, autocast(value_reverse)[0], query, value, rank)
    tensors = _sorted(op, edges, query, key)
    out, _ = torch.ops.attn._l1_sparse_fwd(
        query, key, value, value_reverse, *tensors, softmax, sink, _scale(op, scale, query)
    )
    return out.squeeze(1) if merged else out


def _fold_reverse(op: str, reverse: Tensor, query: Tensor, value: Tensor, rank: int) -> Tensor:
    """[B, Hk, M, E] in the layout of value."""
    check_like_query(op, "value_reverse", reverse, query)
    if query.shape[2] != value.shape[2]:
        expected = "come with as many keys as queries, M = N"
        got = f"{query.shape[2]} queries, {value.shape[2]} keys"
        raise fail(op, "value_reverse", expected, got)
    law = "[B, Hk, N, E]" if rank == 4 else "[B, N, E]"
    expected_shape = value.shape if rank == 4 else (value.shape[0], *value.shape[2:])
    check_shape(op, "value_reverse", reverse, expected_shape, f"{law} like value")
    return reverse if rank == 4 else reverse.unsqueeze(1)


def _sorted(op: str, edges: Tensor | EdgeList, query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
    """The edges in both orders, as many queries and keys as there are."""
    sizes = query.shape[2], key.shape[2]
    if isinstance(edges, Tensor):
        check_edges(op, "edges", edges)
        check_device(op, "edges", edges, query)
        return torch.ops.attn._l1_edges(edges, *sizes)
    check_device(op, "edges", edges.row_start, query)
    if (edges.num_queries, edges.num_keys) != sizes:
        expected = f"be made for {sizes[0]} queries and {sizes[1]} keys"
        got = f"{edges.num_queries} queries and {edges.num_keys} keys"
        raise fail(op, "edges", expected, got)
    return edges.tensors


def _scale(op: str, scale: float | None, query: Tensor) -> float:
    if scale is None:
        return int(query.shape[3]) ** -0.5
    check_scale(op, scale, query)
    return scale


def _l1_sparse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edges: Tensor,
    *,
    value_reverse: Tensor | None = None,
    softmax: bool = True,
    sink: bool = True,
    scale: float | None = None,
) -> Tensor:
    return attend(query, key, value, edges, value_reverse, softmax, sink, scale)


_library.decompose("l1_sparse", _l1_sparse)


# --- shapes


@_library.fake("_l1_edges")
def _(edges: Tensor, num_queries: int, num_keys: int) -> tuple[Tensor, ...]:
    count = edges.shape[0]
    sizes = (num_queries + 1, count, num_keys + 1, count, count)
    return tuple(edges.new_empty(size, dtype=torch.int64) for size in sizes)


@_library.fake("_l1_sparse_fwd")
def _(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    batch, heads, num_queries, _width = query.shape
    out = query.new_empty(batch, heads, num_queries, value.shape[3])
    row_keys = args[2]
    weight_dtype = compute_dtype(query.dtype)
    return out, query.new_empty(batch, heads, row_keys.shape[0], dtype=weight_dtype)


@_library.fake("_l1_sparse_bwd")
def _(grad_out: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(
        grad_out.new_empty(0) if x is None or not needed else x.new_empty(x.shape)
        for x, needed in zip(args[:4], args[-1], strict=True)
    )


# --- derivatives

# Of the private forward: query, key, value, value_reverse, the edges in both orders, three options.
_NUM_TENSORS, _NUM_DIFFERENTIABLE = 9, 4


def _save_forward(ctx: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*args[:_NUM_TENSORS], output[1])
    ctx.options = args[_NUM_TENSORS:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _forward_backward(ctx: Any, grad_out: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * (_NUM_TENSORS + len(ctx.options))
    if grad_out is None:
        return tuple(grads)
    output_mask = list(_autograd.needed(ctx)[:_NUM_DIFFERENTIABLE])
    results = torch.ops.attn._l1_sparse_bwd(grad_out, *saved, *ctx.options, output_mask)
    for i, (result, needed) in enumerate(zip(results, output_mask, strict=True)):
        grads[i] = result if needed else None
    return tuple(grads)


def _backward_backward(ctx: Any, *cotangents: Tensor | None) -> list[Tensor | None]:
    # The weights take no part: the formula computes them again.
    args = (*ctx.saved_tensors, *ctx.options)
    places = range(1 + _NUM_DIFFERENTIABLE)
    return _autograd.vjp_of_formula(sparse_in_blocks.backward_formula, args, cotangents, places)


_autograd.formulas["_l1_edges"] = edge_list.both_orders
_autograd.differentiable(
    "_l1_sparse_fwd", _save_forward, _forward_backward, sparse_in_blocks.forward_formula
)
_autograd.differentiable(
    "_l1_sparse_bwd",
    _autograd.saving(_NUM_TENSORS + 2),
    _backward_backward,
    sparse_in_blocks.backward_formula,
)


# --- batching: where the heads stand in every tensor

_FORWARD_PLACES = (*[_vmap.BATCH_HEADS] * 4, *[_vmap.NOWHERE] * 5)
_vmap.register("_l1_edges", (_vmap.NOWHERE,), ())
_vmap.register("_l1_sparse_fwd", _FORWARD_PLACES, [_vmap.BATCH_HEADS] * 2)
_vmap.register(
    "_l1_sparse_bwd",
    (_vmap.BATCH_HEADS, *_FORWARD_PLACES, _vmap.BATCH_HEADS),
    [_vmap.BATCH_HEADS] * 4,
)


# --- kernels


def _triton() -> Any:
    """The Triton kernels, imported at the first CUDA launch."""
    return importlib.import_module("attn_ops.l1.triton_sparse")


def _forward_cuda(query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    if query.dtype == torch.float64:
        return sparse_in_blocks.forward(query, *args)
    return _triton().forward(query, *args)


def _backward_cuda(grad_out: Tensor, *args: Any) -> tuple[Tensor, ...]:
    if grad_out.dtype == torch.float64:
        return sparse_in_blocks.backward(grad_out, *args)
    return _triton().backward(grad_out, *args)


_library.implement("_l1_edges", edge_list.sort, "CompositeExplicitAutograd")
for _op, _blocks, _cuda in (
    ("_l1_sparse_fwd", sparse_in_blocks.forward, _forward_cuda),
    ("_l1_sparse_bwd", sparse_in_blocks.backward, _backward_cuda),
):
    _library.implement(_op, _blocks, "CompositeExplicitAutograd")
    _library.implement(_op, _cuda, "CUDA")
_ahead.trace_into("_l1_edges", edge_list.sort)
_ahead.trace_into("_l1_sparse_fwd", _forward_cuda)
