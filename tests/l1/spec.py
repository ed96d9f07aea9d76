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
from tests.strategies import LAYOUTS, SOFTMAX_LIKE, SOFTMAX_LIKE_LONG, Case


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
INVERSES = {
    "inverse": Case(options=INVERSE),
    "grouped heads": LAYOUTS["grouped heads"].but(options=INVERSE),
}
EVERYTHING = {"everything": SOFTMAX_LIKE["everything"].but(options=INVERSE)}
# Zero is a multiple of zero.
NO_HEADS = Case(heads=0, kv_heads=0)

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
    cases=SOFTMAX_LIKE | INVERSES | EVERYTHING,
    long=SOFTMAX_LIKE_LONG,
    unordered=("cuda",),
    examples=(NO_HEADS,),
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
    cases=LAYOUTS | INVERSES | EVERYTHING,
    long=None,
    unordered=("cuda",),
    examples=(NO_HEADS,),
)
SPECS = (L1, SCORES, SPARSE)
