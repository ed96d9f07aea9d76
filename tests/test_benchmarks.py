"""The runner times nothing that is wrong, and reports what could not run."""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import (
    forward_mode,
    l1,
    linear,
    linear_scaling,
    overhead,
    run,
)
from benchmarks.cases import Bar, Contender, Entry, Inputs, Setting, draw
from benchmarks.measure import Exact, Times, measure
from benchmarks.report import Row, bars

pytestmark = pytest.mark.usefixtures("torch_as_it_was")
SETTING = Setting("cpu", torch.float32, 1, 2, 1, 16, 8, 8, causal=True, mask_prob=0.3)
LINEAR = replace(
    SETTING, length=150, value_width=5, normalize=True, feature_map="identity", decay=False
)
NOTHING_HIDDEN = replace(SETTING, causal=False, mask_prob=0.0)
SETTINGS = {
    "cosine_sim": [SETTING],
    "l1": [SETTING, replace(NOTHING_HIDDEN, length=300, value_width=5)],
    "l1_scores": [NOTHING_HIDDEN, replace(NOTHING_HIDDEN, dtype=torch.bfloat16)],
    "l1_sparse": [replace(NOTHING_HIDDEN, edges=3, value_width=5)],
    "linear": [
        LINEAR,
        replace(LINEAR, causal=False, normalize=False),
        replace(LINEAR, feature_map="taylor", decay=True),
        replace(LINEAR, dtype=torch.bfloat16),
    ],
}


def computed(contender: Contender, setting: Setting, inputs: Inputs) -> Tensor:
    """The contender's output."""
    call = contender.prepare(inputs, setting)
    assert not isinstance(call, str), call
    return call()


def outcome(
    call: Callable[[Inputs], Tensor], op: str = "cosine_sim", setting: Setting = SETTING
) -> str:
    """What becomes of a contender that computes `call(inputs)`."""
    exact = Exact(run.OPS[op])
    contender = Contender("it", lambda inputs, setting: lambda: call(inputs))
    passes = ["forward", "forward+backward"]
    inputs = run.OPS[op].draw(setting)
    results = measure(exact, [contender], inputs, setting, passes, 3, 0.1)
    for (times,) in results.values():
        assert bool(times.seconds) != bool(times.failure)
    return times.failure


@pytest.mark.parametrize(
    ("op", "setting"), [(op, setting) for op in SETTINGS for setting in SETTINGS[op]]
)
def test_every_default_contender_is_right(op: str, setting: Setting) -> None:
    ran = 0
    for contender in run.OPS[op].contenders("cpu", everyone=False):
        if isinstance(contender.prepare(run.OPS[op].draw(setting), setting), str):
            continue  # it says that it cannot
        if contender.compiled and setting is not LINEAR:
            continue  # compiling is slow
        ran += 1
        assert outcome(partial(computed, contender, setting), op, setting) == "", contender.name
    assert ran > 1


@pytest.mark.parametrize("setting", SETTINGS["l1"])
def test_the_formula_that_is_compiled_is_that_of_l1(setting: Setting) -> None:
    inputs = draw(setting)
    got = l1.attention(inputs, setting, l1.broadcast_distance)
    expected = l1.ENTRY.reference(inputs, setting, True)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        expected, torch.ops.attn.l1(*inputs.leaves(), inputs.mask, causal=setting.causal)
    )


def test_a_gradient_of_all_elements_is_not_tried_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(l1, "LARGEST_GRADIENT", 1000)
    peer = next(c for c in l1.ENTRY.peers if c.compiled)
    results = measure(Exact(l1.ENTRY), [peer], draw(SETTING), SETTING, ["forward+backward"], 3, 0.1)
    assert results["forward+backward"][0].failure == "out of memory"


def test_left_out_contenders_are_not_prepared() -> None:
    whole = l1.ENTRY.contenders("cpu", everyone=False)
    kept = [run.left_out(c, ["cdist", "other"]) for c in whole]
    assert [c.name for c in kept] == [c.name for c in whole]
    skipped = [c.name for c in kept if c.prepare(draw(SETTING), SETTING) == "left out"]
    assert skipped == ["cdist"]


