"""Calls of the linear ops of which each has one thing wrong."""

import torch
from torch import Tensor

from tests.errors import Cases, case, layout_cases, ones
from tests.linear.inputs import (
    KEY_SUM,
    MERGED,
    OFFSETS,
    PACKED,
    STATE,
    TOKEN,
    TRUE,
    K,
    Q,
    V,
)

# Of all three ops, but for the lengths of a step.
SHARED = layout_cases(Q, K, V, MERGED) | {
    "mask of floats": case(Q, K, V, mask=ones(2, 7)),
    "mask of rank 4": case(Q, K, V, mask=TRUE.expand(2, 1, 1, 7)),
    "mask of another length": case(Q, K, V, mask=TRUE.expand(2, 8)),
    "mask of another batch size": case(Q, K, V, mask=TRUE.expand(1, 7)),
    "mask of the heads of a merged query": case(*MERGED, mask=TRUE.expand(2, 7)),
    "mask on another device": case(Q, K, V, mask=TRUE.expand(2, 7).to("meta")),
    "mask sparse": case(Q, K, V, mask=TRUE.expand(2, 7).to_sparse()),
    "eps below 0": case(Q, K, V, eps=-1e-5),
    "eps infinite": case(Q, K, V, eps=float("inf")),
    "eps not a number": case(Q, K, V, eps=float("nan")),
    "eps below 0, not normalised": case(Q, K, V, eps=-1.0, normalize=False),
    "decay of key heads": case(Q, K, V, causal=True, decay=ones(2)),
    "decay of rank 2": case(Q, K, V, causal=True, decay=ones(4, 1)),
    "decay of integers": case(Q, K, V, causal=True, decay=ones(4).int()),
    "decay too precise": case(Q, K, V, causal=True, decay=ones(4, dtype=torch.float64)),
    "decay of the other half": case(
        Q.half(), K.half(), V.half(), causal=True, decay=ones(4, dtype=torch.bfloat16)
    ),
    "decay on another device": case(Q, K, V, causal=True, decay=ones(4, device="meta")),
    "decay sparse": case(Q, K, V, causal=True, decay=ones(4).to_sparse()),
    "feature_map of no name": case(Q, K, V, feature_map="exp"),
    "feature_map of another spelling": case(Q, K, V, feature_map="ReLU"),
}
LINEAR = SHARED | {
    "key of another length in causal attention": case(
        Q, ones(2, 2, 5, 8), ones(2, 2, 5, 6), causal=True
    ),
    "decay without causal": case(Q, K, V, decay=ones(4)),
    "cu_seqlens of floats": case(*PACKED, cu_seqlens=ones(3)),
    "cu_seqlens of rank 2": case(*PACKED, cu_seqlens=OFFSETS[None]),
    "cu_seqlens of one offset": case(*PACKED, cu_seqlens=OFFSETS[:1]),
    "cu_seqlens of a batch": case(Q, K, V, cu_seqlens=OFFSETS),
    "cu_seqlens on another device": case(*PACKED, cu_seqlens=OFFSETS.to("meta")),
    "cu_seqlens sparse": case(*PACKED, cu_seqlens=OFFSETS.to_sparse()),
    "key of another length beside cu_seqlens": case(
        PACKED[0], ones(1, 2, 5, 8), ones(1, 2, 5, 6), cu_seqlens=OFFSETS
    ),
}
STATES = {
    "state of rank 3": case(Q, K, V, STATE[0], KEY_SUM),
    "state of key heads": case(Q, K, V, STATE[:, :2], KEY_SUM),
    "state of another width": case(Q, K, V, ones(2, 4, 6, 8), KEY_SUM),
    "state of other features": case(Q, K, V, STATE, KEY_SUM, feature_map="taylor"),
    "state of another batch size": case(Q, K, V, STATE[:1], KEY_SUM),
    "state of merged heads": case(*MERGED, STATE, KEY_SUM[0]),
    "state of half precision": case(Q.half(), K.half(), V.half(), STATE.half(), KEY_SUM),
    "state too precise": case(Q, K, V, STATE.double(), KEY_SUM),
    "state of integers": case(Q, K, V, STATE.int(), KEY_SUM),
    "state on another device": case(Q, K, V, STATE.to("meta"), KEY_SUM),
    "state sparse": case(Q, K, V, STATE.to_sparse(), KEY_SUM),
    "key_sum of rank 2": case(Q, K, V, STATE, KEY_SUM[0]),
    "key_sum of key heads": case(Q, K, V, STATE, KEY_SUM[:, :2]),
    "key_sum of the width of value": case(Q, K, V, STATE, ones(2, 4, 6)),
    "key_sum of merged heads": case(*MERGED, ones(4, 8, 6), KEY_SUM),
    "key_sum of half precision": case(Q.half(), K.half(), V.half(), STATE, KEY_SUM.half()),
    "key_sum too precise": case(Q, K, V, STATE, KEY_SUM.double()),
    "key_sum on another device": case(Q, K, V, STATE, KEY_SUM.to("meta")),
}


def not_causal(cases: Cases) -> Cases:
    """Without the argument that only `linear` has."""
    return {
        name: (args, {key: x for key, x in options.items() if key != "causal"})
        for name, (args, options) in cases.items()
    }


LENGTH = {"key of another length": case(Q, ones(2, 2, 5, 8), ones(2, 2, 5, 6))}
WITH_STATE = not_causal(SHARED) | STATES | LENGTH


def one_token(cases: Cases) -> Cases:
    """The same for a step: one token each, and states where the case has none."""

    def first(x: Tensor) -> Tensor:
        return x[..., :1, :] if x.layout == torch.strided and not x.is_nested and x.dim() > 2 else x

    result = {}
    for name, (args, options) in cases.items():
        if "mask" not in options and not name.endswith(("nested", "length")):
            states = args[3:] or (STATE, KEY_SUM)
            result[name] = ((*map(first, args[:3]), *states), options)
    return result


STEP = one_token(WITH_STATE) | {
    "query of two tokens": case(Q[:, :, :2], K[:, :, :2], V[:, :, :2], STATE, KEY_SUM),
    "query of no token": case(Q[:, :, :0], K[:, :, :0], V[:, :, :0], STATE, KEY_SUM),
    "key of two tokens": case(TOKEN[0], K[:, :, :2], V[:, :, :2], STATE, KEY_SUM),
}
