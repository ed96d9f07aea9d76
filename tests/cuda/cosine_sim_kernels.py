"""Cosine-sim attention for Hopper, forward and backward, against the formula in float64.

Run by test_kernels.py in a process of its own, where there is no GPU on an emulation of one.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from attn_ops._arguments import fold
from attn_ops.cosine_sim import cuda
from attn_ops.cosine_sim.triton_core import Inputs
from tests.comparison import assert_close, assert_tangent_close
from tests.conformance.evaluate import (
    assert_arguments_agree,
    cotangents,
    in_dtype,
    with_gradients,
)
from tests.conformance.test_forward_mode import tangents_of
from tests.conftest import DEVICE
from tests.cosine_sim.spec import SPEC
from tests.cuda import emulated
from tests.strategies import Case

if DEVICE == "cpu":
    # Warps run in another order each time, some of them seldom: waits that are missing show.
    os.environ["EMULATOR_ORDER"] = "2"
    emulated.load("cosine_sim")
else:
    reason = cuda.missing(torch.device(DEVICE))
    if reason:
        pytest.skip(f"Triton serves: {reason}", allow_module_level=True)

ONE = Case(batch=1, heads=1, kv_heads=1, width=128, value_width=128)
# Keys are normalised by a kernel of their own where 1024 queries read each; causal, where 2048 do.
# Causal tiles go in pairs where there are 4 pairs for a multiprocessor: the emulation has three.
# Up to 64 columns a multiprocessor takes whole heads in the backward where that leaves none idle:
# multiples of three here, of 132 on an H200.
SMALL = {
    "one tile": ONE.but(queries=128, keys=128),
    "several tiles and heads": ONE.but(heads=4, kv_heads=2, queries=150, keys=280),
    "causal with fewer queries than keys": ONE.but(
        batch=2, heads=2, kv_heads=1, queries=150, keys=400, causal=True, strides="transposed"
    ),
    "causal with more queries than keys": ONE.but(queries=333, keys=100, causal=True),
    "many pairs of causal tiles": ONE.but(heads=6, kv_heads=6, queries=260, keys=140, causal=True),
    "one key": ONE.but(queries=65, keys=1),
    "without a scale": ONE.but(queries=130, keys=300, options={"scale": 0.0}),
    "negative scale": ONE.but(queries=130, keys=300, causal=True, options={"scale": -9.0}),
    "window, and keys before all of them": ONE.but(queries=210, keys=420, causal=True, window=100),
    "hidden keys": ONE.but(batch=2, heads=2, kv_heads=1, queries=70, keys=150, mask="BN"),
    "hidden keys and a window": ONE.but(
        batch=2, queries=140, keys=300, mask="BN", causal=True, window=150, strides="transposed"
    ),
    "other widths": ONE.but(
        heads=2, kv_heads=1, queries=130, keys=150, causal=True, strides="transposed"
    ),
    "relative bias": ONE.but(heads=2, kv_heads=1, queries=150, keys=280, relative_bias="H"),
    "one relative bias, and more queries than keys": ONE.but(
        batch=2, heads=2, queries=321, keys=100, relative_bias="1", causal=True
    ),
    "relative bias, and a window": ONE.but(
        queries=210, keys=423, relative_bias="H", causal=True, window=100, strides="transposed"
    ),
    "whole heads of groups, window": ONE.but(
        heads=6, kv_heads=3, queries=150, keys=280, causal=True, window=100
    ),
    "unit keys": ONE.but(heads=8, queries=129, keys=140),
    "unit keys, causal": ONE.but(heads=8, queries=257, keys=150, causal=True, strides="transposed"),
}
LARGE = {
    "512": ONE.but(batch=2, heads=16, kv_heads=16, queries=512, keys=512),
    "512, causal": ONE.but(batch=2, heads=16, kv_heads=16, queries=512, keys=512, causal=True),
    "1024": ONE.but(heads=16, kv_heads=16, queries=1024, keys=1024),
    "4096, causal": ONE.but(heads=8, kv_heads=8, queries=4096, keys=4096, causal=True),
    "grouped heads, causal": ONE.but(
        batch=4, heads=32, kv_heads=8, queries=700, keys=700, causal=True
    ),
    "few queries of many heads": ONE.but(
        batch=2, heads=6, kv_heads=3, queries=64, keys=4099, causal=True
    ),
    "more queries than keys": ONE.but(heads=8, kv_heads=2, queries=3000, keys=1000, causal=True),
    "one past a tile": ONE.but(batch=3, heads=5, kv_heads=5, queries=129, keys=257, causal=True),
    "whole heads": ONE.but(batch=11, heads=12, kv_heads=12, queries=500, keys=512),
    "whole heads of groups, causal": ONE.but(
        batch=22, heads=12, kv_heads=6, queries=512, keys=500, causal=True
    ),
    "window of 512": ONE.but(heads=4, queries=4096, keys=4096, causal=True, window=512),
    "relative bias of long rows": ONE.but(
        batch=2, heads=4, kv_heads=2, queries=2048, keys=2048, relative_bias="H"
    ),
    "relative bias of grouped heads, causal": ONE.but(
        batch=2, heads=8, kv_heads=2, queries=1000, keys=1500, relative_bias="H", causal=True
    ),
    "heads in parts, relative bias": ONE.but(
        batch=2, heads=18, kv_heads=6, queries=20000, keys=300, relative_bias="H", causal=True
    ),
    "hidden keys of grouped heads, causal": ONE.but(
        batch=2, heads=8, kv_heads=2, queries=1000, keys=1500, mask="BN", causal=True
    ),
    "batches in parts, hidden keys": ONE.but(
        batch=4, heads=6, kv_heads=2, queries=20000, keys=300, mask="BN"
    ),
    "batches in parts": ONE.but(batch=4, heads=6, kv_heads=2, queries=20000, keys=300),
    "heads in parts": ONE.but(batch=2, heads=18, kv_heads=6, queries=20000, keys=300, causal=True),
    "transposed": ONE.but(
        batch=2, heads=8, kv_heads=2, queries=640, keys=1025, causal=True, strides="transposed"
    ),
}
CASES = SMALL | (LARGE if DEVICE != "cpu" else {})
MAIN_WIDTHS = (64, 128)
# Tiles are 32, 64, 80, 96, 128, 192 and 256 wide: rows that are narrower or fill them.
OTHER_WIDTHS = (24, 48, 72, 96, 104, 136, 256, *((32, 80, 192) if DEVICE != "cpu" else ()))
DTYPES = (torch.bfloat16, torch.float16)


def is_taken(case: Case, width: int, dtype: torch.dtype) -> bool:
    """relative_bias is taken in narrow rows of bfloat16 alone."""
    return case.relative_bias is None or (dtype == torch.bfloat16 and width <= 128)


def every_run() -> Iterator[tuple[str, int, torch.dtype]]:
    """An emulation takes its time. The two types differ in conversions alone, and what the device
    finds of a mask does not know the width.
    """
    on_gpu = DEVICE != "cpu"
    for name, case in CASES.items():
        for width in MAIN_WIDTHS if on_gpu or case.mask is None else MAIN_WIDTHS[1:]:
            for dtype in DTYPES if on_gpu or name in ("one tile", "unit keys") else DTYPES[:1]:
                yield name, width, dtype
    for name in SMALL if on_gpu else ("other widths",):
        for width in OTHER_WIDTHS:
            for dtype in DTYPES if on_gpu else DTYPES[:1]:
                yield name, width, dtype
    if not on_gpu:  # an order of keys, where they have a kernel of their own for gradients
        yield "hidden keys", 136, torch.bfloat16


RUNS = [run for run in every_run() if is_taken(CASES[run[0]], *run[1:])]
each_run = pytest.mark.parametrize(
    ("name", "width", "dtype"), RUNS, ids=[f"{name}-{width}-{dtype}" for name, width, dtype in RUNS]
)


def arguments_of(case: Case, width: int, dtype: torch.dtype, device: torch.device) -> Any:
    """Rows of every length, one of them zero."""
    arguments = SPEC.build(case.but(width=width, value_width=width), dtype, device)
    for name in ("query", "key"):
        rows = arguments[name].shape[-2]
        lengths = torch.linspace(0.1, 30, rows, device=device).to(dtype)
        lengths[rows // 2] = 0
        arguments[name] *= lengths[:, None]
    return arguments


class Kernels(torch.autograd.Function):
    """Both passes, as the op joins them."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        out, lse = cuda.forward(Inputs(*inputs))
        ctx.save_for_backward(*inputs[:6], out, lse)
        ctx.options = inputs[6:]
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> Any:  # type: ignore[override]
        *tensors, out, lse = ctx.saved_tensors
        inputs = Inputs(*tensors, *ctx.options)
        wanted = {"query", "key", "value", "relative_bias"}
        grads = cuda.backward(inputs, grad_out, grad_lse, out, lse, wanted)
        return tuple(grads.get(name) for name in Inputs._fields)


