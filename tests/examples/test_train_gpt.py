"""The main job: it learns, continues exactly, and leaves a file that runs without its Python."""

import gzip
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train_gpt
from gpt.data import Corpus, _overlapping, batch, bigram_bits_per_byte, load_corpus, windows
from gpt.export import run_in_fresh_process
from gpt.model import ATTENTIONS, GPT, GPTConfig
from gpt.training import TrainConfig, Trainer, schedule
from torch import Tensor

ROOT = Path(__file__).parent.parent.parent
TEXT = b"the cat sat on the mat; the dog sat on the log, and so on and on. " * 300
TINY = "--dim 16 --layers 2 --heads 2 --seq-len 32 --batch-size 4 --valid-bytes 512"
TINY += " --evaluate-every 4 --sample-bytes 8 --device cpu"


@pytest.fixture(autouse=True)
def fresh_processes_find_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture(autouse=True)
def compiled_anew() -> None:
    torch.compiler.reset()  # of one function the compiler keeps eight versions, not one per trainer


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT)
    return path


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_gpt, "compiler_missing", lambda: "g++ is not there")


def tiny_trainer(attention: str = "cosine_sim", post_norm: bool = False, **options) -> Trainer:
    """A trainer that compiles nothing."""
    corpus = Corpus("text", *torch.frombuffer(bytearray(TEXT), dtype=torch.uint8).split(16000))
    config = TrainConfig(**{"steps": 12, "seq_len": 16, "batch_size": 4, **options})
    model = GPTConfig(attention, dim=16, layers=2, heads=2, post_norm=post_norm)
    return Trainer(model, config, corpus, torch.device("cpu"), backend="eager")


def advance(trainer: Trainer, steps: int) -> None:
    for _ in range(steps):
        trainer.advance()
    trainer.read_losses()


def test_trains_packages_and_runs_the_package_in_a_fresh_process(text: Path) -> None:
    out = text.parent / "run"
    command = [sys.executable, str(ROOT / "compile_examples" / "train_gpt.py"), *TINY.split()]
    command += ["--data", str(text), "--out", str(out), "--steps", "8", "--accumulate", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ops of this library in it: ['attn.cosine_sim.default']" in done.stdout
    for shape in ([1, 1], [1, 7], [1, 333], [3, 50]):
        assert f"{shape} bytes: logits differ by" in done.stdout
    assert "gives the same logits in a fresh process" in done.stdout
    curve = json.loads((out / "curve.json").read_text())
    assert [step for step, _ in curve["train"]] == list(range(1, 9))
    assert [step for step, _ in curve["valid"]] == [4, 8]
    for file in ("curve.png", "gpt.pt2", "gpt.exported.pt2", "checkpoint.pt", "samples.txt"):
        assert (out / file).stat().st_size > 0


@pytest.mark.parametrize(
    "attention, ops",
    {"softmax": [], "linear": ["attn.linear.default"], "l1": ["attn.l1.default"]}.items(),
)
def test_without_a_compiler_the_exported_program_is_what_remains(
    attention: str, ops: list[str], text: Path, no_compiler: None, capfd: pytest.CaptureFixture[str]
) -> None:
    out = text.parent / "run"
    options = f"{TINY} --data {text} --out {out} --steps 4 --attention {attention} --post-norm"
    assert train_gpt.main(options.split()) == 0
    printed = capfd.readouterr().out
    assert f"ops of this library in it: {ops}" in printed
    assert "No AOTInductor package: it needs a C++ compiler" in printed
    assert "gpt.exported.pt2 gives the same logits in a fresh process" in printed
    assert not (out / "gpt.pt2").exists()


def test_wrong_logits_fail_the_run(text: Path) -> None:
    model = GPT(GPTConfig(dim=16, layers=1, heads=2))
    program = torch.export.export(model, (torch.zeros(1, 8, dtype=torch.int64),))
    package, expected = text.parent / "gpt.exported.pt2", text.parent / "expected.pt"
    torch.export.save(program, package)
    tokens, logits = [torch.zeros(1, 8, dtype=torch.int64)], [torch.ones(1, 8, 256)]
    torch.save({"tokens": tokens, "logits": logits, "tolerance": 1e-4}, expected)
    cpu = torch.device("cpu")
    with pytest.raises(RuntimeError, match="the exported model and the trained one differ"):
        run_in_fresh_process(package, expected, prompt="a", context=8, device=cpu, length=1)


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_resumed_run_equals_the_one_that_was_not_interrupted(
    attention: str, post_norm: bool, tmp_path: Path
) -> None:
    whole = tiny_trainer(attention, post_norm)
    advance(whole, 12)
    first = tiny_trainer(attention, post_norm)
    advance(first, 6)
    first.save(tmp_path / "checkpoint.pt")
    second = tiny_trainer(attention, post_norm)
    second.load(tmp_path / "checkpoint.pt")
    advance(second, 6)
    assert second.history == whole.history
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name


def test_resumed_command_goes_on_where_it_stopped(
    text: Path, no_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_gpt, "export_and_reload", lambda *_: "Not exported here")
    out = text.parent / "run"
    options = f"{TINY} --data {text} --out {out}".split()
    assert train_gpt.main([*options, "--steps", "2"]) == 0
    assert train_gpt.main([*options, "--steps", "5", "--resume"]) == 0
    curve = json.loads((out / "curve.json").read_text())
    assert [step for step, _ in curve["train"]] == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="was trained with attention=cosine_sim, not softmax"):
        train_gpt.main([*options, "--resume", "--attention", "softmax"])


