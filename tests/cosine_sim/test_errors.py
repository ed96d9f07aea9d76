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
    ones,
    texts,
)
from tests.softmax_inputs import NOT_TRACED, SHARED, TRUE, K, Q, V

assert attn_ops.__all__  # its import registers the op
attend = torch.ops.attn.cosine_sim


CASES = SHARED | {
    "scale infinite": case(Q, K, V, scale=float("inf")),
    "scale beyond float32": case(Q, K, V, scale=1e300),
    "scale not a number": case(Q, K, V, scale=float("nan")),
    "groups of 0": case(Q, K, V, groups=0),
    "groups that do not divide": case(Q, K, V, groups=3),
    "head_scale of other heads": case(Q, K, V, head_scale=ones(2)),
    "head_scale too precise": case(Q, K, V, head_scale=ones(4, dtype=torch.float64)),
    "query_gain without norms": case(Q, K, V, normalize=False, query_gain=ones(8)),
    "key_gain without norms": case(Q, K, V, normalize=False, key_gain=ones(8)),
    "query_gain of another width": case(Q, K, V, query_gain=ones(9)),
    "query_gain of key heads": case(Q, K, V, query_gain=ones(2, 8)),
    "key_gain of query heads": case(Q, K, V, key_gain=ones(4, 8)),
    "key_gain of rank 3": case(Q, K, V, key_gain=ones(1, 2, 8)),
    "key_gain of integers": case(Q, K, V, key_gain=ones(8).int()),
}


