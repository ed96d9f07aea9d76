"""Every text of an error of `l2_normalize`, pinned."""

import textwrap
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline

from attn_ops import l2_normalize

X = torch.ones(2, 6)
CASES: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "integers": ((X.int(),), {}),
    "complex numbers": ((X, X.to(torch.complex64)), {}),
    "a number": ((1.0,), {}),
    "no dimension": ((X.sum(),), {}),
    "sparse": ((X.to_sparse(),), {}),
    "groups of 0": ((X,), {"groups": 0}),
    "groups below 0": ((X,), {"groups": -2}),
    "groups that do not divide": ((X,), {"groups": 4}),
    "groups a float": ((X,), {"groups": 2.0}),
}


def text(name: str) -> str:
    tensors, options = CASES[name]
    with pytest.raises((ValueError, TypeError, NotImplementedError)) as caught:
        l2_normalize(*tensors, **options)
    line = f"{caught.type.__name__}: {caught.value}"
    return f"{name}\n" + textwrap.fill(line, 96, initial_indent="    ", subsequent_indent="    ")


def test_texts() -> None:
    assert_expected_inline(
        "\n".join(map(text, CASES)),
        """\
integers
    TypeError: l2_normalize: x must be float64, float32, bfloat16 or float16, got torch.int32
complex numbers
    TypeError: l2_normalize: x must be float64, float32, bfloat16 or float16, got
    torch.complex64
a number
    TypeError: l2_normalize: tensors must be a Tensor, got float
no dimension
    ValueError: l2_normalize: x must have shape [..., D], got ()
sparse
    NotImplementedError: l2_normalize: x must be a dense tensor, got torch.sparse_coo; pack
    sequences of several lengths with cu_seqlens
groups of 0
    ValueError: l2_normalize: groups must be at least 1 and divide D=6, got 0
groups below 0
    ValueError: l2_normalize: groups must be at least 1 and divide D=6, got -2
groups that do not divide
    ValueError: l2_normalize: groups must be at least 1 and divide D=6, got 4
groups a float
    TypeError: l2_normalize: groups must be an int, got float""",
    )
