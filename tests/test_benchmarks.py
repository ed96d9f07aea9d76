"""The runner times nothing that is wrong, and reports what could not run."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import run
from benchmarks.cases import Contender, Entry, Inputs, Setting, draw
from benchmarks.measure import Exact, measure

SETTING = Setting("cpu", torch.float32, 1, 2, 1, 16, 8, causal=True, mask_prob=0.3)


def computed(contender: Contender, inputs: Inputs) -> Tensor:
    """The contender's output."""
    call = contender.prepare(inputs, SETTING)
    assert not isinstance(call, str), call
    return call()


def outcome(call: Callable[[Inputs], Tensor]) -> str:
    """What becomes of a contender that computes `call(inputs)`."""
    exact = Exact(run.OPS["cosine_sim"])
    contender = Contender("it", lambda inputs, setting: lambda: call(inputs))
    torch_threads = torch.get_num_threads()
    try:
        passes = ["forward", "forward+backward"]
        results = measure(exact, [contender], draw(SETTING), SETTING, passes, 3, 0.1)
    finally:
        torch.set_num_threads(torch_threads)
    for (times,) in results.values():
        assert bool(times.seconds) != bool(times.failure)
    return times.failure


def test_every_default_contender_is_right() -> None:
    entry = run.OPS["cosine_sim"]
    for contender in entry.contenders("cpu", everyone=False):
        assert outcome(partial(computed, contender)) == ""


@pytest.mark.parametrize("factor", [1.001, torch.nan])
def test_wrong_contender_is_not_timed(factor: float) -> None:
    right = run.OPS["cosine_sim"].ours
    assert outcome(lambda inputs: factor * computed(right, inputs)).startswith("wrong: ")


def test_out_of_memory_is_reported_as_such() -> None:
    def call(inputs: Inputs) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert outcome(call) == "out of memory"
    assert outcome(lambda inputs: torch.empty(1 << 56)) == "out of memory"


@pytest.mark.parametrize("only", ["--only-forwards", "--only-backwards"])
def test_command_writes_a_table_a_csv_file_and_a_plot(
    only: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    command = "run --op cosine_sim --device cpu --causal --mask-prob 0.2 --num-times 2 --plot"
    command += f" --dtype float32 --seq-lens 32 64 --heads 2 --head-dim 16 --csv {only}"
    monkeypatch.setattr(sys, "argv", command.split())
    run.main()
    printed = capsys.readouterr().out
    assert "| ratio |" in printed
    assert "wrong" not in printed
    which = only.removeprefix("--only-").removesuffix("s")
    assert (tmp_path / f"cosine_sim-cpu-{which}.png").stat().st_size > 1000
    lines = (tmp_path / "cosine_sim-cpu.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * len(run.OPS["cosine_sim"].contenders("cpu", everyone=False))


def test_an_entry_is_data() -> None:
    for entry in run.OPS.values():
        assert isinstance(entry, Entry)
        assert {"forward", "backward", "forward+backward"} == entry.flops(SETTING).keys()
