"""The Triton kernels against the formula in float64.

Run by test_kernels.py in a process of its own, where there is no GPU by Triton's interpreter. Then
bfloat16 is left out: the interpreter's dot product of it is silently wrong.
"""

import os
from typing import Any

import numpy as np
import pytest
import torch
import triton
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from attn_ops import _library
from tests.conformance.evaluate import assert_agrees, assert_arguments_agree
from tests.conftest import DEVICE
from tests.cosine_sim.spec import SPEC
from tests.strategies import Case

if DEVICE == "cpu":
    assert os.environ["TRITON_INTERPRET"] == "1" and not _library.loaded_libraries
    _kernels = _library.triton_room("cosine_sim")
    _library.implement("_cosine_sim_fwd", _kernels.forward, "CPU")
    _library.implement("_cosine_sim_bwd", _kernels.backward, "CPU")

multiply = InterpreterBuilder.create_dot
ONE = Case(batch=1, heads=1, kv_heads=1, width=16, value_width=16)
# What the small cases of the specification leave out: more than one block in each direction.
LONG = {
    "blocks of every kind": ONE.but(queries=150, keys=280, causal=True, window=130),
    "blocks of packed sequences": ONE.but(
        queries=200, keys=190, sequences=((90, 60), (0, 20), (100, 100)), causal=True
    ),
    "relative bias over blocks": ONE.but(queries=70, keys=100, relative_bias="H", causal=True),
    "relative bias, more queries than keys": ONE.but(queries=90, keys=33, relative_bias="H"),
    "bias of keys over blocks": ONE.but(
        batch=2, heads=2, kv_heads=1, queries=70, keys=66, bias="1H1N"
    ),
    "bias of queries over blocks": ONE.but(batch=2, queries=70, keys=66, bias="BHM1"),
    "grouped heads over blocks": ONE.but(
        heads=4, kv_heads=2, queries=40, keys=70, causal=True, options={"head_scale": True}
    ),
    "a slice per element": ONE.but(options={"groups": 16, "scale": 1.0}),
    "one query": ONE.but(queries=1, keys=300, causal=True),
}
CASES = [(name, case, torch.float32) for name, case in (SPEC.cases | LONG).items()]
# What 16 bits change: rounding, and in float16 the shift of the weights.
SHORT = torch.float16 if DEVICE == "cpu" else torch.bfloat16
CASES += [(name, SPEC.cases[name], SHORT) for name in ("plain", "sink", "wide", "everything")]
# Norms and their gradients are taken inside of the core: the rows of tiles are whole.
DESCRIBED = {
    "blocks of every kind": LONG["blocks of every kind"].but(strides="transposed"),
    "blocks of packed sequences": LONG["blocks of packed sequences"],
    "grouped heads": ONE.but(heads=4, kv_heads=2, queries=70, keys=70, causal=True),
    "slices": ONE.but(queries=70, keys=40, options={"groups": 4}),
    "relative bias over blocks": LONG["relative bias over blocks"],
    "bias": ONE.but(batch=2, heads=2, queries=72, keys=136, bias="1HMN"),
    "causal bias": ONE.but(batch=2, heads=2, queries=80, keys=88, bias="1HMN", causal=True),
    "bias of a head": ONE.but(batch=3, heads=2, kv_heads=1, queries=72, keys=40, bias="11MN"),
    "bias of a batch": ONE.but(batch=2, queries=72, keys=40, bias="BHMN", relative_bias="H"),
    "few queries": ONE.but(heads=4, kv_heads=2, queries=3, keys=1100, causal=True),
}
# Few queries and many keys: spans of keys side by side, the last one short or partly hidden.
DECODE = {
    "one query": (ONE.but(queries=1, keys=1024, width=64), SHORT),
    "some queries of grouped heads": (
        ONE.but(heads=4, kv_heads=1, queries=3, keys=1100, causal=True, strides="transposed"),
        torch.float32,
    ),
    "odd widths": (
        ONE.but(batch=2, queries=16, keys=1500, causal=True, width=13, value_width=70),
        SHORT,
    ),
    "queries that see all keys": (
        ONE.but(heads=4, kv_heads=1, queries=3, keys=1027, options={"scale": -3.0}),
        SHORT,
    ),
}
# float32 as sums of 16-bit terms: unit vectors as two float16, all else as three bfloat16.
SPLIT = {
    "blocks of every kind": LONG["blocks of every kind"],
    "grouped heads": DESCRIBED["grouped heads"].but(value_width=40),
    "a scale too large for a fixed shift": ONE.but(queries=70, keys=70, options={"scale": 100.0}),
    "slices": DESCRIBED["slices"],
    "gains": ONE.but(queries=40, keys=70, options={"query_gain": "HD", "key_gain": "D"}),
    "without norms": ONE.but(queries=40, keys=70, options={"normalize": False, "scale": 0.35}),
}
EXTREME = {
    "a large scale": {"scale": 1e4},
    "slices and a large scale": {"scale": 16.0, "groups": 8},
    "scale zero": {"scale": 0.0},
}


