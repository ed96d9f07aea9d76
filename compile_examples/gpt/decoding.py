"""Text byte by byte: attention that remembers what it has seen, instead of seeing it all again.

B batch (1 here), H heads, N bytes so far, D head width, F features, V = 256 byte values.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_ops import linear_attention_step, linear_attention_with_state
from attn_ops.nn import MultiheadAttention
from attn_ops.nn.multihead import rotary
from gpt.model import GPT, linear_options


class Memory:
    """An attention function that is called with a prompt, then with one byte at a time."""

    def __init__(self, rotary_base: float | None) -> None:
        self.rotary_base, self.length = rotary_base, 0

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        first, self.length = self.length, self.length + query.shape[2]
        # MultiheadAttention has turned this one byte as if it were the first, that is, not at all.
        if first and self.rotary_base is not None:
            query, key = (rotary(x, self.rotary_base, first) for x in (query, key))
        return self.attend(query, key, value)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        raise NotImplementedError

    def bytes_held(self) -> int:
        """Of memory that the next byte has to read."""
        raise NotImplementedError


class RecurrentState(Memory):
    """Linear attention: a state [B, H, F, D] of one size, updated in place."""

    state: Tensor
    key_sum: Tensor

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        options = linear_options(query)
        if self.length == query.shape[2]:
            out, self.state, self.key_sum = linear_attention_with_state(
                query, key, value, **options
            )
            return out
        return linear_attention_step(query, key, value, self.state, self.key_sum, **options)

    def bytes_held(self) -> int:
        return self.state.nbytes + self.key_sum.nbytes


class KeyValueCache(Memory):
    """Softmax attention: keys and values [B, H, N, D], which grow by one row with every byte."""

    cache = torch.empty(2, 1, 1, 0, 1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        first = self.length - key.shape[2]
        if self.length > self.cache.shape[3]:  # room for twice as many: copied seldom
            larger = key.new_empty(2, *key.shape[:2], 2 * self.length, key.shape[3])
            if first:
                larger[:, :, :, :first] = self.cache[:, :, :, :first]
            self.cache = larger
        self.cache[:, :, :, first : self.length] = torch.stack([key, value])
        key, value = self.cache[:, :, :, : self.length]
        return F.scaled_dot_product_attention(query, key, value, is_causal=first == 0)

    def bytes_held(self) -> int:
        return self.cache[:, :, :, : self.length].nbytes


MEMORIES: dict[str, Callable[[float | None], Memory]] = {
    "linear": RecurrentState,
    "softmax": KeyValueCache,
}


class Decoder:
    """A GPT that is shown all bytes so far [1, N] each time, and computes the last ones alone.

    Takes the place of the model in `run_package.generate`.
    """

    def __init__(self, model: GPT, attention: str) -> None:
        self.model = copy.deepcopy(model).eval()
        self.memories: list[Memory] = []
        for module in self.model.modules():
            if isinstance(module, MultiheadAttention):
                module.attention = MEMORIES[attention](module.rotary_base)
                self.memories.append(module.attention)
        self.logits: list[Tensor] = []  # [1, new bytes, V] of each call
        self.seconds: list[float] = []  # that each call took
        self.held: list[int] = []  # bytes of memory after each call

    def __call__(self, tokens: Tensor) -> Tensor:
        new = tokens[:, self.memories[0].length :]
        began = time.perf_counter()
        self.logits.append(self.model(new))
        self.seconds.append(time.perf_counter() - began)
        self.held.append(sum(memory.bytes_held() for memory in self.memories))
        return self.logits[-1]
