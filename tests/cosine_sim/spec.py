"""The cosine-sim op, as the conformance suite sees it."""

from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st

import attn_ops
from tests import strategies
from tests.conformance.spec import OpSpec
from tests.cosine_sim.formula import formula, magnitudes
from tests.strategies import SOFTMAX_LIKE, SOFTMAX_LIKE_LONG, Case

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


CASES = SOFTMAX_LIKE | {
    "grouped heads": SOFTMAX_LIKE["grouped heads"].but(options={"head_scale": True}),
    "gains and groups": Case(options={"groups": 2, "query_gain": "HD", "key_gain": "D"}),
    "without norms": Case(options={"normalize": False, "scale": 0.35}),
    "everything": SOFTMAX_LIKE["everything"].but(
        options={
            "scale": 5.0,
            "groups": 2,
            "head_scale": True,
            "query_gain": "HD",
            "key_gain": "D",
        }
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
    long=SOFTMAX_LIKE_LONG,
    unordered=("cuda",),  # on Hopper, of 16 bits
    examples=(
        # The diagonals of no scores: there are none of them, not -1.
        Case(batch=1, queries=0, keys=0, relative_bias="H", sequences=((0, 0),), causal=True),
        Case(queries=0, keys=0, relative_bias="1"),
    ),
)
SPECS = (SPEC,)
