"""Lightning Attention, the linear layers of `transformers`' MiniMax, by `attn::linear_with_state`.

    from attn_ops.integrations.transformers import use_linear_attention

    use_linear_attention(model)  # a MiniMaxForCausalLM, or any module that holds such layers

B batch, N tokens, H heads, D head width.
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attn_ops import linear_attention, linear_attention_step, linear_attention_with_state
from attn_ops._checks import MAX_WIDTH, compute_dtype, fail, shape

if TYPE_CHECKING:
    from transformers.models.minimax.modeling_minimax import MiniMaxCache, MiniMaxLightningAttention

OP = "use_linear_attention"


def use_linear_attention(model: nn.Module) -> int:
    r"""Lets every Lightning Attention layer of a model compute with this library, in place.

    .. math::
        S_m = e^{-\mathrm{slope}_h} S_{m-1} + k_m v_m^T, \qquad \mathrm{out}_m = q_m^T S_m

    is what a layer computes between its projections, before as after: weights, buffers and
    checkpoints stay as they are. The result no longer depends on `block_size`. Padding (an
    attention mask [B, N]), `generate` with its cache, gradients and `torch.compile` work as before;
    in 16 bits the states are float32, where transformers rounds them after every block and token.

    Without gradients a cached state is updated in place as a token is decoded. What differs:

    - `output_attentions`: these layers have no weights to show, and give None. (transformers gives
      the state.)
    - Rows of padding tokens: zeros go into the norm behind the attention, as in transformers 5.23;
      5.0 computes something there, which no other token reads.
    - Heads wider than 256, tensor parallel plans, and masks other than [B, N] are not supported.
    - Hooks that replace a layer's `forward` (accelerate's, for a model on several devices) have to
      come after this.

    `del layer.forward` undoes it for a layer.

    Args:
        model: a MiniMax model of transformers, or any module with such layers.

    Returns:
        The number of layers that now use this library.

    Raises:
        ImportError: transformers is not installed, or has no MiniMax.
        ValueError: there is no such layer in the model, or one that is too wide, or that something
            else has given another `forward`.
    """
    layer_class = _layer_class()
    layers = [module for module in model.modules() if isinstance(module, layer_class)]
    if not layers:
        expected = "have layers of Lightning Attention (MiniMaxLightningAttention)"
        raise fail(OP, "model", expected, type(model).__name__)
    for layer in layers:
        if layer.head_dim > MAX_WIDTH:
            raise fail(OP, "model", f"have heads of width 1 to {MAX_WIDTH}", layer.head_dim)
        if getattr(layer.forward, "__func__", None) not in (layer_class.forward, _forward):
            expected = "have layers whose forward nothing else has replaced"
            raise fail(OP, "model", expected, layer.forward)
    for layer in layers:
        layer.forward = MethodType(_forward, layer)
    return len(layers)


def _layer_class() -> Any:
    try:
        from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention
    except ImportError as error:
        raise ImportError(
            f"{OP} needs transformers 5 or newer: pip install 'attn_ops[integrations]'"
        ) from error
    return MiniMaxLightningAttention


def _forward(
    layer: MiniMaxLightningAttention,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Tensor | None = None,
    past_key_values: MiniMaxCache | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """`MiniMaxLightningAttention.forward`: [B, N, hidden] to the same; no positions are read."""
    qkv = layer.act_fn(layer.qkv_proj(hidden_states))
    if attention_mask is not None:
        qkv = qkv * _padding(attention_mask, qkv)
    # Per head the query, the key and the value: views, [B, H, N, D] each.
    heads = qkv.unflatten(-1, (layer.num_attention_heads, -1)).transpose(1, 2)
    query, key, value = heads.split(layer.head_dim, dim=-1)
    out = _attend(layer, query, key, value, past_key_values)
    out = layer.norm(out.transpose(1, 2).flatten(2))
    return layer.out_proj(torch.sigmoid(layer.output_gate(hidden_states)) * out), None


def _attend(
    layer: MiniMaxLightningAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: MiniMaxCache | None,
) -> Tensor:
    slope = layer.slope_rate.flatten()  # in the model's dtype, as every buffer
    decay = torch.exp(-slope.to(compute_dtype(slope.dtype)))
    if cache is None:
        return linear_attention(query, key, value, causal=True, normalize=False, decay=decay)
    state = cache.get_linear_cache(layer.layer_idx)
    if state is not None:  # the first tokens may have come before `use_linear_attention`
        state = state.to(compute_dtype(query.dtype))
    if state is not None and query.shape[2] == 1 and _is_free(state):
        unused = state.new_zeros(state.shape[:3])  # the sum of keys, which only averages need
        out = linear_attention_step(query, key, value, state, unused, normalize=False, decay=decay)
    else:
        out, state, _ = linear_attention_with_state(
            query, key, value, state, normalize=False, decay=decay
        )
    cache.set_linear_cache(layer.layer_idx, state)
    return out


def _is_free(state: Tensor) -> bool:
    """Whether a state may be written to: no gradient needs it, and autograd does not forbid it."""
    if torch.is_grad_enabled() or state.requires_grad:
        return False
    return torch.is_inference_mode_enabled() or not state.is_inference()


def _padding(attention_mask: Tensor, qkv: Tensor) -> Tensor:
    """Ones and zeros [B, N, 1]: of a mask that has columns for cached tokens too, the last N."""
    if attention_mask.dim() != 2:
        raise fail(OP, "attention_mask", "have shape [B, N]", shape(attention_mask))
    return attention_mask[:, -qkv.shape[1] :, None].to(qkv.dtype)
