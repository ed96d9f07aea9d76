"""Two of 32 random tokens are equal: what is the distance of their positions?

    python compile_examples/symmetric_matching.py                    # 8 tokens: CPU, two minutes
    python compile_examples/symmetric_matching.py --full --out docs  # a GPU, four minutes

Trains with L1 and with dot-product attention, 1 and 2 layers, with and without LayerNorm, all on
the same tokens. Writes symmetric_matching.md, a table of steps to reach a loss, and
symmetric_matching.png, the curves. Two processes, one with --only l1 and one with --only dot, are
quicker; the one that ends last tells of all.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

# Threads that spin while they wait starve each other where cores are shared.
os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_ops import l1_attention

ATTENTIONS: dict[str, Callable[..., Tensor]] = {
    "l1": l1_attention,
    "dot": F.scaled_dot_product_attention,
}
CONTENT = 16  # numbers that a token consists of, beside its position
THRESHOLDS = (0.5, 0.1, 0.01)
POINTS = 100  # of a curve, each the mean of as many steps
COLOURS = {"l1": "#1f77b4", "dot": "#d62728"}


@dataclass(frozen=True)
class Size:
    """How much is trained. Seeds are trained side by side, with parameters of their own."""

    tokens: int
    batch: int
    steps: int
    seeds: int
    dim: int = 32
    heads: int = 2
    learning_rate: float = 3e-3


SMALL, FULL = Size(8, 64, 1000, 2, learning_rate=1e-2), Size(32, 256, 10_000, 5)


def draw_batch(size: Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens [S, B, N, C], of which two are equal, and the distance [S, B] of those two.

    In units of its standard deviation, the mean taken off: a constant answer has the loss 1.
    """
    device, n = generator.device, size.tokens
    shape = (size.seeds, size.batch, n)
    tokens = torch.randn(*shape, CONTENT, generator=generator, device=device)
    order = torch.rand(shape, generator=generator, device=device).argsort(-1)
    first, second = order[..., :1], order[..., 1:2]
    at = first[..., None].expand(-1, -1, -1, CONTENT)
    tokens.scatter_(2, second[..., None].expand_as(at), tokens.gather(2, at))
    distance = (first - second).abs().squeeze(-1)
    return tokens, (distance - (n + 1) / 3) / variance(n) ** 0.5


def variance(n: int) -> float:
    """Of the distance between two different places of n."""
    return (n + 1) * (n - 2) / 18


class Ensemble(nn.Module):
    """S transformers with parameters of their own: each seed's matrices are one of a batch.

    A token enters as its content and its position, a number; every token of the last layer is
    summed, and one linear map reads the distance off the sum.
    """

    place: Tensor  # [N, 1]

    def __init__(self, attention: str, layers: int, norm: bool, size: Size) -> None:
        super().__init__()
        self.attention, self.layers, self.norm, self.heads = attention, layers, norm, size.heads
        dim = size.dim

        def matrix(rows: int, columns: int, gain: float = 1.0) -> nn.Parameter:
            return nn.Parameter(torch.randn(size.seeds, rows, columns) * gain * rows**-0.5)

        self.embed, self.head = matrix(CONTENT + 1, dim), matrix(dim, 1)
        self.head_bias = nn.Parameter(torch.zeros(size.seeds, 1, 1))
        self.mix = nn.ParameterList(matrix(dim, 3 * dim) for _ in range(layers))
        self.out = nn.ParameterList(matrix(dim, dim) for _ in range(layers))
        self.up = nn.ParameterList(matrix(dim, 4 * dim, 2**0.5) for _ in range(layers))
        self.down = nn.ParameterList(matrix(4 * dim, dim) for _ in range(layers))
        self.up_bias = nn.ParameterList(
            nn.Parameter(torch.zeros(size.seeds, 1, 4 * dim)) for _ in range(layers)
        )
        place = torch.arange(size.tokens) - (size.tokens - 1) / 2
        self.register_buffer("place", (place / place.std())[:, None])

    def forward(self, tokens: Tensor) -> Tensor:
        seeds, batch, n, _ = tokens.shape
        place = self.place.expand(seeds, batch, n, 1)
        x = torch.bmm(torch.cat([tokens, place], -1).flatten(1, 2), self.embed)  # [S, BN, dim]
        for layer in range(self.layers):
            mixed = torch.bmm(self.normalized(x), self.mix[layer])
            heads = mixed.view(seeds * batch, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            found = ATTENTIONS[self.attention](*heads.unbind())  # [SB, H, N, D]
            found = found.transpose(1, 2).reshape(seeds, batch * n, -1)
            x = torch.baddbmm(x, found, self.out[layer])
            hidden = F.relu(torch.baddbmm(self.up_bias[layer], self.normalized(x), self.up[layer]))
            x = torch.baddbmm(x, hidden, self.down[layer])
        summed = x.view(seeds, batch, n, -1).sum(2) * n**-0.5
        return torch.baddbmm(self.head_bias, summed, self.head).squeeze(-1)  # [S, B]

    def normalized(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:]) if self.norm else x

    def losses(self, tokens: Tensor, distance: Tensor) -> Tensor:
        """[S]"""
        return (self(tokens) - distance).square().mean(1)


