"""On inputs that are multiples of 1/128 the scores are exact sums, rounded in one order.

The kernels of every device, the formulas that serve without one and the formula of the tests give
the same bits in float64 and float32; sums of signs do too where no product is rounded.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attn_ops
from attn_ops.l1 import in_blocks
from tests.l1.formula import l1_scores
from tests.strategies import STRIDES, Case, build

WIDE = (torch.float64, torch.float32)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"scale": 0.3},
    {"scale": -1.7},
    {"score": "inverse", "scale": 0.3, "eps": 1e-3},
    {"score": "inverse", "eps": 0.7},
)


def multiples(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Queries and keys within [-4, 4] on the grid, some of them equal."""
    arguments, _ = build(case, dtype, device)

    def on_grid(x: Tensor) -> Tensor:
        return (x * 128).round().clamp(-512, 512) / 128

    return {name: on_grid(arguments[name]) for name in ("query", "key")} | case.options


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kv_heads = draw(st.integers(1, 2))
    return Case(
        batch=draw(st.integers(1, 2)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        queries=draw(st.integers(1, 70)),
        keys=draw(st.integers(1, 140)),
        width=draw(st.integers(1, 256)),
        strides=draw(st.sampled_from(STRIDES)),
        options=draw(st.sampled_from(OPTIONS)),
        seed=draw(st.integers(0, 99)),
    )


def reference(arguments: dict[str, Any]) -> Tensor:
    """What serves without a kernel."""
    query, key = arguments["query"], arguments["key"]
    eps = arguments.get("eps") if arguments.get("score") == "inverse" else None
    return in_blocks.scores(query, key, arguments.get("scale", query.shape[3] ** -0.5), eps)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_scores_of_kernel_reference_and_formula(dtype: torch.dtype, device: torch.device) -> None:
    @settings(max_examples=30)
    @given(cases())
    def check(case: Case) -> None:
        arguments = multiples(case, dtype, device)
        score = attn_ops.l1_scores(**arguments)
        assert torch.equal(score, reference(arguments))
        on_cpu = dict(arguments)
        on_cpu |= {name: arguments[name].cpu() for name in ("query", "key")}
        assert torch.equal(score.cpu(), attn_ops.l1_scores(**on_cpu))
        assert torch.equal(score.cpu(), l1_scores(**on_cpu)[0])

    check()


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_sums_of_signs_of_kernel_reference_and_formula(
    dtype: torch.dtype, device: torch.device
) -> None:
    """Gradients that are multiples of 1/8 and a scale of 1/4: no product is rounded."""

    @settings(max_examples=30)
    @given(cases(), st.integers(0, 9))
    def check(case: Case, seed: int) -> None:
        arguments = multiples(case.but(options={}), dtype, device)
        grad = torch.randn(
            case.batch,
            case.heads,
            case.queries,
            case.keys,
            generator=torch.Generator().manual_seed(seed),
        )
        grad = ((grad * 8).round() / 8).to(device, dtype)

        def gradients(function: Any) -> tuple[Tensor, ...]:
            leaves = [arguments[name].detach().requires_grad_() for name in ("query", "key")]
            out = function(query=leaves[0], key=leaves[1], scale=0.25)
            return torch.autograd.grad(out, leaves, grad)

        expected = gradients(lambda **given: l1_scores(**given)[0])
        blocks = in_blocks.scores_backward(
            grad, arguments["query"], arguments["key"], -0.25, [True, True]
        )
        for actual, block, e in zip(gradients(attn_ops.l1_scores), blocks, expected):
            assert torch.equal(actual, e)
            assert torch.equal(block, e)

    check()
