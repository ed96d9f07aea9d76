"""L1 attention over an explicit list of edges: the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attn_ops._checks import check_bool, check_number, check_tensor
from attn_ops.l1 import sparse_ops
from attn_ops.l1.edge_list import EdgeList


def l1_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edges: Tensor | EdgeList,
    *,
    value_reverse: Tensor | None = None,
    softmax: bool = True,
    sink: bool = True,
    scale: float | None = None,
) -> Tensor:
    r"""Attention over the edges of a graph, by the L1 distance of their ends.

    .. math::
        z_e = -\mathrm{scale}\, \|q_{m(e)} - k_{n(e)}\|_1, \qquad
        A_e = \frac{e^{z_e}}{1 + \sum_{f:\, m(f) = m(e)} e^{z_f}}, \qquad
        \mathrm{out}_m = \sum_{e:\, m(e) = m} A_e\, v_{n(e)}
                         \;\Big(+ \sum_{e:\, n(e) = m} A_e\, r_{m(e)}\Big)

    The second sum is there with `value_reverse` r. `sink=False` leaves the 1 out, and
    `softmax=False` the whole denominator: :math:`A_e = e^{z_e}`. In the gradient sign(0) = 0.
    A query without edges gives zeros. All batches and heads have the same edges.

    The result, and the first gradients, do not depend on the order of the edges, bit by bit. Time
    grows linearly with the number of edges, and memory by one number per edge and head.

    Letters: B batch, H query heads, Hk key/value heads, M queries, N keys, L edges, D query/key
    width, E value width. D and E are 1 to 256. Any strides; float64, float32, bfloat16, float16;
    sums are float32 (float64 for float64).

    Args:
        query: [B, H, M, D]. Or [BH, M, D] with key and value of rank 3: batch and heads merged,
            which is a batch of BH with one head.
        key: [B, Hk, N, D], H a multiple of Hk: query head h reads head h // (H/Hk). Or [B, N, D],
            one head for all query heads.
        value: [B, Hk, N, E] or [B, N, E] like key.
        edges: int32 or int64 [L, 2], rows (query index, key index) in any order; an edge that is
            there twice counts twice. Or an `EdgeList`, which has been sorted once and for all.
        value_reverse: like value, with M = N: what flows from the query of an edge to its key.
        softmax: divide by the sum over the edges of a query.
        sink: with softmax, one more edge of score 0 and no value: attention to nothing.
        scale: nats per unit of distance, 1/sqrt(D) by default; any finite number.

    Returns:
        [B, H, M, E] (or [BH, M, E]) in query's dtype.

    Raises:
        ValueError: a shape, a device or a value that the above does not allow. Indices of raw
            edges that are out of range: on CUDA an assertion of the device, without waiting.
        TypeError: a dtype that the above does not allow.
        NotImplementedError: nested and sparse tensors.
    """
    op = "l1_sparse_attention"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(op, name, tensor)
    check_tensor(op, "value_reverse", value_reverse, optional=True)
    if not isinstance(edges, (Tensor, EdgeList)):
        got = type(edges).__name__
        raise TypeError(f"{op}: edges must be a Tensor or an EdgeList, got {got}")
    for name, flag in (("softmax", softmax), ("sink", sink)):
        check_bool(op, name, flag)
    options: dict[str, Any] = {"value_reverse": value_reverse, "softmax": softmax, "sink": sink}
    if scale is not None:
        check_number(op, "scale", scale)
    if isinstance(edges, EdgeList):
        scale = None if scale is None else float(scale)
        return sparse_ops.attend(query, key, value, edges, **options, scale=scale)
    return torch.ops.attn.l1_sparse(query, key, value, edges, **options, scale=scale)
