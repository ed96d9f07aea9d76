"""On a torch that lacks one of the private autograd names: all that can work does, the rest raises.

Each test runs in a process of its own, where the name is deleted before attn_ops is imported.
"""

import os
import subprocess
import sys

import pytest

NAMES = (
    "torch.autograd.function._SingleLevelFunction",
    "torch._C._set_fwd_grad_enabled",
    "torch.autograd.forward_ad._current_level",
    "torch.autograd.forward_ad._set_fwd_grad_enabled",
    "torch.autograd._profiler_enabled",
    "torch._functorch.utils.enable_single_level_autograd_function",
    "torch._C._any_requires_grad",
    "torch._C._after_autograd_keyset",
    "torch._C._AutoDispatchBelowAutograd",
)

PRELUDE = """
import importlib, sys, torch
import torch._functorch.utils
from torch.autograd import forward_ad
make_dual, dual_level = forward_ad.make_dual, forward_ad.dual_level
module, _, name = {name!r}.rpartition(".")
saved = getattr(importlib.import_module(module), name)
delattr(importlib.import_module(module), name)
import attn_ops
setattr(importlib.import_module(module), name, saved)  # torch itself needs it
from attn_ops import _autograd
assert {name!r}.rpartition(".")[2] in _autograd.unavailable, _autograd.unavailable
from tests.comparison import assert_same
from tests.conformance.evaluate import *
from tests.conformance.spec import all_specs
problems = [
    (spec, spec.build(spec.cases["everything"], torch.float64, torch.device("cpu")))
    for spec in all_specs()
]
"""

BACKWARD = """
for spec, arguments in problems:
    assert_arguments_agree(spec, arguments)
"""

DOUBLE_BACKWARD = """
for spec, arguments in problems:
    results = []
    for op in (spec.run, spec.formula):
        leaves = {n: x.detach().requires_grad_() for n, x in spec.floating(arguments).items()}
        total = scalar(op(**(arguments | leaves)))
        grads = torch.autograd.grad(total, list(leaves.values()), create_graph=True)
        results.append(torch.autograd.grad(scalar(grads), list(leaves.values())))
    for name, actual, expected in zip(leaves, *results):
        assert_same(name, actual, expected)
"""

COMPILE = """
for spec, arguments in problems:
    compiled = torch.compile(spec.run, backend="aot_eager", fullgraph=True)
    leaves = {n: x.detach().requires_grad_() for n, x in spec.floating(arguments).items()}
    totals = [scalar(op(**(arguments | leaves))) for op in (spec.run, compiled)]
    for a, b in zip(*(torch.autograd.grad(total, list(leaves.values())) for total in totals)):
        torch.testing.assert_close(a, b)
"""

FORWARD_MODE = """
for spec, arguments in problems:
    refused = []
    for name in spec.floating(arguments):
        with dual_level():
            dual = make_dual(arguments[name], torch.ones_like(arguments[name]))
            try:
                spec.run(**(arguments | {name: dual}))
            except NotImplementedError as error:
                assert "forward-mode AD is not available" in str(error), error
                assert "lacks a private name" in str(error), error
                refused.append(name)
    assert tuple(refused) == spec.differentiable, refused
    function = lambda query: spec.out(**(arguments | {"query": query}))
    try:
        torch.func.jvp(function, (arguments["query"],), (arguments["query"],))
    except (NotImplementedError, RuntimeError) as error:
        print("torch.func.jvp:", type(error).__name__)
    else:
        raise AssertionError("torch.func.jvp returned something")
"""

GRAD = """
for spec, arguments in problems:
    function = lambda query: spec.out(**(arguments | {"query": query})).sum()
    try:
        torch.func.grad(function)(arguments["query"])
    except (NotImplementedError, RuntimeError) as error:
        print("torch.func.grad:", type(error).__name__)
    else:
        raise AssertionError("torch.func.grad returned something")
"""


def run(name: str, *programs: str) -> None:
    source = "\n".join([PRELUDE.format(name=name), *programs])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", source],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_without_single_level_functions_derivatives_in_reverse_are_right() -> None:
    run(NAMES[0], BACKWARD, DOUBLE_BACKWARD, COMPILE)


def test_without_single_level_functions_the_rest_raises_instead_of_returning_zeros() -> None:
    run(NAMES[0], FORWARD_MODE, GRAD)


@pytest.mark.parametrize("name", NAMES[1:])
def test_every_private_name_may_be_the_one_that_is_missing(name: str) -> None:
    """All that follows is the same: one op shows it."""
    run(name, "problems = problems[:1]", BACKWARD, FORWARD_MODE)
