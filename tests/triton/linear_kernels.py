"""The Triton kernels of linear attention against the formula in float64; see kernels.py."""

import os

import pytest
import torch

from attn_ops import _library
from tests.conformance.evaluate import assert_agrees
from tests.conformance.spec import OpSpec
from tests.conftest import DEVICE
from tests.linear.spec import CAUSAL, LINEAR, PACKED, POSITIVE, WITH_STATE
from tests.strategies import Case

kernels = _library.triton_room("linear")
if DEVICE == "cpu":
    assert os.environ["TRITON_INTERPRET"] == "1" and not _library.loaded_libraries
    _library.implement("_linear_fwd", kernels.forward, "CPU")
    _library.implement("_linear_bwd", kernels.backward, "CPU")
    _library.implement("_linear_step", kernels.step, "CPU")

ONE = POSITIVE.but(batch=1, heads=1, kv_heads=1, width=16, value_width=16)
LONG = ONE.but(queries=100, keys=100, causal=True)
TAYLOR = {"feature_map": "taylor", "decay": True}
# What the named cases of the specification leave out: more than one chunk, in all combinations.
CHUNKS = {
    "chunks": LONG,
    "chunks, not divided": LONG.but(options={"normalize": False, "decay": True}),
    "chunks, masked": LONG.but(mask="BN", options={"feature_map": "softplus", "decay": True}),
    "chunks, grouped": LONG.but(batch=2, heads=4, kv_heads=2, strides="transposed"),
    "chunks, taylor": LONG.but(value_width=40, mask="BN", options=TAYLOR),
    "even chunks": LONG.but(queries=128, keys=128, options={"feature_map": "elu_plus_one"}),
    "chunks, not causal": LONG.but(causal=False, queries=70, mask="BN"),
    "parts of value columns": LONG.but(width=24, value_width=80, options={"decay": True}),
    "chunks of packed sequences": PACKED.but(
        queries=160, keys=160, causal=True, sequences=((70, 70), (0, 0), (33, 33), (50, 50)),
        heads=2, options={"decay": True},
    ),
    "packed, not causal": PACKED.but(
        queries=100, keys=100, sequences=((33, 33), (0, 0), (50, 50)), mask="BN"
    ),
}  # fmt: skip
WITH = {"state": True, "decay": True}
STATES = {
    "a state and chunks": LONG.but(heads=2, kv_heads=2, options=WITH),
    "a state, not divided": LONG.but(options=WITH | {"normalize": False}),
}
CASES = [(LINEAR, n, c) for n, c in (LINEAR.cases | CHUNKS).items()]
CASES += [(WITH_STATE, n, c) for n, c in (WITH_STATE.cases | STATES).items() if "state" in n]
SHORT = torch.float16 if DEVICE == "cpu" else torch.bfloat16


@pytest.fixture(params=CASES, ids=[f"{spec.name}-{name}" for spec, name, _ in CASES])
def asked(request: pytest.FixtureRequest) -> tuple[OpSpec, Case]:
    return request.param[0], request.param[2]


def test_kernels_agree_with_the_formula(asked: tuple[OpSpec, Case], device: torch.device) -> None:
    assert_agrees(*asked, torch.float32, device)


@pytest.mark.parametrize("name", ("chunks", "chunks, masked", "chunks, taylor"))
def test_kernels_agree_in_16_bits(name: str, device: torch.device) -> None:
    assert_agrees(LINEAR, CHUNKS[name], SHORT, device)


@pytest.mark.parametrize("name", ("chunks", "chunks, masked", "chunks, not causal", "a state"))
def test_segments_agree_with_the_formula(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences are cut where there are few heads; here always."""
    from attn_ops.linear import triton_problem

    monkeypatch.setattr(triton_problem, "num_segments", lambda *sizes: 3)
    spec, case = (
        (LINEAR, CHUNKS[name]) if name in CHUNKS else (WITH_STATE, STATES["a state and chunks"])
    )
    assert_agrees(
        spec, case.but(queries=190 - 20 * (not case.causal), keys=190), torch.float32, device
    )


@pytest.mark.parametrize("name", ("chunks", "chunks, masked", "even chunks"))
def test_tiles_by_descriptors_agree_with_the_formula(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Hopper tiles come through tensor descriptors, elsewhere through pointers."""
    from attn_ops._triton import descriptors

    monkeypatch.setattr(descriptors, "has_descriptors", lambda device: True)
    assert_agrees(LINEAR, CHUNKS[name].but(strides="transposed"), torch.float32, device)


@pytest.mark.parametrize("feature_map", ("identity", "softplus", "taylor"))
def test_step_is_the_last_row_of_the_march(feature_map: str, device: torch.device) -> None:
    case = CAUSAL.but(heads=4, kv_heads=2, options=WITH | {"feature_map": feature_map})
    arguments = WITH_STATE.build(case, torch.float32, device)
    last = {n: arguments[n][:, :, -1:] for n in ("query", "key", "value")}
    before = {n: arguments[n][:, :, :-1] for n in ("query", "key", "value")}
    out, *after = WITH_STATE.run(**arguments)
    _, *states = WITH_STATE.run(**(arguments | before))
    options = {
        n: arguments[n] for n in ("decay", "feature_map", "normalize", "eps") if n in arguments
    }
    one = torch.ops.attn.linear_step(**last, state=states[0], key_sum=states[1], **options)
    torch.testing.assert_close(one, out[:, :, -1:])
    for state, expected in zip(states, after):
        torch.testing.assert_close(state, expected)
