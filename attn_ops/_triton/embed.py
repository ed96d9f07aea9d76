"""A launch of a Triton kernel as a node of a graph, which has the kernel's machine code with it.

Inductor embeds kernels itself, but takes neither tuples of tensors and strides nor what only this
library's C++ can launch. Compiled for any sizes: a symbol may be a multiple of 16, never 1.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

from attn_ops._ahead import is_aligned, known


class _Pointer:
    """What Triton has to know of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self.address = 0 if is_aligned(tensor) else tensor.element_size()

    def data_ptr(self) -> int:
        return self.address

    @staticmethod
    def ptr_range() -> int:
        return 0


def _stand_in(value: Any) -> Any:
    """A value that Triton compiles the same kernel for."""
    if isinstance(value, tuple):
        parts = map(_stand_in, value)
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, Tensor):
        return _Pointer(value)
    if isinstance(value, torch.SymInt):
        return 16 if known(value % 16 == 0) else 17
    return value


def _parameters(kind: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """The types and values that are passed at run time: the others are constants."""
    if isinstance(kind, tuple):
        for part in zip(kind, value, strict=True):
            yield from _parameters(*part)
    elif kind != "constexpr":
        yield kind, value


def _compile(kernel: Any, args: Sequence[Any], constants: dict[str, Any]) -> Any:
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True  # which is most of it
        compiled = kernel.warmup(*map(_stand_in, args), grid=(1,), **constants)
    data = compiled.metadata
    # The launcher in C++ knows neither of them.
    assert data.num_ctas == 1 and data.global_scratch_size == 0, (kernel, data)
    return compiled


@dataclass
class _Passed:
    """What a kernel is passed; `kinds` has a letter for each (csrc/common/cuda/embedded.cu)."""

    kinds: str = ""
    read: list[Tensor] = field(default_factory=list)
    written: list[Tensor] = field(default_factory=list)
    integers: list[int] = field(default_factory=list)
    floats: list[float] = field(default_factory=list)

    def add(self, kind: str, value: Any, writes: Sequence[Tensor | None]) -> None:
        if isinstance(value, Tensor):
            target = any(value is x for x in writes)
            (self.written if target else self.read).append(value)
            letter = "w" if target else "r"
            self.kinds += letter.upper() if is_aligned(value) else letter
        elif kind == "fp32":
            self.floats.append(value)
            self.kinds += "f"
        else:
            assert kind in ("i32", "i64"), kind
            self.integers.append(value)
            self.kinds += "i" if kind == "i32" else "l"


def embed(
    kernel: Any, programs: Any, args: Sequence[Any], writes: Sequence[Tensor | None],
    constants: dict[str, Any],
) -> None:  # fmt: skip
    """Leaves the launch of `programs` programs in the graph; `writes`: the tensors it writes."""
    compiled = _compile(kernel, args, constants)
    named = {name: constants[name] for name in kernel.arg_names if name in constants}
    values = kernel.signature.bind(*args, **named).arguments
    passed = _Passed()
    for name, kind in compiled.src.signature.items():
        for part, value in _parameters(kind, values[name]):
            passed.add(part, value, writes)
    assert passed.written, f"{kernel}: which tensors does it write?"
    code, data = compiled.asm["cubin"], compiled.metadata
    torch.ops.attn._launch(
        f"{data.name}:{hashlib.sha256(code).hexdigest()}",
        base64.b64encode(code).decode().rstrip("="),
        *vars(passed).values(), programs, 32 * data.num_warps, data.shared,
    )  # fmt: skip
