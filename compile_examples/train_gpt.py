"""Trains a byte-level GPT under torch.compile, exports it, and runs it from the exported file.

    python compile_examples/train_gpt.py                        # the Python standard library
    python compile_examples/train_gpt.py --attention linear --data enwik8.gz
    python compile_examples/train_gpt.py --compare docs/loss_curves.png

Writes to --out: curve.png, curve.json, samples.txt, checkpoint.pt, gpt.exported.pt2 (torch.export)
and gpt.pt2 (AOTInductor).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

# Threads that spin while they wait starve each other where cores are shared: 5 times slower.
os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "passive")

import torch
from gpt.curves import plot
from gpt.data import Corpus, bigram_bits_per_byte, load_corpus
from gpt.export import (
    compiler_missing,
    export,
    headers_missing,
    ops_in,
    run_in_fresh_process,
    write_expected,
)
from gpt.model import ATTENTIONS, GPTConfig
from gpt.run_package import generate
from gpt.training import History, TrainConfig, Trainer
from tqdm import tqdm

from attn_ops import info

DEFAULT_STEPS, DEFAULT_MINUTES = 1000, 1.3
READ_EVERY = 10  # steps between two looks at the loss: each waits for the device


@dataclass
class Run:
    """A trainer, and where and how often it reports."""

    trainer: Trainer
    bigram: float
    out: Path
    evaluate_every: int
    checkpoint_every: int
    prompt: str
    sample_bytes: int
    minutes: float | None = None  # fewer steps where they would take longer than this

    def train(self) -> None:
        """Steps until the last one, with checkpoints, validation and samples on the way."""
        trainer = self.trainer
        began = time.perf_counter()
        bar = tqdm(total=trainer.steps, initial=trainer.step, unit="step", dynamic_ncols=True)
        seen: list[tuple[int, float]] = []
        while trainer.step < trainer.steps:
            trainer.advance()
            bar.update()
            step = trainer.step
            if step % READ_EVERY == 0 or step == trainer.steps:
                bar.set_postfix(bits_per_byte=f"{trainer.read_losses():.3f}")
                seen.append((step, time.perf_counter()))
                if len(seen) == 3:  # the first interval compiled
                    bar.total = self.fit_into_minutes(seen[1], seen[2])
            if step % self.evaluate_every == 0 and step < trainer.steps:
                self.report(bar)
            if step % self.checkpoint_every == 0:
                trainer.save(self.out / "checkpoint.pt")
        if not trainer.history.valid or trainer.history.valid[-1][0] != trainer.step:
            self.report(bar)
        bar.close()
        trainer.save(self.out / "checkpoint.pt")
        print(f"Trained for {time.perf_counter() - began:.0f} s, compilation included.")

    def fit_into_minutes(self, earlier: tuple[int, float], later: tuple[int, float]) -> int:
        """Lowers the number of steps to what the minutes are enough for; returns it."""
        trainer = self.trainer
        if self.minutes is None:
            return trainer.steps
        seconds = (later[1] - earlier[1]) / (later[0] - earlier[0])
        affordable = later[0] + int(60 * self.minutes / seconds)
        if affordable < trainer.steps:
            tqdm.write(
                f"A step takes {seconds:.2f} s here: {affordable} steps instead of "
                f"{trainer.steps}, to end in time (--steps or --minutes change that)."
            )
            trainer.steps = affordable
        return trainer.steps

    def report(self, bar: tqdm) -> None:
        """Validates, and writes a sample of text."""
        trainer = self.trainer
        trainer.read_losses()
        bits = trainer.validate()
        with trainer.autocast():
            text = generate(
                trainer.model,
                self.prompt.encode(),
                self.sample_bytes,
                context=trainer.config.seq_len,
                seed=trainer.step,
                device=trainer.device,
            ).decode(errors="replace")
        head = (
            f"step {trainer.step}: validation {bits:.3f} bits per byte (bigram {self.bigram:.3f})"
        )
        bar.write(f"{head}\n{indented(text)}")
        with (self.out / "samples.txt").open("a") as file:
            file.write(f"{head}\n{text}\n\n")
        self.write_curve()

    def write_curve(self) -> None:
        trainer = self.trainer
        name = trainer.model_config.attention
        numbers = {"attention": name, "bigram": self.bigram, **asdict(trainer.history)}
        (self.out / "curve.json").write_text(json.dumps(numbers))
        if trainer.history.train:
            title = f"byte-level GPT, {name} attention"
            plot({name: trainer.history}, self.bigram, title, self.out / "curve.png")


def compare(args: argparse.Namespace, corpus: Corpus, backend: str) -> None:
    """Trains with each attention from the same seed on the same batches, and draws the curves."""
    args.steps = args.steps or DEFAULT_STEPS
    histories: dict[str, History] = {}
    out = args.out
    for args.attention in ATTENTIONS:
        args.out = out / args.attention
        run = prepare(args, corpus, backend)
        describe(args, run.trainer, corpus)
        run.train()
        histories[args.attention] = run.trainer.history
    bytes_per_step = args.accumulate * args.batch_size * args.seq_len
    title = (
        f"Byte-level GPT, {args.layers} layers of width {args.dim}, {corpus.name}, "
        f"{bytes_per_step:,} bytes per step"
    )
    plot(histories, run.bigram, title, args.compare)
    for name, history in histories.items():
        print(f"{name}: {history.valid[-1][1]:.3f} bits per byte (bigram {run.bigram:.3f})")
    print(f"The curves are in {args.compare}.")


def export_and_reload(run: Run, corpus: Corpus, compiler_error: str | None) -> str:
    """Exports, packages and runs the package in a fresh process; what became of it, in a sentence.

    Raises:
        RuntimeError: the package does not give the model's logits.
    """
    trainer, out = run.trainer, run.out
    began = time.perf_counter()
    trainer.model.eval()
    program = export(trainer.model, trainer.config.seq_len, trainer.device)
    package = out / "gpt.exported.pt2"
    torch.export.save(program, package)
    print(f"Exported to {package}, length left open; ops of this library in it: {ops_in(program)}.")
    if compiler_error is None:
        package = out / "gpt.pt2"
        torch._inductor.aoti_compile_and_package(program, package_path=str(package))
        print(f"Compiled ahead of time into {package} ({time.perf_counter() - began:.0f} s).")
    else:
        print("No AOTInductor package: it needs a C++ compiler (apt install g++, for example).")
    expected = out / "expected.pt"
    write_expected(trainer.model, corpus.valid, trainer.device, expected)
    written = run_in_fresh_process(
        package,
        expected,
        prompt=run.prompt,
        context=trainer.config.seq_len,
        device=trainer.device,
        length=2 * run.sample_bytes,
    )
    print(f"A fresh process ran {package.name} without the model's Python:\n{written}")
    return f"{package} gives the same logits in a fresh process, at every length tried"


def describe(args: argparse.Namespace, trainer: Trainer, corpus: Corpus) -> None:
    device = trainer.device
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    kernels = {(one.room, one.device): one.kernel for one in info.servings()}
    kernel = kernels.get((args.attention, device.type), "PyTorch's own")
    amp = device.type == "cuda" and not args.float32
    parameters = sum(p.numel() for p in trainer.model.parameters())
    config = trainer.config
    print(
        f"Device: {on}{threads}, {'bfloat16 autocast' if amp else 'float32'}\n"
        f"Attention: {args.attention}, kernel: {kernel}\n"
        f"Model: {parameters:,} parameters, {args.layers} layers of width {args.dim}, "
        f"{'post' if args.post_norm else 'pre'}-norm\n"
        f"Data: {corpus.name}, {len(corpus.train):,} bytes to train on, {len(corpus.valid):,} held "
        f"out, {trainer.valid_windows[:, 1:].numel():,} of them validated on\n"
        f"Steps: {trainer.steps}, each {config.accumulate} x {config.batch_size} stretches of "
        f"{config.seq_len} bytes; the first one compiles",
        flush=True,
    )


def summary(run: Run, reloaded: str, seconds: float) -> str:
    trainer = run.trainer
    bits = trainer.history.valid[-1][1]
    config = trainer.config
    size = trainer.step * config.accumulate * config.batch_size * config.seq_len
    better = "less than" if bits < run.bigram else "NOT less than"
    return (
        f"After {trainer.step} steps on {size:,} bytes the model needs {bits:.3f} bits per byte "
        f"of held-out text, {better} the {run.bigram:.3f} of a bigram model on the same bytes.\n"
        f"{reloaded}.\n"
        f"The curve is in {run.out / 'curve.png'}, the samples in {run.out / 'samples.txt'}.\n"
        f"All of it took {seconds:.0f} s."
    )


def indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--attention", choices=sorted(ATTENTIONS), default="cosine_sim")
    add("--post-norm", action="store_true", help="norm after the residual, DeepNet's scales")
    add("--dim", type=positive, default=128)
    add("--layers", type=positive, default=4)
    add("--heads", type=positive, default=4)
    add("--data", type=Path, help="enwik8, enwik8.gz, any file or folder of text; without it the "
        "Python standard library")  # fmt: skip
    add("--seq-len", type=positive, default=256)
    add("--batch-size", type=positive, default=TrainConfig.batch_size)
    add("--accumulate", type=positive, default=1, help="batches per step")
    add("--steps", type=positive, help=f"without it {DEFAULT_STEPS}, or what --minutes allow")
    add("--minutes", type=float, help="train no longer than about this, after compilation; "
        f"{DEFAULT_MINUTES} where --steps is not given")  # fmt: skip
    add("--learning-rate", type=float, default=TrainConfig.learning_rate)
    add("--clip", type=float, default=TrainConfig.clip, help="norm of the gradient")
    add("--float32", action="store_true", help="on CUDA: no bfloat16 autocast")
    add("--seed", type=int, default=0)
    add("--evaluate-every", type=positive, default=250, help="steps between validations")
    add("--checkpoint-every", type=positive, default=250, help="steps between checkpoints")
    add("--valid-bytes", type=positive, default=TrainConfig.valid_bytes)
    add("--prompt", default="def ")
    add("--sample-bytes", type=positive, default=150)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, default=Path("runs/gpt"))
    add("--compare", type=Path, metavar="PNG", help="no export: train with every attention alike "
        "and draw the curves into this picture")  # fmt: skip
    add("--resume", action="store_true", help="continue from the checkpoint in --out")
    return parser.parse_args(argv)


def prepare(args: argparse.Namespace, corpus: Corpus, backend: str) -> Run:
    """The model as the arguments ask for it, or as the checkpoint has it."""
    model = GPTConfig(args.attention, args.dim, args.layers, args.heads, args.post_norm)
    config = TrainConfig(
        steps=args.steps or DEFAULT_STEPS,
        seq_len=args.seq_len,
        batch_size=args.batch_size,
        accumulate=args.accumulate,
        learning_rate=args.learning_rate,
        clip=args.clip,
        float32=args.float32,
        valid_bytes=args.valid_bytes,
        seed=args.seed,
    )
    trainer = Trainer(model, config, corpus, torch.device(args.device), backend)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.resume:
        trainer.load(args.out / "checkpoint.pt", args.steps)
    else:
        (args.out / "samples.txt").unlink(missing_ok=True)
    return Run(
        trainer,
        bigram_bits_per_byte(corpus.train, trainer.valid_windows),
        args.out,
        args.evaluate_every,
        args.checkpoint_every,
        args.prompt,
        args.sample_bytes,
        args.minutes or (None if args.steps or args.resume else DEFAULT_MINUTES),
    )


def main(argv: list[str] | None = None) -> int:
    began = time.perf_counter()
    args = arguments(argv)
    corpus = load_corpus(args.data)
    compiler_error = compiler_missing()
    uncompiled = compiler_error or headers_missing()
    backend = "inductor" if uncompiled is None else "aot_eager"
    if uncompiled is not None:
        print(f"No kernels from torch.compile ({uncompiled}): graphs are captured, not compiled.")
    if args.compare:
        compare(args, corpus, backend)
        return 0
    run = prepare(args, corpus, backend)
    describe(args, run.trainer, corpus)
    try:
        run.train()
    except KeyboardInterrupt:
        run.trainer.save(args.out / "checkpoint.pt")
        print(f"\nInterrupted at step {run.trainer.step}; --resume continues from there.")
        return 130
    try:
        reloaded = export_and_reload(run, corpus, compiler_error)
    except RuntimeError as error:
        print(error)
        return 1
    print(summary(run, reloaded, time.perf_counter() - began))
    return 0


if __name__ == "__main__":
    sys.exit(main())
