"""Linear attention writes text with a state of one size: a byte costs the same however long it is.

python compile_examples/linear_recurrent_generation.py  (CPU, about two minutes)

A small byte model is trained with linear and one with softmax attention. Each then writes, one byte
at a time: out of its state, updated in place, or out of a cache of keys and values.
"""

import argparse
from pathlib import Path

import torch
from gpt.data import Corpus, load_corpus
from gpt.decoding import MEMORIES, Decoder
from gpt.model import GPT, GPTConfig
from gpt.run_package import generate
from gpt.training import TrainConfig, Trainer

PROMPT = b"def "
CHECKED = 150  # bytes written once more by the full forward


def train(attention: str, steps: int, corpus: Corpus) -> GPT:
    config = TrainConfig(steps, seq_len=128, valid_bytes=8192)
    trainer = Trainer(GPTConfig(attention), config, corpus, torch.device("cpu"), backend="eager")
    while trainer.step < steps:
        trainer.advance()
    print(f"{attention}: {trainer.validate():.2f} bits per byte after {steps} steps")
    return trainer.model.eval()


def check_text(model: GPT, attention: str) -> bytes:
    """The same draws give the same bytes; in float64, where no rounding turns a close one."""
    model = model.double()
    whole = generate(model, PROMPT, CHECKED, context=len(PROMPT) + CHECKED)
    assert generate(Decoder(model, attention), PROMPT, CHECKED, context=1 << 30) == whole
    model.float()
    return whole


@torch.no_grad()
def write(model: GPT, attention: str, length: int) -> Decoder:
    """Writes so many bytes, and checks the logits of all of them against one pass over the text."""
    decoder = Decoder(model, attention)
    text = generate(decoder, PROMPT, length - len(PROMPT) + 1, context=1 << 30)
    actual, expected = torch.cat(decoder.logits, 1), model(torch.tensor([list(text[:-1])]))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    return decoder


def at(length: int, decoder: Decoder) -> tuple[float, float]:
    """Bytes per second over the last eighth before a length, and MB held there.

    Of the times the lower quartile: other work on the machine has disturbed it little.
    """
    last = length - len(PROMPT) + 1  # the first call took the whole prompt
    seconds = sorted(decoder.seconds[last - length // 8 : last])
    return 1 / seconds[len(seconds) // 4], decoder.held[last - 1] / 1e6


def draw(rates: dict[str, list[float]], lengths: list[int], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (name, values), memory in zip(rates.items(), ("a state", "a cache of keys and values")):
        axes.plot(lengths, values, "o-", label=f"{name} attention, {memory}")
    axes.set(xlabel="bytes so far", ylabel="bytes written per second")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, labels=map(str, lengths))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150, help="of training, for each model")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--data", type=Path, help="text; without it Python's standard library")
    parser.add_argument("--out", type=Path, default=Path("runs/recurrent_generation.png"))
    args = parser.parse_args(argv)
    if min(args.lengths) < 16:
        parser.error("lengths must be at least 16")
    corpus, lengths = load_corpus(args.data), sorted(args.lengths)
    measured: dict[str, list[tuple[float, float]]] = {}
    for attention in MEMORIES:
        model = train(attention, args.steps, corpus)
        print(check_text(model, attention).decode(errors="replace"))
        decoder = write(model, attention, lengths[-1])
        print(f"{attention}: {lengths[-1]} bytes written, with the logits of the full forward\n")
        measured[attention] = [at(length, decoder) for length in lengths]
    print("bytes so far" + "".join(f"{name:>10} bytes/s       MB" for name in measured))
    for length, *columns in zip(lengths, *measured.values()):
        print(f"{length:12}" + "".join(f"{rate:18.0f} {held:8.2f}" for rate, held in columns))
    rates = {name: [rate for rate, _ in rows] for name, rows in measured.items()}
    draw(rates, lengths, args.out)
    print(f"The picture is in {args.out}.")


if __name__ == "__main__":
    main()
