"""Writes docs/support.md: which door of PyTorch is open for which op, as the tests of a run found.

python -m pytest -p tests.doors.support_table --support-table docs/support.md tests

A cell is a check mark only if tests of that door ran for that op in that run, and all of them
passed. On another device (ATTN_OPS_TEST_DEVICE=cuda) the same command replaces that device's part,
which is that of a machine with as many GPUs.
"""

from __future__ import annotations

import os
import platform
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

OPCHECK = "`torch.library.opcheck`"
COMPILE = "`torch.compile`, dynamic lengths, no graph break"
EXPORT = "`torch.export`, strict and not, dynamic, saved, decomposed"
PRECISION = "`set_float32_matmul_precision`"
SUBCLASSES = "tensor subclasses, plain and with `__torch_dispatch__`"
VMAP = "`vmap`, per-sample gradients"
# The doors, in the order of the table: what a test file, or the tests of it whose names begin so,
# ask.
DOORS = {
    "conformance/test_numerics.py": "float64, float32, bfloat16, float16",
    "conformance/test_opcheck.py": OPCHECK,
    "linear/test_step.py::test_passes_opcheck": OPCHECK,
    "conformance/test_compile.py": COMPILE,
    "linear/test_step.py::test_compiled_steps": COMPILE,
    "doors/test_compile.py::test_cuda_graphs": "CUDA graphs (`reduce-overhead`)",
    "doors/test_compile.py::test_batch_and_heads": "`torch.compile`, dynamic batch and heads",
    "doors/test_compile.py::test_compiled_autograd": "compiled autograd",
    "doors/test_compile.py::test_scale": "a compiled `scale` tensor",
    "doors/test_compile.py::test_vmap": "`vmap` inside of `torch.compile`",
    "doors/test_compile.py::test_second_process": "Inductor's cache in a second process",
    "conformance/test_export.py": EXPORT,
    "linear/test_step.py::test_exported_program": EXPORT,
    "doors/test_aoti.py": "AOTInductor package run from Python",
    "doors/test_aoti_cpp.py": "AOTInductor package run from C++ without Python",
    "doors/test_onnx.py": "ONNX, run in onnxruntime",
    "conformance/test_autograd.py": "gradcheck, gradgradcheck, forward mode",
    "conformance/test_func.py": "`torch.func`: grad, jvp, vjp, Jacobians, Hessian, nested",
    "conformance/test_forward_mode.py": "forward mode in linear memory, eager and compiled",
    "conformance/test_vmap.py": VMAP,
    "linear/test_step.py::test_vmap": VMAP,
    "conformance/test_packed_vmap.py": "`vmap` over packed sequences",
    "doors/test_autograd.py::test_anomaly": "anomaly mode",
    "doors/test_autograd.py::test_hooks": "hooks of tensors and of saved tensors",
    "doors/test_autograd.py::test_save_on_cpu": "`save_on_cpu`",
    "doors/test_autograd.py::test_modules": "per-sample gradients of a module's parameters",
    "conformance/test_gradients_needed.py": "only the gradients that are needed",
    "conformance/test_autocast.py": "autocast",
    "doors/test_precision.py::test_grad_scaler": "`GradScaler`",
    "doors/test_precision.py::test_float32": PRECISION,
    "doors/test_precision.py::test_a_step": PRECISION,
    "doors/test_deterministic.py": "`use_deterministic_algorithms`",
    "conformance/test_memory.py": "the same bits in every run, memory linear in the length",
    "conformance/test_checkpoint.py": "activation checkpointing",
    "doors/test_checkpointing.py": "selective checkpointing by `save_list()`, eager and compiled",
    "doors/test_flops.py": "`FlopCounterMode` equal to hand counts",
    "doors/test_tracing.py::test_profiler": "profiler and its trace show the op",
    "doors/test_tracing.py::test_fake": "`FakeTensorMode`",
    "doors/test_modes.py::test_dispatch_mode": "dispatch modes, that look and that replace",
    "doors/test_modes.py::test_function_mode": "function modes, likewise",
    "doors/test_modes.py::test_plain": SUBCLASSES,
    "doors/test_modes.py::test_wrapper": SUBCLASSES,
    "doors/test_modes.py::test_a_step": SUBCLASSES,
    "conformance/test_meta.py": "meta device",
    "doors/test_dtensor.py": "DTensor over batch and heads",
    "doors/test_context_parallel.py": "context parallel over the sequence",
    "doors/test_fsdp_tensor_parallel.py": "FSDP2 and tensor parallelism of the GPT",
}
# Files whose tests ask one op.
OPS_OF_FILES = {"linear/test_step.py": ("linear_step",)}
# The columns; another test without a spec names its ops with @pytest.mark.ops(...).
OPS = (
    "cosine_sim", "l1", "l1_scores", "l1_sparse", "linear", "linear_with_state", "linear_step",
)  # fmt: skip
MARKS = {"passed": "✓", "failed": "✗", "skipped": ""}

