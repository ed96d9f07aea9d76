"""The quick question about query, key and value agrees with the worded checks, and asks them."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from attn_ops import _arguments

SIZES: list[tuple[int, ...]] = [
    (2, 4, 3, 5),
    (2, 2, 3, 5),
    (2, 4, 6, 5),
    (1, 4, 3, 5),
    (2, 3, 3, 5),
    (2, 0, 3, 5),
]
SIZES += [(2, 4, 3, 8), (2, 4, 3, 0), (2, 4, 3, 257), (2, 3, 5), (4, 3), (2, 0, 0, 5), (0, 4, 3, 5)]


def tensors() -> Iterator[Tensor]:
    """Of the usual kind and shape, and what differs in one thing."""
    yield from (torch.ones(size) for size in SIZES)
    usual = torch.ones(SIZES[0])
    yield usual.double()
    yield usual.int()
    yield usual.to("meta")
    yield usual.to_sparse()
    yield torch.nested.nested_tensor([usual[0], usual[1]])


def test_tensors_as_usual_pass_every_check() -> None:
    several = list(tensors())
    usual = 0
    for query, key, value in itertools.product(several, repeat=3):
        if not _arguments.are_as_usual(query, key, value):
            continue
        usual += 1
        folded = _arguments.fold_layout("op", query, key, value)
        assert all(a is b for a, b in zip(folded, (query, key, value), strict=True))
        _arguments.check_sizes("op", query, key, value)
    assert usual > 20


def test_of_rank_4_only_tensors_as_usual_pass() -> None:
    of_rank_4 = [x for x in tensors() if not x.is_nested and x.dim() == 4]
    for query, key, value in itertools.product(of_rank_4, repeat=3):
        if _arguments.are_as_usual(query, key, value):
            continue
        with pytest.raises((ValueError, TypeError, NotImplementedError), match="^op: "):
            _arguments.fold_layout("op", query, key, value)
            _arguments.check_sizes("op", query, key, value)