def test_texts() -> None:
    assert_expected_inline(
        texts(attend, CASES),
        """\
query of rank 2
    ValueError: cosine_sim: query must have shape [B, H, M, D] or [BH, M, D], got (5, 8)
query of integers
    TypeError: cosine_sim: query must be float64, float32, bfloat16 or float16, got torch.int32
query of complex numbers
    TypeError: cosine_sim: query must be float64, float32, bfloat16 or float16, got
    torch.complex64
query sparse
    NotImplementedError: cosine_sim: query must be a dense tensor, got torch.sparse_coo; pack
    sequences of several lengths with cu_seqlens
query nested
    NotImplementedError: cosine_sim: query must be a dense tensor, got a nested tensor; pack
    sequences of several lengths with cu_seqlens
query too wide
    ValueError: cosine_sim: query must have width D from 1 to 256, got 257
query of width 0
    ValueError: cosine_sim: query must have width D from 1 to 256, got 0
key of rank 2
    ValueError: cosine_sim: key must have shape [B, Hk, N, D] or [B, N, D], got (7, 8)
key of rank 4 beside a merged query
    ValueError: cosine_sim: key must have shape [BH, N, D] beside a query of rank 3, got (2, 2,
    7, 8)
value of rank 4 beside a merged query
    ValueError: cosine_sim: value must have shape [BH, N, E] beside a query of rank 3, got (2,
    2, 7, 6)
key of another dtype
    TypeError: cosine_sim: key must be torch.float32 like query, got torch.float16
key on another device
    ValueError: cosine_sim: key must be on cpu like query, got meta
key of another width
    ValueError: cosine_sim: key must have width D=8 like query, got (2, 2, 7, 16)
key of another batch size
    ValueError: cosine_sim: key must have batch size B=2 like query, got (3, 2, 7, 8)
key broadcast over the batch
    ValueError: cosine_sim: key must have batch size B=2 like query, got (1, 2, 7, 8)
heads that do not divide
    ValueError: cosine_sim: key must have a number of heads that divides H=4, got (2, 3, 7, 8)
key of no heads
    ValueError: cosine_sim: key must have a number of heads that divides H=4, got (2, 0, 7, 8)
value of another rank than key
    ValueError: cosine_sim: value must have shape [B, N, E] beside a key of rank 3, got (2, 2,
    7, 6)
value of another dtype
    TypeError: cosine_sim: value must be torch.float32 like query, got torch.float64
value of another batch size
    ValueError: cosine_sim: value must have batch size B=2 like query, got (3, 2, 7, 6)
value of another length
    ValueError: cosine_sim: value must have [Hk, N]=(2, 7) like key, got (2, 2, 8, 6)
value of other heads
    ValueError: cosine_sim: value must have [Hk, N]=(2, 7) like key, got (2, 4, 7, 6)
value too wide
    ValueError: cosine_sim: value must have width E from 1 to 256, got 300
mask of floats
    TypeError: cosine_sim: mask must be bool (True = may attend), got torch.float32; an additive
    mask is a bias
mask of integers
    TypeError: cosine_sim: mask must be bool (True = may attend), got torch.int32
mask of rank 3
    ValueError: cosine_sim: mask must have shape [B, N] or broadcastable to [B, H, M, N], got
    (4, 5, 7)
mask of another length
    ValueError: cosine_sim: mask must have shape [B, N]=(2, 7), got (2, 8)
mask that does not broadcast
    ValueError: cosine_sim: mask must be broadcastable to [B, H, M, N]=(2, 4, 5, 7), got (2, 2,
    5, 7)
mask on another device
    ValueError: cosine_sim: mask must be on cpu like query, got meta
mask sparse
    NotImplementedError: cosine_sim: mask must be a dense tensor, got torch.sparse_coo; pack
    sequences of several lengths with cu_seqlens
bias of rank 2
    ValueError: cosine_sim: bias must have shape [H, M, N] or broadcastable to [B, H, M, N], got
    (5, 7)
bias of other heads
    ValueError: cosine_sim: bias must have shape [H, M, N]=(4, 5, 7), got (2, 5, 7)
bias of merged heads
    ValueError: cosine_sim: bias must have shape [BH, M, N]=(4, 5, 7), got (1, 5, 7)
bias that does not broadcast
    ValueError: cosine_sim: bias must be broadcastable to [B, H, M, N]=(2, 4, 5, 7), got (2, 4,
    7, 5)
bias of booleans
    TypeError: cosine_sim: bias must be float64, float32, bfloat16 or float16, got torch.bool
bias too precise
    TypeError: cosine_sim: bias must be torch.float32 beside this query, got torch.float64
bias of the other half
    TypeError: cosine_sim: bias must be torch.float16 or torch.float32 beside this query, got
    torch.bfloat16
bias on another device
    ValueError: cosine_sim: bias must be on cpu like query, got meta
relative_bias of rank 1
    ValueError: cosine_sim: relative_bias must have shape [H or 1, M+N-1], got (11,)
relative_bias too short
    ValueError: cosine_sim: relative_bias must have shape [H or 1, M+N-1]=(4, 11), got (4, 10)
relative_bias of other heads
    ValueError: cosine_sim: relative_bias must have shape [H or 1, M+N-1]=(4, 11), got (2, 11)
relative_bias of unequal packed lengths
    ValueError: cosine_sim: cu_seqlens_k must have as many keys as queries beside relative_bias,
    got 5 queries, 7 keys
window without causal
    ValueError: cosine_sim: window must come with causal=True, got causal=False
window of 0
    ValueError: cosine_sim: window must be at least 1, got 0
sink of rank 2
    ValueError: cosine_sim: sink must have shape [H]=(4,), got (4, 1)
sink of other heads
    ValueError: cosine_sim: sink must have shape [H]=(4,), got (2,)
sink of integers
    TypeError: cosine_sim: sink must be float64, float32, bfloat16 or float16, got torch.int64
cu_seqlens_k alone
    ValueError: cosine_sim: cu_seqlens_q must be given beside the other cu_seqlens, got None
cu_seqlens_q alone
    ValueError: cosine_sim: cu_seqlens_k must be given beside the other cu_seqlens, got None
cu_seqlens of floats
    TypeError: cosine_sim: cu_seqlens_q must be int32 or int64, got torch.float32
cu_seqlens of rank 2
    ValueError: cosine_sim: cu_seqlens_q must have shape [S+1], got (1, 3)
cu_seqlens of one offset
    ValueError: cosine_sim: cu_seqlens_q must have at least 2 offsets, [0, length], got (1,)
cu_seqlens of unequal numbers
    ValueError: cosine_sim: cu_seqlens_k must have shape [S+1] like cu_seqlens_q=(3,), got (2,)
cu_seqlens on another device
    ValueError: cosine_sim: cu_seqlens_k must be on cpu like query, got meta
cu_seqlens of a batch
    ValueError: cosine_sim: query must be packed into batch size B=1 beside cu_seqlens, got (2,
    4, 5, 8)
cu_seqlens sparse
    NotImplementedError: cosine_sim: cu_seqlens_q must be a dense tensor, got torch.sparse_coo;
    pack sequences of several lengths with cu_seqlens
scale infinite
    ValueError: cosine_sim: scale must be finite, got inf
scale beyond float32
    ValueError: cosine_sim: scale must be finite in torch.float32, got 1e+300
scale not a number
    ValueError: cosine_sim: scale must be finite, got nan
groups of 0
    ValueError: cosine_sim: groups must be at least 1 and divide D=8, got 0
groups that do not divide
    ValueError: cosine_sim: groups must be at least 1 and divide D=8, got 3
head_scale of other heads
    ValueError: cosine_sim: head_scale must have shape [H]=(4,), got (2,)
head_scale too precise
    TypeError: cosine_sim: head_scale must be torch.float32 beside this query, got torch.float64
query_gain without norms
    ValueError: cosine_sim: query_gain must come with normalize=True, got normalize=False
key_gain without norms
    ValueError: cosine_sim: key_gain must come with normalize=True, got normalize=False
query_gain of another width
    ValueError: cosine_sim: query_gain must have shape [D] or [H, D]=(4, 8), got (9,)
query_gain of key heads
    ValueError: cosine_sim: query_gain must have shape [D] or [H, D]=(4, 8), got (2, 8)
key_gain of query heads
    ValueError: cosine_sim: key_gain must have shape [D] or [Hk, D]=(2, 8), got (4, 8)
key_gain of rank 3
    ValueError: cosine_sim: key_gain must have shape [D] or [Hk, D], got (1, 2, 8)
key_gain of integers
    TypeError: cosine_sim: key_gain must be float64, float32, bfloat16 or float16, got
    torch.int32""",
    )


