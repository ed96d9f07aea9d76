"""The cosine-sim op, as the conformance suite sees it."""

from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st

import attn_ops
from tests import strategies
from tests.conformance.spec import OpSpec
from tests.cosine_sim.formula import formula, magnitudes
from tests.strategies import Case

SWIN = 100.0  # the largest temperature of Swin Transformer V2


def build(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    args, make = strategies.build(case, dtype, device)
    options = dict(case.options)
    heads = {"query_gain": case.heads, "key_gain": case.kv_heads}
    for name, count in heads.items():
        shape = options.pop(name, None)
        if shape is not None:
            args[name] = make.parameter(*((case.width,) if shape == "D" else (count, case.width)))
    if options.pop("head_scale", False):
        args["head_scale"] = make.parameter(case.heads)
    return args | options


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    drawn: dict[str, Any] = {"scale": draw(st.sampled_from((8.0, 1.0, 0.0, -3.0, 30.0)))}
    drawn["head_scale"] = draw(st.booleans())
    drawn["groups"] = draw(st.sampled_from((1, 1, 2, 4)))
    if draw(st.integers(0, 3)) == 0:
        return drawn | {"normalize": False, "scale": 0.5}
    gains = st.sampled_from((None, "D", "HD"))
    return drawn | {"query_gain": draw(gains), "key_gain": draw(gains)}


PACKED = ((3, 3), (0, 2), (4, 1), (2, 5), (5, 0))
CASES = {
    "plain": Case(),
    "transposed": Case(strides="transposed"),
    "expanded": Case(strides="expanded"),
    "grouped heads": Case(heads=6, kv_heads=2, options={"head_scale": True}),
    "one key head of rank 3": Case(heads=3, kv_heads=1, layout="BND", bias="HMN"),
    "merged batch and heads": Case(
        batch=4, heads=1, kv_heads=1, layout="merged", mask="BN", bias="HMN"
    ),
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
    "gains and groups": Case(options={"groups": 2, "query_gain": "HD", "key_gain": "D"}),
    "without norms": Case(options={"normalize": False, "scale": 0.35}),
    "odd widths": Case(width=13, value_width=17, queries=33, keys=35),
    "wide": Case(width=256, value_width=256),
    "narrow": Case(width=1, value_width=1),
    "longer than a block": Case(batch=1, queries=70, keys=150, width=32, value_width=40),
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
        options={
            "scale": 5.0,
            "groups": 2,
            "head_scale": True,
            "query_gain": "HD",
            "key_gain": "D",
        },
    ),
}

SPEC = OpSpec(
    name="cosine_sim",
    room="cosine_sim",
    results=("out", "lse"),
    ops=(torch.ops.attn.cosine_sim_with_lse, torch.ops.attn.cosine_sim),
    function=attn_ops.cosine_sim_attention,
    formula=formula,
    magnitudes=magnitudes,
    build=build,
    drawn=partial(strategies.cases, options()),
    resized=strategies.resized,
    differentiable=(
        "query",
        "key",
        "value",
        "bias",
        "relative_bias",
        "head_scale",
        "query_gain",
        "key_gain",
        "sink",
    ),
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
    examples=(
        # The diagonals of no scores: there are none of them, not -1.
        Case(batch=1, queries=0, keys=0, relative_bias="H", sequences=((0, 0),), causal=True),
        Case(queries=0, keys=0, relative_bias="1"),
    ),
)
SPECS = (SPEC,)
