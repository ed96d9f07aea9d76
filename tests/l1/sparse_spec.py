"""The sparse L1 op, as the conformance suite sees it."""

from typing import Any

import torch
from hypothesis import strategies as st

import attn_ops
from tests import strategies
from tests.conformance.spec import OpSpec
from tests.l1 import sparse_formula
from tests.strategies import STRIDES, Case

# Numbers of edges: so many, all pairs in a random order, or most of them at one query and one key.
DENSE, HUB = "all pairs", "hub"


def edges_of(case: Case, generator: torch.Generator) -> torch.Tensor:
    """[L, 2]; without queries or keys there are no edges."""
    m, n = case.queries, case.keys
    count = case.options.get("edges", 11)
    if count == DENSE:
        return torch.cartesian_prod(torch.arange(m), torch.arange(n))[
            torch.randperm(m * n, generator=generator)
        ]
    hub, count = count == HUB, 6 * (m + n) if count == HUB else count
    if m == 0 or n == 0:
        count = 0
    ends = [torch.randint(max(size, 1), (count,), generator=generator) for size in (m, n)]
    if hub:  # a third of all edges each, and twice the same edge
        ends[0][: count // 3] = m // 2
        ends[1][-(count // 3) :] = n // 2
    return torch.stack(ends, 1)


def build(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Away from ties, where the distance has no derivative."""
    args, make = strategies.build(case.but(apart=True), dtype, device)
    options = dict(case.options)
    args["edges"] = edges_of(case, make.generator).to(
        device, torch.int32 if options.pop("int32", False) else torch.int64
    )
    options.pop("edges", None)
    if options.pop("value_reverse", False):
        args["value_reverse"] = make.normal(*args["value"].shape, strides=case.strides)
    return args | options


def resized(case: Case, queries: int, keys: int, batch: int) -> Case:
    """At other sizes; value_reverse needs as many queries as keys."""
    count = queries + keys - 1
    if case.options.get("value_reverse"):
        queries = keys
    return case.but(queries=queries, keys=keys, batch=batch, options={"edges": count})


@st.composite
def drawn(draw: st.DrawFn, smallest: int = 0, largest: int = 12) -> Case:
    """Legal calls."""
    layout = draw(st.sampled_from(("BHMD", "BHMD", "BND", "merged")))
    kv_heads = 1 if layout != "BHMD" else draw(st.integers(1, 2))
    keys = draw(st.integers(smallest, largest))
    reverse = draw(st.booleans())
    return Case(
        batch=draw(st.integers(smallest, 2)),
        heads=1 if layout == "merged" else kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        queries=keys if reverse else draw(st.integers(smallest, largest)),
        keys=keys,
        width=draw(st.integers(1, 5)),
        value_width=draw(st.integers(1, 9)),
        layout=layout,
        strides=draw(st.sampled_from(STRIDES)),
        options={
            "edges": draw(st.sampled_from((0, 1, 7, 30, DENSE, HUB))),
            "int32": draw(st.booleans()),
            "value_reverse": reverse,
            "softmax": draw(st.booleans()),
            "sink": draw(st.booleans()),
            "scale": draw(st.sampled_from((1.0, 0.25, 0.0, -0.5))),
        },
        seed=draw(st.integers(0, 99)),
    )


BOTH_WAYS = {"value_reverse": True}
CASES = {
    "plain": Case(),
    "transposed": Case(strides="transposed"),
    "expanded": Case(strides="expanded"),
    "all pairs": Case(options={"edges": DENSE}),
    "many times the same edges": Case(queries=2, keys=3, options={"edges": 50, "int32": True}),
    "hub": Case(queries=10, keys=15, options={"edges": HUB}),
    "hub, both ways": Case(queries=12, keys=12, options={"edges": HUB, **BOTH_WAYS}),
    "without sink": Case(options={"sink": False}),
    "without softmax": Case(options={"softmax": False}),
    "both ways": Case(queries=7, options=BOTH_WAYS),
    "grouped heads": Case(heads=6, kv_heads=2, options={"edges": 20}),
    "one key head of rank 3": Case(heads=3, kv_heads=1, layout="BND", queries=7, options=BOTH_WAYS),
    "merged batch and heads": Case(
        batch=4, heads=1, kv_heads=1, layout="merged", queries=7, options=BOTH_WAYS
    ),
    "odd widths": Case(width=13, value_width=17, queries=33, keys=35, options={"edges": 100}),
    "wide": Case(width=256, value_width=256),
    "narrow": Case(width=1, value_width=1),
    "longer than a block": Case(
        batch=1, queries=70, keys=150, width=32, value_width=40, options={"edges": 3000}
    ),
    "everything": Case(
        heads=4,
        kv_heads=2,
        queries=9,
        keys=9,
        options={"edges": 30, "int32": True, "sink": False, "scale": 0.5, **BOTH_WAYS},
    ),
}

SPARSE = OpSpec(
    name="l1_sparse",
    room="l1",
    private="l1_sparse",
    prepares=("_l1_edges",),
    results=("out",),
    ops=(torch.ops.attn.l1_sparse,),
    function=attn_ops.l1_sparse_attention,
    formula=sparse_formula.l1_sparse,
    magnitudes=sparse_formula.magnitudes,
    build=build,
    drawn=drawn,
    resized=resized,
    differentiable=("query", "key", "value", "value_reverse"),
    unordered_twice=("cuda",),  # the formula's index_add is atomic there
    cases=CASES,
    long=Case(
        batch=1, heads=1, kv_heads=1, width=8, value_width=8, options={"scale": 0.5, **BOTH_WAYS}
    ),
)
