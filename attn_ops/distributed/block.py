"""The scores of one chunk of queries: their place in those of the whole sequence, [M, N].

Letters: B batch, H heads, L queries of a rank, M and N queries and keys of the whole sequence,
S packed sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_ops._checks import check_rank, fail, shape

Options = dict[str, Any]


@dataclass(frozen=True)
class Block:
    """A chunk of queries, beside chunks of keys that follow each other."""

    op: str  # for errors
    chunk: int  # which one of the sequence it is
    row: int  # and which one of its rank
    seen: tuple[int, int]  # first and past the last chunk of keys
    chunks: tuple[int, int]  # number of chunks of a rank, and of the sequence
    size: tuple[int, int]  # queries and keys of a chunk

    def options(self, options: Options) -> Options:
        """What of these belongs to single scores, for this block."""
        of_block: Options = {}
        for name in ("mask", "bias"):
            tensor = options.get(name)
            if tensor is not None and not (name == "mask" and tensor.dim() == 2):
                of_block[name] = self._of_pairs(name, tensor)
        if options.get("relative_bias") is not None:
            of_block["relative_bias"] = self._of_distances(options["relative_bias"])
        offsets: list[Any] = [options.get(name) for name in ("cu_seqlens_q", "cu_seqlens_k")]
        if not any(x is None for x in offsets):
            of_block |= self._of_offsets(options.get("causal", False), *offsets)
        return of_block

    def _of_pairs(self, name: str, tensor: Tensor) -> Tensor:
        """[..., L or 1, N or 1]."""
        law = "[H, L, N] or broadcastable to [B, H, L, N]"
        check_rank(self.op, name, tensor, (3, 4), law)
        rows, columns = self.chunks[0] * self.size[0], self.chunks[1] * self.size[1]
        if tensor.shape[-2] not in (1, rows) or tensor.shape[-1] not in (1, columns):
            expected = f"have L={rows} rows, of this rank, and N={columns} columns, of all ranks"
            raise fail(self.op, name, expected, shape(tensor))
        if tensor.shape[-2] != 1:
            tensor = tensor.narrow(-2, self.row * self.size[0], self.size[0])
        if tensor.shape[-1] != 1:
            first, last = self.seen
            tensor = tensor.narrow(-1, first * self.size[1], (last - first) * self.size[1])
        return tensor

    def _of_distances(self, relative_bias: Tensor) -> Tensor:
        """[H or 1, M+N-1], the place of m, n being n - m + M - 1."""
        check_rank(self.op, "relative_bias", relative_bias, (2,), "[H or 1, M+N-1]")
        queries, keys = (self.chunks[1] * size for size in self.size)
        if relative_bias.shape[1] != queries + keys - 1:
            expected = f"have M+N-1={queries + keys - 1} distances, of all ranks"
            raise fail(self.op, "relative_bias", expected, shape(relative_bias))
        first, last = self.seen
        # From the last query of the block and its first key to the reverse.
        start = queries - (self.chunk + 1) * self.size[0] + first * self.size[1]
        length = self.size[0] + (last - first) * self.size[1] - 1
        return relative_bias.narrow(1, start, length)

    def _of_offsets(self, causal: bool, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Options:
        """[S+1] each, beside all keys."""
        first, size = self.chunk * self.size[0], self.size[0]
        if causal:
            # Sequences align at their ends: one that goes on loses as many keys here as queries.
            beyond = (cu_seqlens_q - (first + size)).clamp(min=0)
            cu_seqlens_k = torch.cummax(cu_seqlens_k - beyond, 0).values
        cu_seqlens_q = (cu_seqlens_q - first).clamp(0, size)
        return {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