Outcomes = dict[tuple[str, str], set[str]]


def file_of(item: pytest.Item) -> str:
    return "/".join(item.path.parts[-2:])


def door_of(item: pytest.Item) -> str | None:
    """The door that a test knocks at."""
    for key, door in DOORS.items():
        at, _, test = key.partition("::")
        if at == file_of(item) and item.name.startswith(test):
            return door
    return None


def ops_of(item: pytest.Item) -> tuple[str, ...]:
    marker = item.get_closest_marker("ops")
    if marker is not None:
        return marker.args
    callspec = getattr(item, "callspec", None)
    spec = callspec.params.get("spec") if callspec is not None else None
    return OPS_OF_FILES.get(file_of(item), ()) if spec is None else (spec.name,)


def mark(outcomes: set[str]) -> str:
    """The worst of what happened: a failure, else a pass, else nothing."""
    for outcome in ("failed", "passed"):
        if outcome in outcomes:
            return MARKS[outcome]
    return ""


def table(outcomes: Outcomes) -> str:
    """Doors that were tried, by op."""
    lines = [f"| | {' | '.join(OPS)} |", f"|---|{'---|' * len(OPS)}"]
    for door in dict.fromkeys(DOORS.values()):
        cells = [mark(outcomes.get((door, op), set())) for op in OPS]
        lines.append(f"| {door} | {' | '.join(cells)} |")
    return "\n".join(lines)


def heading(device: str) -> str:
    """The device and, of GPUs, how many there were: tests of two are skipped where there is one."""
    kind = device.partition(":")[0]
    if kind != "cuda":
        return f"## {kind}"
    return f"## cuda: {torch.cuda.device_count()} x {torch.cuda.get_device_name()}"


def section(device: str, outcomes: Outcomes, counts: dict[str, int]) -> str:
    """The part of one device, its torch above it."""
    tests = ", ".join(f"{counts[outcome]} {outcome}" for outcome in MARKS)
    facts = f"torch {torch.__version__}, Python {platform.python_version()}; tests: {tests}"
    return f"{heading(device)}\n\n{facts}.\n\n{table(outcomes)}\n"


PREFACE = """# Doors of PyTorch, by op

Written by the tests themselves, never by hand:

    python -m pytest -p tests.doors.support_table --support-table docs/support.md tests

✓: tests of this door ran for this op, and all of them passed in that run. ✗: one failed. Nothing:
none ran.
"""


def write(path: Path, device: str, part: str) -> None:
    """Replaces the part of this device; those of others stay as their own runs wrote them."""
    parts = {}
    if path.exists():
        for old in path.read_text().split("\n## ")[1:]:
            parts["## " + old.partition("\n")[0]] = "## " + old.rstrip("\n") + "\n"
    parts[heading(device)] = part
    path.write_text("\n".join([PREFACE, *(parts[name] for name in sorted(parts))]))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--support-table", type=Path, help="write the table of doors into this file")


class Recorder:
    """Collects what became of each door and op."""

    def __init__(self) -> None:
        self.outcomes: Outcomes = defaultdict(set)
        self.counts: dict[str, int] = dict.fromkeys(MARKS, 0)

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        door = door_of(item)
        for op in ops_of(item) if door is not None else ():
            item.user_properties.append(("support", (door, op)))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return  # of setup and teardown only what went wrong counts
        self.counts[report.outcome] += 1
        for name, value in report.user_properties:
            if name == "support":
                key: Any = value  # a list where pytest-xdist sent it
                self.outcomes[key[0], key[1]].add(report.outcome)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        path: Any = session.config.getoption("support_table")
        if not hasattr(session.config, "workerinput"):  # not in a worker of pytest-xdist
            device = os.environ.get("ATTN_OPS_TEST_DEVICE", "cpu")
            write(path, device, section(device, self.outcomes, self.counts))


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("support_table") is not None:
        config.pluginmanager.register(Recorder(), "support_table_recorder")
