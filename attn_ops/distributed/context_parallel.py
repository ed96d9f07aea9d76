"""Attention over a sequence that is spread over processes, exactly, forward and backward.

Each rank holds some of the tokens: of queries, keys and values, of results and gradients. For
softmax-like attention keys and values of all ranks are gathered, and the rank's own queries attend
to them, one call of the op for each chunk of successive queries. Causal masks align at the bottom
right: given the keys up to the end of the chunk, the op need know nothing of positions. For linear
attention the states that the ranks' keys leave behind are gathered, whose size does not depend on
the length.

A call has one collective, an all-gather, whose backward is a reduce-scatter. Of two, the compiler
might choose another order on another rank, since each rank compiles a program of its own.

Letters: B batch, H query heads, Hk key/value heads, R ranks, L tokens of a rank, N = R * L tokens,
C tokens of a chunk, D query/key width, E value width, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from attn_ops import cosine_sim_attention, l1_attention
from attn_ops._arguments import (
    autocast,
    check_mask,
    check_offsets,
    check_sizes,
    check_types,
    fold_layout,
)
from attn_ops._checks import check_bool, check_shape, check_tensor, fail, shape
from attn_ops.distributed.all_gather import all_gather
from attn_ops.distributed.block import Block
from attn_ops.distributed.states import attend_after, attend_to, state_before, state_of

NAME = "ContextParallel"
OPTIONAL = ("mask", "bias", "window", "relative_bias", "cu_seqlens_q", "cu_seqlens_k")


@dataclass(frozen=True)
class ContextParallel:
    """Attention functions for a sequence whose tokens are spread over the ranks of a mesh.

    All ranks call a method together, each with its own tokens, as many as the others have; and all
    or none of them go backward through the result. `shard` gives a rank its tokens. Whatever else
    depends on positions (rotary angles, labels, masks) is sharded in the same way.

    The gradients of query, key and value are those of the sum of all ranks' losses. What each rank
    holds in full (scale, head_scale, gains, sink, relative_bias, decay, a bias that broadcasts over
    queries) gets that part of its gradient which this rank's tokens cause. As with data parallelism
    the parts are to be summed over the ranks, or averaged where the loss is a mean over the rank's
    tokens; FSDP and DistributedDataParallel do so with parameters.

    Args:
        mesh: of one dimension, such as `mesh["context"]` of a larger one.
        load_balance: rank r holds the chunks r and 2R-1-r of 2R, so that causal attention is the
            same work for every rank. By default it holds chunk r of R, and the last rank has the
            most keys to see.

    Raises:
        TypeError, ValueError: another kind of mesh.

    Source: gathered keys, two chunks per rank: Llama Team, The Llama 3 Herd of Models, 2024;
    gathered states: Sun et al., LASP-2, 2025.
    """

    mesh: DeviceMesh
    load_balance: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.mesh, DeviceMesh):
            raise TypeError(f"{NAME}: mesh must be a DeviceMesh, got {type(self.mesh).__name__}")
        if self.mesh.ndim != 1:
            raise fail(NAME, "mesh", 'have one dimension, like mesh["context"]', self.mesh)
        check_bool(NAME, "load_balance", self.load_balance)

    def shard(self, tensor: Tensor, dim: int) -> Tensor:
        """This rank's tokens of a tensor that every rank has in full.

        Args:
            tensor: any; its length along `dim` is a multiple of R (2R with load_balance). Pad other
                sequences at the end: causal attention never looks there, else a mask hides it.
            dim: the dimension of the tokens.

        Returns:
            The tensor with 1/R of the length along `dim`.

        Raises:
            ValueError: another length.
        """
        op = f"{NAME}.shard"
        check_tensor(op, "tensor", tensor)
        chunks = _split(op, "tensor", tensor, dim, self._num_chunks)
        return torch.cat([chunks[i] for i in self._own], dim)

    def unshard(self, tensor: Tensor, dim: int) -> Tensor:
        """The tokens of all ranks in the order of the sequence: puts together what `shard` took.

        The gradient is summed over the ranks.
        """
        op = f"{NAME}.unshard"
        check_tensor(op, "tensor", tensor)
        chunks = _split(op, "tensor", tensor, dim, len(self._own))
        return torch.cat(self._gather(chunks), dim)

    def cosine_sim_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """`attn_ops.cosine_sim_attention` of this rank's queries over the keys of all ranks.

        Args:
            query, key, value: this rank's tokens, in any layout that the function takes. In causal
                attention as many keys as queries.
            mask: bool. [B, L] hides keys of this rank; or broadcastable to [B, H, L, N], this
                rank's queries by all keys in the order of the sequence.
            bias: [H, L, N] or broadcastable to [B, H, L, N], likewise.
            options: those of the function. `relative_bias` [H or 1, M+N-1] (M queries of all
                ranks) and the offsets `cu_seqlens_q`, `cu_seqlens_k` are those of the whole
                sequence, not both kinds at once; `window` counts tokens of the whole sequence.

        Returns:
            What the function returns for these queries: out, with return_lse also lse.

        Raises:
            ValueError, TypeError, NotImplementedError: as the function.
        """
        options |= {"mask": mask, "bias": bias}
        return self._softmax_like(cosine_sim_attention, query, key, value, options)

    def l1_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """`attn_ops.l1_attention` of this rank's queries over the keys of all ranks.

        Arguments, results and errors: as `ContextParallel.cosine_sim_attention`.
        """
        options |= {"mask": mask, "bias": bias}
        return self._softmax_like(l1_attention, query, key, value, options)

    def linear_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        normalize: bool = True,
        eps: float | None = None,
        decay: Tensor | None = None,
        feature_map: str = "identity",
        cu_seqlens: None = None,
    ) -> Tensor:
        r"""`attn_ops.linear_attention` of this rank's queries over the keys of all ranks.

        .. math::
            S_c = \sum_{n=0}^{C-1} \gamma^{\,C-1-n}\, \phi(k_{cn}) v_{cn}^T, \qquad
            P_c = \gamma^{\,C} P_{c-1} + S_{c-1}, \qquad P_0 = 0

        Causal attention of chunk c continues from the state :math:`P_c`, as
        `linear_attention_with_state` does. Otherwise the state is the sum over all chunks. The sums
        of keys for `normalize` go the same way.

        Args:
            query, key, value: this rank's tokens, in any layout that the function takes. In causal
                attention as many keys as queries.
            mask: bool [B, L], of this rank's keys.
            cu_seqlens: None: several sequences are a batch here.
            causal, normalize, eps, decay, feature_map: those of the function.

        Returns:
            What the function returns for these queries.

        Raises:
            ValueError, TypeError, NotImplementedError: as the function.
        """
        op = f"{NAME}.linear_attention"
        check_bool(op, "causal", causal)
        if cu_seqlens is not None:
            got = type(cu_seqlens).__name__
            raise NotImplementedError(f"{op}: cu_seqlens must be None over ranks, got a {got}")
        if decay is not None and not causal:
            raise ValueError(f"{op}: decay must come with causal=True, got causal=False")
        query, key, value = _inputs(op, query, key, value, causal)
        own = self._own
        keys, values = (_split(op, "key", x, -2, len(own)) for x in (key, value))
        masks: Sequence[Tensor | None] = [None] * len(own)
        if mask is not None:
            _check_key_mask(op, mask, key)
            masks = _split(op, "mask", mask, -1, len(own)).unbind(0)
        own_states = [state_of(query, *x, decay, feature_map) for x in zip(keys, values, masks)]
        states = self._gather(torch.stack(own_states))
        options = {"normalize": normalize, "eps": eps, "decay": decay, "feature_map": feature_map}
        if not causal:
            return attend_to(query, value, torch.stack(states).sum(0), **options)
        queries, outs = _split(op, "query", query, -2, len(own)), []
        for i, chunk in enumerate(own):
            before = state_before(states[:chunk], states[chunk], keys[i].shape[-2], decay)
            outs.append(attend_after(queries[i], keys[i], values[i], masks[i], before, **options))
        return torch.cat(outs, -2)

    @property
    def _own(self) -> list[int]:
        """This rank's chunks of the sequence."""
        rank, ranks = self.mesh.get_local_rank(), self.mesh.size()
        return [rank, 2 * ranks - 1 - rank] if self.load_balance else [rank]

    @property
    def _num_chunks(self) -> int:
        return self.mesh.size() * (2 if self.load_balance else 1)

    def _gather(self, chunks: Tensor) -> list[Tensor]:
        """Of each rank's chunks [1 or 2, ...], all chunks in the order of the sequence."""
        gathered = all_gather(chunks, self.mesh).unbind(0)
        return [*gathered[0::2], *gathered[-1::-2]] if self.load_balance else [*gathered]

    def _softmax_like(
        self,
        attention: Callable[..., Any],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: dict[str, Any],
    ) -> Any:
        op = f"{NAME}.{attention.__name__}"
        causal, given = options.get("causal", False), {name: options.get(name) for name in OPTIONAL}
        check_types(op, query, key, value, causal=causal, **given)
        query, key, value = _inputs(op, query, key, value, causal)
        packed = _check_packed(op, query, given)
        aligned = causal and not packed  # each packed sequence aligns for itself, beside all keys
        columns, mask = [key, value], given["mask"]
        if mask is not None and mask.dim() == 2:  # it travels with the keys
            columns.append(_column(op, mask, key))
        own = self._own
        chunks = self._gather(_split(op, "key", torch.cat(columns, -1), -2, len(own)))
        queries, results = _split(op, "query", query, -2, len(own)), []
        for row, (chunk, rows) in enumerate(zip(own, queries)):
            size = rows.shape[-2], chunks[0].shape[-2]
            seen = _seen(chunk, size[0], given["window"]) if aligned else (0, len(chunks))
            block = Block(op, chunk, row, seen, (len(own), len(chunks)), size)
            joined = torch.cat(chunks[slice(*seen)], -2)
            keys, values, *hidden = joined.split([x.shape[-1] for x in columns], -1)
            moved = block.options(options) | ({"mask": _mask(hidden[0])} if hidden else {})
            results.append(attention(rows, keys, values, **options | moved))
        if isinstance(results[0], tuple):
            outs, lses = zip(*results)
            return torch.cat(outs, -2), torch.cat(lses, -1)
        return torch.cat(results, -2)


