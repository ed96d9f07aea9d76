"""Every test of this folder that takes `spec` is asked of every op.

`named` is one of its named cases, or of those in `@only(...)`. A file with SOFTMAX_LIKE = True asks
the ops with a softmax alone.
"""

import sys

import pytest
import torch

from tests.conformance.spec import OpSpec, all_specs


def asked(metafunc: pytest.Metafunc, specs: list[OpSpec]) -> list[tuple[OpSpec, str]]:
    """Specs with the names of the cases that a test asks."""
    known = {name for spec in specs for name in spec.cases}
    names = getattr(metafunc.function, "only", known)
    assert known.issuperset(names), f"no op has the cases {set(names) - known}"
    return [(spec, name) for spec in specs for name in spec.cases if name in names]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    softmax_like = getattr(metafunc.module, "SOFTMAX_LIKE", False)
    specs = [spec for spec in all_specs() if spec.softmax_like or not softmax_like]
    if "named" in metafunc.fixturenames:
        pairs = asked(metafunc, specs)
        ids = [f"{spec.name}-{name.replace(' ', '-')}" for spec, name in pairs]
        metafunc.parametrize(("spec", "named"), pairs, ids=ids)
    elif "spec" in metafunc.fixturenames:
        metafunc.parametrize("spec", specs, ids=lambda spec: spec.name)


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    """No test meets what another has compiled."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
