"""The linear ops, as the conformance suite sees them."""

from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st

import attn_ops
from tests import strategies
from tests.conformance.spec import OpSpec
from tests.linear import formula
from tests.linear.formula import FEATURES
from tests.linear.magnitudes import magnitudes
from tests.strategies import STRIDES, Case, Maker

MAPS = ("identity", "elu_plus_one", "relu", "softplus", "taylor")
DECAYS = (1.0, 0.984375, 0.9375, 0.75, 0.5, 0.125)  # numbers that 16 bits hold


def decay_of(make: Maker) -> torch.Tensor:
    case = make.case
    drawn = torch.randint(len(DECAYS), (case.heads,), generator=make.generator)
    dtype = strategies.compute_dtype(make.dtype) if case.wide_parameters else make.dtype
    return torch.tensor(DECAYS)[drawn].to(make.device, dtype)


def build(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Arguments of `attn::linear`."""
    args, make = strategies.build(case, dtype, device)
    if case.sequences is not None:
        args["cu_seqlens"] = args.pop("cu_seqlens_q")
        del args["cu_seqlens_k"]
    options = dict(case.options)
    if options.pop("decay", False):
        args["decay"] = decay_of(make)
    return args | {name: x for name, x in options.items() if name != "state"}


def build_with_state(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Arguments of `attn::linear_with_state`, which is causal."""
    args = build(case, dtype, device)
    del args["causal"]
    if case.options.get("state"):
        sums = strategies.compute_dtype(dtype)
        make = Maker(case.but(seed=case.seed + 100), sums, device)
        rows = (case.batch,) if case.layout == "merged" else (case.batch, case.heads)
        features = FEATURES[case.options.get("feature_map", "identity")]
        # The features of a key before: what it is divided by does not cancel out.
        key = make.normal(*rows, case.width, positive=True).double()
        args["key_sum"] = features(key).float().to(sums)  # one and the same in every dtype
        sizes = (*args["key_sum"].shape, case.value_width)
        args["state"] = make.normal(*sizes, strides=case.strides)
    return args


def resized(case: Case, queries: int, keys: int, batch: int) -> Case:
    """The case at other sizes; causal and packed ones have as many queries as keys."""
    tied = case.causal or case.sequences is not None
    return strategies.resized(case, keys if tied else queries, keys, batch)


@st.composite
def drawn(draw: st.DrawFn, with_state: bool = False, smallest: int = 0, largest: int = 12) -> Case:
    """Legal calls. Where they are divided, what they are divided by is a sum of one sign."""
    layout = draw(st.sampled_from(("BHMD", "BHMD", "BND", "merged")))
    kv_heads = 1 if layout != "BHMD" else draw(st.integers(1, 2))
    causal = with_state or draw(st.booleans())
    normalize, feature_map = draw(st.booleans()), draw(st.sampled_from(MAPS))
    options = {
        "normalize": normalize,
        "eps": draw(st.sampled_from((1e-5, 0.0, 0.25))),
        "feature_map": feature_map,
        "decay": causal and draw(st.booleans()),
        "state": with_state and draw(st.booleans()),
    }
    case = Case(
        batch=draw(st.integers(smallest, 2)),
        heads=1 if layout == "merged" else kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        width=draw(st.integers(1, 5)),
        value_width=draw(st.integers(1, 9)),
        layout=layout,
        strides=draw(st.sampled_from(STRIDES)),
        mask=draw(st.sampled_from((None, "BN"))),
        causal=causal,
        positive=normalize and feature_map == "identity" or draw(st.booleans()),
        wide_parameters=draw(st.booleans()),
        options=options,
        seed=draw(st.integers(0, 99)),
    )
    if not with_state and draw(st.integers(0, 3)) == 0:
        return draw(packed(case, smallest))
    keys = draw(st.integers(smallest, largest))
    return case.but(keys=keys, queries=keys if causal else draw(st.integers(smallest, largest)))


@st.composite
def packed(draw: st.DrawFn, case: Case, smallest: int) -> Case:
    lengths = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    total = sum(lengths) + draw(st.integers(smallest, 2))
    return case.but(
        batch=1,
        queries=total,
        keys=total,
        sequences=tuple((length, length) for length in lengths),
        offsets=draw(st.sampled_from((torch.int32, torch.int64))),
    )


POSITIVE = Case(positive=True)
CAUSAL = POSITIVE.but(queries=9, keys=9, causal=True)
PACKED = POSITIVE.but(batch=1, queries=15, keys=15, sequences=((3, 3), (0, 0), (6, 6), (4, 4)))
SIGNED = Case(options={"normalize": False})
EVERYTHING = Case(
    heads=4,
    queries=9,
    keys=9,
    width=4,
    mask="BN",
    causal=True,
    options={"decay": True, "eps": 0.25, "feature_map": "taylor"},
)
# Of both ops; those of linear_with_state are made causal.
COMMON = {
    "plain": POSITIVE,
    "transposed": POSITIVE.but(strides="transposed"),
    "expanded": POSITIVE.but(strides="expanded"),
    "grouped heads": Case(heads=6, kv_heads=2, options={"feature_map": "elu_plus_one"}),
    "one key head of rank 3": POSITIVE.but(heads=3, kv_heads=1, layout="BND"),
    "merged batch and heads": POSITIVE.but(
        batch=4, heads=1, kv_heads=1, layout="merged", mask="BN"
    ),
    "key mask": POSITIVE.but(mask="BN"),
    "decay": CAUSAL.but(options={"decay": True}),
    "decay in query's dtype": CAUSAL.but(wide_parameters=False, options={"decay": True}),
    "without norms": SIGNED,
    "relu": Case(options={"feature_map": "relu"}),
    "softplus": Case(options={"feature_map": "softplus", "eps": 0.0}),
    "taylor": Case(width=7, options={"feature_map": "taylor", "normalize": False}),
    "odd widths": POSITIVE.but(width=13, value_width=17, queries=33, keys=35),
    "wide": SIGNED.but(width=256, value_width=256),
    "narrow": POSITIVE.but(width=1, value_width=1),
    "longer than a block": POSITIVE.but(batch=1, queries=300, keys=300, width=32, value_width=40),
    "longer than a block, decay": POSITIVE.but(
        batch=1,
        queries=150,
        keys=150,
        width=16,
        value_width=8,
        causal=True,
        options={"decay": True},
    ),
    "everything": EVERYTHING,
}
CASES = COMMON | {
    "causal": CAUSAL,
    "packed": PACKED,
    "packed and causal": PACKED.but(mask="BN", causal=True, options={"decay": True}),
}
CASES_WITH_STATE = {
    name: case.but(causal=True, queries=case.keys) for name, case in COMMON.items()
} | {
    "a state": CAUSAL.but(options={"state": True}),
    "a state, merged": CAUSAL.but(
        heads=1, kv_heads=1, layout="merged", mask="BN", options={"state": True, "decay": True}
    ),
    "a state, without norms": SIGNED.but(
        queries=7, heads=4, causal=True, strides="transposed", options={"state": True}
    ),
    "everything": EVERYTHING.but(options={"state": True}),
}
LONG = Case(
    batch=1,
    heads=1,
    kv_heads=1,
    width=8,
    value_width=8,
    causal=True,
    options={"decay": True, "state": True, "feature_map": "elu_plus_one"},
)
# Zero is a multiple of the number of key heads: their gradients are zeros.
NO_QUERY_HEADS = CAUSAL.but(heads=0, kv_heads=1)

LINEAR = OpSpec(
    name="linear",
    room="linear",
    results=("out",),
    ops=(torch.ops.attn.linear,),
    function=attn_ops.linear_attention,
    formula=formula.linear,
    magnitudes=magnitudes,
    build=build,
    drawn=drawn,
    resized=resized,
    differentiable=("query", "key", "value", "decay"),
    own_backward={"decay": "_linear_grad_decay"},
    cases=CASES,
    long=LONG,
    examples=(NO_QUERY_HEADS,),
)
WITH_STATE = OpSpec(
    name="linear_with_state",
    room="linear",
    results=("out", "final_state", "final_key_sum"),
    ops=(torch.ops.attn.linear_with_state,),
    function=attn_ops.linear_attention_with_state,
    formula=formula.linear_with_state,
    magnitudes=magnitudes,
    build=build_with_state,
    drawn=partial(drawn, with_state=True),
    resized=resized,
    differentiable=("query", "key", "value", "state", "key_sum", "decay"),
    own_backward={"decay": "_linear_grad_decay"},
    cases=CASES_WITH_STATE,
    long=LONG,
    examples=(NO_QUERY_HEADS,),
)
SPECS = (LINEAR, WITH_STATE)
