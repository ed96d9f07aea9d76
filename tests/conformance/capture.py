"""Sees which private ops a call reaches, and with which arguments."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    """Records every call of an op of the `attn` namespace that is left after autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "attn":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))

    def of(self, overload: Any) -> tuple[Any, ...]:
        """The arguments of the only call of this op."""
        (found,) = [args for func, args in self.calls if func is overload]
        return found
