"""Runs an exported GPT in a process that has none of its Python: compares logits, writes text.

python run_package.py model.pt2 [--expected expected.pt] [--prompt TEXT] [--bytes 300]

The file holds the whole model; `import attn_ops` brings the one op that PyTorch has not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import attn_ops  # noqa: F401  registers torch.ops.attn

Predict = Callable[[Tensor], Tensor]


def load(path: Path) -> Predict:
    """The function ``[B, M]`` bytes -> ``[B, M, 256]`` logits of a package or exported program."""
    if path.name.endswith(".exported.pt2"):
        return torch.export.load(path).module()
    return torch._inductor.aoti_load_package(str(path))


@torch.no_grad()
def generate(
    predict: Predict,
    prompt: bytes,
    length: int,
    *,
    context: int = 256,
    temperature: float = 0.7,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> bytes:
    """``prompt`` and ``length`` bytes after it, each drawn given the last ``context`` ones."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([list(prompt)])
    for _ in range(length):
        logits = predict(tokens[:, -context:].to(device))[0, -1].float().cpu()
        weights = torch.softmax(logits / temperature, dim=-1)
        tokens = torch.cat([tokens, torch.multinomial(weights, 1, generator=generator)[None]], 1)
    return bytes(tokens[0].tolist())


def compare(predict: Predict, expected: Path, device: str) -> bool:
    """Whether the logits are those that the model gave; prints how far they are apart."""
    cases = torch.load(expected, weights_only=True)
    agree = True
    for tokens, logits in zip(cases["tokens"], cases["logits"]):
        got = predict(tokens.to(device)).cpu()
        error = (got - logits).abs().max().item()
        allowed = cases["tolerance"] * logits.abs().max().item()
        agree &= got.shape == logits.shape and error <= allowed  # NaN is not <=
        print(f"  {list(tokens.shape)} bytes: logits differ by {error:.1e}, allowed {allowed:.1e}")
    return agree


def main() -> int:
    """Returns 1 where the logits differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path)
    parser.add_argument("--expected", type=Path, help="tokens and logits that have to come out")
    parser.add_argument("--prompt", default="def ")
    parser.add_argument("--bytes", type=int, default=300, help="how much text to write")
    parser.add_argument("--context", type=int, default=256, help="bytes the model looks back on")
    parser.add_argument("--device", default="cpu", help="where the model was exported")
    args = parser.parse_args()
    predict = load(args.package)
    if args.expected and not compare(predict, args.expected, args.device):
        print("the exported model and the trained one differ")
        return 1
    options = {"context": args.context, "device": args.device}
    text = generate(predict, args.prompt.encode(), args.bytes, **options)
    print(text.decode(errors="replace"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
