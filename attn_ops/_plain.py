"""Plain calls: three tensors as they usually are and no optional one, where nothing looks on.

Most calls are plain, and most of what they cost on the host went into finding that out. One
question does, and such a call goes from the public function to the kernel. All others go through
the ops, and so do all calls that a transform, a mode, the compiler or a profiler is to see.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from attn_ops import _autograd
from attn_ops._arguments import are_as_usual

Kernel = Callable[..., Any]


def is_plain(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether a call of these and of no optional tensor is plain; then they are checked, too."""
    return (
        _autograd.nothing_looks_on()  # first: the compiler can trace none of the rest
        and not has_torch_function((query,))  # a mode's
        and type(query) is type(key) is type(value) is Tensor
        and are_as_usual(query, key, value)
    )


def forward(
    room: str, num_tensors: int, cuda: Kernel, backward: Kernel, on_cuda: Kernel | None = None
) -> Kernel:
    """What calls `attn::_room_fwd` and asks no dispatcher: call(query, key, value, options).

    num_tensors: of the op, of which all but three are absent. cuda: its kernel on CUDA.
    backward: the op's; the saved tensors are query, key, value and both results.
    on_cuda: a shorter way on CUDA, (query, key, value, *options) -> None where it does not lead.

    It returns the op's first two results.
    """
    name, native = f"_{room}_fwd", f"_{room}_plain"
    overload = getattr(torch.ops.attn, name).default
    absent = (None,) * (num_tensors - 3)

    def elsewhere(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Any:
        if query.is_cuda and on_cuda is not None:
            results = on_cuda(query, key, value, *options)
            if results is not None:
                return results
        kernel = cuda if query.is_cuda else overload
        return kernel(query, key, value, *absent, *options)[:2]

    # The native library has it as an op of its own: an argument takes time, given or not.
    on_cpu = _autograd.kernel(native, "CPU") if hasattr(torch.ops.attn, native) else elsewhere
    return _autograd.plain(name, on_cpu, elsewhere, backward)
