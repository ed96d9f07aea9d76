"""ONNX: the exported graph has ONNX operators only, and onnxruntime gives the same numbers."""

from typing import Any

import pytest
import torch

from tests.comparison import assert_same
from tests.conformance.spec import OpSpec, all_specs
from tests.conformance.test_export import OTHER_SIZES, arguments_of, export
from tests.doors.all_ops import AllOps

pytest.importorskip("onnxruntime", reason="attn_ops[onnx] is not installed")
pytest.importorskip("onnxscript", reason="attn_ops[onnx] is not installed")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> AllOps:
    return AllOps([spec for spec in all_specs() if spec.name != "l1_sparse"], CPU)


def run(program: torch.export.ExportedProgram, inputs: Any) -> list[torch.Tensor]:
    """In onnxruntime, which knows no op of this library."""
    import attn_ops.onnx

    exported = attn_ops.onnx.export(program, verbose=False)
    assert "attn" not in {node.domain for node in exported.model.graph}
    return list(exported(inputs))


@pytest.fixture(scope="module")
def results(model: AllOps) -> dict[str, list[torch.Tensor]]:
    flat = run(model.exported(), model.inputs())
    return {spec.name: [flat.pop(0) for _ in spec.results] for spec in model.specs}


def test_onnxruntime_gives_the_same_numbers_at_other_lengths(
    spec: OpSpec, model: AllOps, results: dict[str, list[torch.Tensor]]
) -> None:
    if spec.name not in results:
        pytest.skip("sorting edges has no translation")
    expected = model.expected()[spec.name]
    for name, a, e in zip(spec.results, results[spec.name], expected, strict=True):
        assert_same(name, a, e)


@pytest.mark.ops("cosine_sim")
def test_packed_sequences_look_themselves_up() -> None:
    (spec,) = (spec for spec in all_specs() if spec.name == "cosine_sim")
    case = spec.cases["packed, causal, window"]
    tensors, options = arguments_of(spec, case, OTHER_SIZES, CPU)
    actual = run(export(spec, case, False, CPU), tensors)
    for name, a, e in zip(spec.results, actual, spec.run(**tensors, **options), strict=True):
        assert_same(name, a, e)
