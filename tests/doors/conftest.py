"""The tests of this folder are asked of every op, as those of the conformance suite are."""

import pytest

from tests.conformance.conftest import nothing_compiled, pytest_generate_tests  # noqa: F401


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ops(*names): the ops that a test without a spec asks")
