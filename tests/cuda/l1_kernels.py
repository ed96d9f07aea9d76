"""The CUDA kernels of L1 attention against the formula in float64.

Run by test_kernels.py in a process of its own, where there is no GPU on an emulation of one.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attn_ops import _library
from tests.conformance.evaluate import assert_agrees, assert_changed_case_agrees
from tests.conformance.spec import OpSpec
from tests.conftest import DEVICE
from tests.cuda import emulated
from tests.l1.spec import L1, SCORES
from tests.strategies import Case

OPS = ("_l1_fwd", "_l1_bwd", "_l1_scores_fwd", "_l1_scores_bwd")

if DEVICE == "cpu":
    assert not _library.loaded_libraries
    emulated.load("l1")
    for op in OPS:
        _library.implement(op, getattr(torch.ops.attn, f"{op}_cuda"), "CPU")

ONE = Case(batch=1, heads=1, kv_heads=1, width=16, value_width=16)
# What the small cases leave out: more than one block in each direction, and widths of every kernel.
LONG = {
    "blocks of every kind": ONE.but(queries=150, keys=280, causal=True, window=130),
    "blocks of packed sequences": ONE.but(
        queries=200, keys=190, sequences=((90, 60), (0, 20), (100, 100)), causal=True
    ),
    "relative bias over blocks": ONE.but(queries=70, keys=140, relative_bias="H", causal=True),
    "bias of keys over blocks": ONE.but(
        batch=2, heads=2, kv_heads=1, queries=70, keys=140, bias="1H1N"
    ),
    "bias of queries over blocks": ONE.but(batch=2, queries=140, keys=66, bias="BHM1"),
    "grouped heads over blocks": ONE.but(heads=4, kv_heads=2, queries=40, keys=140, causal=True),
    "one query": ONE.but(queries=1, keys=300, causal=True),
    "wide over blocks": ONE.but(queries=140, keys=70, width=128, value_width=128),
    "width 64": ONE.but(queries=130, keys=130, width=64, value_width=64, causal=True),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [
    (spec, name, case, dtype)
    for spec, extra in ((L1, LONG), (SCORES, {}))
    for name, case in (spec.cases | extra).items()
    for dtype in DTYPES
    # An emulation takes its time, and the two 16-bit types differ in conversions alone.
    if DEVICE != "cpu" or dtype != torch.float16 or name in LONG or name == "longer than a block"
]


@pytest.mark.parametrize(
    ("spec", "case", "dtype"),
    [(spec, case, dtype) for spec, _, case, dtype in CASES],
    ids=[f"{spec.name}-{name}-{dtype}" for spec, name, _, dtype in CASES],
)
def test_kernels_agree_with_the_formula(
    spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device
) -> None:
    assert_agrees(spec, case, dtype, device)


# Rows of this width lie on a grid as fine as their largest number lets it be (range.cuh), which the
# few digits of the cases' own numbers are on.
NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "usual": lambda x: x / 3,
    "near each other": lambda x: 3 + x / 1000,
    "all far away": lambda x: x / 3 + 1000,
    "large": lambda x: x * 1e6,
    "small": lambda x: x * 1e-30,
}


@pytest.mark.parametrize("name", NUMBERS)
def test_float32_agrees_with_the_formula_whatever_its_grid(name: str, device: torch.device) -> None:
    case = ONE.but(heads=2, queries=30, keys=70, width=64)
    change = NUMBERS[name]
    assert_changed_case_agrees(L1, case, torch.float32, device, query=change, key=change)
