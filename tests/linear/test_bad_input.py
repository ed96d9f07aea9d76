"""Wrong shapes, dtypes and devices drawn at random: an error that names itself, or a right result.

Neither a crash nor a silent result, whatever is drawn.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.conformance.evaluate import assert_arguments_agree
from tests.conformance.spec import OpSpec
from tests.errors import ERRORS, spoilt
from tests.linear.spec import LINEAR, SPECS

every_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)


@st.composite
def spoilt_arguments(draw: st.DrawFn, spec: OpSpec) -> dict[str, Any]:
    """Legal arguments of which some were spoilt, and some options drawn without regard to them."""
    case = draw(spec.drawn(largest=6))
    arguments = spec.build(case, torch.float32, torch.device("cpu"))
    tensors = [name for name, x in arguments.items() if isinstance(x, Tensor)]
    for name in draw(st.lists(st.sampled_from(tensors), min_size=1, max_size=2, unique=True)):
        arguments[name] = draw(spoilt(arguments[name]))
    wild = {
        "eps": st.sampled_from((float("nan"), float("inf"), 1e300, 0.5, -1.0)),
        "feature_map": st.sampled_from(("exp", "softplus", "taylor", "")),
        "normalize": st.just(False),
        "mask": st.none(),
        "decay": st.just(torch.full((case.heads,), 0.5)),
    }
    if spec is LINEAR:
        wild |= {"causal": st.booleans(), "cu_seqlens": st.none()}
    for name in draw(st.lists(st.sampled_from(sorted(wild)), max_size=1, unique=True)):
        arguments[name] = draw(wild[name])
    # What is left of signed inputs may cancel out, where no tolerance holds.
    if arguments.get("normalize", True) and arguments.get("feature_map") == "identity":
        arguments["feature_map"] = "softplus"
    return arguments


@every_spec
def test_an_error_that_names_itself_or_a_right_result(spec: OpSpec) -> None:
    @settings(max_examples=250)
    @given(spoilt_arguments(spec))
    def check(arguments: dict[str, Any]) -> None:
        try:
            out, *_ = spec.run(**arguments)
        except ERRORS as error:
            assert str(error).startswith(f"{spec.name}: "), error
            assert " must " in str(error) and "got " in str(error), error
            return
        if out.device.type == "meta":
            return
        assert all(x.device == out.device for x in spec.floating(arguments).values())
        assert_arguments_agree(spec, arguments)

    check()


@every_spec
def test_errors_are_drawn_as_well_as_results(spec: OpSpec) -> None:
    """Or the test above would show nothing."""
    outcomes = []

    @settings(max_examples=100, derandomize=True)
    @given(spoilt_arguments(spec))
    def collect(arguments: dict[str, Any]) -> None:
        try:
            spec.run(**arguments)
            outcomes.append("result")
        except ERRORS as error:
            outcomes.append(str(error).split(": ")[1].split(" must")[0])

    collect()
    assert outcomes.count("result") >= 10
    assert len(set(outcomes)) >= 6
