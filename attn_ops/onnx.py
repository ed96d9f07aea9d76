"""ONNX: attention as ONNX operators, for any runtime. Needs `pip install attn_ops[onnx]`.

    program = torch.export.export(model, inputs, dynamic_shapes=...)
    attn_ops.onnx.export(program).save("model.onnx")

Every op is written out as the formula that is its specification (`reference.py` of its room), which
holds [M, N] scores (`l1_sparse`: rows gathered by edge, sums scattered): a file that runs anywhere,
not a fused kernel. Lengths, and numbers of edges, stay dynamic. The range of edges is not checked,
and onnxruntime (1.31) needs one at least: its sums over empty tensors have a wrong shape.

An ONNX program writes to no input: what `linear_step` does to its state and key_sum, and whatever
else the program writes to, are further results, after its own. A decoder feeds them back, so its
state is an input of the program: a buffer stays what it was at export.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import OutputKind, OutputSpec, TensorArgument
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_structure

from attn_ops import _autograd

_WRITTEN = (OutputKind.USER_INPUT_MUTATION, OutputKind.BUFFER_MUTATION)


def _searchsorted(
    sorted_sequence: Tensor, values: Tensor, *, right: bool = False, **options: Any
) -> Any:
    """Of one row of integers, which is sorted together with what is looked up in it.

    ONNX has no such operator. Packed sequences and sorted edges look themselves up by it.
    """
    if sorted_sequence.dim() != 1 or sorted_sequence.is_floating_point():
        return NotImplemented
    flat, count = values.flatten(), sorted_sequence.shape[0]
    # Doubled, so that among equals the one or the other comes first.
    together = torch.cat([2 * sorted_sequence.long() + (not right), 2 * flat.long() + right])
    places = together.sort().indices
    before = (places < count).long().cumsum(0)
    return torch.zeros_like(before).scatter(0, places, before)[count:].view_as(values)


def _stable_sort(x: Tensor, *, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """ONNX's TopK is stable: equals keep their order."""
    return torch.ops.aten.sort.default(x, dim, descending)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The table for `ExportedProgram.run_decompositions` that leaves no op without side effects."""
    table: dict[Any, Callable[..., Any]] = dict(torch.export.default_decompositions())
    for op, formula in _autograd.formulas.items():
        overload = getattr(torch.ops.attn, op).default
        if not overload._schema.is_mutable:
            table[overload] = formula
    table[torch.ops.aten.searchsorted.Tensor] = _searchsorted
    table[torch.ops.aten.sort.stable] = _stable_sort
    return table


class _WriteByFormula(TorchFunctionMode):
    """Ops that write become formulas before they are functionalized, when no table reaches them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if isinstance(func, torch._ops.OpOverload) and func.namespace == "attn":
            if func._schema.is_mutable:
                func = _autograd.formulas[func._opname]
        return func(*args, **(kwargs or {}))


def _return_what_is_written(program: torch.export.ExportedProgram) -> list[str]:
    """Makes results of what the program writes to, after its own; returns the names of these."""
    (returned,) = program.graph.find_nodes(op="output")
    pairs = list(zip(returned.args[0], program.graph_signature.output_specs, strict=True))
    results, specs, names = [], [], []
    for result, spec in sorted(pairs, key=lambda pair: pair[1].kind in _WRITTEN):
        if spec.kind in _WRITTEN:
            names.append(f"{spec.target}_out")
            with program.graph.inserting_before(returned):
                # Of its own, since it may be a result as well.
                result = program.graph.call_function(torch.ops.aten.clone.default, (result,))
            spec = OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(result.name), None)
        results.append(result)
        specs.append(spec)
    returned.args = (tuple(results),)
    program.graph_signature.output_specs[:] = specs
    signature = program.module_call_graph[0].signature
    assert signature is not None  # that of the whole program always is
    signature.out_spec = tree_structure(tuple(results))
    return names


def export(program: torch.export.ExportedProgram, **options: Any) -> torch.onnx.ONNXProgram:
    """An exported model as an ONNX program.

    Args:
        program: of `torch.export.export`, in which ops of this library may stand; with
            `linear_step` not one that has been decomposed.
        options: of `torch.onnx.export`: `input_names`, `opset_version`, ...

    Returns:
        What `torch.onnx.export(..., dynamo=True)` returns; it has `save` and, where onnxruntime is
        installed, can be called. Its results are the program's, then what an input or a buffer
        called `name` becomes where the program writes to it, called `name_out`.

    Raises:
        torch.onnx.OnnxExporterError: an op that has no translation.
        ModuleNotFoundError: onnx or onnxscript is not installed.
    """
    with _WriteByFormula():
        program = program.run_decompositions(decompositions())
    names = _return_what_is_written(program)
    onnx_program = torch.onnx.export(program, dynamo=True, **options)
    assert onnx_program is not None  # it is where dynamo=True
    results = onnx_program.model.graph.outputs
    for value, name in zip(results[len(results) - len(names) :], names, strict=True):
        value.name = name
    return onnx_program
