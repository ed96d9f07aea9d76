"""Wrong arguments of L1 attention and of its scores, drawn at random."""

from typing import Any

import pytest
from hypothesis import strategies as st

from tests import bad_input
from tests.conformance.spec import OpSpec
from tests.l1.spec import L1, SCORES
from tests.strategies import Case


def wild_scores(case: Case) -> dict[str, st.SearchStrategy[Any]]:
    return {
        "scale": st.sampled_from((float("nan"), float("inf"), 1e300, 40.0, 0.0, -2.0)),
        "score": st.sampled_from(("positive", "")),
        "eps": st.sampled_from((float("nan"), float("inf"), 0.0, -1.0, 0.5)),
    }


def wild(case: Case) -> dict[str, st.SearchStrategy[Any]]:
    return bad_input.shared_options(case) | wild_scores(case)


DRAWN = bad_input.spoilt_arguments(L1, wild)
DRAWN_SCORES = bad_input.spoilt_arguments(SCORES, wild_scores)


@pytest.mark.parametrize(
    ("spec", "drawn"), ((L1, DRAWN), (SCORES, DRAWN_SCORES)), ids=("l1", "l1_scores")
)
def test_an_error_that_names_itself_or_a_right_result(
    spec: OpSpec, drawn: bad_input.Arguments
) -> None:
    bad_input.assert_errors_name_themselves_and_results_are_right(spec, drawn, 250)


def test_errors_are_drawn_as_well_as_results() -> None:
    bad_input.assert_errors_are_drawn_as_well_as_results(L1, DRAWN, 6)
    bad_input.assert_errors_are_drawn_as_well_as_results(SCORES, DRAWN_SCORES, 4)