@dataclass
class Run:
    """What became of one way to build the model."""

    attention: str
    layers: int
    norm: bool
    size: Size
    device: str
    seconds: float
    curves: list[list[float]]  # [S][steps]: mean losses of stretches of a hundredth of the steps

    def name(self) -> str:
        return f"{self.attention}-{self.layers}-{'norm' if self.norm else 'plain'}"

    def save(self, folder: Path) -> None:
        (folder / f"{self.name()}.json").write_text(json.dumps(asdict(self)))

    def stretch(self) -> int:
        return self.size.steps // len(self.curves[0])

    def steps_to(self, threshold: float) -> list[int | None]:
        """Of each seed: the end of the first stretch with a loss below the threshold."""
        return [
            next(
                (self.stretch() * (i + 1) for i, loss in enumerate(curve) if loss < threshold), None
            )
            for curve in self.curves
        ]


def train(attention: str, layers: int, norm: bool, size: Size, device: str) -> Run:
    """All seeds of one model."""
    began = time.perf_counter()
    torch.manual_seed(0)
    torch.compiler.reset()
    generator = torch.Generator(device).manual_seed(0)
    model = Ensemble(attention, layers, norm, size).to(device)
    losses = model.losses
    if device == "cuda":  # the CPU would compile for longer than it trains
        losses = torch.compile(losses, fullgraph=True, mode="reduce-overhead")
    optimizer = torch.optim.Adam(
        model.parameters(), lr=size.learning_rate, betas=(0.9, 0.99), fused=True
    )
    history = torch.empty(size.steps, size.seeds, device=device)
    for step in range(size.steps):
        rate = min(1.0, 20 * (step + 1) / size.steps) * (1 - 0.95 * step / size.steps)
        for group in optimizer.param_groups:
            group["lr"] = size.learning_rate * rate
        optimizer.zero_grad()
        loss = losses(*draw_batch(size, generator))
        loss.sum().backward()  # seeds share no parameter: each gradient is its own seed's
        optimizer.step()
        history[step].copy_(loss.detach())
    stretches = history.unflatten(0, (min(POINTS, size.steps), -1)).mean(1)
    curves = stretches.T.tolist()
    on = torch.cuda.get_device_name() if device == "cuda" else "a CPU"
    return Run(attention, layers, norm, size, on, time.perf_counter() - began, curves)


def load(folder: Path, size: Size) -> list[Run]:
    """What was trained at this size, by this process or others."""
    runs = []
    for path in sorted(folder.glob("*.json")):
        fields = json.loads(path.read_text())
        runs.append(Run(**{**fields, "size": Size(**fields["size"])}))
    ours = [run for run in runs if run.size == size]
    return sorted(ours, key=lambda run: (run.layers, run.norm, run.attention))


