"""`python -m attn_ops.info`: what this installation runs on, and which kernel serves each op."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec

import torch

import attn_ops
from attn_ops import _autograd, _late, _library


@dataclass(frozen=True)
class Serving:
    """Who computes a room's op on a device, and what is missing for a faster kernel."""

    room: str
    device: str
    kernel: str
    missing: str = ""


def triton_version() -> str | None:
    """The version that is installed, found without importing it."""
    if find_spec("triton") is None:
        return None
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "of unknown version"


def gpu() -> str:
    """The GPU's name and architecture, or why there is none."""
    if torch.version.cuda is None:
        return "none: this torch has no CUDA"
    if not torch.cuda.is_available():
        return f"none: torch is built for CUDA {torch.version.cuda} and finds no device"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (sm_{major}{minor}), CUDA {torch.version.cuda}"


def serving_cpu(room: str) -> Serving:
    """C++ where the native library has kernels for the room."""
    native = bool(_library.loaded_libraries) and any(
        torch._C._dispatch_has_kernel_for_dispatch_key(f"attn::{op}", "CPU")
        for op in _library.private_ops(room)
    )
    if native:
        return Serving(room, "cpu", "C++")
    missing = _library.library_error or "the native library has no kernel for it"
    return Serving(room, "cpu", "reference", missing)


def serving_cuda(room: str) -> Serving:
    """CUDA C++ and Triton where the room has such kernels, and what they need is there.

    In place of CUDA C++ the room's Triton serves the same ops where it has them (triton.py), and
    the reference elsewhere. Nothing serves in place of Triton.
    """
    folder = _library.PACKAGE / room
    kernels, missing = [], []
    if (folder / "cuda.py").exists():
        of_room = import_module(f"attn_ops.{room}.cuda")
        reason = of_room.missing(torch.device("cuda")) if torch.cuda.is_available() else None
        instead = [] if (folder / "triton.py").exists() else ["reference"]
        kernels += instead if reason else ["CUDA C++"]
        missing += [reason] if reason else []
    if any(folder.glob("triton*.py")):
        if triton_version() is None:
            missing.append("Triton")
        else:
            kernels.append("Triton")
    if not torch.cuda.is_available():
        missing.append("a GPU, or a torch built for it")
    kernel = f"{' and '.join(kernels) or 'none'}; reference for float64"
    return Serving(room, "cuda", kernel, ", ".join(missing))


def servings() -> list[Serving]:
    """One line per room and device."""
    return [serving(room) for room in _library.ROOMS for serving in (serving_cpu, serving_cuda)]


def report() -> str:
    """The whole text."""
    triton = triton_version()
    facts = {
        "attn_ops": f"{attn_ops.__version__}, Python {platform.python_version()}",
        "torch": torch.__version__,
        "libraries": ", ".join(_library.loaded_libraries) or f"none: {_library.library_error}",
        "CPU": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads",
        "GPU": gpu(),
        "Triton": triton or "not installed (CUDA builds of torch bring it)",
    }
    # Private names of PyTorch that this release of it does not have, and what falls back.
    facts |= {"forward AD": _autograd.unavailable} if _autograd.unavailable else {}
    facts |= {part.removeprefix("torch."): why for part, why in _late.errors.items()}
    lines = [f"{name:<10} {fact}" for name, fact in facts.items()]
    lines += ["", f"{'op':<12} {'device':<7} kernel"]
    for one in servings():
        missing = f" (missing: {one.missing})" if one.missing else ""
        lines.append(f"{one.room:<12} {one.device:<7} {one.kernel}{missing}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
