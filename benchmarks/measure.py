"""Correctness first, then time: contenders take turns, so that a busy machine is busy for all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks.cases import Call, Contender, Entry, Inputs, Setting

# |out - reference| / |reference| that a contender may have: several roundings of its inputs' dtype.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 4e-2,
}
SLOW = 6  # budgets that one round may take before its repetition is given up
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass
class Times:
    """What became of one contender in one setting: seconds, or the reason for there being none."""

    contender: Contender
    seconds: list[float] = field(default_factory=list)
    failure: str = ""

    @property
    def fastest(self) -> float:
        """Shared machines only ever slow a run down, so the minimum repeats best."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """The usual run."""
        return statistics.median(self.seconds)


def explain(error: Exception) -> str:
    """One line on why a contender did not run."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in text for words in OUT_OF_MEMORY
    ):
        return "out of memory"
    return f"{type(error).__name__}: {text.splitlines()[0][:60] if text else ''}"


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """|ours - exact| / |exact|; NaN stays NaN."""
    return float((ours.double() - exact).norm() / exact.norm())


def check(
    entry: Entry, contender: Contender, call: Call, inputs: Inputs, setting: Setting, grad: bool
) -> tuple[str, float]:
    """Compares the first and the last key/value head with float64.

    Returns what is wrong, or '', and the seconds that the call took.
    """
    start = time.perf_counter()
    out = call()
    names, results = ["out"], [out]
    if grad:
        names += ["grad_query", "grad_key", "grad_value"]
        results += torch.autograd.grad(out, inputs.leaves(), inputs.grad_out)
    seconds = time.perf_counter() - start
    group = setting.heads // setting.kv_heads
    for head in {0, setting.kv_heads - 1}:
        exact_inputs = inputs.heads(head, 1, group)
        exact_out = entry.reference(exact_inputs, setting, contender.with_norm)
        exact = [exact_out]
        if grad:
            exact += torch.autograd.grad(exact_out, exact_inputs.leaves(), exact_inputs.grad_out)
        for name, result, expected in zip(names, results, exact, strict=True):
            per_head = result.shape[1] // setting.kv_heads
            part = result[:, head * per_head : (head + 1) * per_head]
            error = relative_error(part.detach(), expected.detach())
            if not error <= TOLERANCE[setting.dtype]:
                return f"wrong: {name} is off by {error:.1e}", seconds
    return "", seconds


def timed_call(call: Call, inputs: Inputs, which: str) -> Callable[[], object]:
    """What is timed: a pass in inference, a pass backwards on a kept graph, or both."""
    if which == "backward":
        out = call()
        return lambda: torch.autograd.grad(out, inputs.leaves(), inputs.grad_out, retain_graph=True)
    if which == "forward+backward":
        return lambda: torch.autograd.grad(call(), inputs.leaves(), inputs.grad_out)

    def forward() -> object:
        with torch.no_grad():
            return call()

    return forward


def time_once(run: Callable[[], object], device: str, flush: torch.Tensor | None) -> float:
    """Seconds of one call."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    assert flush is not None
    flush.zero_()  # the second-level cache holds nothing of the inputs
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    run()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def measure(
    entry: Entry,
    contenders: list[Contender],
    inputs: Inputs,
    setting: Setting,
    which: str,
    num_times: int,
    budget: float,
) -> list[Times]:
    """Every contender checked, then `num_times` rounds, or (3 at least) as many as fit `budget`.

    On a CPU where one round would take many budgets, the calls that were checked are the round.
    """
    if setting.device == "cpu":
        torch.set_num_threads(setting.threads)
    results, ready = [], []
    for contender in contenders:
        times = Times(contender)
        results.append(times)
        try:
            call = contender.prepare(inputs, setting)
            if isinstance(call, str):
                times.failure = call
                continue
            grad = which != "forward"
            times.failure, seconds = check(entry, contender, call, inputs, setting, grad)
            if not times.failure:
                ready.append((times, timed_call(call, inputs, which), seconds))
        except Exception as error:
            times.failure = explain(error)
    in_one_round = sum(seconds for _, _, seconds in ready)
    if setting.device == "cpu" and which != "backward" and in_one_round > SLOW * budget:
        for times, _, seconds in ready:
            times.seconds.append(seconds)
        return results
    warm_up = setting.device == "cuda" or in_one_round < budget / 4
    turns = [(times, run) for times, run, _ in ready]
    take_turns(turns, setting.device, num_times, budget, warm_up)
    return results


def take_turns(
    ready: list[tuple[Times, Callable[[], object]]],
    device: str,
    num_times: int,
    budget: float,
    warm_up: bool,
) -> None:
    """Rounds in which everybody runs once; one that warms up does not count."""
    flush = None
    if device == "cuda":
        flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    start = time.perf_counter()
    for turn in range(-1 if warm_up else 0, num_times):
        if turn >= 3 and time.perf_counter() - start > budget:
            break
        for times, run in ready:
            if times.failure:
                continue
            try:
                seconds = time_once(run, device, flush)
            except Exception as error:
                times.failure = explain(error)
                continue
            if turn >= 0:
                times.seconds.append(seconds)
