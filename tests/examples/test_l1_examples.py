"""The examples of L1 attention: their tasks are what they say, and a few steps show it."""

from dataclasses import replace
from pathlib import Path

import pytest
import set_search
import symmetric_matching as matching
import torch

TINY = matching.Size(tokens=5, batch=16, steps=4, seeds=2, dim=16, heads=2)


def test_exactly_two_tokens_are_equal_and_their_distance_is_asked() -> None:
    tokens, target = matching.draw_batch(TINY, torch.Generator().manual_seed(3))
    equal = (tokens.unsqueeze(-2) == tokens.unsqueeze(-3)).all(-1)  # [S, B, N, N]
    assert (equal.sum((-1, -2)) == TINY.tokens + 2).all()
    first, second = equal.triu(1).nonzero()[:, 2:].unbind(1)
    distance = (second - first).view(TINY.seeds, TINY.batch).float()
    torch.testing.assert_close(target * matching.variance(5) ** 0.5 + 2, distance)
    assert set(distance.flatten().tolist()) == {1.0, 2.0, 3.0, 4.0}


def test_a_constant_answer_has_the_loss_one() -> None:
    size = replace(TINY, batch=20_000)
    _, target = matching.draw_batch(size, torch.Generator().manual_seed(3))
    assert target.mean().item() == pytest.approx(0, abs=0.02)
    assert target.square().mean().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("attention", matching.ATTENTIONS)
def test_seeds_share_nothing(attention: str) -> None:
    model = matching.Ensemble(attention, 2, True, TINY)
    tokens, target = matching.draw_batch(TINY, torch.Generator().manual_seed(3))
    losses = model.losses(tokens, target)
    for name, gradient in zip(
        dict(model.named_parameters()), torch.autograd.grad(losses[0], list(model.parameters()))
    ):
        assert gradient[0].any(), name
        assert not gradient[1].any(), name


def test_positions_are_seen() -> None:
    model = matching.Ensemble("l1", 1, False, TINY)
    tokens, _ = matching.draw_batch(TINY, torch.Generator().manual_seed(3))
    assert (model(tokens) - model(tokens.roll(1, 2))).abs().max() > 1e-3


def test_steps_are_those_of_the_first_stretch_below_the_threshold() -> None:
    curves = [[1.0, 0.4, 0.6, 0.05], [1.0, 0.9, 0.8, 0.7]]
    run = matching.Run("l1", 1, False, replace(TINY, steps=40), "a CPU", 1.0, curves)
    assert run.steps_to(0.5) == [20, None]
    assert run.steps_to(0.1) == [40, None]
    assert matching.median_steps(run.steps_to(0.5)) == "20 (1 of 2)"
    assert matching.median_steps([None]) == "-"


def test_matching_is_learned() -> None:
    size = matching.Size(4, 64, 500, 1, dim=16, learning_rate=1e-2)
    run = matching.train("l1", 1, False, size, "cpu")
    assert run.curves[0][-1] < 0.3 < 0.8 < run.curves[0][0]


def test_processes_tell_of_what_others_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(matching, "SMALL", TINY)
    options = f"--runs {tmp_path}/runs --out {tmp_path}"
    matching.main(f"{options} --only dot --steps 3".split())  # another size: not told of
    matching.main(f"{options} --only l1".split())
    matching.main(f"{options} --only dot".split())
    assert (tmp_path / "symmetric_matching.png").stat().st_size > 1000
    text = (tmp_path / "symmetric_matching.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert table == [line for line in capsys.readouterr().out.splitlines() if line[:1] == "|"][-10:]
    models = [tuple(word.strip() for word in line.split("|")[1:4]) for line in table[2:]]
    assert sorted(models) == sorted(
        (attention, layers, norm)
        for attention in ("dot", "l1")
        for layers in ("1", "2")
        for norm in ("no", "yes")
    )


def test_the_probe_matches_one_element_of_the_set() -> None:
    probe, others, distance = set_search.draw_batch(50, 10)
    equal = (probe[..., :-1] == others[..., :-1]).all(-1)
    assert (equal.sum(1) == 1).all()
    there = others[equal][:, -1] - probe[:, 0, -1]
    torch.testing.assert_close(there * set_search.PLACES, distance)


def test_search_is_learned_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "folder" / "search.png"
    set_search.main(f"--steps 400 --dims 8 16 --out {picture}".split())
    assert picture.stat().st_size > 1000
    *_, first, second, last = capsys.readouterr().out.splitlines()
    assert "3.1%" in last
    found = [[float(word.rstrip("%")) for word in row.split()[2:]] for row in (first, second)]
    assert found[0][0] > 10 and found[1][0] > found[0][0]
    assert found[1][0] > found[1][-1]  # the more distractors, the harder
