"""The L1 ops, as the conformance suite sees them."""

from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st

import attn_ops
from tests import strategies
from tests.conformance.spec import OpSpec
from tests.l1 import formula
from tests.l1.sparse_spec import SPARSE
from tests.strategies import Case


def build(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Away from ties, where the distance has no derivative."""
    args, _ = strategies.build(case.but(apart=True), dtype, device)
    return args | case.options


def build_scores(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    args = build(case, dtype, device)
    return {name: args[name] for name in ("query", "key")} | case.options


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    if draw(st.booleans()):
        return draw(st.sampled_from(({}, {"scale": 0.25}, {"scale": 0.0}, {"scale": -0.5})))
    scale = draw(st.sampled_from((1.0, 0.25, 0.0)))
    return {"score": "inverse", "scale": scale, "eps": draw(st.sampled_from((0.25, 1.0)))}


INVERSE = {"score": "inverse", "scale": 0.5, "eps": 0.125}
PACKED = ((3, 3), (0, 2), (4, 1), (2, 5), (5, 0))
COMMON = {
    "plain": Case(),
    "transposed": Case(strides="transposed"),
    "expanded": Case(strides="expanded"),
    "inverse": Case(options=INVERSE),
    "grouped heads": Case(heads=6, kv_heads=2, options=INVERSE),
    "one key head of rank 3": Case(heads=3, kv_heads=1, layout="BND"),
    "merged batch and heads": Case(batch=4, heads=1, kv_heads=1, layout="merged"),
    "odd widths": Case(width=13, value_width=17, queries=33, keys=35),
    "wide": Case(width=256, value_width=256),
    "narrow": Case(width=1, value_width=1),
    "longer than a block": Case(batch=1, queries=70, keys=150, width=32, value_width=40),
}
CASES = COMMON | {
    "one key head of rank 3": COMMON["one key head of rank 3"].but(bias="HMN"),
    "merged batch and heads": COMMON["merged batch and heads"].but(mask="BN", bias="HMN"),
    "key mask and broadcast bias": Case(mask="BN", bias="11MN"),
    "mask of rank 4 and causal": Case(mask="B1MN", causal=True),
    "bias that hides": Case(bias="B1MN", bias_hides=True, wide_parameters=False),
    "bias of every row": Case(bias="BHM1"),
    "relative bias": Case(relative_bias="H"),
    "one relative bias for all heads": Case(relative_bias="1", causal=True),
    "causal": Case(queries=9, keys=9, causal=True),
    "causal with more queries than keys": Case(queries=9, keys=4, causal=True),
    "window": Case(queries=6, keys=20, causal=True, window=3),
    "packed": Case(batch=1, queries=15, keys=12, sequences=PACKED),
    "packed, causal, window": Case(
        batch=1, queries=15, keys=12, sequences=PACKED, causal=True, window=2
    ),
    "packed with relative bias": Case(
        batch=1, queries=9, keys=9, sequences=((4, 4), (3, 3)), relative_bias="H", causal=True
    ),
    "sink": Case(sink=True, causal=True, queries=9, keys=4),
    "everything": Case(
        heads=4,
        queries=6,
        keys=9,
        mask="B1MN",
        bias="1HMN",
        relative_bias="H",
        causal=True,
        window=5,
        sink=True,
        options=INVERSE,
    ),
}

L1 = OpSpec(
    name="l1",
    room="l1",
    results=("out", "lse"),
    ops=(torch.ops.attn.l1_with_lse, torch.ops.attn.l1),
    function=attn_ops.l1_attention,
    formula=formula.l1,
    magnitudes=formula.magnitudes,
    build=build,
    drawn=partial(strategies.cases, options()),
    resized=strategies.resized,
    differentiable=("query", "key", "value", "bias", "relative_bias", "sink"),
    cases=CASES,
    long=Case(
        heads=1,
        kv_heads=1,
        width=8,
        value_width=8,
        relative_bias="H",
        causal=True,
        sink=True,
    ),
)
SCORES = OpSpec(
    name="l1_scores",
    room="l1",
    private="l1_scores",
    linear_backward=True,
    results=("out",),
    ops=(torch.ops.attn.l1_scores,),
    function=attn_ops.l1_scores,
    formula=formula.l1_scores,
    magnitudes=formula.magnitudes_of_scores,
    build=build_scores,
    drawn=partial(strategies.cases, options()),
    resized=strategies.resized,
    differentiable=("query", "key"),
    cases=COMMON | {"everything": Case(heads=4, queries=6, keys=9, options=INVERSE)},
    long=None,
)
SPECS = (L1, SCORES, SPARSE)
