"""`attn::linear` and its kin: public ops, and the private ops that carry all the rest.

The public ops check their arguments and fold them; compiled graphs keep the private ones.
schemas.txt has the schemas.

What the private ops read, beside query, key and value [B, H, M, D], [B, Hk, N, D], [B, Hk, N, E]:
  mask bool [B, 1 or H, 1, N]; decay [H]; state [B, H, F, E] and key_sum [B, H, F], both or none;
  offsets int32 [S+1], the first one 0, none above N: packed sequences, B = 1 and no state;
  causal: M = N, and only then a decay; eps: None leaves the sums as they are.
Parameters and states have the dtype of sums. The private forward returns, beside out, what it was
divided by (`denominator` [B, H, M], eps included; [0] without eps), and the state and key_sum after
the last key ([0] unless they were given). All outputs are contiguous.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from attn_ops import _ahead, _autograd, _library, _plain, _vmap
from attn_ops._checks import compute_dtype, fail, shape
from attn_ops.linear import in_blocks
from attn_ops.linear.arguments import (
    check_causal,
    check_feature_map,
    fold_decay,
    fold_eps,
    fold_inputs,
    fold_mask,
    fold_offsets,
    fold_state,
)

_library.define("linear")


def _linear(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    normalize: bool = True,
    eps: float = 1e-5,
    decay: Tensor | None = None,
    feature_map: str = "identity",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    op = "linear"
    merged = query.dim() == 3
    query, key, value = fold_inputs(op, query, key, value, causal)
    _autograd.check_forward_mode(op, query, key, value, decay)
    if decay is not None and not causal:
        raise ValueError(f"{op}: decay must come with causal=True, got causal=False")
    out, *_ = _forward(
        query,
        key,
        value,
        fold_mask(op, mask, query, key),
        fold_decay(op, decay, query),
        None,
        None,
        fold_offsets(op, cu_seqlens, query, key),
        causal,
        fold_eps(op, eps, normalize),
        check_feature_map(op, feature_map),
    )
    return out.squeeze(1) if merged else out


def plain(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, eps: float, feature_map: str
) -> Tensor:
    """A plain call (_plain.py)."""
    op = "linear"
    check_causal(op, query, key, causal)
    options = causal, fold_eps(op, eps, True), check_feature_map(op, feature_map)
    out, _ = _plain_forward(query, key, value, options)
    return out


def _linear_with_state(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor | None = None,
    key_sum: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-5,
    decay: Tensor | None = None,
    feature_map: str = "identity",
) -> tuple[Tensor, Tensor, Tensor]:
    op = "linear_with_state"
    merged = query.dim() == 3
    query, key, value = fold_inputs(op, query, key, value, True)
    _autograd.check_forward_mode(op, query, key, value, state, key_sum, decay)
    check_feature_map(op, feature_map)
    state, key_sum = fold_state(op, state, key_sum, query, value, feature_map, merged)
    out, _, state, key_sum = _forward(
        query,
        key,
        value,
        fold_mask(op, mask, query, key),
        fold_decay(op, decay, query),
        state,
        key_sum,
        None,
        True,
        fold_eps(op, eps, normalize),
        feature_map,
    )
    if merged:
        return out.squeeze(1), state.squeeze(1), key_sum.squeeze(1)
    return out, state, key_sum


def _linear_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor,
    key_sum: Tensor,
    *,
    normalize: bool = True,
    eps: float = 1e-5,
    decay: Tensor | None = None,
    feature_map: str = "identity",
    kernel: Any = torch.ops.attn._linear_step,
) -> Tensor:
    op = "linear_step"
    merged = query.dim() == 3
    query, key, value = fold_inputs(op, query, key, value, True)
    check_feature_map(op, feature_map)
    if query.shape[2] != 1:
        raise fail(op, "query", "have one token", shape(query))
    folded, folded_sum = fold_state(op, state, key_sum, query, value, feature_map, merged)
    eps_or_none = fold_eps(op, eps, normalize)
    decay = fold_decay(op, decay, query)
    out = kernel(query, key, value, folded, folded_sum, decay, eps_or_none, feature_map)
    return out.squeeze(1) if merged else out


linear = _autograd.composite("linear", _linear)
linear_with_state = _autograd.composite("linear_with_state", _linear_with_state)
linear_step = _autograd.composite("linear_step", _linear_step)


# --- shapes


@_library.fake("_linear_fwd")
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    decay: Tensor | None,
    state: Tensor | None,
    key_sum: Tensor | None,
    offsets: Tensor | None,
    causal: bool,
    eps: float | None,
    feature_map: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(query.dtype)
    rows = query.shape[:3]
    return (
        query.new_empty(*rows, value.shape[3]),
        query.new_empty((0,) if eps is None else rows, dtype=dtype),
        query.new_empty((0,) if state is None else state.shape, dtype=dtype),
        query.new_empty((0,) if key_sum is None else key_sum.shape, dtype=dtype),
    )


@_library.fake("_linear_bwd")
def _(grad_out: Tensor, *args: Any) -> tuple[Tensor, ...]:
    inputs = [args[i] for i in _DIFFERENTIABLE_IN_BACKWARD]
    return tuple(
        grad_out.new_empty(0) if x is None or not needed else x.new_empty(x.shape)
        for x, needed in zip(inputs, args[-1], strict=True)
    )


@_library.fake("_linear_grad_decay")
def _(*args: Any) -> Tensor:
    return args[7].new_empty(args[7].shape)


@_library.fake("_linear_step")
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])


# --- derivatives

# Arguments of the private forward: 8 tensors, then causal, eps, feature_map.
_NUM_TENSORS = 8
_DECAY = 4
# Its differentiable tensors but for the decay, in the order of the private backward's results.
_DIFFERENTIABLE = (0, 1, 2, 5, 6)
# The same among the arguments of the private backward that follow grad_out.
_DIFFERENTIABLE_IN_BACKWARD = tuple(i + 2 for i in _DIFFERENTIABLE)


def _save_forward(ctx: Any, args: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    out, denominator, *finals = output
    normalized = args[9] is not None
    # Without a denominator the gradients do not depend on out: it need not be kept.
    ctx.save_for_backward(
        *args[:_NUM_TENSORS], *((out, denominator) if normalized else (None,) * 2)
    )
    ctx.options = args[_NUM_TENSORS:]
    ctx.mark_non_differentiable(denominator, *(x for x in finals if args[5] is None))
    ctx.set_materialize_grads(False)


def _forward_backward(
    ctx: Any,
    grad_out: Tensor | None,
    grad_denominator: Tensor | None,
    grad_final_state: Tensor | None = None,
    grad_final_key_sum: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    *tensors, out, denominator = ctx.saved_tensors
    given = len(tensors)  # three of a plain call
    tensors = [*tensors, *[None] * (_NUM_TENSORS - given)]  # Dynamo of torch 2.11 has a tuple here
    needed = _autograd.needed(ctx)
    grads: list[Tensor | None] = [None] * len(needed)
    results_grads = (grad_out, grad_final_state, grad_final_key_sum)
    if all(grad is None for grad in results_grads):
        return tuple(grads)
    query, value = tensors[0], tensors[2]
    if grad_out is None:
        grad_out = query.new_zeros(*query.shape[:3], value.shape[3])
    cotangents = (grad_out, grad_final_state, grad_final_key_sum)
    output_mask = [i < given and needed[i] for i in _DIFFERENTIABLE]
    if any(output_mask):
        results = _backward(*cotangents, *tensors, out, denominator, *ctx.options, output_mask)
        for i, result, need in zip(_DIFFERENTIABLE, results, output_mask, strict=True):
            if need:
                grads[i] = result
    if _DECAY < given and needed[_DECAY]:
        grads[_DECAY] = _grad_decay(*cotangents, *tensors, *ctx.options[1:])
    return tuple(grads)


# Of the private backward and of the op for the decay: three gradients, and the forward's arguments.
_DIFFERENTIABLE_TWICE = (0, 1, 2, *(i + 3 for i in (0, 1, 2, _DECAY, 5, 6)))


def _backward_backward(ctx: Any, *cotangents: Tensor | None) -> list[Tensor | None]:
    # out and denominator take no part: the formula computes them again.
    args = (*ctx.saved_tensors, *ctx.options)
    return _autograd.vjp_of_formula(
        in_blocks.backward_formula, args, cotangents, _DIFFERENTIABLE_TWICE
    )


def _grad_decay_backward(ctx: Any, cotangent: Tensor | None) -> list[Tensor | None]:
    args = (*ctx.saved_tensors, *ctx.options)

    def formula(*args: Any) -> tuple[Tensor]:
        return (in_blocks.grad_decay_formula(*args),)

    return _autograd.vjp_of_formula(formula, args, (cotangent,), _DIFFERENTIABLE_TWICE)


_autograd.formulas["linear_step"] = partial(_linear_step, kernel=in_blocks.step)
_forward = _autograd.differentiable(
    "_linear_fwd", _save_forward, _forward_backward, in_blocks.forward_formula
)
_backward = _autograd.differentiable(
    "_linear_bwd", _autograd.saving(13), _backward_backward, in_blocks.backward_formula
)
_grad_decay = _autograd.differentiable(
    "_linear_grad_decay", _autograd.saving(11), _grad_decay_backward, in_blocks.grad_decay_formula
)


# --- batching: where the heads stand in every tensor

_FORWARD_PLACES = (
    *[_vmap.BATCH_HEADS] * 3,  # query, key, value
    _vmap.SCORES,  # mask
    _vmap.HEADS,  # decay
    *[_vmap.BATCH_HEADS] * 2,  # state, key_sum
    _vmap.NOWHERE,  # offsets
)
_vmap.register("_linear_fwd", _FORWARD_PLACES, [_vmap.BATCH_HEADS] * 4)
_vmap.register(
    "_linear_bwd",
    (*[_vmap.BATCH_HEADS] * 3, *_FORWARD_PLACES, *[_vmap.BATCH_HEADS] * 2),
    [_FORWARD_PLACES[i] for i in _DIFFERENTIABLE],
)
_vmap.register(
    "_linear_step",
    [*[_vmap.BATCH_HEADS] * 5, _vmap.HEADS],  # query, key, value, state, key_sum, decay
    [_vmap.BATCH_HEADS],
    written=(3, 4),
)
_vmap.register("_linear_grad_decay", (*[_vmap.BATCH_HEADS] * 3, *_FORWARD_PLACES), [_vmap.HEADS])


# --- kernels


def _forward_cuda(query: Tensor, *args: Any) -> tuple[Tensor, ...]:
    if query.dtype == torch.float64:
        return in_blocks.forward(query, *args)
    return _library.triton_room("linear").forward(query, *args)


def _backward_cuda(grad_out: Tensor, *args: Any) -> tuple[Tensor, ...]:
    if grad_out.dtype == torch.float64:
        return in_blocks.backward(grad_out, *args)
    return _library.triton_room("linear").backward(grad_out, *args)


def _step_cuda(query: Tensor, *args: Any) -> Tensor:
    if query.dtype == torch.float64:
        return in_blocks.step(query, *args)
    # Autograd sees no kernel of Triton write.
    torch.autograd.graph.increment_version((args[2], args[3]))
    return _library.triton_room("linear").step(query, *args)


for _op, _blocks, _cuda in (
    ("_linear_fwd", in_blocks.forward, _forward_cuda),
    ("_linear_bwd", in_blocks.backward, _backward_cuda),
    ("_linear_step", in_blocks.step, _step_cuda),
):
    _library.implement(_op, _blocks, "CompositeExplicitAutograd")
    _library.implement(_op, _cuda, "CUDA")
_ahead.trace_into("_linear_fwd", _forward_cuda)
_ahead.trace_into("_linear_step", _step_cuda)
_plain_forward = _plain.forward("linear", _NUM_TENSORS, _forward_cuda, _forward_backward)
_library.implement("_linear_grad_decay", in_blocks.grad_decay, "CompositeExplicitAutograd")
# A step has no gradient: nothing is recorded, and its result requires none.
_library.implement("_linear_step", torch.library.fallthrough_kernel, "Autograd")
