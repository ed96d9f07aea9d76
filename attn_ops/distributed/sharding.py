"""How DTensor may shard the private ops: over the batch, over the heads, or not at all.

A mesh dimension takes one of three axes. On each of them an argument is placed by what its
dimensions mean, which its name tells in every room; an argument that has not the sharded dimension
is replicated, and its gradient is then a sum over the shards. Whatever comes placed otherwise (over
the sequence, say, or as a partial sum) DTensor redistributes first.

Grouped heads may be sharded only where every shard has whole groups; one key head that all query
heads read is replicated.

Letters: B batch, H query heads, Hk key/value heads, M queries, N keys.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor._op_schema import OpSchema, OpSpec, OpStrategy, RuntimeSchemaInfo
from torch.distributed.tensor._ops.utils import generate_redistribute_costs

from attn_ops import _library

NOT_AT_ALL, BATCH, HEADS, GROUPS = "not at all", "batch", "heads", "groups"
Axes = tuple[str, ...]  # one per dimension of the mesh

# Which dimension of an argument or a result is the batch and which the heads; GROUPS are heads of
# keys. Gradients are placed like what they are the gradients of.
_DIMENSIONS: dict[str, dict[str, int]] = {
    **dict.fromkeys(
        "query out lse scores grad weight denominator state key_sum final_state "
        "final_key_sum".split(),
        {BATCH: 0, HEADS: 1},
    ),
    **dict.fromkeys("key value value_reverse".split(), {BATCH: 0, GROUPS: 1}),
    **dict.fromkeys("mask bias".split(), {BATCH: 0, HEADS: 1}),
    **dict.fromkeys("start stop".split(), {BATCH: 0}),
    **dict.fromkeys("relative_bias sink head_scale query_gain decay".split(), {HEADS: 0}),
    "key_gain": {GROUPS: 0},
    **dict.fromkeys("offsets edges row_start row_keys col_start col_queries col_edges".split(), {}),
}
# A size of 1 is for all of the batch, or for all heads.
_BROADCAST = {"mask", "bias", "start", "stop"}
# Results that the schemas leave without a name.
_UNNAMED = {
    "_linear_grad_decay": "grad_decay",
    "_linear_step": "out",
    "_l1_scores_fwd": "scores",
}
# Results that are empty where an argument is None.
_EMPTY_WITHOUT = {"denominator": "eps", "final_state": "state", "final_key_sum": "key_sum"}


class _Call:
    """The arguments of one call, by name: strategies in place of tensors."""

    def __init__(self, schema: OpSchema) -> None:
        self.mesh = schema.get_mesh_from_args()
        declared = schema.op._schema
        names = [argument.name for argument in declared.arguments]
        self.arguments: dict[str, Any] = dict(zip(names, schema.args_schema))
        self.tensors = {n: x for n, x in self.arguments.items() if isinstance(x, OpStrategy)}
        self.specs = {n: x.strategies[0].output_spec for n, x in self.tensors.items()}
        self.results = [x.name or _UNNAMED[schema.op._opname] for x in declared.returns]
        self.written = [
            x.name for x in declared.arguments if x.alias_info is not None and x.alias_info.is_write
        ]
        # One key head that several query heads read is not sharded with them.
        self.one_group = "key" in self.specs and self.heads("key") == 1 < self.heads("query")

    def heads(self, name: str) -> int:
        return self.specs[name].shape[1]

    def axes(self) -> list[Axes]:
        """Every axis for every dimension of the mesh, where whole groups stay together."""
        known = [NOT_AT_ALL]
        if "query" in self.specs:
            # A batch of one is not sharded: packed sequences have to be in one batch.
            known += [HEADS] if self.specs["query"].shape[0] == 1 else [BATCH, HEADS]
        all_axes = itertools.product(known, repeat=self.mesh.ndim)
        return [axes for axes in all_axes if self._whole_groups(axes)]

    def _whole_groups(self, axes: Axes) -> bool:
        if HEADS not in axes or self.one_group or self.heads("key") == self.heads("query"):
            return True
        shards = 1
        for size, axis in zip(self.mesh.shape, axes):
            shards *= size if axis == HEADS else 1
        return self.heads("key") % shards == 0

    def argument(self, name: str, axis: str) -> Placement:
        """Where the argument has to be."""
        dimensions = _DIMENSIONS[name.removeprefix("grad_").removeprefix("tangent_")]
        dim = dimensions.get(axis)
        if axis == HEADS and not self.one_group:
            dim = dimensions.get(GROUPS, dim)
        if dim is None or (name in _BROADCAST and self.specs[name].shape[dim] == 1):
            return Replicate()
        return Shard(dim)

    def result(self, index: int, axis: str) -> Placement:
        """Where the result comes out."""
        name = self.results[index]
        if name.startswith("grad_"):
            return self._gradient(name.removeprefix("grad_"), index, axis)
        if self.arguments.get(_EMPTY_WITHOUT.get(name, ""), 0) is None:
            return Replicate()
        return self.argument(name, axis)

    def _gradient(self, name: str, index: int, axis: str) -> Placement:
        wanted = self.arguments.get("output_mask")
        if axis == NOT_AT_ALL or name not in self.specs or (wanted and not wanted[index]):
            return Replicate()
        place = self.argument(name, axis)
        return Partial() if place == Replicate() else place


def _strategy(schema: OpSchema) -> OpStrategy:
    """Every way to run the op on shards."""
    call = _Call(schema)
    strategies = []
    for axes in call.axes():
        inputs = {
            name: DTensorSpec(
                call.mesh,
                tuple(call.argument(name, axis) for axis in axes),
                tensor_meta=spec.tensor_meta,
            )
            for name, spec in call.specs.items()
        }
        # What is written to must be the caller's own shard, not a redistributed copy.
        if any(inputs[name].placements != call.specs[name].placements for name in call.written):
            continue
        outputs = tuple(
            DTensorSpec(call.mesh, tuple(call.result(i, axis) for axis in axes))
            for i in range(len(call.results))
        )
        costs = [generate_redistribute_costs(x, inputs[name]) for name, x in call.tensors.items()]
        one = len(outputs) == 1
        strategies.append(
            OpSpec(
                output_specs=outputs[0] if one else outputs,
                input_specs=list(inputs.values()),
                redistribute_cost=costs,
            )
        )
    if not strategies:
        placed = ", ".join(f"{name} {call.specs[name].placements}" for name in call.written)
        raise ValueError(
            f"{schema.op._opname.strip('_')}: what is updated in place must be sharded alike over "
            f"the batch or over the heads, or replicated, got {placed}"
        )
    return OpStrategy(strategies)


def register() -> None:
    """Makes the strategies known to DTensor; called once that is imported."""
    propagator = DTensor._op_dispatcher.sharding_propagator
    # Every argument is a part of the cache's key, from the first on: by default bools, floats and
    # which of the tensors are None would not be, and a call would reuse the answer to another one.
    key = RuntimeSchemaInfo(static_argnum=0, needs_pytree=True)
    for room in _library.ROOMS:
        for op in _library.private_ops(room):
            propagator.register_op_strategy(getattr(torch.ops.attn, op).default, _strategy, key)
