"""Legal arguments of the signature that all softmax-like ops share, and ways to spoil them."""

import torch

from tests.errors import case, layout_cases, ones

Q, K, V = ones(2, 4, 5, 8), ones(2, 2, 7, 8), ones(2, 2, 7, 6)
MERGED = (ones(4, 5, 8), ones(4, 7, 8), ones(4, 7, 6))
PACKED = (ones(1, 4, 5, 8), ones(1, 2, 7, 8), ones(1, 2, 7, 6))
OFFSETS_Q, OFFSETS_K = torch.tensor([0, 2, 5]), torch.tensor([0, 3, 7])
TRUE = ones(1).bool()

SHARED = layout_cases(Q, K, V, MERGED) | {
    "mask of floats": case(Q, K, V, ones(2, 7)),
    "mask of integers": case(Q, K, V, ones(2, 7).int()),
    "mask of rank 3": case(Q, K, V, TRUE.expand(4, 5, 7)),
    "mask of another length": case(Q, K, V, TRUE.expand(2, 8)),
    "mask that does not broadcast": case(Q, K, V, TRUE.expand(2, 2, 5, 7)),
    "mask on another device": case(Q, K, V, TRUE.expand(2, 7).to("meta")),
    "mask sparse": case(Q, K, V, TRUE.expand(2, 7).to_sparse()),
    "bias of rank 2": case(Q, K, V, bias=ones(5, 7)),
    "bias of other heads": case(Q, K, V, bias=ones(2, 5, 7)),
    "bias of merged heads": case(*MERGED, bias=ones(1, 5, 7)),
    "bias that does not broadcast": case(Q, K, V, bias=ones(2, 4, 7, 5)),
    "bias of booleans": case(Q, K, V, bias=TRUE.expand(4, 5, 7)),
    "bias too precise": case(Q, K, V, bias=ones(4, 5, 7, dtype=torch.float64)),
    "bias of the other half": case(
        Q.half(), K.half(), V.half(), bias=ones(4, 5, 7, dtype=torch.bfloat16)
    ),
    "bias on another device": case(Q, K, V, bias=ones(4, 5, 7, device="meta")),
    "relative_bias of rank 1": case(Q, K, V, relative_bias=ones(11)),
    "relative_bias too short": case(Q, K, V, relative_bias=ones(4, 10)),
    "relative_bias of other heads": case(Q, K, V, relative_bias=ones(2, 11)),
    "relative_bias of unequal packed lengths": case(
        *PACKED, cu_seqlens_q=OFFSETS_Q, cu_seqlens_k=OFFSETS_K, relative_bias=ones(4, 11)
    ),
    "window without causal": case(Q, K, V, window=3),
    "window of 0": case(Q, K, V, causal=True, window=0),
    "sink of rank 2": case(Q, K, V, sink=ones(4, 1)),
    "sink of other heads": case(Q, K, V, sink=ones(2)),
    "sink of integers": case(Q, K, V, sink=ones(4).long()),
    "cu_seqlens_k alone": case(*PACKED, cu_seqlens_k=OFFSETS_K),
    "cu_seqlens_q alone": case(*PACKED, cu_seqlens_q=OFFSETS_Q),
    "cu_seqlens of floats": case(*PACKED, cu_seqlens_q=ones(3), cu_seqlens_k=OFFSETS_K),
    "cu_seqlens of rank 2": case(*PACKED, cu_seqlens_q=OFFSETS_Q[None], cu_seqlens_k=OFFSETS_K),
    "cu_seqlens of one offset": case(
        *PACKED, cu_seqlens_q=OFFSETS_Q[:1], cu_seqlens_k=OFFSETS_K[:1]
    ),
    "cu_seqlens of unequal numbers": case(
        *PACKED, cu_seqlens_q=OFFSETS_Q, cu_seqlens_k=OFFSETS_K[:2]
    ),
    "cu_seqlens on another device": case(
        *PACKED, cu_seqlens_q=OFFSETS_Q, cu_seqlens_k=OFFSETS_K.to("meta")
    ),
    "cu_seqlens of a batch": case(Q, K, V, cu_seqlens_q=OFFSETS_Q, cu_seqlens_k=OFFSETS_K),
    "cu_seqlens sparse": case(*PACKED, cu_seqlens_q=OFFSETS_Q.to_sparse(), cu_seqlens_k=OFFSETS_K),
}
NOT_TRACED = ("query sparse", "query nested", "mask sparse", "cu_seqlens sparse")
