"""Forward mode of softmax-like attention, in memory that is linear in the length.

`attn::_room_jvp` returns the tangents of out and lse by the formula of the room's reference, a
block of scores at a time. What it reads beside the arguments of the forward (see _softmax_ops.py):
lse, which only shifts the scores, tangents, None where an argument has none, and for kernels out,
which formulas compute again. Outputs are contiguous: tangent_out in value's dtype, tangent_lse in
the dtype of sums.

Letters: B batch, H query heads, Hk key/value heads, M queries, N keys, E value width.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from attn_ops import _autograd, _vmap
from attn_ops._checks import compute_dtype
from attn_ops._in_blocks import query_blocks

PLACES = {
    **dict.fromkeys("query key value out lse".split(), _vmap.BATCH_HEADS),
    **dict.fromkeys("mask bias".split(), _vmap.SCORES),
    **dict.fromkeys("relative_bias sink".split(), _vmap.HEADS),
    **dict.fromkeys("start stop".split(), _vmap.NOWHERE),
}
DIFFERENTIABLE = "query key value bias relative_bias sink".split()
PLACES |= {f"tangent_{name}": PLACES[name] for name in DIFFERENTIABLE}
_PER_KEY = ("key", "value", "tangent_key", "tangent_value")
_PER_QUERY = ("query", "out", "lse", "tangent_query")
_SCORES = ("mask", "bias", "tangent_bias")
_DIAGONALS = ("relative_bias", "tangent_relative_bias")

# Scores of a block: 1 MiB of float32 stays in a CPU's cache, 64 MiB keep a GPU busy.
SCORES_ON_CPU, SCORES_ELSEWHERE = 1 << 18, 1 << 24
FEWEST_QUERIES = 64  # of a block: fewer do not keep matrix products busy
# Where reverse mode may record, it computes so many blocks again at a time.
RECORDED = 16

Arguments = dict[str, Any]
Part = tuple[int, int]  # first, last + 1
Results = tuple[Tensor, Tensor]  # out, lse
Operands = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # query, key, their tangents


def _scores_of_block(query: Tensor) -> int:
    return SCORES_ON_CPU if query.device.type == "cpu" else SCORES_ELSEWHERE


def _parts(size: int, at_a_time: int) -> list[Part]:
    return [(first, min(first + at_a_time, size)) for first in range(0, size, at_a_time)]


def _blocks(args: Arguments) -> Iterator[tuple[Part, Part, Part]]:
    """Batches, key/value heads and queries of blocks that together are all."""
    query, key = args["query"], args["key"]
    batch, heads, num_queries, _ = query.shape
    kv_heads = key.shape[1]
    limit, row = _scores_of_block(query), heads // max(1, kv_heads) * key.shape[2]
    counts = []
    for size, fewest in ((num_queries, FEWEST_QUERIES), (kv_heads, 1), (batch, 1)):
        counts.append(max(1, min(size, max(fewest, limit // max(1, row)))))
        row *= counts[-1]
    queries, its_heads, batches = (
        _parts(size, count) for size, count in zip((num_queries, kv_heads, batch), counts)
    )
    return itertools.product(batches, its_heads, queries)


def _narrow(x: Tensor | None, dim: int, part: Part) -> Tensor | None:
    """A part of an optional tensor, all of it where that dimension is broadcast."""
    if x is None or x.shape[dim] == 1:
        return x
    return x.narrow(dim, part[0], part[1] - part[0])


def _of_heads(args: Arguments, batches: Part, kv_heads: Part) -> Arguments:
    """The arguments of these batches and key/value heads, and of the query heads that read them."""
    group = args["query"].shape[1] // args["key"].shape[1]
    heads = (group * kv_heads[0], group * kv_heads[1])
    part = dict(args)
    for name in args.keys() & PLACES.keys():
        place = PLACES[name]
        if place == _vmap.HEADS:
            part[name] = _narrow(args[name], 0, heads)
        else:
            part[name] = _narrow(args[name], 0, batches)
            if place != _vmap.NOWHERE:
                its_heads = kv_heads if name in _PER_KEY else heads
                part[name] = _narrow(part[name], 1, its_heads)
    return part


def _of_queries(args: Arguments, first: int, last: int) -> Arguments:
    """The arguments of queries first..last, and of the keys that their band has."""
    num_queries, num_keys = args["query"].shape[2], args["key"].shape[2]
    ahead = num_keys - num_queries  # the position of query m is m + ahead
    first_key = min(max(0, first + ahead - args["left"]), num_keys)
    last_key = max(first_key, min(num_keys, last + ahead + args["right"]))
    queries, keys = (first, last), (first_key, last_key)
    part = dict(args)
    for name in args.keys() & set(_PER_QUERY):
        part[name] = _narrow(args[name], 2, queries)
    for name in _PER_KEY:
        if args[name] is not None:
            part[name] = args[name].narrow(2, first_key, last_key - first_key)
    for name in _SCORES:
        part[name] = _narrow(_narrow(args[name], 2, queries), 3, keys)
    for name in ("start", "stop"):
        x = _narrow(args[name], 1, queries)
        part[name] = None if x is None else x - first_key
    diagonals = max(0, last - first + last_key - first_key - 1)
    for name in _DIAGONALS:
        if args[name] is not None:
            start = num_queries - last + first_key
            part[name] = args[name].narrow(1, start, diagonals)
    shift = last_key - last - ahead  # by how much positions are others, counted within the block
    part["left"], part["right"] = args["left"] + shift, args["right"] - shift
    return part


class ForwardMode:
    """A room's forward mode, from the formulas of its reference.

    tangent: takes the arguments of `attn::_room_jvp` by their names, returns the tangents of out
        and lse.
    score_operands: from the forward's arguments that it names, what `_room_jvp` takes as query and
        key; differentiable.
    score_tangents: (query, key and their tangents or None) -> what it takes as tangent_query and
        tangent_key.
    by_kernel: (the forward's arguments, dual numbers) -> what `_room_jvp` takes as query, key and
        their tangents, None where no kernel computes them: then the two above do.
    at_once: (the forward's arguments, dual numbers) -> results and their tangents by one kernel,
        None where there is none.
    """

    def __init__(
        self,
        tangent: Callable[..., tuple[Tensor, Tensor]],
        score_operands: Callable[..., tuple[Tensor, Tensor]],
        score_tangents: Callable[..., tuple[Tensor | None, Tensor | None]],
        by_kernel: Callable[[Arguments], Operands | None] = lambda args: None,
        at_once: Callable[[Arguments], tuple[Results, Results] | None] = lambda args: None,
    ) -> None:
        self._tangent, self._score_operands = tangent, score_operands
        self._score_tangents, self._by_kernel = score_tangents, by_kernel
        self._at_once = at_once
        self.names = list(inspect.signature(tangent).parameters)
        self.tensors = [name for name in self.names if name in PLACES]
        self.differentiable = [
            place
            for place, name in enumerate(self.tensors)
            if name.removeprefix("tangent_") in DIFFERENTIABLE
        ]

    def _in_compute_dtype(self, values: tuple[Any, ...]) -> Arguments:
        args = dict(zip(self.names, values, strict=True))
        dtype = compute_dtype(args["value"].dtype)
        places = (self.tensors[place] for place in self.differentiable)
        return args | {name: args[name].to(dtype) for name in places if args[name] is not None}

    def formula(self, *values: Any) -> tuple[Tensor, Tensor]:
        """`attn::_room_jvp` as one differentiable formula that does hold [M, N] scores."""
        args = self._in_compute_dtype(values)
        out, lse = self._tangent(**args)
        return out.to(values[2].dtype), lse

    def in_blocks(self, *values: Any) -> tuple[Tensor, Tensor]:
        """`attn::_room_jvp`."""
        query, key, value = values[:3]
        args = self._in_compute_dtype(values)
        out = value.new_empty(*query.shape[:3], value.shape[3])
        lse = value.new_empty(query.shape[:3], dtype=compute_dtype(value.dtype))
        group = query.shape[1] // max(1, key.shape[1])
        with torch.autocast(query.device.type, enabled=False):
            for batches, kv_heads, queries in _blocks(args):
                part = _of_queries(_of_heads(args, batches, kv_heads), *queries)
                heads = slice(group * kv_heads[0], group * kv_heads[1])
                place = (slice(*batches), heads, slice(*queries))
                out[place], lse[place] = self._tangent(**part)
        return out, lse

    def at_once(self, args: Arguments) -> tuple[Results, Results] | None:
        """Results and tangents of the forward's arguments, which are dual numbers.

        None where there is no kernel for both, or something is to see or to differentiate the two
        ops that it stands for.
        """
        tensors = [x for x in args.values() if isinstance(x, Tensor)]
        if _autograd.dispatch_mode_is_on() or is_fake(args["query"]):
            return None
        return None if _autograd.derivatives_may_follow(tensors) else self._at_once(args)

    def tangents(self, op: Any, args: Arguments, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Tangents of out and lse, from the forward's arguments, which are dual numbers.

        op: `attn::_room_jvp`; out, lse: the forward's.
        """
        values = args | {"out": out.detach(), "lse": lse.detach()}
        for name in DIFFERENTIABLE:
            x = values[name]
            pair = (None, None) if x is None else _autograd.unpack_dual(x)
            values[name], values[f"tangent_{name}"] = pair
        operands = self._by_kernel(args) or self._operands(args)
        values |= zip(("query", "key", "tangent_query", "tangent_key"), operands)
        return self._in_recorded_blocks(op, {name: values[name] for name in self.names})

    def _operands(self, args: Arguments) -> Operands:
        """What scores are made of, and its tangents, in the dtype of sums."""
        dtype = compute_dtype(args["query"].dtype)
        wide = args | {name: args[name].to(dtype) for name in ("query", "key")}
        wanted = inspect.signature(self._score_operands).parameters
        duals = self._score_operands(**{name: wide[name] for name in wanted})
        (query, tangent_query), (key, tangent_key) = map(_autograd.unpack_dual, duals)
        return query, key, *self._score_tangents(query, key, tangent_query, tangent_key)

    def _in_recorded_blocks(self, op: Any, args: Arguments) -> tuple[Tensor, Tensor]:
        """A call of `op` per block of queries: its derivative holds the scores of one at a time."""
        query, key = args["query"], args["key"]
        tensors = [x for x in args.values() if isinstance(x, Tensor)]
        # A compiler would unroll the loop over blocks, for this length alone.
        if is_fake(query) or not _autograd.derivatives_may_follow(tensors):
            return op(*args.values())
        fewest = FEWEST_QUERIES * query.shape[0] * query.shape[1] * key.shape[2]
        scores = max(RECORDED * _scores_of_block(query), fewest)
        blocks = list(query_blocks(query, key, scores))
        if len(blocks) < 2:
            return op(*args.values())
        parts = [op(*_of_queries(args, first, last).values()) for first, last in blocks]
        out, lse = (torch.cat(results, 2) for results in zip(*parts, strict=True))
        return out, lse
