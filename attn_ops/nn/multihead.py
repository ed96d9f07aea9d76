"""Multi-head attention as a module, over any attention function.

B batch, M queries, N keys, H query heads, Hk key/value heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attn_ops import cosine_sim_attention
from attn_ops._checks import fail

OP = "MultiheadAttention"


class MultiheadAttention(nn.Module):
    """Projections around an attention function, for self-attention and cross-attention.

    ``out_proj(attention(q_proj(x), k_proj(context), v_proj(context)))``, without dropout.

    Args:
        dim: width of the input and of the output.
        heads: number of query heads H.
        kv_heads: number of key/value heads Hk, a divisor of ``heads``; ``heads`` by default.
        attention: called as ``attention(query, key, value, **options)`` with ``[B, H, M, D]``,
            ``[B, Hk, N, D]``, ``[B, Hk, N, D]``, returns ``[B, H, M, D]``. Options that never
            change are given once: ``functools.partial(cosine_sim_attention, groups=4)``.
            ``l1_attention``, ``linear_attention`` and ``F.scaled_dot_product_attention`` fit as
            well (the last with ``enable_gqa=True`` for grouped heads).
        head_dim: width D of a head; ``dim // heads`` by default.
        context_dim: width of the context; ``dim`` by default.
        bias: whether the four projections have a bias.
        learned_scale: where a learnable scale per head starts, passed to ``attention`` as
            ``scale``, a tensor ``[H]``, which ``attention`` has to take. None: nothing learned.
        rotary_base: rotary position embedding of queries and keys with this base (10000, say).
            None: no positions. Self-attention only.
        device, dtype: of the parameters.

    Raises:
        ValueError: a width or a number of heads that is below 1 or does not divide.

    Source: Vaswani et al., https://arxiv.org/abs/1706.03762; grouped heads: Ainslie et al.,
    https://arxiv.org/abs/2305.13245
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        attention: Callable[..., Tensor] = cosine_sim_attention,
        *,
        head_dim: int | None = None,
        context_dim: int | None = None,
        bias: bool = False,
        learned_scale: float | None = None,
        rotary_base: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        context_dim = dim if context_dim is None else context_dim
        _check_sizes(dim, heads, kv_heads, head_dim, context_dim, rotary_base)
        head_dim = dim // heads if head_dim is None else head_dim
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.attention = attention
        self.rotary_base = rotary_base
        self.q_proj = nn.Linear(dim, heads * head_dim, bias, device, dtype)
        self.k_proj = nn.Linear(context_dim, kv_heads * head_dim, bias, device, dtype)
        self.v_proj = nn.Linear(context_dim, kv_heads * head_dim, bias, device, dtype)
        self.out_proj = nn.Linear(heads * head_dim, dim, bias, device, dtype)
        self.learned_scale: nn.Parameter | None
        if learned_scale is None:
            self.register_parameter("learned_scale", None)
        else:
            scale = torch.full((heads,), float(learned_scale), device=device, dtype=dtype)
            self.learned_scale = nn.Parameter(scale)

    def forward(self, x: Tensor, context: Tensor | None = None, **options: Any) -> Tensor:
        """Attend from ``x`` to ``context``, or to ``x`` itself.

        Args:
            x: ``[B, M, dim]``.
            context: ``[B, N, context_dim]``; None: self-attention.
            options: passed to the attention (``mask=…``, ``causal=True``, ``window=…``).

        Returns:
            ``[B, M, dim]``.

        Raises:
            ValueError: a rank or a width that does not fit, a context beside ``rotary_base``, or
                a scale beside ``learned_scale``. What else the attention does not accept, it
                raises for itself.
        """
        self._check_inputs(x, context, options)
        source = x if context is None else context
        query = self.q_proj(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        key = self.k_proj(source).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        value = self.v_proj(source).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        if self.rotary_base is not None:
            query, key = rotary(query, self.rotary_base), rotary(key, self.rotary_base)
        if self.learned_scale is not None:
            options["scale"] = self.learned_scale
        out = self.attention(query, key, value, **options)  # [B, H, M, D]
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def _check_inputs(self, x: Tensor, context: Tensor | None, options: dict[str, Any]) -> None:
        if self.rotary_base is not None and context is not None:
            raise fail(OP, "context", "be None beside rotary_base", _shape(context))
        if self.learned_scale is not None and "scale" in options:
            raise fail(OP, "scale", "not be given beside learned_scale", options["scale"])
        if context is None and self.k_proj.in_features != self.q_proj.in_features:
            width = self.k_proj.in_features
            raise fail(OP, "context", f"be given: its width context_dim={width} is not dim", None)
        _check_sequence("x", x, "dim", self.q_proj.in_features)
        if context is not None:
            _check_sequence("context", context, "context_dim", self.k_proj.in_features)

    def extra_repr(self) -> str:
        attention = getattr(self.attention, "func", self.attention)  # inside a partial
        name = getattr(attention, "__name__", type(attention).__name__)
        return f"heads={self.heads}, kv_heads={self.kv_heads}, attention={name}"


def rotary(x: Tensor, base: float = 10000.0, start: int = 0) -> Tensor:
    """Rotary position embedding: the pair ``(x[d], x[d + D/2])`` turned by ``m * base**(-2d/D)``.

    The product of two rotated vectors depends on their distance, not on their positions. A
    rotation keeps lengths: normalising after it equals normalising before it. It does not keep L1
    distances, which then depend on the positions too, by a factor of at most ``sqrt(2)``.

    Args:
        x: ``[..., M, D]``, D even; the position ``m`` is the index along ``M``, plus ``start``.
        base: the wavelengths go from ``2*pi`` to ``2*pi*base`` tokens.
        start: the position of the first token, where others came before (decoding).

    Returns:
        The shape and dtype of ``x``; the angles are float32 whatever the dtype.

    Source: Su et al., https://arxiv.org/abs/2104.09864
    """
    half = x.shape[-1] // 2
    position = start + torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)
    frequency = torch.arange(half, device=x.device, dtype=torch.float32)
    frequency = torch.exp2(frequency * (-math.log2(base) / half))
    angle = position[:, None] * frequency  # [M, D/2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _shape(tensor: Tensor) -> str:
    # While a length is symbolic the compiler can write its number, but no tuple of numbers.
    return "(" + ", ".join([f"{int(size)}" for size in tensor.shape]) + ")"


def _check_sequence(name: str, tensor: Tensor, width_name: str, width: int) -> None:
    if tensor.dim() != 3 or tensor.shape[-1] != width:
        expected = f"have shape [batch, length, {width_name}={width}]"
        raise fail(OP, name, expected, _shape(tensor))


def _check_sizes(
    dim: int,
    heads: int,
    kv_heads: int,
    head_dim: int | None,
    context_dim: int,
    rotary_base: float | None,
) -> None:
    sizes = {"dim": dim, "heads": heads, "kv_heads": kv_heads, "context_dim": context_dim}
    if head_dim is not None:
        sizes["head_dim"] = head_dim
    for name, size in sizes.items():
        if size < 1:
            raise fail(OP, name, "be at least 1", size)
    if heads % kv_heads:
        raise fail(OP, "kv_heads", f"divide heads={heads}", kv_heads)
    if head_dim is None and dim % heads:
        raise fail(OP, "heads", f"divide dim={dim} where head_dim is not given", heads)
    if rotary_base is not None:
        width = dim // heads if head_dim is None else head_dim
        if width % 2:
            raise fail(OP, "head_dim", "be even with rotary_base", width)
        if rotary_base <= 0:
            raise fail(OP, "rotary_base", "be positive", rotary_base)
