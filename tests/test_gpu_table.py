"""The table of the GPU holds nothing wrong and compares with its bars: few tokens, on a CPU."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_problem, gpu_report, gpu_rows, gpu_table

pytestmark = pytest.mark.usefixtures("torch_as_it_was")


def small(row: gpu_rows.Row) -> gpu_rows.Row:
    """The same problem with few tokens; of a CPU's peers."""
    queries = None if row.queries is None else min(row.queries, 4)
    shape = (min(row.shape[0], 2), min(row.shape[1], 2), 96, 16)
    window = None if row.window is None else 7
    peers = (gpu_rows.SDPA,) if gpu_rows.SDPA in row.peers else ()
    return replace(row, shape=shape, queries=queries, window=window, sequences=3, peers=peers)


def test_the_table_of_the_gpu_has_every_row_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [small(row) for row in gpu_rows.ROWS]
    monkeypatch.setattr(gpu_table, "ROWS", rows)
    command = f"gpu_table --device cpu --num-times 1 --budget 0 --csv {tmp_path}/a.csv"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--plot", f"{tmp_path}/a.png"])
    gpu_table.main()
    printed = capsys.readouterr().out
    assert "wrong" not in printed and "Error" not in printed, printed
    lines = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("|")][2:]
    assert len(lines) == sum(len(row.bars) for row in rows)
    bars = [bar for row in rows for bar in row.bars.values()]
    for cells, bar in zip(lines, bars, strict=True):
        assert bar.unit in cells[5], cells  # something was reached
        assert cells[7].strip() in (("met", "NOT MET") if bar.number else ("",))
    assert f" of {sum(bar.number is not None for bar in bars)} bars met" in printed
    peers = 3  # of float32, twice, and on the host
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 1 + len(lines) + peers
    assert (tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.parametrize("extra", ("", "bias", "mask", "relative_bias", "random"))
def test_what_is_wrong_is_not_in_the_table_of_the_gpu(extra: str) -> None:
    row = next(small(row) for row in gpu_rows.ROWS if row.extra == extra)
    problem = gpu_problem.draw(replace(row, dtype="float32"), "cpu")
    call = gpu_problem.contender(problem, None)
    assert gpu_table.check(problem, call, True) == ""
    assert gpu_table.check(problem, lambda: 1.001 * call(), True).startswith("wrong: out")
    for i, name in enumerate(problem.names):  # out stays, a gradient does not
        leaf = problem.leaves[i]
        grown = tuple(x + 0.001 * (x - x.detach()) if x is leaf else x for x in problem.leaves)
        changed = replace(problem, leaves=grown)
        words = gpu_table.check(problem, gpu_problem.contender(changed, None), True)
        assert words.startswith(f"wrong: grad_{name}")


def test_a_bar_of_another_row_compares_speeds_or_rates() -> None:
    base = gpu_rows.Row("s", "base", (1, 1, 64, 16), {})
    row = gpu_rows.Row("s", "row", (1, 1, 64, 8), {})
    before = [gpu_report.Result(base, "forward", gpu_rows.Bar("ms"), {"we": 1.0})]
    for unit, expected in (("rate", 0.25), ("speed", 0.5)):
        bar = gpu_rows.Bar(unit, 0.5, "base")
        result = gpu_report.Result(row, "forward", bar, {"we": 2.0}).beside(before)
        assert result.reached == expected
        assert result.verdict() == ("met" if expected >= 0.5 else "NOT MET")
    least = gpu_report.Result(row, "forward", gpu_rows.Bar("ms", 3), {"we": 0.002}).beside([])
    assert (least.reached, least.verdict()) == (2.0, "met")
    failed = gpu_report.Result(row, "forward", gpu_rows.Bar("ms", 3), {"we": "wrong"}).beside([])
    assert failed.verdict() == "NOT MET"


def test_random_sequences_hold_all_tokens() -> None:
    (row,) = (row for row in gpu_rows.ROWS if row.extra == "random")
    sizes = gpu_problem.lengths(row)
    assert sizes.sum() == row.shape[2] and sizes.min() >= 16 and len(set(sizes.tolist())) > 50


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("peer", (*gpu_problem.PEERS, gpu_rows.FLEX_BIAS))
def test_peers_of_the_gpu_are_right(
    peer: str, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What they run through is not on a CPU, or slow to compile.
    monkeypatch.setattr(torch, "compile", lambda f=None, **options: f or (lambda g: g))
    if "cuDNN" in peer:
        prepare: Any = gpu_problem.PEERS[peer]
        monkeypatch.setitem(gpu_problem.PEERS, peer, partial(prepare, backend=None))
    row = next(small(row) for row in gpu_rows.ROWS if peer in row.peers)
    row = replace(row, dtype="float32", causal=causal and peer != gpu_rows.FLEX_BIAS)
    problem = gpu_problem.draw(row, "cpu")
    if "Flex" in peer:  # which has no backward on a CPU
        problem.row = replace(row, bars={"forward": gpu_rows.RATE})
        problem.leaves = tuple(x.detach() for x in problem.leaves)
    call = gpu_problem.contender(problem, peer)
    with_norm = peer != gpu_rows.NO_NORM
    assert gpu_table.check(problem, call, with_norm) == ""
    assert gpu_table.check(problem, call, not with_norm).startswith("wrong")
