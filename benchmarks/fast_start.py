"""How soon a compiled op runs in a new process: python -m benchmarks.fast_start

Seconds from the first call of a compiled function to its gradients, per op, in two processes one
after the other: the first finds the caches of AOTAutograd and Inductor empty, the second finds what
the first has left. Importing PyTorch and starting its compiler are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

import torch

from benchmarks.gradients_needed import problems

LENGTH = 128


def compiled_once(device: str) -> dict[str, float]:
    """Seconds of the first forward and backward of each op."""
    torch.manual_seed(0)
    first = torch.ones(2, device=device, requires_grad=True)
    torch.compile(torch.nn.functional.silu)(first).sum().backward()  # starts the compiler
    seconds = {}
    for name, (op, wanted) in problems(LENGTH, device).items():
        shapes = dict.fromkeys(wanted, (1, 4, LENGTH, 32)) | {"bias": (4, LENGTH, LENGTH)}
        tensors = {
            argument: torch.randn(shapes[argument], device=device, requires_grad=True)
            for argument in wanted
        }
        compiled = torch.compile(op, fullgraph=True)
        start = time.perf_counter()
        torch.autograd.grad(compiled(**tensors).sum(), list(tensors.values()))
        if device == "cuda":
            torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - start
    return seconds


def in_a_process(device: str, cache: str) -> dict[str, float]:
    """The same in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.fast_start", "--device", device, "--once"],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Prints the table."""
    p = argparse.ArgumentParser("benchmarks.fast_start", description=__doc__)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--once", action="store_true", help="this process alone, as JSON")
    args = p.parse_args()
    if args.once:
        print(json.dumps(compiled_once(args.device)))
        return
    with tempfile.TemporaryDirectory() as cache:
        first, second = (in_a_process(args.device, cache) for _ in range(2))
    print("| op | first process | second process |\n|---|---|---|")
    for name in first:
        print(f"| {name} | {first[name]:.2f} s | {second[name]:.2f} s |")
    print(f"| all | {sum(first.values()):.2f} s | {sum(second.values()):.2f} s |")


if __name__ == "__main__":
    main()
