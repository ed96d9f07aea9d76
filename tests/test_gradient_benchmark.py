"""`python -m benchmarks.gradients_needed` times every subset of every op's gradients."""

import sys

import pytest
import torch

from benchmarks import gradients_needed


def test_every_gradient_has_a_time_beside_that_of_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    command = "gradients_needed --device cpu --shape 1 2 24 4 --num-times 1 --budget 0.01"
    monkeypatch.setattr(sys, "argv", command.split())
    gradients_needed.main()
    printed = capsys.readouterr().out
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("| ")][1:]
    problems = gradients_needed.problems(24, "cpu")
    assert [row[0].strip() for row in rows] == list(problems)
    for (_, wanted), (_, *cells) in zip(problems.values(), rows):
        timed = [name for name, cell in zip(gradients_needed.COLUMNS, cells) if cell.strip()]
        assert timed == ["all", *wanted]
        assert "(1.00)" in cells[0]
