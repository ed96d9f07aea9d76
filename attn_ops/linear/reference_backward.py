"""The gradients of `reference.forward`, written out.

PyTorch derives the same from the formula, but not inside of a kernel, where neither autograd nor
functorch can record.

Letters: B batch, H query heads, Hk key/value heads, M queries, N keys, D query/key width,
F features, E value width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attn_ops._heads import per_kv_head, per_query_head
from attn_ops.feature_maps import FEATURE_MAPS, pullback
from attn_ops.linear import reference
from attn_ops.linear.reference import power, seen


def slope(decay: Tensor, exponent: Tensor) -> Tensor:
    """The derivative of decay ** exponent, [H, *exponent]."""
    return exponent.to(decay.dtype) * power(decay, (exponent - 1).clamp_min(0))


def of_quotient(block: dict[str, Any], grad_out: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradients of the numerator [B, H, M, E] and the denominator [B, H, M], None without one."""
    if block["eps"] is None:
        return grad_out, None
    out, denominator, *_ = reference.forward(**block)
    safe = torch.where(denominator == 0, 1, denominator)
    grad = grad_out * torch.where(denominator == 0, 0, 1 / safe).unsqueeze(-1)
    return grad, -(grad * out).sum(-1)


def of_state(
    block: dict[str, Any],
    phi_query: Tensor,
    phi_key: Tensor,
    value: Tensor,
    decay: Tensor,
    grad: Tensor,
    grad_sum: Tensor,
    grad_state: Tensor,
    grad_key_sum: Tensor,
) -> dict[str, Tensor]:
    """What the state before and after the block adds to the gradients.

    grad, grad_sum: of the numerator and the denominator; grad_state, grad_key_sum: after the block.
    """
    state, key_sum = block["state"], block["key_sum"]
    m, n = (torch.arange(x.shape[2], device=x.device) for x in (phi_query, phi_key))
    # Filled on the device: a number copied to it cannot be part of a CUDA graph.
    number = n.new_full((), len(n))
    before, after = m + 1, len(n) - 1 - n
    of_query = grad @ state.mT + grad_sum.unsqueeze(-1) * key_sum.unsqueeze(2)
    of_key = value @ grad_state.mT + grad_key_sum.unsqueeze(2)
    read = phi_query * power(decay, before).unsqueeze(-1)
    kept = phi_key * power(decay, after).unsqueeze(-1)
    left = power(decay, number)[:, None]
    of_left = (state * grad_state).sum((2, 3)) + (key_sum * grad_key_sum).sum(2)
    of_decay = ((phi_query * of_query).sum(-1) * slope(decay, before)).sum((0, 2))
    of_decay = of_decay + ((phi_key * of_key).sum(-1) * slope(decay, after)).sum((0, 2))
    return {
        "query": of_query * power(decay, before).unsqueeze(-1),
        "key": of_key * power(decay, after).unsqueeze(-1),
        "value": kept @ grad_state,
        "state": read.mT @ grad + left.unsqueeze(-1) * grad_state,
        "key_sum": (read * grad_sum.unsqueeze(-1)).sum(2) + left * grad_key_sum,
        "decay": of_decay + (of_left * slope(decay, number)).sum(0),
    }


def backward(
    block: dict[str, Any], grad_out: Tensor, grad_state: Tensor | None, grad_key_sum: Tensor | None
) -> dict[str, Tensor]:
    """Gradients of everything that `reference.forward(**block)` reads, by name."""
    query, key, decay = block["query"], block["key"], block["decay"]
    heads, name = query.shape[1], block["feature_map"]
    features = FEATURE_MAPS[name]
    phi_query, phi_key = features(query), per_query_head(features(key), heads)
    visible = 1 if block["mask"] is None else block["mask"].mT
    phi_key = phi_key * visible
    value = per_query_head(block["value"], heads)
    rates = query.new_ones(heads) if decay is None else decay
    m = torch.arange(block["first"], block["first"] + query.shape[2], device=query.device)
    n = torch.arange(key.shape[2], device=query.device)
    age = (m[:, None] - n).clamp_min(0)
    sees = seen(m, n, block["offsets"], block["causal"])
    weight = sees * power(rates, age)

    grad, grad_sum = of_quotient(block, grad_out)
    grad_sum = grad.new_zeros(grad.shape[:-1]) if grad_sum is None else grad_sum
    products = phi_query @ phi_key.mT
    grad_score = grad @ value.mT + grad_sum.unsqueeze(-1)
    grads = {
        "query": grad_score * weight @ phi_key,
        "key": (grad_score * weight).mT @ phi_query,
        "value": (products * weight).mT @ grad,
        "decay": (grad_score * products * (sees * slope(rates, age))).sum((0, 2, 3)),
    }
    if block["state"] is not None:
        after = [
            torch.zeros_like(block[x]) if g is None else g
            for x, g in (("state", grad_state), ("key_sum", grad_key_sum))
        ]
        added = of_state(block, phi_query, phi_key, value, rates, grad, grad_sum, *after)
        grads = {x: grads[x] + y if x in grads else y for x, y in added.items()}
    kv_heads = key.shape[1]
    grads["query"] = pullback(name, query, grads["query"])
    grads["key"] = pullback(name, key, per_kv_head(grads["key"] * visible, kv_heads))
    grads["value"] = per_kv_head(grads["value"], kv_heads)
    return grads
