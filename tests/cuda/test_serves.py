"""Which calls of cosine-sim attention go to the CUDA library."""

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from attn_ops.cosine_sim import cuda
from attn_ops.masks import UNBOUNDED

triton_core = pytest.importorskip("attn_ops.cosine_sim.triton_core", exc_type=ImportError)


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_is_there", lambda device: True)


def rows(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def call_of(**changes: Any) -> Any:
    return triton_core.Inputs(
        *(rows(2, 4, 64, 128), rows(2, 2, 70, 128), rows(2, 2, 70, 128), *[None] * 9),
        left=UNBOUNDED,
        right=UNBOUNDED,
        scale=8.0,
        groups=1,
    )._replace(**changes)


def served(**changes: Any) -> bool:
    inputs = call_of(**changes)
    return cuda.serves(inputs, triton_core.fixed_shift(inputs))


def each(change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    q, k = rows(2, 4, 64, 128), rows(2, 2, 70, 128)
    return {"query": change(q), "key": change(k), "value": change(k.clone())}


SERVED: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"right": 0},
    "window": {"left": 10, "right": 0},
    "shifted diagonal": {"right": 3},
    "key mask": {"mask": torch.ones(2, 1, 1, 70, dtype=torch.bool)},
    "key mask for all batches": {"mask": torch.ones(1, 1, 1, 70, dtype=torch.bool)},
    "float16": each(Tensor.half),
    "relative_bias": {"relative_bias": torch.zeros(4, 133)},
    "relative_bias and a window": {"relative_bias": torch.zeros(4, 133), "left": 10, "right": 0},
    "width 64": each(lambda x: x[..., :64]),
    "rows of all heads side by side": each(
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)
    ),
    "narrow rows": each(lambda x: x[..., :8]),
    "rows as wide as two tiles": each(lambda x: torch.cat([x, x], -1)),
    "one head with any stride": each(lambda x: x.as_strided((1, 1, 64, 128), (3, 5, 128, 1))),
}
LEFT_TO_TRITON: dict[str, dict[str, Any]] = {
    "float32": each(Tensor.float),
    "rows of other than 16 bytes": each(lambda x: x[..., :100]),
    "rows that are too wide": each(lambda x: torch.cat([x, x, x[..., :8]], -1)),
    "values of another width": {"value": rows(2, 2, 70, 64)},
    "few queries": {"query": rows(2, 4, 63, 128)},
    "no keys": {"key": rows(2, 2, 0, 128), "value": rows(2, 2, 0, 128)},
    "packed": {"start": torch.zeros(1, 64).int(), "stop": torch.ones(1, 64).int()},
    "sink": {"sink": torch.zeros(4)},
    "mask of pairs": {"mask": torch.ones(1, 1, 64, 70, dtype=torch.bool)},
    "key mask for each head": {"mask": torch.ones(1, 4, 1, 70, dtype=torch.bool)},
    "bias": {"bias": torch.zeros(1, 1, 1, 70)},
    "relative_bias and a key mask": {
        "relative_bias": torch.zeros(4, 133),
        "mask": torch.ones(2, 1, 1, 70, dtype=torch.bool),
    },
    "relative_bias and float16": {"relative_bias": torch.zeros(4, 133), **each(Tensor.half)},
    "relative_bias and wide rows": {
        "relative_bias": torch.zeros(4, 133),
        **each(lambda x: torch.cat([x, x], -1)),
    },
    "gain": {"key_gain": torch.ones(2, 128)},
    "head_scale": {"head_scale": torch.ones(4)},
    "groups": {"groups": 2},
    "no norms": {"groups": 0},
    "large scale": {"scale": 50.0},
    "expanded": {"key": rows(1, 2, 70, 128).expand(2, 2, 70, 128)},
    "columns apart": {"query": rows(2, 4, 128, 64).mT},
    "rows at odd places": each(lambda x: torch.zeros(2, 2, 70, 132, dtype=x.dtype)[..., :128]),
    "an odd start": {"query": torch.zeros(2 * 4 * 64 * 128 + 4).bfloat16()[4:].view(2, 4, 64, 128)},
}
# Those without an optional tensor.
PLAIN = {
    name: changes
    for name, changes in {**SERVED, **LEFT_TO_TRITON}.items()
    if changes.keys() <= {"query", "key", "value", "left", "right", "scale", "groups"}
}


@pytest.mark.parametrize("name", SERVED)
def test_hopper_serves(name: str) -> None:
    assert served(**SERVED[name])


@pytest.mark.parametrize("name", LEFT_TO_TRITON)
def test_triton_serves(name: str) -> None:
    assert not served(**LEFT_TO_TRITON[name])


def test_nothing_is_served_without_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_is_there", lambda device: False)
    assert not served()


def tangents_served(tangents: dict[str, Any] | None = None, **changes: Any) -> bool:
    inputs = call_of(**changes)
    its_rows = inputs[:3]
    given = {"query": its_rows[0], "key": its_rows[1], "value": its_rows[2]} | (tangents or {})
    return cuda.serves_tangents(inputs._asdict(), its_rows, list(given.values()))


TANGENTS_SERVED = (
    "plain",
    "causal",
    "window",
    "shifted diagonal",
    "width 64",
    "rows of all heads side by side",
    "one head with any stride",
)


@pytest.mark.parametrize("name", SERVED | LEFT_TO_TRITON)
def test_hopper_makes_results_and_tangents_at_once(name: str) -> None:
    assert tangents_served(**(SERVED | LEFT_TO_TRITON)[name]) == (name in TANGENTS_SERVED)


@pytest.mark.parametrize(
    "tangent",
    (
        None,
        rows(1, 2, 70, 128).expand(2, 2, 70, 128),
        torch._efficientzerotensor((2, 2, 70, 128), dtype=torch.bfloat16),
    ),
    ids=("absent", "expanded", "zero without memory"),
)
def test_tangents_of_other_kinds_are_left_to_triton(tangent: Tensor | None) -> None:
    assert not tangents_served({"key": tangent})


@pytest.mark.parametrize("name", PLAIN)
def test_shortest_way_leads_to_the_same_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = call_of(**PLAIN[name])
    kernel = Mock(return_value="kernel")
    monkeypatch.setattr(cuda, "_kernel", lambda: kernel)
    served = cuda.plain(*inputs[:3], *inputs[12:])
    assert served == ("kernel" if name in SERVED else None)
    if name in SERVED:
        query, key, value, mask, relative_bias, left, right, scale = kernel.call_args.args
        assert query is inputs.query and key is inputs.key and value is inputs.value
        assert mask is None and relative_bias is None
        assert (left, right, scale) == (inputs.left, inputs.right, inputs.scale)
