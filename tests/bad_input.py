"""Wrong shapes, dtypes and devices drawn at random: an error that names itself, or a right result.

Neither a crash nor a silent result, whatever is drawn.
"""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.conformance.evaluate import assert_arguments_agree
from tests.conformance.spec import OpSpec
from tests.errors import ERRORS, spoilt
from tests.strategies import Case

# The op's own options, drawn without regard to the other arguments.
Wild = Callable[[Case], dict[str, st.SearchStrategy[Any]]]
Arguments = st.SearchStrategy[dict[str, Any]]


def shared_options(case: Case) -> dict[str, st.SearchStrategy[Any]]:
    """Those of every op with a softmax."""
    return {
        "window": st.integers(-2, 9),
        "causal": st.booleans(),
        "mask": st.none(),
        "cu_seqlens_q": st.none(),
        "sink": st.just(torch.ones(case.heads)),
    }


@st.composite
def spoilt_arguments(draw: st.DrawFn, spec: OpSpec, wild: Wild) -> dict[str, Any]:
    """Legal arguments of which some were spoilt, and some options drawn at random."""
    case = draw(spec.drawn(largest=6))
    arguments = spec.build(case, torch.float32, torch.device("cpu"))
    tensors = [name for name, x in arguments.items() if isinstance(x, Tensor)]
    for name in draw(st.lists(st.sampled_from(tensors), min_size=1, max_size=2, unique=True)):
        arguments[name] = draw(spoilt(arguments[name]))
    options = wild(case)
    for name in draw(st.lists(st.sampled_from(sorted(options)), max_size=1, unique=True)):
        arguments[name] = draw(options[name])
    return arguments


def assert_errors_name_themselves_and_results_are_right(
    spec: OpSpec, drawn: Arguments, examples: int
) -> None:
    @settings(max_examples=examples)
    @given(drawn)
    def check(arguments: dict[str, Any]) -> None:
        try:
            out, *_ = spec.run(**arguments)
        except ERRORS as error:
            assert str(error).startswith(f"{spec.ops[0].__name__}: "), error
            assert " must " in str(error) and "got " in str(error), error
            return
        if out.device.type == "meta":
            return
        assert all(x.device == out.device for x in spec.floating(arguments).values())
        assert_arguments_agree(spec, arguments)

    check()


def assert_errors_are_drawn_as_well_as_results(spec: OpSpec, drawn: Arguments, kinds: int) -> None:
    """Or the test above would show nothing. kinds: of outcomes, a result and wrong arguments."""
    outcomes = []

    @settings(max_examples=100, derandomize=True)
    @given(drawn)
    def collect(arguments: dict[str, Any]) -> None:
        try:
            spec.run(**arguments)
            outcomes.append("result")
        except ERRORS as error:
            outcomes.append(str(error).split(": ")[1].split(" must")[0])

    collect()
    assert outcomes.count("result") >= 10
    assert len(set(outcomes)) >= kinds
