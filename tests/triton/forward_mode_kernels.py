"""The Triton kernels of forward mode against the formula in float64; run as kernels.py is."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jvp

from attn_ops import _forward_mode, _library
from attn_ops.cosine_sim import in_blocks
from tests.comparison import assert_tangent_close, compute_dtype
from tests.conformance.capture import Calls
from tests.conformance.evaluate import in_dtype
from tests.conformance.test_forward_mode import tangents_of
from tests.conftest import DEVICE
from tests.cosine_sim.spec import SPEC
from tests.strategies import Case
from tests.triton import kernels

if DEVICE == "cpu":
    assert os.environ["TRITON_INTERPRET"] == "1" and not _library.loaded_libraries
    _kernels = _library.triton_room("cosine_sim", "triton_jvp")
    _library.implement("_cosine_sim_jvp", _kernels.jvp, "CPU")
    _library.implement("_cosine_sim_unit_jvp", _kernels.unit_jvp, "CPU")

OP = torch.ops.attn._cosine_sim_jvp.default
UNIT = torch.ops.attn._cosine_sim_unit_jvp.default
CASES = SPEC.cases | kernels.LONG
ALL = [(name, case, torch.float32) for name, case in CASES.items()]
ALL += [(name, CASES[name], kernels.SHORT) for name in ("plain", "sink", "wide", "everything")]
if DEVICE == "cuda":
    ALL += [(name, CASES[name], torch.float16) for name in ("plain", "everything")]


def tangents(arguments: dict[str, Any], function: Any, names: list[str]) -> tuple[Tensor, ...]:
    """Those of the results, where these arguments have one, equal for all dtypes."""
    inputs = tuple(arguments[name].contiguous() for name in names)

    def of_these(*values: Tensor) -> Any:
        return function(**(arguments | dict(zip(names, values))))

    result: tuple[Tensor, ...] = jvp(of_these, inputs, tangents_of(inputs))[1]
    return result


def assert_tangents_agree(arguments: dict[str, Any], names: list[str]) -> None:
    """As exact as the formula in the same dtype, but for a factor of two and a rounding."""
    dtype = arguments["query"].dtype
    with Calls() as calls:
        actual = tangents(arguments, SPEC.run, names)
    assert OP in [call.op for call in calls.calls]
    exact = tangents(in_dtype(arguments, torch.float64), SPEC.formula, names)
    same_dtype = tangents(arguments, SPEC.formula, names)
    for name, result, of_formula, truth in zip(SPEC.results, actual, same_dtype, exact):
        assert result.dtype == (dtype if name == "out" else compute_dtype(dtype))
        assert_tangent_close(name, result, of_formula, truth, result.dtype)


@pytest.mark.parametrize(
    ("case", "dtype"), [c[1:] for c in ALL], ids=[f"{c[0]}-{c[2]}" for c in ALL]
)
def test_tangents_agree_with_the_formula(
    case: Case, dtype: torch.dtype, device: torch.device
) -> None:
    arguments = SPEC.build(case, dtype, device)
    assert_tangents_agree(arguments, list(SPEC.floating(arguments)))


@pytest.mark.parametrize("name", ("query", "key", "value", "bias", "relative_bias", "sink"))
def test_one_argument_alone_has_a_tangent(name: str, device: torch.device) -> None:
    arguments = SPEC.build(SPEC.cases["everything"], torch.float32, device)
    assert_tangents_agree(arguments, [name])


@pytest.mark.parametrize("name", kernels.DESCRIBED)
def test_tiles_by_descriptors_agree_with_the_formula(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attn_ops._triton import descriptors

    monkeypatch.setattr(descriptors, "has_descriptors", lambda device: True)
    arguments = SPEC.build(kernels.DESCRIBED[name], kernels.SHORT, device)
    assert_tangents_agree(arguments, list(SPEC.floating(arguments)))


@pytest.mark.parametrize("name", ("plain", "transposed", "slices", "odd widths", "window"))
def test_norms_by_kernels_agree_with_the_formula(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_blocks, "kernels_serve", lambda x: x.dtype == torch.float32)
    arguments = SPEC.build((CASES | kernels.DESCRIBED)[name], torch.float32, device)
    with Calls() as calls:
        assert_tangents_agree(arguments, ["query", "key"])
    assert [call.op for call in calls.calls].count(UNIT) == 2


def test_blocks_of_queries_change_nothing(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slices of results of the forward are no contiguous tensors."""
    monkeypatch.setattr(_forward_mode, "SCORES_ON_CPU", 8)
    monkeypatch.setattr(_forward_mode, "SCORES_ELSEWHERE", 8)
    monkeypatch.setattr(_forward_mode, "RECORDED", 3)
    monkeypatch.setattr(_forward_mode, "FEWEST_QUERIES", 1)
    arguments = SPEC.build(SPEC.cases["everything"], torch.float32, device)
    arguments["query"].requires_grad_()  # else there is one block
    with Calls() as calls:
        assert_tangents_agree(arguments, list(SPEC.floating(arguments)))
    assert [call.op for call in calls.calls].count(OP) > 1


def test_results_are_the_same_from_run_to_run(device: torch.device) -> None:
    arguments = SPEC.build(kernels.LONG["blocks of every kind"], torch.float32, device)
    names = list(SPEC.floating(arguments))
    for first, again in zip(*(tangents(arguments, SPEC.run, names) for _ in range(2))):
        assert torch.equal(first, again)
