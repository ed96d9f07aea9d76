"""Errors as texts, to pin."""

import textwrap
from collections.abc import Callable
from typing import Any

import pytest

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
