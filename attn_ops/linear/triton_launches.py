"""Tiles, warps and stages of the marches by dtype and width."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attn_ops._ahead import known
from attn_ops._triton.launch import shared_memory


class Plan(NamedTuple):
    """A program takes `chunk` tokens at a time, and keeps a part of the state.

    That part is all features of so many value columns, or, where the result is as wide as the
    features, so many features of all value columns. `sharing`: the stages where two programs share
    a multiprocessor, whose shared memory should hold both.
    """

    chunk: int
    columns: int
    features: int
    warps: int
    stages: int
    sharing: int


def plan(
    query: Tensor,
    inputs: int,
    features: int,
    values: int,
    hopper: bool,
    described: bool,
    plain: bool,
    divided: bool,
    decays: bool,
) -> Plan:
    """inputs, features, values: padded widths; taylor has more features than inputs.

    hopper: operands come out of shared memory. described: tiles come through tensor descriptors,
        which need no registers for addresses.
    plain: neither features nor decay, and no need of halves (see `halves_suffice`).
    divided: marches carry sums without values beside the state.
    """
    large = shared_memory(query.device) >= 160 << 10
    if query.dtype != torch.bfloat16:  # operands of 32 bits
        if features > 128 or values > 128:
            return Plan(16, 32, min(32, features), 8, 1, 1)
        return Plan(32, 32, min(32, features), 4, 1, 1)
    if features > inputs:
        stages = 2 if large else 1
        return Plan(64, 64, features, 4, stages, stages)
    if not hopper:
        wide = features > 128 or values > 128
        return Plan(32, 32, 32, 8, 2, 2) if wide else Plan(32, 64, 64, 4, 2, 2)
    if features > 128 or values > 128:
        stages = 2 if large else 1
        return Plan(64, 64, 64, 4 if described else 8, stages, stages)
    # A state of 128 x 128 takes half of the registers, and only the plain marches have so many.
    # Those by features, which are of the backward, have them where nothing is divided.
    width = 128 if described and plain else 64
    rows = 64 if divided else width
    narrow = features <= 64 and values <= 64
    stages = 4 if narrow or (decays and not divided) else 3
    stages, sharing = (stages, 2 if divided else stages) if large else (1, 1)
    return Plan(64, min(values, width), min(features, rows), 4, stages, sharing)


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def num_stages(plan: Plan, programs: int, parts: int, device: torch.device) -> int:
    """Stages of a march."""
    shares = parts > 1 and known(programs > processors(device))
    return plan.sharing if shares else plan.stages


def num_segments(programs: int, num_tokens: int, chunk: int, device: torch.device) -> int:
    """Into how many segments a sequence is cut, so that every multiprocessor has a program."""
    if not isinstance(programs * num_tokens, int):
        return 1  # a package is for many sizes
    longest = max(1, num_tokens // (8 * chunk))
    return max(1, min(round(processors(device) / max(1, programs)), longest))


def halves_suffice(programs: int, device: torch.device) -> bool:
    """Whether two programs in place of one give every multiprocessor its own, without segments.

    Both halves of the value columns read the same queries and keys, one of them from the L2 cache;
    segments read keys and values twice.
    """
    if not isinstance(programs, int):
        return False
    each = processors(device) / max(1, programs)
    return round(each) > 1 and round(each / 2) == 1
