"""One module that calls every op, each with everything that can be used together."""

from typing import Any

import torch
from torch import Tensor, nn

from tests.conformance.spec import OpSpec, as_tuple
from tests.conformance.test_export import OTHER_SIZES, SIZES, arguments_of, dynamic_shapes

Inputs = dict[str, dict[str, Tensor]]


class AllOps(nn.Module):
    """Its inputs and results are dicts by the name of the op."""

    def __init__(self, specs: list[OpSpec], device: torch.device) -> None:
        super().__init__()
        self.specs, self.device = specs, device
        self.ops = {spec.name: spec.ops[0] for spec in specs}
        self.options = {spec.name: self._arguments(spec, SIZES)[1] for spec in specs}

    def _arguments(self, spec: OpSpec, sizes: dict[str, int]) -> tuple[Any, dict[str, Any]]:
        return arguments_of(spec, spec.cases["everything"], sizes, self.device)

    def inputs(self, sizes: dict[str, int] = OTHER_SIZES) -> Inputs:
        """Of sizes that it is not exported at."""
        return {spec.name: self._arguments(spec, sizes)[0] for spec in self.specs}

    def expected(self) -> dict[str, tuple[Tensor, ...]]:
        """What the ops themselves make of these inputs."""
        inputs = self.inputs()
        return {
            spec.name: spec.run(**inputs[spec.name], **self.options[spec.name])
            for spec in self.specs
        }

    def forward(self, inputs: Inputs) -> dict[str, tuple[Tensor, ...]]:
        return {
            name: as_tuple(op(**inputs[name], **self.options[name]))
            for name, op in self.ops.items()
        }

    def exported_at(self) -> tuple[tuple[Inputs], tuple[Any]]:
        """The arguments that it is exported with, and which of their dimensions are dynamic."""
        inputs = self.inputs(SIZES)
        return (inputs,), ({name: dynamic_shapes(tensors) for name, tensors in inputs.items()},)

    def exported(self) -> torch.export.ExportedProgram:
        args, shapes = self.exported_at()
        return torch.export.export(self, args, dynamic_shapes=shapes, strict=False)
