"""Results and every gradient, in every dtype, against the formula in float64."""

import pytest
import torch

from tests.conformance.evaluate import DTYPES, assert_agrees
from tests.conformance.spec import OpSpec, as_tuple, given_case
from tests.strategies import Case


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_named_case_agrees_with_the_formula(
    spec: OpSpec, named: str, dtype: torch.dtype, device: torch.device
) -> None:
    assert_agrees(spec, spec.cases[named], dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_drawn_case_agrees_with_the_formula(
    spec: OpSpec, dtype: torch.dtype, device: torch.device
) -> None:
    @given_case(lambda spec: spec.drawn(), max_examples=60)
    def check(spec: OpSpec, device: torch.device, case: Case) -> None:
        assert_agrees(spec, case, dtype, device)

    check(spec, device)


def test_python_function_returns_what_the_op_returns(
    spec: OpSpec, named: str, device: torch.device
) -> None:
    """Bit by bit: all of it, or `out` alone."""
    arguments = spec.build(spec.cases[named], torch.float32, device)
    results = as_tuple(spec.function(**arguments))
    assert len(results) in (1, len(spec.results))
    for name, actual, expected in zip(spec.results, results, spec.run(**arguments)):
        assert torch.equal(actual, expected), name