def test_comparison_trains_every_attention_alike(text: Path, no_compiler: None) -> None:
    out = text.parent / "run"
    picture = text.parent / "curves.png"
    options = f"{TINY} --data {text} --out {out} --steps 3 --compare {picture}"
    assert train_gpt.main(options.split()) == 0
    assert picture.stat().st_size > 1000
    for attention in ATTENTIONS:
        curve = json.loads((out / attention / "curve.json").read_text())
        assert curve["attention"] == attention
        assert [step for step, _ in curve["train"]] == [1, 2, 3]
    one, other = (tiny_trainer(attention) for attention in ("cosine_sim", "softmax"))
    for (name, value), same in zip(one.model.named_parameters(), other.model.parameters()):
        assert torch.equal(value, same), name
    draws = [batch(t.train_data, 4, 16, t.generator) for t in (one, other)]
    assert torch.equal(*draws)


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_learns_more_than_a_bigram_model(attention: str, post_norm: bool) -> None:
    trainer = tiny_trainer(attention, post_norm, steps=150, learning_rate=1e-2)
    advance(trainer, 150)
    assert trainer.validate() < bigram_bits_per_byte(trainer.train_data, trainer.valid_windows)


def test_accumulated_batches_are_one_larger_batch() -> None:
    large, small = tiny_trainer(batch_size=8), tiny_trainer(batch_size=4, accumulate=2)
    advance(large, 1)
    advance(small, 1)
    for (name, one), other in zip(large.model.named_parameters(), small.model.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_no_byte_sees_a_later_one(attention: str) -> None:
    model = GPT(GPTConfig(attention, dim=16, layers=2, heads=2))
    torch.nn.init.normal_(model.head.weight)
    tokens = torch.randint(256, (2, 20))
    changed = tokens.clone()
    changed[:, 11:] = (changed[:, 11:] + 1) % 256
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :11], after[:, :11])
    assert (before[:, 11:] - after[:, 11:]).abs().max() > 1e-3


