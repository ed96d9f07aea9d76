"""The `attn` namespace: loads the native library, or defines the same schemas without it.

The schema text of every op lives in its room's `schemas.txt`. The build compiles that text into the
native library, so that a C++ program can run an exported graph; where there is no native library
Python defines the very same lines, and the references serve.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).parent
NATIVE_LIBRARY = PACKAGE / "lib" / "libattn_ops.so"
CUDA_LIBRARY = PACKAGE / "lib" / "libattn_ops_cuda.so"

# A room is a folder with the schemas of its ops.
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/schemas.txt"))

loaded_libraries: list[str] = []
library_error: str | None = None

# Registrations live as long as this object does.
_library = torch.library.Library("attn", "FRAGMENT")


def schemas(room: str) -> list[str]:
    """The schema lines of a room."""
    return (PACKAGE / room / "schemas.txt").read_text().splitlines()


def private_ops(room: str) -> list[str]:
    """The ops of a room that kernels are registered for: `_cosine_sim_fwd` and so on."""
    names = [schema.partition("(")[0] for schema in schemas(room)]
    return [name for name in names if name.startswith("_")]


def _load_native_library() -> str | None:
    """Loads the native library; returns what stands in the way, or None."""
    if os.environ.get("ATTN_OPS_NO_NATIVE"):
        return "switched off by the environment variable ATTN_OPS_NO_NATIVE"
    if not NATIVE_LIBRARY.exists():
        return (
            "the native library was not built: install a C++ compiler, then "
            "`pip install --no-build-isolation --force-reinstall --no-deps` this package"
        )
    try:
        torch.ops.load_library(str(NATIVE_LIBRARY))
    except OSError as error:
        return f"{NATIVE_LIBRARY.name} does not load: {error}"
    loaded_libraries.append(str(NATIVE_LIBRARY))
    return None


library_error = _load_native_library()
if library_error is not None and not os.environ.get("ATTN_OPS_NO_NATIVE"):
    warnings.warn(
        f"attn_ops: {library_error}. The slower reference formulas serve on the CPU.", stacklevel=2
    )


def define(room: str) -> None:
    """Makes the room's schemas known to PyTorch, but those that the native library has.

    One that was built before an op was added lacks it.
    """
    for schema in schemas(room):
        if not hasattr(torch.ops.attn, schema.partition("(")[0]):
            _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def implement(op: str, kernel: Callable[..., Any], key: str, *, with_keyset: bool = False) -> None:
    """Registers `kernel` for one dispatch key of `attn::op`."""
    _library.impl(op, kernel, key, with_keyset=with_keyset)


def decompose(op: str, function: Callable[..., Any]) -> None:
    """Registers `function`, made of other ops, as the meaning of `attn::op` for every key."""
    implement(op, function, "CompositeImplicitAutograd")
    implement(op, function, "FuncTorchBatchedDecomposition")  # vmap decomposes on a key of its own


def fake(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the fake implementation (shapes and dtypes only) of `attn::op`."""
    return torch.library.register_fake(f"attn::{op}", lib=_library)


# By name: fakes of ops that the CUDA library defines.
_cuda_fakes: dict[str, Callable[..., Any]] = {}


def fake_cuda(op: str, function: Callable[..., Any]) -> None:
    """Registers the fake implementation of `attn::op`, once the CUDA library has defined it."""
    _cuda_fakes[op] = function


@functools.cache
def load_cuda_library() -> str | None:
    """Loads the CUDA kernels, at the first CUDA call; returns what stands in the way, or None."""
    if os.environ.get("ATTN_OPS_NO_NATIVE"):
        return "switched off by the environment variable ATTN_OPS_NO_NATIVE"
    if not CUDA_LIBRARY.exists():
        return (
            "the CUDA library was not built: install nvcc, then "
            "`pip install --no-build-isolation --force-reinstall --no-deps` this package"
        )
    folder = Path(torch.__file__).parent / "lib"
    try:
        # The library names no CUDA library of torch, so that one build serves every torch.
        for name in ("libc10_cuda.so", "libtorch_cuda.so"):
            ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
        torch.ops.load_library(str(CUDA_LIBRARY))
    except OSError as error:
        return f"{CUDA_LIBRARY.name} does not load: {error}"
    loaded_libraries.append(str(CUDA_LIBRARY))
    for op, function in _cuda_fakes.items():
        if hasattr(torch.ops.attn, op):  # one that was built before an op was added lacks it
            fake(op)(function)
    return None


@functools.cache
def triton_room(room: str, module: str = "triton") -> Any:
    """The Triton kernels of a room, imported at the first CUDA launch."""
    try:
        return importlib.import_module(f"attn_ops.{room}.{module}")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise RuntimeError(
            f"attn_ops: {room} on CUDA needs Triton, which is not installed: `pip install triton`"
        ) from error
