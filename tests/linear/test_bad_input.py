"""Wrong arguments of linear attention, drawn at random."""

from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from tests import bad_input
from tests.conformance.spec import OpSpec
from tests.linear.spec import LINEAR, SPECS
from tests.strategies import Case

every_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)


def wild_with_state(case: Case) -> dict[str, st.SearchStrategy[Any]]:
    return {
        "eps": st.sampled_from((float("nan"), float("inf"), 1e300, 0.5, -1.0)),
        "feature_map": st.sampled_from(("exp", "softplus", "taylor", "")),
        "normalize": st.just(False),
        "mask": st.none(),
        "decay": st.just(torch.full((case.heads,), 0.5)),
    }


def wild(case: Case) -> dict[str, st.SearchStrategy[Any]]:
    return wild_with_state(case) | {"causal": st.booleans(), "cu_seqlens": st.none()}


def positive(arguments: dict[str, Any]) -> dict[str, Any]:
    """What is left of signed inputs may cancel out, where no tolerance holds."""
    if arguments.get("normalize", True) and arguments.get("feature_map") == "identity":
        arguments["feature_map"] = "softplus"
    return arguments


def drawn(spec: OpSpec) -> bad_input.Arguments:
    options = wild if spec is LINEAR else wild_with_state
    return bad_input.spoilt_arguments(spec, options).map(positive)


@every_spec
def test_an_error_that_names_itself_or_a_right_result(spec: OpSpec) -> None:
    bad_input.assert_errors_name_themselves_and_results_are_right(spec, drawn(spec), 250)


@every_spec
def test_errors_are_drawn_as_well_as_results(spec: OpSpec) -> None:
    bad_input.assert_errors_are_drawn_as_well_as_results(spec, drawn(spec), 6)
