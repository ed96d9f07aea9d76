"""MultiheadAttention written out by hand, and gradients of a module's inputs and parameters."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_ops.nn import MultiheadAttention
from tests.comparison import assert_same

softmax_attention = partial(F.scaled_dot_product_attention, enable_gqa=True)


def cosine(query: Tensor, key: Tensor) -> Tensor:
    """[B, M, N]"""
    return F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).mT


def by_hand(
    module: MultiheadAttention,
    x: Tensor,
    context: Tensor | None = None,
    *,
    causal: bool = False,
    similarity: Callable[[Tensor, Tensor], Tensor] = cosine,
    scale: float = 8.0,
) -> Tensor:
    """Projections, scores and softmax, one head after the other."""
    source = x if context is None else context
    project = [
        F.linear(tokens, proj.weight, proj.bias)
        for tokens, proj in ((x, module.q_proj), (source, module.k_proj), (source, module.v_proj))
    ]
    query, key, value = (tokens.split(module.head_dim, dim=-1) for tokens in project)
    outs = []
    for head in range(module.heads):
        kv_head = head * module.kv_heads // module.heads
        factor = scale if module.learned_scale is None else module.learned_scale[head]
        score = factor * similarity(query[head], key[kv_head])
        if causal:
            hidden = torch.ones_like(score, dtype=torch.bool).triu(1)
            score = score.masked_fill(hidden, -torch.inf)
        outs.append(score.softmax(-1) @ value[kv_head])
    return F.linear(torch.cat(outs, dim=-1), module.out_proj.weight, module.out_proj.bias)


def gradients(module: nn.Module, out: Tensor, *inputs: Tensor) -> dict[str, Tensor]:
    """Of a fixed, uneven sum of `out`, with regard to all parameters and these inputs."""
    of = {f"input {i}": tensor for i, tensor in enumerate(inputs)} | dict(module.named_parameters())
    weights = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype)
    return dict(zip(of, torch.autograd.grad((out.flatten() * weights).sum(), list(of.values()))))


def assert_equal_with_gradients(
    module: nn.Module, actual: Tensor, expected: Tensor, *inputs: Tensor
) -> None:
    assert_same("out", actual, expected)
    truth = gradients(module, expected, *inputs)
    for name, gradient in gradients(module, actual, *inputs).items():
        assert_same(f"gradient of {name}", gradient, truth[name])


def tokens(
    *size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    return torch.randn(*size, device=device, dtype=dtype, requires_grad=True)
