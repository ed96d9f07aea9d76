"""Text out of a state, and out of a cache, is the text of the full forward."""

from pathlib import Path

import linear_recurrent_generation as example
import pytest
import torch
from gpt.decoding import MEMORIES, Decoder, RecurrentState
from gpt.model import GPT, GPTConfig
from gpt.run_package import generate

PROMPT = b"the cat "


def tiny_model(attention: str) -> GPT:
    return GPT(GPTConfig(attention, dim=16, layers=2, heads=2)).double().eval()


@pytest.mark.parametrize("attention", MEMORIES)
def test_text_is_that_of_the_full_forward(attention: str) -> None:
    model = tiny_model(attention)
    decoder = Decoder(model, attention)
    whole = generate(model, PROMPT, 40, context=48)
    assert len(set(whole)) > 20
    assert generate(decoder, PROMPT, 40, context=48) == whole
    assert [part.shape[1] for part in decoder.logits] == [len(PROMPT), *[1] * 39]
    expected = model(torch.tensor([list(whole[:-1])]))
    torch.testing.assert_close(torch.cat(decoder.logits, 1), expected)


def test_a_state_keeps_its_size_and_place_where_a_cache_grows() -> None:
    state, cache = (Decoder(tiny_model(name), name) for name in ("linear", "softmax"))
    text = torch.randint(256, (1, 30))
    with torch.no_grad():
        places = set()
        for length in range(5, 31):
            state(text[:, :length])
            cache(text[:, :length])
            memory = state.memories[0]
            assert isinstance(memory, RecurrentState)
            places.add(memory.state.data_ptr())
    assert len(places) == len(set(state.held)) == 1
    per_byte = 2 * 2 * 16 * 8  # keys and values of 2 layers of width 16, 8 bytes a number
    assert cache.held == [per_byte * length for length in range(5, 31)]


def test_one_decoder_leaves_the_model_and_other_decoders_alone() -> None:
    model = tiny_model("linear")
    before = generate(model, PROMPT, 10)
    assert generate(Decoder(model, "linear"), PROMPT, 10) == before
    assert generate(Decoder(model, "linear"), PROMPT, 10) == before
    assert generate(model, PROMPT, 10) == before


def test_example_prints_a_table_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(example, "CHECKED", 20)
    text, picture = tmp_path / "text.txt", tmp_path / "folder" / "rates.png"
    text.write_bytes(b"the cat sat on the mat; the dog sat on the log. " * 300)
    options = f"--steps 3 --lengths 40 20 --data {text} --out {picture}"
    example.main(options.split())
    assert picture.stat().st_size > 1000
    printed = capsys.readouterr().out.splitlines()
    head, *rows = printed[-4:-1]
    assert head.split() == ["bytes", "so", "far", *"linear bytes/s MB softmax bytes/s MB".split()]
    assert [int(row.split()[0]) for row in rows] == [20, 40]
    for row in rows:
        assert all(float(number) > 0 for number in row.split())
