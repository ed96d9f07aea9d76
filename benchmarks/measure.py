"""Correctness first, then time: contenders take turns, so that a busy machine is busy for all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch._functorch.config as functorch_config

from benchmarks.cases import Call, Contender, Entry, Inputs, Setting

# |out - reference| / |reference| that a contender may have: several roundings of its inputs' dtype.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 4e-2,
}
WAIT = 2_000_000  # clocks of the device, about a millisecond
SLOW = 5  # budgets that one round may take before its repetition is given up
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass
class Times:
    """What became of one contender in one setting: seconds, or the reason for there being none."""

    name: str
    with_norm: bool = True
    seconds: list[float] = field(default_factory=list)
    failure: str = ""
    setup: float = 0.0  # seconds of compiling, of first calls and of comparing with float64

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


@dataclass
class Exact:
    """The float64 results of the first and the last head, kept for the next contender.

    The first head is that of the first batch, the last one that of the last.
    """

    entry: Entry
    key: object = None
    heads: dict[tuple[int, int], list[torch.Tensor]] = field(default_factory=dict)

    def of(
        self, inputs: Inputs, setting: Setting, with_norm: bool
    ) -> dict[tuple[int, int], list[torch.Tensor]]:
        """Batch and key/value head -> out and the gradients, of it and its query heads."""
        key = (replace(setting, threads=0), with_norm)  # inputs do not depend on threads
        if self.key != key:
            self.key, self.heads = key, {}
            group = setting.heads // setting.kv_heads
            for batch, head in {(0, 0), (setting.batch - 1, setting.kv_heads - 1)}:
                part = inputs.head(batch, head, group)
                out = self.entry.reference(part, setting, with_norm)
                grads = torch.autograd.grad(out, part.leaves(), part.grad_out)
                self.heads[batch, head] = [out.detach(), *grads]
        return self.heads


def check(
    exact: Exact, contender: Contender, call: Call, inputs: Inputs, setting: Setting, grad: bool
) -> tuple[str, dict[str, float]]:
    """Compares with float64.

    Returns what is wrong, or '', and the seconds that the passes took this first time.
    """
    if contender.compiled:
        with torch.set_grad_enabled(grad):
            first = call()
        if grad:
            torch.autograd.grad(first, inputs.leaves(), inputs.grad_out)
    start = time.perf_counter()
    with torch.set_grad_enabled(grad):
        out = call()
    seconds = {"forward": time.perf_counter() - start}
    results = [out]
    if grad:
        results += torch.autograd.grad(out, inputs.leaves(), inputs.grad_out)
        seconds["forward+backward"] = time.perf_counter() - start
    for (batch, head), expected in exact.of(inputs, setting, contender.with_norm).items():
        names = ("out", "grad_query", "grad_key", "grad_value")
        for name, result, right in zip(names, results, expected, strict=False):
            per_head = result.shape[1] // setting.kv_heads
            part = result[batch : batch + 1, head * per_head : (head + 1) * per_head]
            error = relative_error(part.detach(), right)
            if not error <= TOLERANCE[setting.dtype]:
                return f"wrong: {name} is off by {error:.1e}", seconds
    return "", seconds


def timed_call(call: Call, inputs: Inputs, which: str) -> Callable[[], object]:
    """What is timed: a pass in inference, a pass backwards on a kept graph, or both."""
    if which == "backward":
        kept: list[torch.Tensor] = []

        def backward() -> object:
            if not kept:  # in the round that warms up
                kept.append(call())
            return torch.autograd.grad(kept[0], inputs.leaves(), inputs.grad_out, retain_graph=True)

        return backward
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
    torch.cuda._sleep(WAIT)  # the host gets ahead: what is timed is the device, not the launches
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    run()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def measure(
    exact: Exact,
    contenders: list[Contender],
    inputs: Inputs,
    setting: Setting,
    passes: list[str],
    num_times: int,
    budget: float,
) -> dict[str, list[Times]]:
    """Every contender checked; then for each pass `num_times` rounds, or as many as fit `budget`.

    Three rounds at least; on a slow CPU the calls that were checked are the first, or the only one.
    """
    if setting.device == "cpu":
        torch.set_num_threads(setting.threads)
    # A kept graph is walked many times: compiled code may not give its buffers away.
    functorch_config.donated_buffer = "backward" not in passes
    results: dict[str, list[Times]] = {which: [] for which in passes}
    ready: dict[str, list[tuple[Times, Callable[[], object]]]] = {which: [] for which in passes}
    first_round = dict.fromkeys(passes, 0.0)
    for contender in contenders:
        its = inputs.tokens_first() if contender.tokens_first else inputs
        call, failure, seconds = attempt(exact, contender, its, setting, passes != ["forward"])
        setup = seconds["setup"] / len(passes)
        for which in passes:
            times = Times(contender.name, contender.with_norm, failure=failure, setup=setup)
            results[which].append(times)
            if call is not None and not failure:
                ready[which].append((times, timed_call(call, its, which)))
                if which in seconds:
                    first_round[which] += seconds[which]
                    times.seconds.append(seconds[which])
    for which in passes:
        slow = setting.device == "cpu" and first_round[which] > budget
        if not slow:
            for times, _ in ready[which]:
                times.seconds.clear()
        if not slow or first_round[which] <= SLOW * budget:
            take_turns(ready[which], setting.device, num_times, budget, slow)
    return results


def attempt(
    exact: Exact, contender: Contender, inputs: Inputs, setting: Setting, grad: bool
) -> tuple[Call | None, str, dict[str, float]]:
    """The call, why it is not to be timed, and the seconds of its first passes and of all this."""
    call, failure, seconds = None, "", dict[str, float]()
    start = time.perf_counter()
    try:
        prepared = contender.prepare(inputs, setting)
        if isinstance(prepared, str):
            failure = prepared
        else:
            call = prepared
            failure, seconds = check(exact, contender, call, inputs, setting, grad)
    except Exception as error:
        call, failure = None, explain(error)
    seconds["setup"] = time.perf_counter() - start
    return call, failure, seconds


def take_turns(
    ready: list[tuple[Times, Callable[[], object]]],
    device: str,
    num_times: int,
    budget: float,
    slow: bool,
) -> None:
    """Rounds in which everybody runs once; one that warms up comes before, if not slow."""
    flush = None
    if device == "cuda":
        flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    start = time.perf_counter()
    for turn in range(1 if slow else -1, num_times):
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
