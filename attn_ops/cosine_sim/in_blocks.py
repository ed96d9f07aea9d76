"""The private ops by the reference formulas, a block of queries at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attn_ops import _autograd
from attn_ops._checks import compute_dtype
from attn_ops._forward_mode import ForwardMode, Operands, Results
from attn_ops._in_blocks import InBlocks
from attn_ops.cosine_sim import cuda, reference

ATTENTION = InBlocks(
    reference.forward,
    reference.backward,
    "query key value bias relative_bias head_scale query_gain key_gain sink",
    block_scores=1 << 23,  # 32 MiB of float32
)


def unit_tangents(x: Tensor, tangent: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """`attn::_cosine_sim_unit_jvp`: unit slices and their tangent."""
    # The derivative of the norm is symmetric: tangents go through it as gradients do.
    wide, its_tangent = (t.to(compute_dtype(x.dtype)) for t in (x, tangent))
    tangent_unit, _ = reference.prepare_backward(its_tangent, wide, None, groups)
    return reference.prepare(x, None, groups), tangent_unit.to(x.dtype)


def kernels_serve(x: Tensor) -> bool:
    """Whether a kernel computes `unit_tangents`.

    float16 has not the range for tangents of the directions of small vectors.
    """
    return x.device.type == "cuda" and x.dtype in (torch.float32, torch.bfloat16)


def _units_by_kernel(args: dict[str, Any]) -> Operands | None:
    """Unit queries and keys and their tangents, where nothing follows the norm."""
    query = args["query"]
    followed = any(args[name] is not None for name in ("head_scale", "query_gain", "key_gain"))
    if followed or not kernels_serve(query) or not args["groups"]:
        return None
    results: list[tuple[Tensor, Tensor | None]] = []
    for x in (query, args["key"]):
        primal, tangent = _autograd.unpack_dual(x)
        if tangent is None:
            results.append((reference.prepare(primal, None, args["groups"]), None))
        else:
            op = torch.ops.attn._cosine_sim_unit_jvp
            results.append(op(primal, tangent, args["groups"]))
    (unit_query, tangent_query), (unit_key, tangent_key) = results
    return unit_query, unit_key, tangent_query, tangent_key


def _by_one_kernel(args: dict[str, Any]) -> tuple[Results, Results] | None:
    """Results and tangents in one pass over the keys, where each row has a tangent."""
    rows, tangents = zip(*(_autograd.unpack_dual(args[name]) for name in ("query", "key", "value")))
    if not cuda.serves_tangents(args, rows, tangents):
        return None
    return cuda.with_tangents(*rows, *tangents, args["left"], args["right"], args["scale"])


FORWARD_MODE = ForwardMode(
    reference.tangent,
    reference.score_operands,
    reference.score_tangents,
    _units_by_kernel,
    _by_one_kernel,
)
