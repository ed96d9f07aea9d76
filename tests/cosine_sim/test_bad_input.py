"""Wrong shapes, dtypes and devices drawn at random: an error that names itself, or a right result.

Neither a crash nor a silent result, whatever is drawn.
"""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.conformance.evaluate import assert_arguments_agree
from tests.cosine_sim.spec import SPEC, build
from tests.errors import ERRORS, spoilt
from tests.strategies import Case


@st.composite
def spoilt_arguments(draw: st.DrawFn) -> dict[str, Any]:
    """Legal arguments of which some were spoilt, and some options drawn without regard to them."""
    case = draw(SPEC.drawn(largest=6))
    arguments = build(case, torch.float32, torch.device("cpu"))
    tensors = [name for name, x in arguments.items() if isinstance(x, Tensor)]
    for name in draw(st.lists(st.sampled_from(tensors), min_size=1, max_size=2, unique=True)):
        arguments[name] = draw(spoilt(arguments[name]))
    wild = {
        "scale": st.sampled_from((float("nan"), float("inf"), 1e300, 1e4, 0.0, -2.0)),
        "groups": st.integers(-2, 7),
        "window": st.integers(-2, 9),
        "causal": st.booleans(),
        "normalize": st.booleans(),
        "mask": st.none(),
        "key_gain": st.just(torch.ones(case.width)),
        "cu_seqlens_q": st.none(),
        "sink": st.just(torch.ones(case.heads)),
    }
    for name in draw(st.lists(st.sampled_from(sorted(wild)), max_size=1, unique=True)):
        arguments[name] = draw(wild[name])
    return arguments


@settings(max_examples=600)
@given(spoilt_arguments())
def test_an_error_that_names_itself_or_a_right_result(arguments: dict[str, Any]) -> None:
    try:
        out, lse = SPEC.run(**arguments)
    except ERRORS as error:
        assert str(error).startswith("cosine_sim_with_lse: "), error
        assert " must " in str(error) and "got " in str(error), error
        return
    if out.device.type == "meta":
        return
    floating = SPEC.floating(arguments).values()
    assert all(x.device == out.device for x in floating)
    assert_arguments_agree(SPEC, arguments)


def test_errors_are_drawn_as_well_as_results() -> None:
    """Or the test above would show nothing."""
    outcomes = []

    @settings(max_examples=100, derandomize=True)
    @given(spoilt_arguments())
    def collect(arguments: dict[str, Any]) -> None:
        try:
            SPEC.run(**arguments)
            outcomes.append("result")
        except ERRORS as error:
            outcomes.append(str(error).split(": ")[1].split(" must")[0])

    collect()
    assert outcomes.count("result") >= 10
    assert len(set(outcomes)) >= 6


def test_a_legal_case_is_no_error() -> None:
    assert SPEC.out(**build(Case(), torch.float32, torch.device("cpu"))).shape == (2, 2, 5, 6)
