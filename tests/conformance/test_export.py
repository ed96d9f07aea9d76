"""`torch.export`, strict and not, with dynamic batch size and lengths."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.comparison import assert_same
from tests.conformance.spec import OpSpec, as_tuple, only
from tests.strategies import Case

# Sizes that differ from each other and from every other size, so that no two are taken for one.
SIZES = {"batch": 3, "queries": 11, "keys": 14}
OTHER_SIZES = {"batch": 5, "queries": 37, "keys": 22}


class Attention(nn.Module):
    """The op with everything that is not a tensor fixed."""

    def __init__(self, spec: OpSpec, options: dict[str, Any]) -> None:
        super().__init__()
        self.op, self.options = spec.ops[0], options

    def forward(self, tensors: dict[str, Tensor]) -> Any:
        return self.op(**tensors, **self.options)


def arguments_of(
    spec: OpSpec, case: Case, sizes: dict[str, int], device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    arguments = spec.build(spec.resized(case, **sizes), torch.float32, device)
    tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
    return tensors, {name: x for name, x in arguments.items() if name not in tensors}


def dynamic_shapes(tensors: dict[str, Tensor]) -> dict[str, dict[int, Any]]:
    """Every dimension of size B, M, N or M+N-1; export raises if one of them turns out fixed."""
    dynamic = {*SIZES.values(), SIZES["queries"] + SIZES["keys"] - 1}
    return {
        name: {i: torch.export.Dim.DYNAMIC for i, size in enumerate(x.shape) if size in dynamic}
        for name, x in tensors.items()
    }


def export(
    spec: OpSpec, case: Case, strict: bool, device: torch.device
) -> torch.export.ExportedProgram:
    tensors, options = arguments_of(spec, case, SIZES, device)
    shapes = (dynamic_shapes(tensors),)
    return torch.export.export(
        Attention(spec, options), (tensors,), dynamic_shapes=shapes, strict=strict
    )


def op_nodes(program: torch.export.ExportedProgram) -> list[str]:
    nodes = program.graph.nodes
    return [str(n.target) for n in nodes if n.op == "call_function" and "attn" in str(n.target)]


@pytest.mark.parametrize("strict", (True, False), ids=("strict", "not strict"))
@only(
    "plain",
    "key mask",
    "key mask and broadcast bias",
    "everything",
    "packed, causal, window",
    "packed and causal",
)
def test_exported_program_runs_at_other_lengths(
    spec: OpSpec, named: str, strict: bool, device: torch.device
) -> None:
    program = export(spec, spec.cases[named], strict, device)
    tensors, options = arguments_of(spec, spec.cases[named], OTHER_SIZES, device)
    expected = spec.run(**tensors, **options)
    for exported in (program, program.run_decompositions()):
        results = exported.module()(tensors)
        for name, actual, wanted in zip(spec.results, as_tuple(results), expected):
            assert_same(name, actual, wanted)


@pytest.mark.parametrize("strict", (True, False), ids=("strict", "not strict"))
def test_dynamic_dimensions_keep_their_ranges(
    spec: OpSpec, strict: bool, device: torch.device
) -> None:
    """As the caller gives them, no narrower; beyond them the program refuses."""
    tensors, options = arguments_of(spec, spec.cases["plain"], SIZES, device)
    sizes = {**SIZES, "edges": SIZES["queries"] + SIZES["keys"] - 1}
    dims = {size: torch.export.Dim(name, min=2, max=40) for name, size in sizes.items()}
    shapes = {
        name: {i: dims[size] for i, size in enumerate(x.shape) if size in dims}
        for name, x in tensors.items()
    }
    program = torch.export.export(
        Attention(spec, options), (tensors,), dynamic_shapes=(shapes,), strict=strict
    )
    ranges = {(int(r.lower), int(r.upper)) for r in program.range_constraints.values()}
    assert ranges == {(2, 40)}

    def run(**sizes: int) -> tuple[Tensor, ...]:
        others, _ = arguments_of(spec, spec.cases["plain"], sizes, device)
        results = as_tuple(program.module()(others))
        for name, actual, wanted in zip(spec.results, results, spec.run(**others, **options)):
            assert_same(name, actual, wanted)
        return results

    run(batch=2, queries=20, keys=20)
    with pytest.raises((AssertionError, RuntimeError), match="40"):
        run(batch=41, queries=20, keys=20)


@pytest.mark.parametrize("strict", (True, False), ids=("strict", "not strict"))
def test_exported_graph_keeps_the_public_op_and_decomposes_to_the_private_one(
    spec: OpSpec, strict: bool, device: torch.device
) -> None:
    program = export(spec, spec.cases["everything"], strict, device)
    assert op_nodes(program) == [str(spec.ops[0].default)]
    prepares = [str(getattr(torch.ops.attn, op).default) for op in spec.prepares]
    assert op_nodes(program.run_decompositions()) == [*prepares, str(spec.forward)]


def test_exported_program_survives_being_saved(
    spec: OpSpec, tmp_path: Any, device: torch.device
) -> None:
    program = export(spec, spec.cases["everything"], False, device)
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    tensors, options = arguments_of(spec, spec.cases["everything"], OTHER_SIZES, device)
    results = as_tuple(loaded.module()(tensors))
    for name, actual, expected in zip(spec.results, results, spec.run(**tensors, **options)):
        assert_same(name, actual, expected)
