"""What attn_ops adds to parts of PyTorch that most processes never import.

Importing them here would cost more than attn_ops itself does (`torch.distributed.tensor`, and
`torch.utils.flop_counter`, which imports Triton). So the registrations wait until somebody else
has imported the part; from then on they are in place, and nobody has to ask for them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Each of these modules has a function `register()`.
REGISTRATIONS = {
    "torch.distributed.tensor": "attn_ops.distributed.sharding",
    "torch.export.pt2_archive._package": "attn_ops._ahead",
    "torch.utils.flop_counter": "attn_ops._flops",
}

# What could not be registered, and why: the part of this torch differs from those that are tested.
errors: dict[str, str] = {}


def _register(part: str) -> None:
    try:
        importlib.import_module(REGISTRATIONS[part]).register()
    except (ImportError, AttributeError, TypeError) as error:
        errors[part] = f"{type(error).__name__}: {error}"


class _RegisteringLoader(Loader):
    """Loads a module as `loader` does, and registers afterwards."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        # From here on the module is as if nobody had stood in between.
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register(module.__name__)


class _Finder(MetaPathFinder):
    """Finds nothing itself: it wraps what the finders after it find."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in REGISTRATIONS:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found: Any = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


def install() -> None:
    """Registers with the parts that are there, and with the others once they are imported."""
    for part in REGISTRATIONS:
        if part in sys.modules:
            _register(part)
    sys.meta_path.insert(0, _Finder())
