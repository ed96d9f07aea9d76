"""What references of softmax-like attention share: all that happens to scores [B, H, M, N].

Letters: B batch, H query heads, Hk key/value heads, M queries, N keys, E value width. Arguments are
those of the private ops (see `_softmax_ops.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from attn_ops import masks
from attn_ops._heads import per_kv_head, per_query_head


def diagonal(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """[M, N]: the entry of `relative_bias` that query m and key n share, n - m + M - 1."""
    query = torch.arange(num_queries, device=device)
    return torch.arange(num_keys, device=device) - query.unsqueeze(1) + (num_queries - 1)


def sum_diagonals(x: Tensor) -> Tensor:
    """[H, M, N] -> [H, M+N-1]: entry o is the sum over n - m + M - 1 = o."""
    heads, num_queries, num_keys = x.shape
    # Rows of length N + M read as rows of length N + M - 1: each moves one column to the right.
    padded = torch.nn.functional.pad(x.flip(1), (0, num_queries)).flatten(1)
    length = num_queries + num_keys - 1 if num_queries or num_keys else 0
    return padded[:, : num_queries * length].unflatten(1, (num_queries, length)).sum(1)


def biased(
    score: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    relative_bias: Tensor | None,
    start: Tensor | None,
    stop: Tensor | None,
    left: int,
    right: int,
) -> Tensor:
    """The scores with every bias, -inf where the query may not see the key."""
    num_queries, num_keys = score.shape[2:]
    if bias is not None:
        score = score + bias
    if relative_bias is not None and num_queries and num_keys:
        score = score + relative_bias[:, diagonal(num_queries, num_keys, score.device)]
    if (
        mask is None
        and start is None
        and masks.band_hides_nothing(num_queries, num_keys, left, right)
    ):
        return score
    seen = masks.visible(num_queries, num_keys, mask, start, stop, left, right, score.device)
    return score.masked_fill(~seen, -torch.inf)


def attend(score: Tensor, value: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """out [B, H, M, E] = softmax(score) @ value; lse [B, H, M] = log of the sum of exp(score)."""
    batch, heads, num_queries, _ = score.shape
    # The sink is one extra key with that score and no value; without a sink nobody sees it.
    sink_score = score.new_full((heads,), -torch.inf) if sink is None else sink.to(score.dtype)
    sink_score = sink_score[:, None, None].expand(batch, heads, num_queries, 1)
    score = torch.cat([score, sink_score], -1)
    row_max = score.amax(-1, keepdim=True).detach()
    # -inf where nothing is visible: subtracting it would give NaN.
    row_max = torch.where(row_max == -torch.inf, 0, row_max)
    weight = (score - row_max).exp()
    total = weight.sum(-1, keepdim=True)
    seen = total > 0
    total = torch.where(seen, total, 1)
    lse = torch.where(seen, total.log() + row_max, -torch.inf).squeeze(-1)
    return (weight[..., :-1] / total).to(value.dtype) @ per_query_head(value, heads), lse


def attend_tangent(
    score: Tensor,
    score_tangent: Tensor | None,
    value: Tensor,
    sink: Tensor | None,
    lse: Tensor,
    tangent_value: Tensor | None,
    tangent_sink: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Tangents of out and lse, from those of score (broadcast at will), value and sink.

    With P = softmax(score): lse' = sum_n P score', out' = P value' + P (score' - lse') value.
    """
    heads = score.shape[1]
    # Only a shift, which cancels: rounded or not, it has no derivative.
    shift = torch.where(lse == -torch.inf, 0, lse).detach().unsqueeze(-1)
    weight = (score - shift).exp()
    total = weight.sum(-1, keepdim=True)
    of_sink = None if sink is None else (sink[:, None, None] - shift).exp()
    total = total if of_sink is None else total + of_sink
    total = torch.where(total > 0, total, 1)  # a row that sees nothing has no weights
    moved = None if score_tangent is None else weight * score_tangent
    tangent_lse = torch.zeros_like(total) if moved is None else moved.sum(-1, keepdim=True) / total
    if of_sink is not None and tangent_sink is not None:
        tangent_lse = tangent_lse + of_sink * tangent_sink[:, None, None] / total
    out = torch.zeros_like(total)
    if moved is not None or tangent_sink is not None:
        # Before the product: what all keys of a row move alike is lost to no rounding.
        against = torch.zeros_like(weight) if moved is None else moved
        centred = torch.addcmul(against, weight, tangent_lse, value=-1)
        out = centred @ per_query_head(value, heads)
    if tangent_value is not None:
        out = out + weight @ per_query_head(tangent_value, heads)
    return (out / total).expand(*score.shape[:3], value.shape[3]), tangent_lse.squeeze(-1)


def biases_tangent(
    score_tangent: Tensor | None,
    tangent_bias: Tensor | None,
    tangent_relative_bias: Tensor | None,
    num_queries: int,
    num_keys: int,
) -> Tensor | None:
    """The tangent of `biased` scores, from those of the scores and of each bias."""
    terms = [term for term in (score_tangent, tangent_bias) if term is not None]
    if tangent_relative_bias is not None and num_queries and num_keys:
        places = diagonal(num_queries, num_keys, tangent_relative_bias.device)
        terms.append(tangent_relative_bias[:, places])
    if not terms:
        return None
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    score: Tensor,
    value: Tensor,
    bias: Tensor | None,
    relative_bias: Tensor | None,
    sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of score, value, bias, relative_bias and sink."""
    # Where lse is -inf the row sees nothing: its score is -inf.
    finite_lse = torch.where(lse == -torch.inf, 0, lse)
    weight = (score - finite_lse.unsqueeze(-1)).exp()
    delta = (out * grad_out).sum(-1)
    delta = delta if grad_lse is None else delta - grad_lse
    grad_weight = grad_out @ per_query_head(value, score.shape[1]).mT
    grad_score = weight * (grad_weight - delta.unsqueeze(-1))
    grad_value = per_kv_head(weight.mT @ grad_out, value.shape[1])
    grad_bias = None if bias is None else grad_score.sum_to_size(bias.shape)
    grad_relative_bias = None if relative_bias is None else sum_diagonals(grad_score.sum(0))
    grad_sink = None
    if sink is not None:
        grad_sink = -((sink[:, None] - finite_lse).exp() * delta).sum((0, 2))
    return grad_score, grad_value, grad_bias, grad_relative_bias, grad_sink
