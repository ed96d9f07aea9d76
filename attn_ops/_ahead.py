"""Ahead-of-time compilation for CUDA: packages that run where there is no Python.

Kernels for CUDA are chosen, and most of them launched, by Python. A package calls ops by name in a
process without it. So when AOTInductor compiles for CUDA, the private ops become what their kernels
do, as those of `torch.library.triton_op` do: ops of the CUDA library, and `attn::_launch` with the
machine code of a Triton kernel (_triton/embed.py). Exported programs keep the private ops.

While that happens tensors have no memory, and sizes may be symbols, on which nothing may depend: a
package runs at other sizes.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attn_ops import _library

try:  # a private name, by which torch.library.triton_op does the same
    from torch._subclasses.functional_tensor import FunctionalTensorMode as _Mode
except ImportError:
    _Mode = None  # type: ignore[assignment,misc]  # packages then call private ops by name


class _Thread(threading.local):
    tracing = False


_thread = _Thread()


class _Left(Exception):
    pass


def tracing() -> bool:
    """Whether a kernel is to leave what it does in the graph of a package."""
    return _thread.tracing


def leave() -> None:
    """Says that what a kernel does next is nothing for a package: it keeps the private op."""
    if tracing():
        raise _Left


def known(condition: bool | torch.SymBool) -> bool:
    """Whether a condition holds for all sizes a package may be run at."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def possible(condition: bool | torch.SymBool) -> bool:
    """Whether a condition holds for some of these sizes."""
    return condition if isinstance(condition, bool) else not known(torch.sym_not(condition))


def is_aligned(x: Tensor) -> bool:
    """Whether a traced tensor begins at a multiple of 16 bytes, as the buffer it views does."""
    return known(x.storage_offset() * x.element_size() % 16 == 0)


def trace_into(op: str, kernel: Callable[..., Any]) -> None:
    """Packages for CUDA hold what `kernel` does in place of `attn::op`."""
    if _Mode is None:
        return

    def rule(mode: Any, overload: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if _is_for_package(args[0]):
            _thread.tracing = True
            try:
                with mode:
                    return kernel(*args, **kwargs)
            except _Left:
                pass
            finally:
                _thread.tracing = False
        return mode.__torch_dispatch__(overload, types, args, kwargs)

    torch.library.register_torch_dispatch(f"attn::{op}", _Mode, rule, lib=_library._library)


def _is_for_package(first: Tensor) -> bool:
    inductor = sys.modules.get("torch._inductor.virtualized")
    return (
        inductor is not None
        and inductor.V.aot_compilation
        and first.device.type == "cuda"
        and first.dtype != torch.float64  # formulas in blocks: a loop over lengths
        and _library.load_cuda_library() is None
        and hasattr(torch.ops.attn, "_launch")
    )


def register() -> None:
    """Loads what packages call, before one is compiled or loaded."""
    if torch.version.cuda is not None:
        _library.load_cuda_library()


_library.fake_cuda("_launch", lambda *args: None)
