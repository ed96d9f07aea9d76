"""AOTInductor: one package of all ops, loaded and run from Python at sizes it was not made at."""

from typing import Any

import pytest
import torch

from tests.comparison import assert_same
from tests.conformance.spec import OpSpec, all_specs
from tests.doors.all_ops import AllOps


@pytest.fixture(scope="module")
def model(device: torch.device) -> AllOps:
    return AllOps(all_specs(), device)


@pytest.fixture(scope="module")
def results(model: AllOps, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the package gives."""
    path = tmp_path_factory.mktemp("aoti") / "ops.pt2"
    torch._inductor.aoti_compile_and_package(model.exported(), package_path=str(path))
    return torch._inductor.aoti_load_package(str(path))(model.inputs())


def test_package_gives_the_same_numbers_at_other_sizes(
    spec: OpSpec, model: AllOps, results: Any
) -> None:
    expected = model.expected()[spec.name]
    for name, a, e in zip(spec.results, results[spec.name], expected, strict=True):
        assert_same(name, a, e)