# --- the arguments


def _inputs(
    op: str, query: Tensor, key: Tensor, value: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """In the dtype that the op will run in, and of sizes that fit."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(op, name, tensor)
        if isinstance(tensor, DTensor):
            expected = "be a plain tensor with this rank's tokens"
            raise TypeError(f"{op}: {name} must {expected}, got a DTensor")
    query, key, value = autocast(query, key, value)
    check_sizes(op, *fold_layout(op, query, key, value))
    if causal and query.shape[-2] != key.shape[-2]:
        raise fail(op, "key", "have as many tokens as query in causal attention", shape(key))
    return query, key, value


def _split(op: str, name: str, tensor: Tensor, dim: int, parts: int) -> Tensor:
    """Chunks of one length, [parts, ...]: a view."""
    if tensor.shape[dim] % parts:
        expected = f"have a number of tokens that {parts} divides"
        raise fail(op, name, expected, shape(tensor))
    dim %= tensor.dim()
    return tensor.unflatten(dim, (parts, -1)).movedim(dim, 0)


def _check_key_mask(op: str, mask: Tensor, key: Tensor) -> None:
    check_mask(op, mask, key)
    check_shape(op, "mask", mask, (key.shape[0], key.shape[-2]), "[B, L]")


def _column(op: str, mask: Tensor, key: Tensor) -> Tensor:
    """A key mask [B, L] as numbers [..., L, 1] beside the key."""
    _check_key_mask(op, mask, key)
    column = mask[:, None, :, None] if key.dim() == 4 else mask[..., None]
    return column.expand(*key.shape[:-1], 1).to(key.dtype)


def _mask(column: Tensor) -> Tensor:
    """The key mask that `_column` wrote."""
    return (column[:, 0] if column.dim() == 4 else column).squeeze(-1) > 0


def _check_packed(op: str, query: Tensor, options: dict[str, Any]) -> bool:
    """Whether there are offsets. One without the other the op refuses."""
    offsets = {name: options[name] for name in ("cu_seqlens_q", "cu_seqlens_k")}
    if any(x is None for x in offsets.values()):
        return False
    for name, x in offsets.items():
        check_offsets(op, name, x, query)
    law = "[S+1] like cu_seqlens_q"
    check_shape(op, "cu_seqlens_k", offsets["cu_seqlens_k"], offsets["cu_seqlens_q"].shape, law)
    if options["relative_bias"] is not None:
        raise fail(op, "relative_bias", "be None beside cu_seqlens_q", "a tensor")
    return True


def _seen(chunk: int, size: int, window: int | None) -> tuple[int, int]:
    """First and past the last chunk of keys that causal queries of this chunk see."""
    if window is None or window < 1:  # which the op refuses
        return 0, chunk + 1
    return max(0, chunk * size - window + 1) // max(size, 1), chunk + 1