@pytest.mark.parametrize("name", CASES)
def test_with_lse_names_itself_in_the_same_words(name: str) -> None:
    args, options = CASES[name]
    expected = error_of(attend, *args, **options)
    error = error_of(torch.ops.attn.cosine_sim_with_lse, *args, **options)
    assert type(error) is type(expected)
    assert str(error) == str(expected).replace("cosine_sim:", "cosine_sim_with_lse:", 1)


@pytest.mark.parametrize("mode", TRACING)
@pytest.mark.parametrize("name", [name for name in CASES if name not in NOT_TRACED])
def test_tracing_raises_the_same(name: str, mode: Tracing) -> None:
    args, options = CASES[name]
    assert_tracing_raises_the_same(attend, args, options, mode)


COMPILED = (
    "key of another width",
    "key of another dtype",
    "key on another device",
    "mask of floats",
    "bias that does not broadcast",
    "relative_bias too short",
    "window without causal",
    "cu_seqlens of floats",
    "scale infinite",
    "groups that do not divide",
    "key_gain of query heads",
)


@pytest.mark.parametrize("name", COMPILED)
def test_compiling_raises_the_same_words(name: str) -> None:
    args, options = CASES[name]
    assert_compiling_raises_the_same_words(attend, args, options)


def test_exporting_raises_the_same() -> None:
    assert_exporting_raises_the_same(attend, *CASES["key of another width"][0])


def test_forward_of_bad_input_touches_no_memory() -> None:
    """Tensors of a terabyte that exist only as views: an error comes, not an allocation."""
    huge = ones(1).expand(1, 1, 1 << 19, 8)
    with pytest.raises(ValueError, match="mask must have shape"):
        attend(huge, huge, huge, TRUE.expand(1, 1 << 20))