@pytest.mark.parametrize("op", SETTINGS)
def test_few_rows_of_a_preset_for_gpus_compile(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run", "--preset", "cuda"])
    entry = run.OPS[op]
    compiling = 0
    for args in run.arguments(op):
        names = [run.left_out(c, args.skip) for c in entry.contenders("cuda", everyone=False)]
        slow = [c for c in names if c.compiled and "compiled" in c.name and c in entry.peers]
        compiling += len(slow) * len(list(run.settings(args, entry)))
    assert 1 <= compiling <= 2  # each takes about twenty seconds


@pytest.mark.parametrize("factor", [1.001, torch.nan])
@pytest.mark.parametrize("op", SETTINGS)
def test_wrong_contender_is_not_timed(op: str, factor: float) -> None:
    right, setting = run.OPS[op].ours, SETTINGS[op][0]
    failure = outcome(lambda inputs: factor * computed(right, setting, inputs), op, setting)
    assert failure.startswith("wrong: ")


def test_compiled_contender_is_timed_backwards_alone() -> None:
    entry = run.OPS["linear"]
    compiled = [c for c in entry.contenders("cpu", everyone=False) if c.compiled]
    results = measure(Exact(entry), compiled, draw(LINEAR), LINEAR, ["backward"], 3, 0.1)
    assert [times.failure for times in results["backward"]] == [""] * len(compiled)
    assert len(results["backward"][0].seconds) == 3


def test_out_of_memory_is_reported_as_such() -> None:
    def call(inputs: Inputs) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert outcome(call) == "out of memory"
    assert outcome(lambda inputs: torch.empty(1 << 56)) == "out of memory"


def test_missing_package_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fla", None)
    inputs = draw(LINEAR)
    exact = Exact(run.OPS["linear"])
    results = measure(exact, [Contender("fla", linear.fla)], inputs, LINEAR, ["forward"], 3, 0.1)
    assert results["forward"][0].failure.startswith("ModuleNotFoundError")


def quadratic(inputs: Inputs, setting: Setting) -> Tensor:
    """Linear attention with all pairs of queries and keys."""
    query, key, value = linear.folded(inputs, setting)
    distance = torch.arange(setting.length)[:, None] - torch.arange(setting.length)
    weights = query @ key.mT
    if setting.causal:
        weights = weights.tril()
    if inputs.decay is not None:
        weights = weights * inputs.decay[:, None, None] ** distance.clamp_min(0)
    out = weights @ value
    return out / (weights.sum(-1, keepdim=True) + linear.EPS) if setting.normalize else out


@pytest.mark.parametrize("setting", SETTINGS["linear"][:3])
@pytest.mark.parametrize("length", [1, 64, 1100])
def test_linear_reference_is_the_quadratic_formula(setting: Setting, length: int) -> None:
    setting = replace(setting, length=length)
    inputs = draw(setting).head(0, 0, 2)
    expected, got = quadratic(inputs, setting), linear.reference(inputs, setting, True)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_tokens_first_changes_memory_alone() -> None:
    inputs = draw(LINEAR)
    moved = inputs.tokens_first()
    for ours, its in zip(inputs.leaves(), moved.leaves()):
        assert its.transpose(1, 2).is_contiguous() and its.is_leaf and its.requires_grad
        assert torch.equal(ours, its)
    assert torch.equal(inputs.grad_out, moved.grad_out)


@pytest.mark.parametrize("only", ["--only-forwards", "--only-backwards"])
@pytest.mark.parametrize("op", SETTINGS)
def test_command_writes_a_table_a_csv_file_and_a_plot(
    op: str,
    only: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    entry = run.OPS[op]
    # Compiling takes the longest, and the other tests compile.
    monkeypatch.setitem(
        run.OPS, op, replace(entry, peers=tuple(p for p in entry.peers if not p.compiled))
    )
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    command = f"run --op {op} --device cpu --causal --mask-prob 0.2 --num-times 2 --plot"
    command += f" --dtype float32 --seq-lens 32 64 --heads 2 --head-dim 16 --csv {only}"
    monkeypatch.setattr(sys, "argv", command.split())
    run.main()
    printed = capsys.readouterr().out
    assert f"| {entry.unit[0]} | ratio |" in printed
    assert "wrong" not in printed
    which = only.removeprefix("--only-").removesuffix("s")
    assert (tmp_path / f"{op}-cpu-{which}.png").stat().st_size > 1000
    lines = (tmp_path / f"{op}-cpu.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * len(run.OPS[op].contenders("cpu", everyone=False))


def rows_of(command: str, op: str, monkeypatch: pytest.MonkeyPatch) -> list[Setting]:
    """The settings of a command line."""
    monkeypatch.setattr(sys, "argv", ["run", *command.split()])
    entry = run.OPS[op]
    return [setting for args in run.arguments(op) for setting in run.settings(args, entry)]


def test_shapes_and_options_make_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    command = "--device cpu --shapes 1,2,3,4 5,6,7,8,9 --normalize both --feature-map relu"
    rows = rows_of(f"{command} --decay --threads 1", "linear", monkeypatch)
    assert [(s.batch, s.heads, s.length, s.width, s.value_width) for s in rows] == [
        (1, 2, 3, 4, 4),
        (5, 6, 7, 8, 9),
    ] * 2
    assert [s.normalize for s in rows] == [False, False, True, True]
    assert all(s.decay and s.feature_map == "relu" for s in rows)
    with pytest.raises(SystemExit, match="--op cosine_sim takes no --normalize"):
        rows_of("--normalize yes", "cosine_sim", monkeypatch)


@pytest.mark.parametrize("preset", ["cpu", "cuda"])
def test_every_bar_of_linear_is_asked_by_a_preset(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(f"--preset {preset}", "linear", monkeypatch)
    asked = [bar for bar in linear.ENTRY.bars if any(bar.where(s) for s in rows)]
    assert asked == [bar for bar in linear.ENTRY.bars if bar.of_rate == (preset == "cuda")]


def test_bars_hold_ratios_and_rates() -> None:
    entry = replace(
        run.OPS["linear"],
        bars=(
            Bar("ratio", "forward", 2.0, lambda s: True),
            Bar("rate", "forward", 3.0, lambda s: True, of_rate=True),
        ),
    )
    seconds = entry.work(LINEAR)["forward"] / 2.5e9
    row = Row(LINEAR, "forward", [Times("we", True, [seconds]), Times("they", True, [2 * seconds])])
    ratio, rate = bars(entry, [row]).splitlines()
    assert ratio == "ratio, forward: lowest ratio 2.00 of 1, bar 2.00: met"
    assert rate.endswith("bar 3: NOT MET")
    failed = replace(row, times=[Times("we", failure="no"), row.times[1]])
    assert bars(entry, [row, failed]).count("NOT MET") == 2


def test_scaling_writes_its_bars_and_a_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "linear_scaling --device cpu --longest 4096 --shape 1 2 128 --decode 1 2"
    command += f" --num-times 1 --budget 0.01 --csv {tmp_path}/a.csv --plot {tmp_path}/a.png"
    monkeypatch.setattr(sys, "argv", command.split())
    linear_scaling.main()
    printed = capsys.readouterr().out
    for words in ("linear growth", "decay", "taylor", "decoding", "speed-up of 2 threads"):
        assert f"bar {words}" in printed or f", {words}:" in printed
    assert "wrong" not in printed
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 1 + 2 * 3
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_overhead_is_said_of_every_call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    modes = [mode for mode in overhead.MODES if not mode.startswith("compiled")]
    command = ["overhead", "--rounds", "1", "--number", "2", "--modes", *modes]
    monkeypatch.setattr(sys, "argv", command)
    overhead.main()
    rows = capsys.readouterr().out.splitlines()[4:]
    assert [row.split("|")[1].strip() for row in rows] == list(overhead.CALLS)
    for row in rows:
        cells = row.split("|")[2:-1]
        assert len(cells) == len(modes)
        assert all(float(cell.split()[0]) > 0 for cell in cells)


@pytest.mark.parametrize("op", forward_mode.OPS)
def test_forward_mode_is_compared_before_it_is_timed(
    op: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"forward_mode --op {op} --device cpu --shape 1 2 8 --seq-lens 48 64 --causal"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--num-times", "1", "--budget", "0.01"])
    forward_mode.main()
    rows = capsys.readouterr().out.splitlines()[4:]
    assert [row.split("|")[1].strip() for row in rows] == ["48", "64"]
    assert all(float(cell) >= 0 for row in rows for cell in row.split("|")[2:-1])
    right = forward_mode.OPS[op]
    monkeypatch.setitem(forward_mode.OPS, op, lambda *xs, causal: 1.001 * right(*xs, causal=causal))
    with pytest.raises(SystemExit, match="wrong: the tangent is off by"):
        forward_mode.main()


def test_an_entry_is_data() -> None:
    for op, entry in run.OPS.items():
        assert isinstance(entry, Entry)
        work = entry.work(SETTINGS[op][0])
        assert {"forward", "backward", "forward+backward"} == work.keys()
        assert work["forward"] + work["backward"] == work["forward+backward"]


def test_linear_counts_floor_bytes() -> None:
    setting = Setting("cuda", torch.bfloat16, 8, 16, 16, 4096, 128, 128)
    tensor = 2 * 8 * 16 * 4096 * 128
    assert linear.work(setting)["forward"] == 4 * tensor
    assert linear.work(setting)["backward"] == 7 * tensor
