"""Every text of an error, pinned: the op, the argument, what was expected, what came.

EXPECTTEST_ACCEPT=1 rewrites them. Each is raised in eager mode and while tracing.
"""

import pytest
import torch
from expecttest import assert_expected_inline

import attn_ops
from tests.errors import (
    TRACING,
    Tracing,
    assert_compiling_raises_the_same_words,
    assert_exporting_raises_the_same,
    assert_tracing_raises_the_same,
    case,
    error_of,
    layout_cases,
    ones,
    texts,
)
from tests.softmax_inputs import MERGED, NOT_TRACED, SHARED, TRUE, K, Q, V

assert attn_ops.__all__  # its import registers the ops
attend = torch.ops.attn.l1
scores = torch.ops.attn.l1_scores

INVERSE = {"score": "inverse"}
OF_SCORES = {
    "scale infinite": case(Q, K, scale=float("inf")),
    "scale beyond float32": case(Q, K, scale=1e300),
    "scale not a number": case(Q, K, scale=float("nan")),
    "scale below 0 of an inverse": case(Q, K, scale=-0.5, **INVERSE),
    "score of no name": case(Q, K, score="squared"),
    "score empty": case(Q, K, score=""),
    "eps of 0": case(Q, K, eps=0.0, **INVERSE),
    "eps below 0": case(Q, K, eps=-1.0, **INVERSE),
    "eps not a number": case(Q, K, eps=float("nan"), **INVERSE),
    "eps infinite": case(Q, K, eps=float("inf"), **INVERSE),
    "eps with a square beyond float32": case(Q, K, eps=1e-20, **INVERSE),
}
OWN = {name: case(*args, V, **options) for name, (args, options) in OF_SCORES.items()}
CASES = SHARED | OWN
# Without a value: what is wrong with query and key, and one more.
LAYOUTS = {
    name: case(*args[:2])
    for name, (args, _) in layout_cases(Q, K, V, MERGED).items()
    if not name.startswith("value")
}
HALF = {"eps whose inverse is beyond float16": case(Q.half(), K.half(), eps=1e-5, **INVERSE)}
SCORES = LAYOUTS | OF_SCORES | HALF


def test_texts() -> None:
    assert_expected_inline(
        texts(attend, OWN),
        """\
scale infinite
    ValueError: l1: scale must be finite, got inf
scale beyond float32
    ValueError: l1: scale must be finite in torch.float32, got 1e+300
scale not a number
    ValueError: l1: scale must be finite, got nan
scale below 0 of an inverse
    ValueError: l1: scale must be at least 0 with score='inverse', got -0.5
score of no name
    ValueError: l1: score must be negative or inverse, got 'squared'
score empty
    ValueError: l1: score must be negative or inverse, got ''
eps of 0
    ValueError: l1: eps must be finite and at least 5.42e-20 in torch.float32, got 0.0
eps below 0
    ValueError: l1: eps must be finite and at least 5.42e-20 in torch.float32, got -1.0
eps not a number
    ValueError: l1: eps must be finite and at least 5.42e-20 in torch.float32, got nan
eps infinite
    ValueError: l1: eps must be finite and at least 5.42e-20 in torch.float32, got inf
eps with a square beyond float32
    ValueError: l1: eps must be finite and at least 5.42e-20 in torch.float32, got 1e-20""",
    )


