"""`FlopCounterMode` counts what a hand counts, forward and backward."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import attn_ops
from attn_ops import _flops, _library, masks
from tests.conformance.evaluate import scalar
from tests.conformance.spec import OpSpec


def sees(m: int, n: int, queries: int, keys: int, arguments: dict[str, Any]) -> bool:
    """Whether query m of one sequence sees key n, as SPEC says it."""
    if not arguments.get("causal"):
        return True
    window = arguments.get("window") or queries + keys
    return n <= m + (keys - queries) and n > m + (keys - queries) - window


def pairs(arguments: dict[str, Any], queries: int, keys: int) -> int:
    """Visible pairs of one head, counted one at a time."""
    lengths = [(queries, keys)]
    offsets: list[Any] = [arguments.get(f"cu_seqlens_{side}") for side in "qk"]
    if offsets[0] is not None:
        lengths = list(zip(*(x.diff().tolist() for x in offsets)))
    return sum(
        sees(m, n, *pair, arguments)
        for pair in lengths
        for m in range(pair[0])
        for n in range(pair[1])
    )


def sizes(arguments: dict[str, Any]) -> tuple[int, ...]:
    """B * H, M, N, D, E of public arguments."""
    query, key = arguments["query"], arguments["key"]
    value_width = arguments["value"].shape[-1] if "value" in arguments else 0
    return query.shape[:-2].numel(), query.shape[-2], key.shape[-2], query.shape[-1], value_width


def cosine_sim(arguments: dict[str, Any]) -> tuple[int, int]:
    rows, m, n, d, e = sizes(arguments)
    p = rows * pairs(arguments, m, n)
    return 2 * p * (d + e), 2 * p * (3 * d + 2 * e)


def l1(arguments: dict[str, Any]) -> tuple[int, int]:
    rows, m, n, d, e = sizes(arguments)
    p = rows * pairs(arguments, m, n)
    return p * (3 * d + 2 * e), p * (7 * d + 4 * e)


def l1_scores(arguments: dict[str, Any]) -> tuple[int, int]:
    rows, m, n, d, _ = sizes(arguments)
    return 3 * rows * m * n * d, 5 * rows * m * n * d


def l1_sparse(arguments: dict[str, Any]) -> tuple[int, int]:
    rows, _, _, d, e = sizes(arguments)
    edges = rows * len(arguments["edges"])
    values = e * (2 if "value_reverse" in arguments else 1)
    return edges * (3 * d + 2 * values), edges * (5 * d + 4 * values)


def linear(arguments: dict[str, Any]) -> tuple[int, int]:
    rows, m, n, d, e = sizes(arguments)
    f = (d + 1) * (d + 2) // 2 if arguments.get("feature_map") == "taylor" else d
    written, read = 2 * rows * n * f * e, 2 * rows * m * f * e
    of_decay = 3 * rows * (m + n) * f * e if arguments.get("decay") is not None else 0
    return written + read, (written + read) * 5 // 2 + of_decay


HAND = {
    "cosine_sim": cosine_sim,
    "l1": l1,
    "l1_scores": l1_scores,
    "l1_sparse": l1_sparse,
    "linear": linear,
    "linear_with_state": linear,
}


def counted(mode: FlopCounterMode) -> int:
    ops = mode.get_flop_counts()["Global"]
    return sum(count for op, count in ops.items() if str(op).startswith("attn."))


def test_forward_and_backward_are_counted_as_by_hand(
    spec: OpSpec, named: str, device: torch.device
) -> None:
    arguments = spec.build(spec.cases[named], torch.float32, device)
    forward, backward = HAND[spec.name](arguments)
    leaves = [x.requires_grad_() for x in spec.floating(arguments).values()]
    with FlopCounterMode(display=False) as mode:
        total = scalar(spec.run(**arguments))
        assert counted(mode) == forward
        torch.autograd.grad(total, leaves, materialize_grads=True)
    assert counted(mode) == forward + backward


@pytest.mark.parametrize("symbolic", (False, True), ids=("numbers", "symbols"))
def test_fake_tensors_are_counted_the_same(
    spec: OpSpec, symbolic: bool, device: torch.device
) -> None:
    """With sizes that are symbols too, as the compiler counts where it decides what to keep."""
    arguments = spec.build(spec.cases["everything"], torch.float32, device)
    shapes = ShapeEnv() if symbolic else None
    with FakeTensorMode(shape_env=shapes) as fakes, FlopCounterMode(display=False) as mode:
        spec.run(
            **{
                name: fakes.from_tensor(x) if isinstance(x, Tensor) else x
                for name, x in arguments.items()
            }
        )
    assert counted(mode) == HAND[spec.name](arguments)[0]


@pytest.mark.ops("linear_step")
def test_step_is_counted_as_by_hand(device: torch.device) -> None:
    """The new token's product is added to the state, and the query reads it."""
    batch, heads, width, value_width = 2, 4, 6, 5
    query = torch.rand(batch, heads, 1, width, device=device)
    key, value = query[:, :2], torch.rand(batch, 2, 1, value_width, device=device)
    state = torch.zeros(batch, heads, width, value_width, device=device)
    with FlopCounterMode(display=False) as mode:
        attn_ops.linear_attention_step(query, key, value, state, state[..., 0].clone())
    assert counted(mode) == batch * heads * 4 * width * value_width


def test_every_private_op_has_a_law() -> None:
    lines = [line for room in _library.ROOMS for line in _library.schemas(room)]
    private = {name for line in lines if (name := line.partition("(")[0]).startswith("_")}
    assert private <= _flops.LAWS.keys()
    assert all(getattr(torch.ops.attn, op) in flop_registry for op in private)


@example(queries=5, keys=0, causal=True, window=1)
@example(queries=0, keys=5, causal=True, window=None)
@given(
    queries=st.integers(0, 12),
    keys=st.integers(0, 12),
    causal=st.booleans(),
    window=st.one_of(st.none(), st.integers(1, 20)),
)
def test_pairs_of_a_band_are_counted_exactly(
    queries: int, keys: int, causal: bool, window: int | None
) -> None:
    window = window if causal else None
    left, right = masks.band(causal, window)
    expected = pairs({"causal": causal, "window": window}, queries, keys)
    assert _flops.visible_pairs(queries, keys, left, right) == expected


def test_pairs_that_nobody_can_count_one_by_one() -> None:
    length = 1 << 20
    causal = length * (length + 1) // 2
    assert _flops.visible_pairs(length, length, *masks.band(True, None)) == causal
    assert _flops.visible_pairs(length, length, *masks.band(False, None)) == length * length
    window = 4096
    assert _flops.visible_pairs(length, length, *masks.band(True, window)) == (
        window * length - window * (window - 1) // 2
    )


@pytest.mark.parametrize("first", ("attn_ops", "torch.utils.flop_counter"))
def test_formulas_are_there_whoever_is_imported_first(first: str) -> None:
    program = (
        f"import sys, {first}, attn_ops, torch\n"
        "assert ('torch.utils.flop_counter' in sys.modules) == ('attn_ops' not in sys.argv)\n"
        "from torch.utils.flop_counter import flop_registry\n"
        "assert torch.ops.attn._cosine_sim_fwd in flop_registry\n"
        "from attn_ops import _late\n"
        "assert not _late.errors, _late.errors\n"
    )
    subprocess.run([sys.executable, "-c", program, first], check=True)
