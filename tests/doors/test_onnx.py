"""ONNX: the exported graph has ONNX operators only, and onnxruntime gives the same numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attn_ops
from tests.comparison import assert_same
from tests.conformance.spec import OpSpec, all_specs
from tests.conformance.test_export import OTHER_SIZES, arguments_of, export
from tests.doors.all_ops import AllOps

pytest.importorskip("onnxruntime", reason="attn_ops[onnx] is not installed")
pytest.importorskip("onnxscript", reason="attn_ops[onnx] is not installed")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> AllOps:
    return AllOps(all_specs(), CPU)


def in_onnx(program: torch.export.ExportedProgram) -> torch.onnx.ONNXProgram:
    """To be called, which runs it in onnxruntime; that knows no op of this library."""
    import attn_ops.onnx

    exported = attn_ops.onnx.export(program, verbose=False)
    assert "attn" not in {node.domain for node in exported.model.graph}
    return exported


@pytest.fixture(scope="module")
def results(model: AllOps) -> dict[str, list[Tensor]]:
    flat = list(in_onnx(model.exported())(model.inputs()))
    return {spec.name: [flat.pop(0) for _ in spec.results] for spec in model.specs}


def test_onnxruntime_gives_the_same_numbers_at_other_lengths(
    spec: OpSpec, model: AllOps, results: dict[str, list[Tensor]]
) -> None:
    expected = model.expected()[spec.name]
    for name, a, e in zip(spec.results, results[spec.name], expected, strict=True):
        assert_same(name, a, e)


@pytest.mark.ops("cosine_sim")
def test_packed_sequences_look_themselves_up() -> None:
    (spec,) = (spec for spec in all_specs() if spec.name == "cosine_sim")
    case = spec.cases["packed, causal, window"]
    tensors, options = arguments_of(spec, case, OTHER_SIZES, CPU)
    actual = in_onnx(export(spec, case, False, CPU))(tensors)
    for name, a, e in zip(spec.results, actual, spec.run(**tensors, **options), strict=True):
        assert_same(name, a, e)


class Decoder(nn.Module):
    """A step that writes to its state, which it also returns, and to a counter of its own."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(
        self, x: Tensor, state: Tensor, key_sum: Tensor, decay: Tensor
    ) -> tuple[Tensor, Tensor]:
        self.steps += 1
        options: dict[str, Any] = {"decay": decay, "feature_map": "elu_plus_one"}
        return attn_ops.linear_attention_step(x, x, x, state, key_sum, **options), state


@pytest.mark.ops("cosine_sim", "l1_sparse")
@pytest.mark.parametrize("right", (False, True))
@pytest.mark.parametrize("sizes", ((5, 12), (5, 0), (0, 4)))
def test_the_table_looks_up_as_searchsorted_does(right: bool, sizes: tuple[int, int]) -> None:
    from attn_ops.onnx import decompositions

    row = torch.randint(0, 6, sizes[:1]).sort().values.int()
    values = torch.randint(-1, 8, (2, sizes[1]))
    actual = decompositions()[torch.ops.aten.searchsorted.Tensor](row, values, right=right)
    assert torch.equal(actual, torch.searchsorted(row.long(), values, right=right))


@pytest.mark.ops("linear_step")
def test_a_step_returns_the_state_that_it_cannot_write() -> None:
    """Tokens one by one, of merged heads (so it writes to views), in another batch than before."""

    def inputs(batch: int) -> tuple[Tensor, ...]:
        state, key_sum = torch.rand(batch, 4, 4), torch.rand(batch, 4)
        return torch.randn(batch, 1, 4), state, key_sum, torch.rand(1)

    batch = {0: torch.export.Dim("batch", min=2)}
    program = torch.export.export(Decoder(), inputs(2), dynamic_shapes=(batch, batch, batch, None))
    exported = in_onnx(program)
    names = [value.name for value in exported.model.graph.outputs]
    assert names[2:] == ["steps_out", "state_out", "key_sum_out"]

    x, state, key_sum, decay = inputs(5)
    carried = [state.clone(), key_sum.clone()]
    for token in (x, x + 1, x.cos()):
        out, returned, steps, *carried = exported(token, *carried, decay)
        expected = attn_ops.linear_attention_step(
            token, token, token, state, key_sum, decay=decay, feature_map="elu_plus_one"
        )
        assert_same("out", out, expected)
        for name, a, e in zip(("state", "key_sum"), carried, (state, key_sum), strict=True):
            assert_same(name, a, e)
        assert torch.equal(returned, carried[0])
        assert steps == 1