def test_texts_of_scores() -> None:
    assert_expected_inline(
        texts(scores, LAYOUTS | HALF),
        """\
query of rank 2
    ValueError: l1_scores: query must have shape [B, H, M, D] or [BH, M, D], got (5, 8)
query of integers
    TypeError: l1_scores: query must be float64, float32, bfloat16 or float16, got torch.int32
query of complex numbers
    TypeError: l1_scores: query must be float64, float32, bfloat16 or float16, got
    torch.complex64
query sparse
    NotImplementedError: l1_scores: query must be a dense tensor, got torch.sparse_coo; pack
    sequences of several lengths with cu_seqlens
query nested
    NotImplementedError: l1_scores: query must be a dense tensor, got a nested tensor; pack
    sequences of several lengths with cu_seqlens
query too wide
    ValueError: l1_scores: query must have width D from 1 to 256, got 257
query of width 0
    ValueError: l1_scores: query must have width D from 1 to 256, got 0
key of rank 2
    ValueError: l1_scores: key must have shape [B, Hk, N, D] or [B, N, D], got (7, 8)
key of rank 4 beside a merged query
    ValueError: l1_scores: key must have shape [BH, N, D] beside a query of rank 3, got (2, 2,
    7, 8)
key of another dtype
    TypeError: l1_scores: key must be torch.float32 like query, got torch.float16
key on another device
    ValueError: l1_scores: key must be on cpu like query, got meta
key of another width
    ValueError: l1_scores: key must have width D=8 like query, got (2, 2, 7, 16)
key of another batch size
    ValueError: l1_scores: key must have batch size B=2 like query, got (3, 2, 7, 8)
key broadcast over the batch
    ValueError: l1_scores: key must have batch size B=2 like query, got (1, 2, 7, 8)
heads that do not divide
    ValueError: l1_scores: key must have a number of heads that divides H=4, got (2, 3, 7, 8)
key of no heads
    ValueError: l1_scores: key must have a number of heads that divides H=4, got (2, 0, 7, 8)
eps whose inverse is beyond float16
    ValueError: l1_scores: eps must be finite and at least 1.53e-05 in torch.float16, got 1e-05""",
    )


@pytest.mark.parametrize("name", SHARED)
def test_shared_arguments_are_refused_in_the_words_of_cosine_sim(name: str) -> None:
    """Those are pinned in tests/cosine_sim/test_errors.py."""
    args, options = SHARED[name]
    expected = error_of(torch.ops.attn.cosine_sim, *args, **options)
    error = error_of(attend, *args, **options)
    assert type(error) is type(expected)
    assert str(error) == str(expected).replace("cosine_sim:", "l1:", 1)


@pytest.mark.parametrize("name", CASES)
def test_with_lse_names_itself_in_the_same_words(name: str) -> None:
    args, options = CASES[name]
    expected = error_of(attend, *args, **options)
    error = error_of(torch.ops.attn.l1_with_lse, *args, **options)
    assert type(error) is type(expected)
    assert str(error) == str(expected).replace("l1:", "l1_with_lse:", 1)


@pytest.mark.parametrize("name", OWN)
def test_scores_use_the_same_words(name: str) -> None:
    args, options = OWN[name]
    expected = error_of(attend, *args, **options)
    args, options = SCORES[name]
    error = error_of(scores, *args, **options)
    assert type(error) is type(expected)
    assert str(error) == str(expected).replace("l1:", "l1_scores:", 1)


def test_eps_may_be_as_small_in_attention_as_float32_allows() -> None:
    args, options = HALF["eps whose inverse is beyond float16"]
    assert attend(*args, V.half(), **options).isfinite().all()


ALL = {f"l1: {name}": (attend, one) for name, one in CASES.items()} | {
    f"l1_scores: {name}": (scores, one) for name, one in SCORES.items()
}


@pytest.mark.parametrize("mode", TRACING)
@pytest.mark.parametrize("name", [name for name in ALL if not name.endswith(NOT_TRACED)])
def test_tracing_raises_the_same(name: str, mode: Tracing) -> None:
    op, (args, options) = ALL[name]
    assert_tracing_raises_the_same(op, args, options, mode)


COMPILED = (
    "l1: key of another width",
    "l1: mask of floats",
    "l1: window without causal",
    "l1: cu_seqlens of floats",
    "l1: scale infinite",
    "l1: score of no name",
    "l1: eps of 0",
    "l1_scores: key of another dtype",
    "l1_scores: scale below 0 of an inverse",
)


@pytest.mark.parametrize("name", COMPILED)
def test_compiling_raises_the_same_words(name: str) -> None:
    op, (args, options) = ALL[name]
    assert_compiling_raises_the_same_words(op, args, options)


def test_exporting_raises_the_same() -> None:
    assert_exporting_raises_the_same(attend, *CASES["key of another width"][0])


def test_bad_input_touches_no_memory() -> None:
    """Tensors of a terabyte that exist only as views: an error comes, not an allocation."""
    huge = ones(1).expand(1, 1, 1 << 19, 8)
    with pytest.raises(ValueError, match="mask must have shape"):
        attend(huge, huge, huge, TRUE.expand(1, 1 << 20))
    with pytest.raises(ValueError, match="score must be"):
        scores(huge, huge, score="squared")
