"""Batching rules: the mapped dimension becomes part of the heads.

Folding it into the heads (not the batch) gives every mapped copy its own per-head parameters, so a
backward op returns per-sample gradients of them. Grouped heads survive: with V copies, query head
`v*H + h` still reads key/value head `(v*H + h) // (H/Hk) = v*Hk + h // (H/Hk)`.

Letters: V the mapped dimension, B batch, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attn_ops import _library

# Where the heads stand in a tensor: `[B, H, ...]`, `[H, ...]`, or nowhere.
BATCH_HEADS, SCORES, HEADS, NOWHERE = "batch_heads", "scores", "heads", "nowhere"


def _fold(x: Tensor, dim: int | None, size: int, place: str, heads: int) -> Tensor:
    at = 0 if place == HEADS else 1
    if dim is None:
        x = x.unsqueeze(at).expand(*x.shape[:at], size, *x.shape[at:])
    else:
        x = x.movedim(dim, at)
    if place == SCORES and x.shape[2] == 1:
        x = x.expand(-1, -1, heads, -1, -1)  # a mask or bias that all heads share
    return x.flatten(at, at + 1)


def _fold_all(
    args: tuple[Any, ...], dims: dict[int, Any], size: int, places: Sequence[str]
) -> tuple[list[Any], dict[int, bool]]:
    """All arguments folded, and of masks and biases whether all heads share them."""
    first = dims[0]
    heads = args[0].shape[1 if first is None or first > 1 else 2]
    folded, shared = list(args), {}
    for i, place in enumerate(places):
        x, dim = args[i], dims[i]
        if x is None or place == NOWHERE:
            continue
        if place == SCORES:
            shared[i] = (x if dim is None else x.movedim(dim, 0)[0]).shape[1] == 1
        folded[i] = _fold(x, dim, size, place, heads)
    return folded, shared


def _unfold(x: Tensor, size: int, place: str, shared: bool) -> tuple[Tensor, int]:
    at = 0 if place == HEADS else 1
    x = x.unflatten(at, (size, -1))
    return (x.sum(2, keepdim=True) if shared else x), at


def _check_written(overload: Any, written: Sequence[int], dims: dict[int, Any], size: int) -> None:
    """Every copy writes to something of its own."""
    for i in written:
        if dims[i] is None:
            op, name = overload._opname.strip("_"), overload._schema.arguments[i].name
            message = f"must be mapped by vmap, got one for {size} copies that write to it"
            raise ValueError(f"{op}: {name} {message}")


def register(
    op: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    gradient_of: Sequence[int] | None = None,
    written: Sequence[int] = (),
) -> None:
    """vmap for `attn::op`.

    inputs: the place of the heads in each leading tensor argument (the first BATCH_HEADS one is
        taken to have all query heads); outputs: the same for each output.
    gradient_of: for a backward op, the argument that each output is the gradient of.
    written: the arguments that the op writes to.
    """
    overload = getattr(torch.ops.attn, op).default

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        dims: dict[int, Any] = dict(enumerate(in_dims[: len(inputs)]))
        if any(place == NOWHERE and dims[i] is not None for i, place in enumerate(inputs)):
            return _one_by_one(overload, info.batch_size, in_dims, args)
        _check_written(overload, written, dims, info.batch_size)
        folded, shared = _fold_all(args, dims, info.batch_size, inputs)
        results = overload(*folded)
        for i in written:  # what could not be folded as a view was written to in vain
            x, at = _unfold(folded[i], info.batch_size, inputs[i], False)
            args[i].copy_(x.movedim(at, dims[i]))
        if isinstance(results, Tensor):
            return _unfold(results, info.batch_size, outputs[0], False)
        unfolded: list[tuple[Tensor, int | None]] = []
        for i, (result, place) in enumerate(zip(results, outputs, strict=True)):
            if result.dim() == 1 and result.shape[0] == 0:
                unfolded.append((result, None))  # a gradient that nobody asked for
            else:
                was_shared = gradient_of is not None and shared.get(gradient_of[i], False)
                unfolded.append(_unfold(result, info.batch_size, place, was_shared))
        return tuple(x for x, _ in unfolded), tuple(dim for _, dim in unfolded)

    torch.library.register_vmap(f"attn::{op}", rule, lib=_library._library)


def _one_by_one(
    overload: Any, size: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]
) -> Any:
    """A loop over the copies, for what cannot be folded (packed sequences that differ by copy)."""
    pairs = list(zip(args, in_dims, strict=True))

    def copy(v: int) -> list[Any]:
        # A list of options has a list of dimensions, all None.
        return [x.select(dim, v) if isinstance(dim, int) else x for x, dim in pairs]

    results = [overload(*copy(v)) for v in range(size)]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(r) for r in zip(*results, strict=True)), (0,) * len(results[0])
