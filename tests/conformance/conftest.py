"""Every test of this folder that takes `spec` is asked of every op; `case`: of its named cases."""

import sys

import pytest
import torch

from tests.conformance.spec import all_specs


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    specs = all_specs()
    if "named" in metafunc.fixturenames:
        pairs = [(spec, name) for spec in specs for name in spec.cases]
        ids = [f"{spec.name}-{name.replace(' ', '-')}" for spec, name in pairs]
        metafunc.parametrize(("spec", "named"), pairs, ids=ids)
    elif "spec" in metafunc.fixturenames:
        metafunc.parametrize("spec", specs, ids=lambda spec: spec.name)


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    """No test meets what another has compiled."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
