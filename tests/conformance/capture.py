"""Sees which private ops a call reaches, with which arguments and results."""

from typing import Any, NamedTuple

from torch.utils._python_dispatch import TorchDispatchMode


class Call(NamedTuple):
    op: Any
    args: tuple[Any, ...]
    results: Any


class Calls(TorchDispatchMode):
    """Records every call of an op of the `attn` namespace that is left after autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        if func.namespace == "attn":
            self.calls.append(Call(func, args, results))
        return results

    def of(self, overload: Any) -> tuple[Any, ...]:
        """The arguments of the only call of this op."""
        (found,) = [call.args for call in self.calls if call.op is overload]
        return found