def test_post_norm_has_the_scales_of_deepnet() -> None:
    torch.manual_seed(0)
    plain = GPT(GPTConfig(dim=256, layers=8, heads=4)).blocks[0]
    deep = GPT(GPTConfig(dim=256, layers=8, heads=4, post_norm=True)).blocks[0]
    assert (plain.alpha, deep.alpha) == (1.0, 16**0.25)

    def shrunk(name: str) -> float:
        one, other = (block.get_parameter(f"{name}.weight") for block in (plain, deep))
        return (other.std() / one.std()).item()

    for name in ("attention.v_proj", "attention.out_proj", "up", "down"):
        assert shrunk(name) == pytest.approx(64**-0.25, rel=0.05)
    for name in ("attention.q_proj", "attention.k_proj"):
        assert shrunk(name) == pytest.approx(1, rel=0.05)


def test_bigram_model_is_the_counted_one() -> None:
    data = torch.frombuffer(bytearray(b"abababac" * 100), dtype=torch.uint8)
    bits = bigram_bits_per_byte(data, windows(data, 10, 80))
    # After a: b three times of four, c once; after b and c: always a. Half of the bytes are a.
    assert bits == pytest.approx((0.75 * math.log2(4 / 3) + 0.25 * 2) / 2, abs=0.03)


def test_bigram_model_sees_every_pair_of_a_long_text() -> None:
    data = torch.randint(97, 105, (1000,), dtype=torch.uint8)
    parts = list(_overlapping(data, 64))
    pairs = torch.cat([torch.stack([part[:-1], part[1:]]) for part in parts], dim=1)
    assert torch.equal(pairs, torch.stack([data[:-1], data[1:]]))


def occurs(needle: Tensor, data: Tensor) -> bool:
    return bytes(needle.tolist()) in bytes(data.tolist())


def test_folder_is_split_between_files(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.md").write_text(f"file {number}: " + str(number) * 300)
    (tmp_path / "binary.bin").write_bytes(b"never read" * 100)
    corpus = load_corpus(tmp_path)
    both = bytes(corpus.train.tolist()), bytes(corpus.valid.tolist())
    for number in range(40):
        assert sum(f"file {number}: ".encode() in part for part in both) == 1
    assert not any(b"never read" in part for part in both)
    assert 0.01 < len(corpus.valid) / len(corpus.train) < 0.06


def test_compressed_file_is_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(TEXT))
    corpus = load_corpus(tmp_path / "a.gz")
    assert bytes(torch.cat([corpus.train, corpus.valid]).tolist()) == TEXT


def test_enwik8_is_split_as_everybody_splits_it(tmp_path: Path) -> None:
    path = tmp_path / "enwik8"
    with path.open("wb") as file:  # sparse
        file.truncate(100_000_000)
        for at, letter in ((89_999_999, b"a"), (90_000_000, b"b"), (94_999_999, b"c")):
            file.seek(at)
            file.write(letter)
    corpus = load_corpus(path)
    assert (len(corpus.train), len(corpus.valid)) == (90_000_000, 5_000_000)
    ends = (corpus.train[-1], corpus.valid[0], corpus.valid[-1])
    assert bytes(int(end) for end in ends) == b"abc"


def test_batches_are_stretches_of_the_text() -> None:
    data = torch.randint(256, (500,), dtype=torch.uint8)
    rows = batch(data, 8, 16, torch.Generator().manual_seed(0))
    assert rows.shape == (8, 17)
    assert all(occurs(row, data) for row in rows)


def test_windows_predict_no_byte_twice() -> None:
    data = torch.arange(256).to(torch.uint8)
    for count, seq_len in ((100, 16), (3, 16), (1, 255), (7, 5)):
        predicted = windows(data, count, seq_len)[:, 1:].flatten()
        assert len(predicted) == len(predicted.unique())


@pytest.mark.parametrize("size", [10, 3000])
def test_too_little_text_is_refused(size: int, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_bytes(b"x" * size)
    with pytest.raises(ValueError, match="too few to train on"):
        load_corpus(path)


def test_learning_rate_rises_and_falls() -> None:
    factors = [schedule(step, 100) for step in range(100)]
    peak = factors.index(max(factors))
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert peak < 6 and factors[-1] < 0.1
