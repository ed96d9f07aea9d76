"""L2 normalisation of queries and keys as a separate step."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from attn_ops._checks import check_int, check_tensor

EPSILON = 1e-12


def unit_slices(x: Tensor, groups: int) -> Tensor:
    """Each of `groups` equal slices of the last dimension, divided by max(its norm, 1e-12).

    The norm is taken in at least float32, so that a tiny float16 vector becomes a unit vector. A
    zero vector stays zero and gets a zero gradient.
    """
    slices = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (groups, -1))
    squared = slices.square().sum(-1, keepdim=True)
    # The square root of zero has no derivative: it is kept away from both branches of the `where`.
    inverse = torch.where(squared > 0, squared, 1).rsqrt().clamp_max(1 / EPSILON)
    return (slices * torch.where(squared > 0, inverse, 0)).flatten(-2).to(x.dtype)


@overload
def l2_normalize(tensor: Tensor, /, *, groups: int = ...) -> Tensor: ...


@overload
def l2_normalize(
    first: Tensor, second: Tensor, /, *more: Tensor, groups: int = ...
) -> tuple[Tensor, ...]: ...


def l2_normalize(*tensors: Tensor, groups: int = 1) -> Tensor | tuple[Tensor, ...]:
    """`x / max(|x|, 1e-12)` over the last dimension: unit queries and keys.

    The separate step for `cosine_sim_attention(..., normalize=False)`, where something (a rotary
    embedding, say) comes between the norm and the attention.

    Args:
        tensors: floating tensors of any shape [..., D].
        groups: the last dimension is split into this many equal slices, each of which becomes a
            unit vector.

    Returns:
        One tensor for one, a tuple for several, of the shapes and dtypes of the inputs. The norm is
        taken in at least float32. A zero vector stays zero, and its gradient is zero.

    Raises:
        TypeError: an input is not a floating tensor, or groups not an int.
        ValueError: `groups` is below 1 or does not divide D.
    """
    for tensor in tensors:
        check_tensor("l2_normalize", "tensors", tensor)
    check_int("l2_normalize", "groups", groups)
    outputs = tuple(torch.ops.attn.l2_normalize(tensor, groups) for tensor in tensors)
    return outputs[0] if len(outputs) == 1 else outputs
