"""Errors as texts, to pin; and tensors that are wrong, to raise them."""

import re
import textwrap
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.exc import TorchRuntimeError
from torch.fx.experimental.proxy_tensor import make_fx

ERRORS = (ValueError, TypeError, NotImplementedError)
Cases = dict[str, tuple[tuple[Any, ...], dict[str, Any]]]


def case(*args: Any, **options: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, options


def ones(*sizes: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.ones(sizes, dtype=dtype, device=device)


def layout_cases(q: Tensor, k: Tensor, v: Tensor, merged: tuple[Tensor, ...]) -> Cases:
    """Query, key and value that do not fit each other; q [2, 4, M, 8], k [2, 2, 7, 8], v alike."""
    return {
        "query of rank 2": case(q[0, 0], k, v),
        "query of integers": case(q.int(), k, v),
        "query of complex numbers": case(q.to(torch.complex64), k, v),
        "query sparse": case(q.to_sparse(), k, v),
        "query nested": case(torch.nested.nested_tensor([q[0], q[1]]), k, v),
        "query too wide": case(ones(*q.shape[:3], 257), ones(2, 2, 7, 257), v),
        "query of width 0": case(ones(*q.shape[:3], 0), ones(2, 2, 7, 0), v),
        "key of rank 2": case(q, ones(7, 8), v),
        "key of rank 4 beside a merged query": case(merged[0], k, v),
        "value of rank 4 beside a merged query": case(*merged[:2], v),
        "key of another dtype": case(q, k.half(), v),
        "key on another device": case(q, k.to("meta"), v),
        "key of another width": case(q, ones(2, 2, 7, 16), v),
        "key of another batch size": case(q, ones(3, 2, 7, 8), ones(3, 2, 7, 6)),
        "key broadcast over the batch": case(q, ones(1, 2, 7, 8), ones(1, 2, 7, 6)),
        "heads that do not divide": case(q, ones(2, 3, 7, 8), ones(2, 3, 7, 6)),
        "key of no heads": case(q, ones(2, 0, 7, 8), ones(2, 0, 7, 6)),
        "value of another rank than key": case(q, ones(2, 7, 8), v),
        "value of another dtype": case(q, k, v.double()),
        "value of another batch size": case(q, k, ones(3, 2, 7, 6)),
        "value of another length": case(q, k, ones(2, 2, 8, 6)),
        "value of other heads": case(q, k, ones(2, 4, 7, 6)),
        "value too wide": case(q, k, ones(2, 2, 7, 300)),
    }


def error_of(function: Callable[..., Any], *args: Any, **options: Any) -> Exception:
    with pytest.raises(ERRORS) as caught:
        function(*args, **options)
    return caught.value


def described(name: str, error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    return f"{name}\n" + textwrap.fill(text, 96, initial_indent="    ", subsequent_indent="    ")


def texts(function: Callable[..., Any], cases: Cases) -> str:
    errors = {name: error_of(function, *args, **kw) for name, (args, kw) in cases.items()}
    return "\n".join(described(name, error) for name, error in errors.items())


def assert_compiling_raises_the_same_words(
    op: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    expected = error_of(op, *args, **options)
    torch.compiler.reset()
    compiled = torch.compile(lambda *args: op(*args, **options), backend="eager")
    with pytest.raises((TorchRuntimeError, *ERRORS)) as caught:
        compiled(*args)
    assert str(expected).split(", got")[0] in str(caught.value)


Tracing = Literal["fake", "symbolic"]
TRACING: tuple[Tracing, ...] = ("fake", "symbolic")


def without_sizes(error: Exception) -> str:
    return re.sub(r"s?\d+( [+-] s?\d+)*", "#", str(error).split(", got")[0])


def assert_tracing_raises_the_same(
    op: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any], mode: Tracing
) -> None:
    """make_fx with fake tensors, as export and AOTAutograd trace; symbols stand for sizes."""
    expected = error_of(op, *args, **options)
    tensors = {k: x for k, x in options.items() if isinstance(x, Tensor)}
    rest = {k: x for k, x in options.items() if k not in tensors}

    def call(args: tuple[Tensor, ...], tensors: dict[str, Tensor]) -> Tensor:
        return op(*args, **tensors, **rest)

    error = error_of(make_fx(call, tracing_mode=mode), args, tensors)
    assert type(error) is type(expected)
    assert without_sizes(error) == without_sizes(expected)


def assert_exporting_raises_the_same(op: Callable[..., Any], *args: Tensor) -> None:
    class Module(torch.nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            return op(*args)

    error = error_of(lambda: torch.export.export(Module(), args, strict=False))
    assert str(error) == str(error_of(op, *args))


OTHER_DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
)
WAYS = ("dtype", "longer", "shorter", "fewer ranks", "more ranks", "transposed", "device", "kept")


@st.composite
def spoilt(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    """The same tensor, wrong in some way (or not: a transposed square is as good)."""
    way = draw(st.sampled_from(WAYS))
    if way == "dtype":
        return tensor.to(draw(st.sampled_from(OTHER_DTYPES)))
    if way == "device":
        return tensor.to("meta")
    if way == "more ranks":
        return tensor.unsqueeze(draw(st.integers(0, tensor.dim())))
    if way == "kept" or tensor.dim() == 0:
        return tensor
    dim = draw(st.integers(0, tensor.dim() - 1))
    if way == "longer":
        last = max(tensor.shape[dim] - 1, 0)  # again: offsets, of which two are longer, do not fall
        return torch.cat([tensor, tensor.narrow(dim, last, min(1, tensor.shape[dim]))], dim)
    if way == "shorter":
        return tensor.narrow(dim, 0, draw(st.integers(0, tensor.shape[dim])))
    if way == "fewer ranks" and tensor.shape[dim]:
        return tensor.select(dim, 0)
    return tensor.transpose(dim, draw(st.integers(0, tensor.dim() - 1)))
