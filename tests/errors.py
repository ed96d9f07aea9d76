"""Errors as texts, to pin; and tensors that are wrong, to raise them."""

import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

ERRORS = (ValueError, TypeError, NotImplementedError)
Cases = dict[str, tuple[tuple[Any, ...], dict[str, Any]]]


def case(*args: Any, **options: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, options


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
        return torch.cat([tensor, tensor.narrow(dim, 0, min(1, tensor.shape[dim]))], dim)
    if way == "shorter":
        return tensor.narrow(dim, 0, draw(st.integers(0, tensor.shape[dim])))
    if way == "fewer ranks" and tensor.shape[dim]:
        return tensor.select(dim, 0)
    return tensor.transpose(dim, draw(st.integers(0, tensor.dim() - 1)))