def table(runs: list[Run]) -> str:
    """One row per model: the median seed's steps to each loss, and how many seeds got there."""
    header = ["attention", "layers", "LayerNorm"]
    header += [f"steps to loss {threshold}" for threshold in THRESHOLDS]
    rows = [[*header, "loss at the end", "error at the end, positions"]]
    rows.append(["---"] * len(rows[0]))
    for run in runs:
        last = statistics.median(curve[-1] for curve in run.curves)
        row = [run.attention, str(run.layers), "yes" if run.norm else "no"]
        row += [median_steps(run.steps_to(threshold)) for threshold in THRESHOLDS]
        rows.append([*row, f"{last:.2g}", f"{(last * variance(run.size.tokens)) ** 0.5:.2f}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def median_steps(steps: list[int | None]) -> str:
    """The median of those seeds that got there, and their share; a dash for none."""
    there = [step for step in steps if step is not None]
    if not there:
        return "-"
    return f"{statistics.median_low(there)} ({len(there)} of {len(steps)})"


def draw(runs: list[Run], path: Path) -> None:
    """A panel for each number of layers with and without norm; thin lines are the seeds."""
    from matplotlib.figure import Figure

    panels = sorted({(run.layers, run.norm) for run in runs})
    figure = Figure(figsize=(3.2 * len(panels), 3.4), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for run in (run for run in runs if (run.layers, run.norm) == panel):
            steps = [run.stretch() * (i + 1) for i in range(len(run.curves[0]))]
            for seed, curve in enumerate(run.curves):
                name = run.attention if seed == 0 else None
                axes.plot(steps, curve, color=COLOURS[run.attention], alpha=0.7, label=name)
        axes.set_yscale("log")
        axes.set_ylim(1e-4, 3)
        axes.grid(alpha=0.25)
        layers, norm = panel
        axes.set_title(f"{layers} layer{'s'[: layers - 1]}, {'' if norm else 'no '}LayerNorm")
        axes.set_xlabel("steps")
    figure.axes[0].set_ylabel("squared error / variance of the distance")
    figure.axes[0].legend()
    figure.savefig(path, dpi=110)


def report(runs: list[Run], out: Path) -> None:
    """The table, printed and with the picture as a document."""
    size = runs[0].size
    text = f"""# Symmetric matching

{size.tokens} tokens of {CONTENT} random normal numbers, of which two are equal; the model has to
say how far apart these two are. It gets each token's content and its position, a number, and a
linear map reads the answer off the sum of the last layer. Width {size.dim},
{size.heads} heads, batches of {size.batch}, {size.steps} steps of Adam from a learning rate of
{size.learning_rate} down (gradients zeroed before each), {size.seeds} seeds, alike for every row.

The loss is the squared error over the variance of the distance: a constant answer has 1. Steps
are the median of the seeds that got there; how many did is in brackets.

{table(runs)}

![Loss against steps](symmetric_matching.png)

`python compile_examples/symmetric_matching.py{" --full" * (size == FULL)} --out docs`, on
{runs[0].device}, torch {torch.__version__}, {sum(run.seconds for run in runs):.0f} s of training.
"""
    (out / "symmetric_matching.md").write_text(text)
    draw(runs, out / "symmetric_matching.png")
    print(table(runs))
    print(f"The table and the curves are in {out}.")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help=f"{FULL}; without it {SMALL}")
    parser.add_argument("--steps", type=int, help="fewer or more, a multiple of 100")
    parser.add_argument("--only", choices=ATTENTIONS, nargs="+", default=list(ATTENTIONS))
    parser.add_argument("--runs", type=Path, default=Path("runs/symmetric_matching"))
    parser.add_argument("--out", type=Path, default=Path("runs"))
    args = parser.parse_args(argv)
    size = FULL if args.full else SMALL
    size = replace(size, steps=args.steps or size.steps)
    if size.steps > POINTS and size.steps % POINTS:
        parser.error(f"--steps above {POINTS} must be a multiple of it, got {size.steps}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for folder in (args.runs, args.out):
        folder.mkdir(parents=True, exist_ok=True)
    for layers, norm, attention in itertools.product((1, 2), (False, True), args.only):
        run = train(attention, layers, norm, size, device)
        run.save(args.runs)
        last = ", ".join(f"{curve[-1]:.2g}" for curve in run.curves)
        print(f"{run.name()}: {run.seconds:.0f} s, losses at the end {last}", flush=True)
    report(load(args.runs, size), args.out)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")  # TF32, where there is such a thing
    main()
