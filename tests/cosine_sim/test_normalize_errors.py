"""Every text of an error of `l2_normalize`, pinned."""

import torch
from expecttest import assert_expected_inline

from attn_ops import l2_normalize
from tests.errors import case, texts

X = torch.ones(2, 6)
CASES = {
    "integers": case(X.int()),
    "complex numbers": case(X, X.to(torch.complex64)),
    "a number": case(1.0),
    "no dimension": case(X.sum()),
    "sparse": case(X.to_sparse()),
    "groups of 0": case(X, groups=0),
    "groups below 0": case(X, groups=-2),
    "groups that do not divide": case(X, groups=4),
    "groups a float": case(X, groups=2.0),
}


def test_texts() -> None:
    assert_expected_inline(
        texts(l2_normalize, CASES),
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
