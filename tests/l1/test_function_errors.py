"""What only the Python functions can be given: arguments that are no tensors, numbers or flags."""

import torch
from expecttest import assert_expected_inline

from attn_ops import l1_attention, l1_scores
from tests.errors import case, ones, texts
from tests.softmax_inputs import OFFSETS_K, PACKED, TRUE, K, Q, V

OF_SCORES = {
    "query a list": case([1.0], K),
    "key nothing": case(Q, None),
    "scale a word": case(Q, K, scale="large"),
    "scale a truth": case(Q, K, scale=True),
    "scale a tensor": case(Q, K, scale=ones(4)),
    "scale beyond every float": case(Q, K, scale=10**400),
    "score nothing": case(Q, K, score=None),
    "eps a word": case(Q, K, eps="small"),
}
CASES = {name: case(*args, V, **options) for name, (args, options) in OF_SCORES.items()} | {
    "mask a list": case(Q, K, V, [True]),
    "bias a number": case(Q, K, V, bias=1.0),
    "sink a list": case(Q, K, V, sink=[0.0] * 4),
    "cu_seqlens a list": case(*PACKED, cu_seqlens_q=[0, 5], cu_seqlens_k=OFFSETS_K),
    "window a float": case(Q, K, V, causal=True, window=1.5),
    "window a tensor": case(Q, K, V, causal=True, window=torch.tensor(2)),
    "window of 65 bits": case(Q, K, V, causal=True, window=1 << 64),
    "causal a tensor": case(Q, K, V, causal=TRUE),
    "causal nothing": case(Q, K, V, causal=None),
}


def test_texts() -> None:
    assert_expected_inline(
        texts(l1_attention, CASES),
        """\
query a list
    TypeError: l1_attention: query must be a Tensor, got list
key nothing
    TypeError: l1_attention: key must be a Tensor, got NoneType
scale a word
    TypeError: l1_attention: scale must be a float, got str
scale a truth
    TypeError: l1_attention: scale must be a float, got bool
scale a tensor
    TypeError: l1_attention: scale must be a float, got Tensor
scale beyond every float
    ValueError: l1_attention: scale must be finite, got an int beyond every float
score nothing
    TypeError: l1_attention: score must be a str, got NoneType
eps a word
    TypeError: l1_attention: eps must be a float, got str
mask a list
    TypeError: l1_attention: mask must be a Tensor or None, got list
bias a number
    TypeError: l1_attention: bias must be a Tensor or None, got float
sink a list
    TypeError: l1_attention: sink must be a Tensor or None, got list
cu_seqlens a list
    TypeError: l1_attention: cu_seqlens_q must be a Tensor or None, got list
window a float
    TypeError: l1_attention: window must be an int, got float
window a tensor
    TypeError: l1_attention: window must be an int, got Tensor
window of 65 bits
    ValueError: l1_attention: window must be an int of 64 bits, got 18446744073709551616
causal a tensor
    TypeError: l1_attention: causal must be a bool, got Tensor
causal nothing
    TypeError: l1_attention: causal must be a bool, got NoneType""",
    )


def test_scores_use_the_same_words() -> None:
    expected = texts(l1_attention, {name: CASES[name] for name in OF_SCORES})
    assert texts(l1_scores, OF_SCORES) == expected.replace("l1_attention", "l1_scores")
