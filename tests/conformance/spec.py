"""What the conformance suite needs to know of an op: one entry of data, in `tests/<op>/spec.py`."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.comparison import Rounding
from tests.strategies import Case

Arguments = dict[str, Any]


@dataclass(frozen=True)
class OpSpec:
    """One op.

    name: of the room and the public op `attn::name`; the private ops are `_name_fwd`, `_name_bwd`.
    function: the Python function; with_lse: the public op that returns (out, lse).
    formula: (out, lse) from the public arguments, dense, in any dtype, differentiable by PyTorch.
    magnitudes: (arguments, grad_out, grad_lse) -> what rounding acts on (see comparison.py).
    build: the arguments of a case in a dtype on a device.
    options: draws the op's own arguments of a case.
    differentiable: the names of the arguments that have a gradient.
    cases: the named ones. The one called "everything" uses all that can be used together.
    """

    name: str
    function: Callable[..., Tensor]
    with_lse: Any
    formula: Callable[..., tuple[Tensor, Tensor]]
    magnitudes: Callable[[Arguments, Tensor, Tensor], tuple[float, dict[str, float]]]
    build: Callable[[Case, torch.dtype, torch.device], Arguments]
    options: st.SearchStrategy[dict[str, Any]]
    differentiable: tuple[str, ...]
    cases: dict[str, Case]
    examples: tuple[Case, ...] = ()  # counterexamples that hypothesis found

    @property
    def op(self) -> Any:
        return getattr(torch.ops.attn, self.name)

    @property
    def forward(self) -> Any:
        return getattr(torch.ops.attn, f"_{self.name}_fwd").default

    @property
    def backward(self) -> Any:
        return getattr(torch.ops.attn, f"_{self.name}_bwd").default

    def floating(self, arguments: Arguments) -> dict[str, Tensor]:
        """The differentiable ones among these arguments."""
        return {n: arguments[n] for n in self.differentiable if arguments.get(n) is not None}

    def rounding(
        self, dtype: torch.dtype, arguments: Arguments, grad_out: Tensor, grad_lse: Tensor
    ) -> Rounding:
        return Rounding(dtype, *self.magnitudes(arguments, grad_out, grad_lse))


def all_specs() -> list[OpSpec]:
    """Every op: the `SPEC` of each folder beside this one that has a spec.py."""
    here = Path(__file__).parent
    folders = sorted(path.parent.name for path in here.parent.glob("*/spec.py"))
    names = [f"tests.{folder}.spec" for folder in folders if folder != here.name]
    return [importlib.import_module(name).SPEC for name in names]


def given_case(
    strategy: Callable[[OpSpec], st.SearchStrategy[Case]], **settings: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Runs a test of (spec, device, case) on drawn cases, found counterexamples first."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        def run(spec: OpSpec, device: torch.device) -> None:
            def one(case: Case) -> None:
                test(spec, device, case)

            for case in spec.examples:
                one = hypothesis.example(case=case)(one)
            hypothesis.settings(**settings)(hypothesis.given(case=strategy(spec))(one))()

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate
