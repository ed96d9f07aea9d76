"""What the conformance suite needs to know of an op: an entry of data in `tests/<room>/spec.py`."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.comparison import Rounding
from tests.strategies import Case

Arguments = dict[str, Any]
Test = Callable[..., None]


@dataclass(frozen=True)
class OpSpec:
    """One op.

    name: what the tests call it. room: the folder of its schemas.txt.
    private: the private ops are `_private_fwd` and `_private_bwd`; the name of the room if empty.
    prepares: private ops that run before the private forward.
    results: names for what the op returns, `out` first; none of them is the name of an argument.
    ops: the public ops of these arguments; the first returns all results, the others `out` alone.
    function: the Python function, which returns all results or `out` alone.
    formula: the tuple of results of the public arguments, dense, in any dtype, differentiable by
        PyTorch.
    magnitudes: (arguments, *gradients of the results) -> what rounding acts on (see comparison.py).
    build: the arguments of a case in a dtype on a device.
    drawn: (smallest, largest) -> a strategy of cases with B, M and N within these.
    resized: (case, queries, keys, batch) -> the case at other sizes, as far as it allows.
    differentiable: the names of the arguments that have a gradient.
    cases: the named ones. "plain" has defaults only, "everything" all that can be used together.
    long: all arguments that are smaller than the scores, to be brought to great lengths; None
        where the results themselves are as large.
    linear_backward: the private backward is linear in its one gradient, and no result of the
        forward is an argument of it.
    own_backward: argument -> the private op that alone computes its gradient, where `_room_bwd`
        does not.
    unordered: types of devices where gradients repeat bit by bit in deterministic mode alone;
        unordered_twice: where gradients of gradients do, which formulas compute.
    """

    name: str
    room: str
    results: tuple[str, ...]
    ops: tuple[Any, ...]
    function: Callable[..., Any]
    formula: Callable[..., tuple[Tensor, ...]]
    magnitudes: Callable[..., tuple[float, dict[str, float]]]
    build: Callable[[Case, torch.dtype, torch.device], Arguments]
    drawn: Callable[..., st.SearchStrategy[Case]]
    resized: Callable[..., Case]
    differentiable: tuple[str, ...]
    cases: dict[str, Case]
    long: Case | None
    own_backward: dict[str, str] = field(default_factory=dict)
    private: str = ""
    prepares: tuple[str, ...] = ()
    linear_backward: bool = False
    unordered: tuple[str, ...] = ()
    unordered_twice: tuple[str, ...] = ()
    examples: tuple[Case, ...] = ()  # counterexamples that hypothesis found

    def __post_init__(self) -> None:
        assert {"plain", "everything"} <= self.cases.keys()
        assert not {*self.results} & {*self.differentiable}

    def run(self, **arguments: Any) -> tuple[Tensor, ...]:
        """All results."""
        return as_tuple(self.ops[0](**arguments))

    def out(self, **arguments: Any) -> Tensor:
        """`out` alone, of the op that returns the least."""
        return as_tuple(self.ops[-1](**arguments))[0]

    @property
    def softmax_like(self) -> bool:
        """Whether it takes the arguments that all ops with a softmax share."""
        return self.results == ("out", "lse")

    @property
    def forward(self) -> Any:
        return getattr(torch.ops.attn, f"_{self.private or self.room}_fwd").default

    @property
    def backward(self) -> Any:
        return getattr(torch.ops.attn, f"_{self.private or self.room}_bwd").default

    @property
    def backwards(self) -> tuple[Any, ...]:
        """The private backward, and the ops for gradients that it does not compute."""
        own = (getattr(torch.ops.attn, op).default for op in self.own_backward.values())
        return (self.backward, *own)

    @property
    def gradients_of_backward(self) -> list[str]:
        """The arguments whose gradients the private backward returns, in its order."""
        return [r.name.removeprefix("grad_") for r in self.backward._schema.returns]

    def floating(self, arguments: Arguments) -> dict[str, Tensor]:
        """The differentiable ones among these arguments."""
        return {n: arguments[n] for n in self.differentiable if arguments.get(n) is not None}

    def rounding(self, dtype: torch.dtype, arguments: Arguments, *grads: Tensor) -> Rounding:
        return Rounding(dtype, *self.magnitudes(arguments, *grads))


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    """What an op returns, as a tuple, also of one."""
    return (results,) if isinstance(results, Tensor) else tuple(results)


def all_specs() -> list[OpSpec]:
    """Every op: the `SPECS` of each folder beside this one that has a spec.py."""
    here = Path(__file__).parent
    folders = sorted(path.parent.name for path in here.parent.glob("*/spec.py"))
    names = [f"tests.{folder}.spec" for folder in folders if folder != here.name]
    return [spec for name in names for spec in importlib.import_module(name).SPECS]


def only(*names: str) -> Callable[[Test], Test]:
    """A test of `named` cases asks these alone, of each spec those that it has."""

    def decorate(test: Test) -> Test:
        test.only = names  # type: ignore[attr-defined]
        return test

    return decorate


def given_case(
    strategy: Callable[[OpSpec], st.SearchStrategy[Case]], **settings: Any
) -> Callable[[Test], Test]:
    """Runs a test of (spec, device, case) on drawn cases, found counterexamples first."""

    def decorate(test: Test) -> Test:
        def run(spec: OpSpec, device: torch.device) -> None:
            def one(case: Case) -> None:
                test(spec, device, case)

            for case in spec.examples:
                one = hypothesis.example(case=case)(one)
            hypothesis.settings(**settings)(hypothesis.given(case=strategy(spec))(one))()

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate
