"""A sequence in parts: the state that one call returns continues in the next."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from tests.comparison import assert_close
from tests.conformance.evaluate import DTYPES, cotangents, in_dtype, with_gradients
from tests.linear.spec import CASES_WITH_STATE, WITH_STATE
from tests.strategies import Case

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
CARRIED = ("state", "key_sum")
Function = Callable[..., tuple[Tensor, ...]]


def tokens(arguments: dict[str, Any], first: int, last: int) -> dict[str, Any]:
    """The arguments of these tokens alone."""
    part = {name: arguments[name][..., first:last, :] for name in ("query", "key", "value")}
    if arguments.get("mask") is not None:
        part["mask"] = arguments["mask"][:, first:last]
    return arguments | part


def in_parts(cuts: list[int]) -> Function:
    """`linear_with_state` called once per part, each with what the one before has returned."""

    def function(**arguments: Any) -> tuple[Tensor, ...]:
        carried = {name: arguments.get(name) for name in CARRIED}
        outs = []
        for first, last in zip([0, *cuts], [*cuts, arguments["query"].shape[-2]]):
            out, *states = WITH_STATE.run(**(tokens(arguments, first, last) | carried))
            carried = dict(zip(CARRIED, states))
            outs.append(out)
        return (torch.cat(outs, -2), *carried.values())  # type: ignore[arg-type]

    return function


def assert_like_one_pass(
    function: Function, case: Case, dtype: torch.dtype, device: torch.device, gradients: bool = True
) -> None:
    """Results and gradients are those of the formula for the whole sequence."""
    arguments = WITH_STATE.build(case, dtype, device)
    exact_arguments = in_dtype(arguments, torch.float64)
    grads = cotangents(*WITH_STATE.formula(**exact_arguments))
    exact, same_dtype = (
        with_gradients(WITH_STATE, WITH_STATE.formula, args, *grads)
        for args in (exact_arguments, arguments)
    )
    if gradients:
        actual = with_gradients(WITH_STATE, function, arguments, *grads)
    else:
        actual = dict(zip(WITH_STATE.results, function(**arguments)))
    rounding = WITH_STATE.rounding(dtype, exact_arguments, *grads)
    for name, x in actual.items():
        assert_close(name, x, same_dtype[name], exact[name], rounding)


@st.composite
def split_cases(draw: st.DrawFn) -> tuple[Case, list[int]]:
    case = draw(WITH_STATE.drawn(smallest=1, largest=20))
    cuts = draw(st.lists(st.integers(0, case.queries), max_size=4))
    return case, sorted(cuts)  # equal ones make a part without tokens


@every_dtype
def test_any_split_equals_one_pass(dtype: torch.dtype, device: torch.device) -> None:
    @given(split_cases())
    @example((CASES_WITH_STATE["everything"], [0, 4, 4, 9]))
    @example((CASES_WITH_STATE["longer than a block"], [1, 257]))
    def check(pair: tuple[Case, list[int]]) -> None:
        case, cuts = pair
        assert_like_one_pass(in_parts(cuts), case, dtype, device)

    check()


def by_steps(**arguments: Any) -> tuple[Tensor, ...]:
    """`linear_step` called once per token, on copies of the states."""
    options = {
        n: arguments[n] for n in ("normalize", "eps", "decay", "feature_map") if n in arguments
    }
    state, key_sum = (arguments[name].clone() for name in CARRIED)
    outs = []
    for m in range(arguments["query"].shape[-2]):
        q, k, v = (arguments[name][..., m : m + 1, :] for name in ("query", "key", "value"))
        outs.append(torch.ops.attn.linear_step(q, k, v, state, key_sum, **options))
    return torch.cat(outs, -2), state, key_sum


STEPPED = {
    "plain": CASES_WITH_STATE["a state"],
    "grouped heads": CASES_WITH_STATE["grouped heads"],
    "one key head of rank 3": CASES_WITH_STATE["one key head of rank 3"],
    "merged": CASES_WITH_STATE["a state, merged"],
    "without norms": CASES_WITH_STATE["a state, without norms"],
    "odd widths": CASES_WITH_STATE["odd widths"],
    "wide": CASES_WITH_STATE["wide"],
    "narrow": CASES_WITH_STATE["narrow"],
    "decay in query's dtype": CASES_WITH_STATE["decay in query's dtype"],
    "relu": CASES_WITH_STATE["relu"],
    "softplus": CASES_WITH_STATE["softplus"],
    "everything": CASES_WITH_STATE["everything"],
}


@every_dtype
@pytest.mark.parametrize("name", STEPPED)
def test_steps_equal_one_pass(name: str, dtype: torch.dtype, device: torch.device) -> None:
    case = STEPPED[name].but(mask=None, options={"state": True})
    assert_like_one_pass(by_steps, case, dtype, device, gradients=False)


@every_dtype
def test_drawn_steps_equal_one_pass(dtype: torch.dtype, device: torch.device) -> None:
    @given(WITH_STATE.drawn(smallest=1, largest=8))
    def check(case: Case) -> None:
        case = case.but(mask=None, options={"state": True})
        assert_like_one_pass(by_steps, case, dtype, device, gradients=False)

    check()


def test_a_prompt_and_steps_equal_one_pass(device: torch.device) -> None:
    """What decoding does: the prompt in one call, then a token at a time."""

    def function(**arguments: Any) -> tuple[Tensor, ...]:
        out, *states = WITH_STATE.run(**tokens(arguments, 0, 5))
        rest = tokens(arguments, 5, 9) | dict(zip(CARRIED, states))
        steps, *states = by_steps(**rest)
        return torch.cat([out, steps], -2), *states

    case = CASES_WITH_STATE["everything"].but(mask=None)
    assert_like_one_pass(function, case, torch.float32, device, gradients=False)


def test_gradients_flow_through_the_state_alone(device: torch.device) -> None:
    """A loss on the last part reaches the keys of the first, and no other result is needed."""
    arguments = WITH_STATE.build(CASES_WITH_STATE["plain"], torch.float64, device)
    key = arguments["key"].requires_grad_()
    _, state, key_sum = WITH_STATE.run(**tokens(arguments, 0, 3))
    out, *_ = WITH_STATE.run(**(tokens(arguments, 3, 7) | {"state": state, "key_sum": key_sum}))
    (actual,) = torch.autograd.grad(out[..., -1, :].sum(), key)
    (expected,) = torch.autograd.grad(WITH_STATE.formula(**arguments)[0][..., -1, :].sum(), key)
    assert actual[..., :3, :].abs().max() > 0
    torch.testing.assert_close(actual, expected)


def test_second_derivatives_through_the_state(device: torch.device) -> None:
    arguments = WITH_STATE.build(CASES_WITH_STATE["everything"], torch.float64, device)
    leaves = WITH_STATE.floating(arguments)

    def hessian_vector_product(op: Function) -> tuple[Tensor, ...]:
        def total(*values: Tensor) -> Tensor:
            results = op(**(arguments | dict(zip(leaves, values))))
            return sum(x.sin().sum() for x in results)  # type: ignore[return-value]

        values = tuple(leaves.values())
        gradient = torch.func.grad(total, tuple(range(len(values))))
        return torch.func.vjp(gradient, *values)[1](tuple(x.cos() for x in values))

    for a, e in zip(*map(hessian_vector_product, (in_parts([2, 6]), WITH_STATE.formula))):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("name", CARRIED)
def test_one_of_the_two_sums_alone(name: str, device: torch.device) -> None:
    """The other one is zero."""
    arguments = WITH_STATE.build(CASES_WITH_STATE["a state"], torch.float32, device)
    arguments = arguments | {name: torch.zeros_like(arguments[name])}
    expected = WITH_STATE.run(**arguments)
    results = WITH_STATE.run(**(arguments | {name: None}))
    for result, actual, wanted in zip(WITH_STATE.results, results, expected):
        assert torch.equal(actual, wanted), result


def test_states_that_are_returned_are_not_those_that_were_given(device: torch.device) -> None:
    """Not even of no tokens: a step may write into the one and leave the other."""
    for tokens in (0, 3):
        case = CASES_WITH_STATE["a state"].but(queries=tokens, keys=tokens)
        arguments = WITH_STATE.build(case, torch.float32, device)
        for name, returned in zip(CARRIED, WITH_STATE.run(**arguments)[1:]):
            given = arguments[name]
            assert returned.untyped_storage().data_ptr() != given.untyped_storage().data_ptr()
            assert torch.equal(returned, given) == (tokens == 0)
