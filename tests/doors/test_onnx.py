"""ONNX: the exported graph has ONNX operators only, and onnxruntime gives the same numbers."""

from typing import Any

import pytest
import torch

from tests.comparison import assert_same
from tests.conformance.spec import OpSpec, as_tuple, only
from tests.conformance.test_export import (
    OTHER_SIZES,
    SIZES,
    Attention,
    arguments_of,
    dynamic_shapes,
)

pytest.importorskip("onnxruntime", reason="attn_ops[onnx] is not installed")
pytest.importorskip("onnxscript", reason="attn_ops[onnx] is not installed")


def onnx_program(spec: OpSpec, named: str) -> Any:
    import attn_ops.onnx

    tensors, options = arguments_of(spec, spec.cases[named], SIZES, torch.device("cpu"))
    program = torch.export.export(
        Attention(spec, options), (tensors,), dynamic_shapes=(dynamic_shapes(tensors),)
    )
    return attn_ops.onnx.export(program, verbose=False)


@only("everything", "packed, causal, window")
def test_onnxruntime_gives_the_same_numbers_at_other_lengths(spec: OpSpec, named: str) -> None:
    if spec.name == "l1_sparse":
        pytest.skip("sorting edges has no translation")
    program = onnx_program(spec, named)
    domains = {node.domain for node in program.model.graph}
    assert "attn" not in domains
    tensors, options = arguments_of(spec, spec.cases[named], OTHER_SIZES, torch.device("cpu"))
    expected = as_tuple(spec.run(**tensors, **options))
    for name, a, e in zip(spec.results, program(tensors), expected, strict=True):
        assert_same(name, a, e)
