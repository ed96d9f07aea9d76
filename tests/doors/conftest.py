"""The tests of this folder are asked of every op, as those of the conformance suite are."""

from tests.conformance.conftest import nothing_compiled, pytest_generate_tests  # noqa: F401
