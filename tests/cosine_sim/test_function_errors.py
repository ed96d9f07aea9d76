"""What only the Python function can be given: arguments that are no tensors, numbers or flags."""

import torch
from expecttest import assert_expected_inline

from attn_ops import cosine_sim_attention
from tests.errors import case, ones, texts
from tests.softmax_inputs import OFFSETS_K, PACKED, TRUE, K, Q, V

CASES = {
    "query a list": case([1.0], K, V),
    "mask a list": case(Q, K, V, [True]),
    "bias a number": case(Q, K, V, bias=1.0),
    "sink a list": case(Q, K, V, sink=[0.0] * 4),
    "cu_seqlens a list": case(*PACKED, cu_seqlens_q=[0, 5], cu_seqlens_k=OFFSETS_K),
    "scale a word": case(Q, K, V, scale="large"),
    "scale a truth": case(Q, K, V, scale=True),
    "scale beyond every float": case(Q, K, V, scale=10**400),
    "scale of other heads": case(Q, K, V, scale=ones(2)),
    "scale of integers": case(Q, K, V, scale=ones(4).int()),
    "scale on another device": case(Q, K, V, scale=ones(4, device="meta")),
    "scale beside a query of rank 1": case(ones(8), K, V, scale=ones(4)),
    "scale beside another head_scale": case(Q, K, V, scale=ones(4), head_scale=ones(2)),
    "window a float": case(Q, K, V, causal=True, window=1.5),
    "window a tensor": case(Q, K, V, causal=True, window=torch.tensor(2)),
    "window of 65 bits": case(Q, K, V, causal=True, window=1 << 64),
    "groups a float": case(Q, K, V, groups=2.0),
    "groups nothing": case(Q, K, V, groups=None),
    "causal a tensor": case(Q, K, V, causal=TRUE),
    "causal nothing": case(Q, K, V, causal=None),
    "normalize a number": case(Q, K, V, normalize=1),
}


def test_texts() -> None:
    assert_expected_inline(
        texts(cosine_sim_attention, CASES),
        """\
query a list
    TypeError: cosine_sim_attention: query must be a Tensor, got list
mask a list
    TypeError: cosine_sim_attention: mask must be a Tensor or None, got list
bias a number
    TypeError: cosine_sim_attention: bias must be a Tensor or None, got float
sink a list
    TypeError: cosine_sim_attention: sink must be a Tensor or None, got list
cu_seqlens a list
    TypeError: cosine_sim_attention: cu_seqlens_q must be a Tensor or None, got list
scale a word
    TypeError: cosine_sim_attention: scale must be a float, got str
scale a truth
    TypeError: cosine_sim_attention: scale must be a float, got bool
scale beyond every float
    ValueError: cosine_sim_attention: scale must be finite, got an int beyond every float
scale of other heads
    ValueError: cosine_sim_attention: scale must have shape [H]=(4,), got (2,)
scale of integers
    TypeError: cosine_sim_attention: scale must be float64, float32, bfloat16 or float16, got
    torch.int32
scale on another device
    ValueError: cosine_sim_attention: scale must be on cpu like query, got meta
scale beside a query of rank 1
    ValueError: cosine_sim_attention: query must have shape [B, H, M, D] or [BH, M, D], got (8,)
scale beside another head_scale
    ValueError: cosine_sim_attention: head_scale must have shape [H]=(4,), got (2,)
window a float
    TypeError: cosine_sim_attention: window must be an int, got float
window a tensor
    TypeError: cosine_sim_attention: window must be an int, got Tensor
window of 65 bits
    ValueError: cosine_sim_attention: window must be an int of 64 bits, got 18446744073709551616
groups a float
    TypeError: cosine_sim_attention: groups must be an int, got float
groups nothing
    TypeError: cosine_sim_attention: groups must be an int, got NoneType
causal a tensor
    TypeError: cosine_sim_attention: causal must be a bool, got Tensor
causal nothing
    TypeError: cosine_sim_attention: causal must be a bool, got NoneType
normalize a number
    TypeError: cosine_sim_attention: normalize must be a bool, got int""",
    )
