"""Wrong arguments of cosine-sim attention, drawn at random."""

from typing import Any

import torch
from hypothesis import strategies as st

from tests import bad_input
from tests.cosine_sim.spec import SPEC
from tests.strategies import Case


def wild(case: Case) -> dict[str, st.SearchStrategy[Any]]:
    return bad_input.shared_options(case) | {
        "scale": st.sampled_from((float("nan"), float("inf"), 1e300, 1e4, 0.0, -2.0)),
        "groups": st.integers(-2, 7),
        "normalize": st.booleans(),
        "key_gain": st.just(torch.ones(case.width)),
    }


DRAWN = bad_input.spoilt_arguments(SPEC, wild)


def test_an_error_that_names_itself_or_a_right_result() -> None:
    bad_input.assert_errors_name_themselves_and_results_are_right(SPEC, DRAWN, 600)


def test_errors_are_drawn_as_well_as_results() -> None:
    bad_input.assert_errors_are_drawn_as_well_as_results(SPEC, DRAWN, 6)
