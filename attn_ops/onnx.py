"""ONNX: attention as ONNX operators, for any runtime. Needs `pip install attn_ops[onnx]`.

    program = torch.export.export(model, inputs, dynamic_shapes=...)
    attn_ops.onnx.export(program).save("model.onnx")

Every op is written out as the formula that is its specification (`reference.py` of its room), which
holds [M, N] scores: a file that runs anywhere, not a fused kernel. Lengths stay dynamic. Not
translated: `l1_sparse`, and `linear_step`, which writes to its arguments
(`linear_attention_with_state` does the same without).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attn_ops import _autograd


def _searchsorted(
    sorted_sequence: Tensor, values: Tensor, *, right: bool = False, **options: Any
) -> Any:
    """Of one row, counted; ONNX has no such operator. Packed sequences look themselves up by it."""
    if sorted_sequence.dim() != 1 or not right:
        return NotImplemented
    return (sorted_sequence <= values.unsqueeze(-1)).sum(-1)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The table for `ExportedProgram.run_decompositions` that leaves no op of this library."""
    table: dict[Any, Callable[..., Any]] = dict(torch.export.default_decompositions())
    for op, formula in _autograd.formulas.items():
        table[getattr(torch.ops.attn, op).default] = formula
    table[torch.ops.aten.searchsorted.Tensor] = _searchsorted
    return table


def export(program: torch.export.ExportedProgram, **options: Any) -> torch.onnx.ONNXProgram:
    """An exported model as an ONNX program.

    Args:
        program: of `torch.export.export`, in which ops of this library may stand.
        options: of `torch.onnx.export`: `input_names`, `opset_version`, ...

    Returns:
        What `torch.onnx.export(..., dynamo=True)` returns; it has `save` and, where onnxruntime is
        installed, can be called.

    Raises:
        torch.onnx.OnnxExporterError: an op that has no translation.
        ModuleNotFoundError: onnx or onnxscript is not installed.
    """
    program = program.run_decompositions(decompositions())
    onnx_program = torch.onnx.export(program, dynamo=True, **options)
    assert onnx_program is not None  # it is where dynamo=True
    return onnx_program