def calls_of(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[Any]:
    """The arguments of the calls of a function that are made from now on."""
    calls: list[Any] = []
    function = getattr(module, name)

    def counted(*args: Any) -> Any:
        calls.append(args)
        return function(*args)

    monkeypatch.setattr(module, name, counted)
    return calls


def dot_of_bfloat16(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    """What the interpreter does, but for operands of bfloat16, of which it multiplies the bits."""
    return multiply(self, *(as_float32(x) for x in (a, b)), *rest)


def as_float32(x: Any) -> Any:
    if x.dtype.scalar != triton.language.bfloat16:
        return x
    wide = (x.data.astype(np.uint32) << 16).view(np.float32)
    return TensorHandle(wide, triton.language.float32)


@pytest.mark.parametrize(
    ("case", "dtype"), [c[1:] for c in CASES], ids=[f"{c[0]}-{c[2]}" for c in CASES]
)
def test_kernels_agree_with_the_formula(
    case: Case, dtype: torch.dtype, device: torch.device
) -> None:
    assert_agrees(SPEC, case, dtype, device)


@pytest.mark.parametrize("name", DESCRIBED)
def test_tiles_by_descriptors_agree_with_the_formula(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Hopper tiles come through tensor descriptors, elsewhere through pointers."""
    from attn_ops._triton import descriptors

    monkeypatch.setattr(descriptors, "has_descriptors", lambda device: True)
    assert_agrees(SPEC, DESCRIBED[name], torch.float16, device)


@pytest.mark.parametrize("causal", (False, True))
def test_tiles_of_diagonals_agree_with_the_formula(
    causal: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Hopper relative_bias comes as the tiles that blocks of scores on a diagonal share."""
    from attn_ops._triton import descriptors
    from attn_ops.cosine_sim import triton_core

    monkeypatch.setattr(descriptors, "has_descriptors", lambda device: True)
    monkeypatch.setattr(triton_core, "FEWEST_ROWS", 1)
    case = ONE.but(batch=2, heads=2, queries=130, keys=200, relative_bias="H", causal=causal)
    assert_agrees(SPEC, case, torch.float16, device)


@pytest.mark.parametrize("name", SPLIT)
def test_products_of_terms_are_as_exact_as_those_of_float32(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Hopper float32 enters the products as sums of 16-bit terms."""
    from attn_ops._triton import descriptors
    from attn_ops.cosine_sim import triton_core

    calls = calls_of(monkeypatch, triton_core, "split")
    if device.type == "cpu":
        monkeypatch.setattr(triton_core, "precision", lambda inputs: "bf16x6")
        monkeypatch.setattr(descriptors, "has_descriptors", lambda device: True)
        monkeypatch.setattr(InterpreterBuilder, "create_dot", dot_of_bfloat16)
    assert_agrees(SPEC, SPLIT[name], torch.float32, device)
    assert calls, "float32 was multiplied otherwise"


@pytest.mark.parametrize("name", DECODE)
def test_sums_over_spans_of_keys_agree_with_the_formula(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attn_ops.cosine_sim import triton_decode

    calls = calls_of(monkeypatch, triton_decode, "forward")
    case, dtype = DECODE[name]
    assert_agrees(SPEC, case, dtype, device)
    assert calls, "another kernel served the call"


@pytest.mark.parametrize("queries", (1, 6))
def test_keys_that_vanish_do_not_attract_queries_in_any_span(
    queries: int, device: torch.device
) -> None:
    """Keys of zeros, keys whose squares are too small for 16 bits, and a query of zeros."""
    case = ONE.but(queries=queries, keys=1100, causal=True)
    arguments = SPEC.build(case, torch.float16, device)
    arguments["query"][..., 0, :] = 0
    arguments["key"][..., :200, :] = 0
    arguments["key"][..., 1000:, :] = 6e-8
    assert_arguments_agree(SPEC, arguments)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("name", EXTREME)
def test_extreme_scales_stay_finite(name: str, dtype: torch.dtype, device: torch.device) -> None:
    arguments = SPEC.build(ONE.but(queries=20, keys=20, options=EXTREME[name]), dtype, device)
    arguments["query"][..., 0, :] = 0
    arguments["key"][..., 0, :] = 6e-8  # the smallest float16: its square is zero there
    assert_arguments_agree(SPEC, arguments)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("value", (100.0, -100.0, -1e4, -torch.inf))
def test_extreme_biases_stay_finite(value: float, dtype: torch.dtype, device: torch.device) -> None:
    arguments = SPEC.build(ONE.but(queries=20, keys=20, bias="11MN"), dtype, device)
    arguments["bias"][..., :10, :] = value
    arguments["bias"][..., 15, 3] = value
    results = assert_arguments_agree(SPEC, arguments)
    assert not any(x.isnan().any() for x in results.values())


def test_row_of_equal_huge_biases_is_an_average(device: torch.device) -> None:
    arguments = SPEC.build(ONE.but(bias="11MN"), torch.float32, device)
    arguments["bias"][:] = torch.finfo(torch.float32).min
    out, _ = SPEC.run(**arguments)
    torch.testing.assert_close(out, arguments["value"].mean(2, keepdim=True).expand_as(out))