def kernels(
    query: Tensor, key: Tensor, value: Tensor, scale: float = 8.0, **shared: Any
) -> tuple[Tensor, ...]:
    args = fold("cosine_sim", query, key, value, **shared)
    rows, band = (args.query, args.key, args.value), (args.left, args.right)
    terms = (args.mask, None, args.relative_bias, *[None] * 6)
    results: tuple[Tensor, ...] = Kernels.apply(*rows, *terms, *band, scale, 1)
    return results


@each_run
def test_results_and_gradients_agree_with_the_formula(
    name: str, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    arguments = arguments_of(CASES[name], width, dtype, device)
    exact_arguments = in_dtype(arguments, torch.float64)
    grads = cotangents(*SPEC.formula(**exact_arguments))
    exact = with_gradients(SPEC, SPEC.formula, exact_arguments, *grads)
    same_dtype = with_gradients(SPEC, SPEC.formula, arguments, *grads)
    actual = with_gradients(SPEC, kernels, arguments, *grads)
    rounding = SPEC.rounding(dtype, exact_arguments, *grads)
    for result, truth in exact.items():
        assert_close(result, actual[result], same_dtype[result], truth, rounding)


# Masks, relative_bias and other widths have no such kernel; of the others an emulation runs those
# that differ.
TANGENTS = [x for x, case in CASES.items() if case.mask is case.relative_bias is None]
TANGENTS.remove("other widths")
if DEVICE == "cpu":
    TANGENTS = [
        name
        for name in TANGENTS
        if "unit keys" not in name and "whole" not in name and name != "one tile"
    ]
    TANGENTS.remove("without a scale")


def results_and_tangents(function: Any, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """out, lse and their tangents, where query, key and value have one, equal for all dtypes."""
    names = ("query", "key", "value")
    inputs = tuple(arguments[name] for name in names)
    results = torch.func.jvp(
        lambda *rows: function(**(arguments | dict(zip(names, rows)))), inputs, tangents_of(inputs)
    )
    return dict(zip((*SPEC.results, *(f"tangent of {x}" for x in SPEC.results)), sum(results, ())))


@pytest.mark.parametrize("width", cuda.TANGENT_WIDTHS)
@pytest.mark.parametrize("name", TANGENTS)
def test_results_and_tangents_of_one_kernel_agree_with_the_formula(
    name: str, width: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "_is_there", lambda device: True)
    one_kernel = Mock(wraps=cuda.with_tangents)
    monkeypatch.setattr(cuda, "with_tangents", one_kernel)
    arguments = arguments_of(CASES[name], width, torch.bfloat16, device)
    actual = results_and_tangents(SPEC.run, arguments)
    assert one_kernel.call_count == 1
    exact_arguments = in_dtype(arguments, torch.float64)
    exact = results_and_tangents(SPEC.formula, exact_arguments)
    same_dtype = results_and_tangents(SPEC.formula, arguments)
    rounding = SPEC.rounding(
        torch.bfloat16, exact_arguments, *cotangents(*SPEC.formula(**exact_arguments))
    )
    for result in SPEC.results:
        assert_close(result, actual[result], same_dtype[result], exact[result], rounding)
        name = f"tangent of {result}"
        # Unit vectors and weights have 16 bits, whatever results have.
        assert_tangent_close(name, actual[name], same_dtype[name], exact[name], torch.bfloat16)


FOLLOWED: dict[str, Callable[..., Any]] = {
    "the gradient of a tangent": lambda f, x, t: torch.func.grad(
        lambda x: torch.func.jvp(f, (x,), (t,))[1].float().sum()
    )(x),
    "a backward": lambda f, x, t: torch.func.jvp(f, (x.requires_grad_(),), (t,)),
    "a batch of directions": lambda f, x, t: torch.func.vmap(
        lambda t: torch.func.jvp(f, (x,), (t,))
    )(torch.stack([t, t])),
}


@pytest.mark.parametrize("what", FOLLOWED)
def test_one_kernel_leaves_results_that_something_follows_to_the_op(
    what: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel has no derivative: its results would be constants."""
    monkeypatch.setattr(cuda, "_is_there", lambda device: True)
    one_kernel = Mock(wraps=cuda.with_tangents)
    monkeypatch.setattr(cuda, "with_tangents", one_kernel)
    x = torch.randn(1, 1, 64, 64, device=device).bfloat16()

    def attention(x: Tensor) -> Tensor:
        out: Tensor = SPEC.run(query=x, key=x, value=x)[0]
        return out

    torch.func.jvp(attention, (x,), (x.cos(),))
    assert one_kernel.call_count == 1
    FOLLOWED[what](attention, x, x.cos())
    assert one_kernel.call_count == 1


@pytest.mark.skipif(DEVICE == "cpu", reason="Triton's backward needs a GPU")
@each_run
def test_op_and_its_gradients_agree_with_the_formula(
    name: str,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The op calls this forward, and Triton's backward reads its lse."""
    forward = Mock(wraps=cuda.forward)
    monkeypatch.setattr(cuda, "forward", forward)
    assert_arguments_agree(SPEC, arguments_of(CASES[name], width, dtype, device))
    assert forward.called


@pytest.mark.skipif(DEVICE == "cpu", reason="an emulation has no races")
@pytest.mark.parametrize("width", MAIN_WIDTHS)
@pytest.mark.parametrize("name", ("512, causal", "grouped heads, causal"))
def test_the_same_bits_again(name: str, width: int, device: torch.device) -> None:
    arguments = arguments_of(LARGE[name], width, torch.bfloat16, device)
    first = kernels(**arguments)
    for _ in range(20):
        assert all(torch.equal(x, y) for x, y in zip(kernels(**arguments), first))


LARGEST = torch.finfo(torch.float32).max


@pytest.mark.parametrize("entries", ((LARGEST,), (-LARGEST,), (0.0, LARGEST, -LARGEST, -torch.inf)))
def test_relative_bias_of_any_size_gives_numbers(
    entries: tuple[float, ...], device: torch.device
) -> None:
    case = CASES["relative bias"].but(heads=1, queries=70, keys=150, width=64, value_width=64)
    arguments = SPEC.build(case, torch.bfloat16, device)
    bias = torch.tensor(entries, device=device).repeat(219)[None, :219]
    arguments["relative_bias"] = bias
    grads = cotangents(*SPEC.formula(**arguments))
    results = with_gradients(SPEC, kernels, arguments, *grads)
    assert all(x.isfinite().all() for name, x in results.items() if name != "lse")
    assert not results["lse"].isnan().any()


def test_row_whose_relative_biases_are_far_below_the_others(device: torch.device) -> None:
    """The least of one row is beyond what weights of another could hold."""
    case = CASES["relative bias"].but(heads=1, queries=70, keys=150)
    arguments = SPEC.build(case, torch.bfloat16, device)
    slope = 40.0 * torch.arange(219, device=device)[None]
    arguments["relative_bias"] = slope
    out, lse = kernels(**arguments)
    value, row = arguments["value"], torch.arange(70, device=device)
    torch.testing.assert_close(out, value[:, :, -1:].expand_as(out), rtol=0.01, atol=0.01)
    assert (lse[0, 0] - slope[0, 218 - row]).abs().max() < 9


def test_query_that_sees_no_key_returns_zero(device: torch.device) -> None:
    arguments = arguments_of(CASES["causal with more queries than keys"], 128, torch.half, device)
    out, lse = kernels(**arguments)
    assert not out[:, :, :233].any() and (lse[:, :, :233] == -torch.inf).all()
    assert out[:, :, 233:].any(-1).all() and lse[:, :, 233:].isfinite().all()
