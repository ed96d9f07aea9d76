"""As exact as the formula, at every scale and count of slices, and at both ends of lengths.

Results, lse and every gradient are at most twice as far from float64 as the formula in the same
dtype, but for a rounding (tests/comparison.py).
"""

import pytest
import torch
from torch import Tensor

from tests.conformance.evaluate import assert_arguments_agree, assert_changed_case_agrees
from tests.cosine_sim.spec import SPEC, build
from tests.strategies import Case

BLOCKS = Case(batch=1, heads=2, queries=70, keys=200, width=64, value_width=64)
every_dtype = pytest.mark.parametrize(
    "dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str
)
every_scale = pytest.mark.parametrize("scale", (1.0, 8.0, 10.0, 16.0, 100.0))


@every_dtype
@every_scale
@pytest.mark.parametrize("groups", (1, 4, 8))
def test_every_scale_and_count_of_slices_is_exact(
    groups: int, scale: float, dtype: torch.dtype, device: torch.device
) -> None:
    case = BLOCKS.but(options={"scale": scale, "groups": groups})
    assert_changed_case_agrees(SPEC, case, dtype, device)


@every_dtype
@every_scale
def test_rows_to_which_all_keys_are_opposite_are_exact(
    scale: float, dtype: torch.dtype, device: torch.device
) -> None:
    """Every score is the least there can be: weights below a fixed bound are the smallest."""
    arguments = build(BLOCKS.but(options={"scale": scale}), dtype, device)
    # Of many lengths, and not quite parallel: of equal scores nothing would be left to compare.
    lengths = torch.linspace(0.5, 2.0, 200, device=device)[:, None]
    opposite = -arguments["query"][:, :, 5:6] * lengths + 0.03 * arguments["key"]
    arguments["key"] = opposite.to(dtype).requires_grad_()
    assert_arguments_agree(SPEC, arguments)


@every_dtype
@pytest.mark.parametrize(("queries", "keys"), ((1, 1), (3, 1), (1, 65536), (65536, 1)))
def test_shortest_and_long_inputs_are_exact(
    queries: int, keys: int, dtype: torch.dtype, device: torch.device
) -> None:
    case = BLOCKS.but(heads=1, kv_heads=1, queries=queries, keys=keys)
    assert_changed_case_agrees(SPEC, case, dtype, device)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("width", (64, 128))
def test_gradients_are_the_same_from_run_to_run(
    width: int, dtype: torch.dtype, device: torch.device
) -> None:
    """By default, not in deterministic mode alone."""
    case = BLOCKS.but(heads=4, kv_heads=2, queries=500, keys=500, width=width, causal=True)
    arguments = build(case.but(relative_bias="H", bias="11MN", sink=True), dtype, device)
    leaves = [x.detach().requires_grad_() for x in SPEC.floating(arguments).values()]
    named = arguments | dict(zip(SPEC.floating(arguments), leaves))

    def gradients() -> tuple[Tensor, ...]:
        out, lse = SPEC.run(**named)
        return torch.autograd.grad(out.float().sin().sum() + lse.sum(), leaves)

    first = gradients()
    for _ in range(3):
        for name, again, before in zip(SPEC.floating(arguments), gradients(), first):
            assert torch.equal(again, before), name
