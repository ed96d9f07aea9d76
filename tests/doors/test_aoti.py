"""AOTInductor: one package of all ops, loaded and run from Python at sizes it was not made at."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.comparison import assert_same
from tests.conformance.spec import OpSpec, all_specs, as_tuple
from tests.conformance.test_export import OTHER_SIZES, SIZES, arguments_of, dynamic_shapes

CASE = "everything"
Inputs = dict[str, dict[str, Tensor]]


def inputs_and_options(
    sizes: dict[str, int], device: torch.device
) -> tuple[Inputs, dict[str, dict[str, Any]]]:
    """Of every op, by its name."""
    both = {s.name: arguments_of(s, s.cases[CASE], sizes, device) for s in all_specs()}
    return {n: tensors for n, (tensors, _) in both.items()}, {n: o for n, (_, o) in both.items()}


class AllOps(nn.Module):
    def __init__(self, options: dict[str, dict[str, Any]]) -> None:
        super().__init__()
        self.ops = {spec.name: spec.ops[0] for spec in all_specs()}
        self.options = options

    def forward(self, inputs: Inputs) -> dict[str, tuple[Tensor, ...]]:
        return {
            name: as_tuple(op(**inputs[name], **self.options[name]))
            for name, op in self.ops.items()
        }


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, device: torch.device
) -> dict[str, tuple[Tensor, ...]]:
    """What the package gives at other sizes."""
    inputs, options = inputs_and_options(SIZES, device)
    shapes = ({name: dynamic_shapes(tensors) for name, tensors in inputs.items()},)
    program = torch.export.export(AllOps(options), (inputs,), dynamic_shapes=shapes, strict=False)
    path = Path(tmp_path_factory.mktemp("aoti")) / "ops.pt2"
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    package = torch._inductor.aoti_load_package(str(path))
    return package(inputs_and_options(OTHER_SIZES, device)[0])


def test_package_gives_the_same_numbers_at_other_sizes(
    spec: OpSpec, results: dict[str, tuple[Tensor, ...]], device: torch.device
) -> None:
    inputs, options = inputs_and_options(OTHER_SIZES, device)
    expected = spec.run(**inputs[spec.name], **options[spec.name])
    for name, a, e in zip(spec.results, results[spec.name], expected, strict=True):
        assert_same(name, a, e)
