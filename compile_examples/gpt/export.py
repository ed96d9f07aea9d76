"""From the trained model to a file that runs without its Python, and the proof that it does."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn

from gpt import run_package

LENGTHS = (1, 7, 64, 200, 333)  # none of them the length it was exported at


def compiler_missing() -> str | None:
    """Why TorchInductor cannot compile C++ here; None where it can."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError) as error:
        return str(error).splitlines()[0]
    return None


def headers_missing() -> str | None:
    """Why torch.compile cannot bind its kernels to Python here; None where it can.

    Ahead-of-time packages are not bound to Python and do without.
    """
    folder = Path(sysconfig.get_path("include"))
    if (folder / "Python.h").exists():
        return None
    return f"no Python.h in {folder}: apt install python3-dev, for example"


def export(model: nn.Module, seq_len: int, device: torch.device) -> torch.export.ExportedProgram:
    """The whole model as one graph, batch and length left open."""
    tokens = torch.randint(256, (2, seq_len), device=device)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    with torch.no_grad():
        return torch.export.export(
            model.eval(), (tokens,), dynamic_shapes={"tokens": {0: batch, 1: length}}
        )


def ops_in(program: torch.export.ExportedProgram) -> list[str]:
    """The names of this library's ops in an exported graph."""
    targets = (str(node.target) for node in program.graph.nodes)
    return sorted({target for target in targets if target.startswith("attn.")})


@torch.no_grad()
def write_expected(model: nn.Module, data: Tensor, device: torch.device, path: Path) -> None:
    """Stretches of text of several lengths with the logits that the model gives, and a batch."""
    tokens = [data[None, :length].long() for length in LENGTHS if length <= len(data)]
    if len(data) >= 150:
        tokens.append(data[:150].long().view(3, 50))
    logits = [model(t.to(device)).cpu() for t in tokens]
    # Relative to the largest logit. Fusing changes the order of float32 sums (1e-6 on the CPU);
    # on a GPU matrix products may round their operands to TF32's 11 bits.
    tolerance = 1e-4 if device.type == "cpu" else 1e-2
    torch.save({"tokens": tokens, "logits": logits, "tolerance": tolerance}, path)


def run_in_fresh_process(
    package: Path, expected: Path, *, prompt: str, context: int, device: torch.device, length: int
) -> str:
    """What run_package.py printed.

    Raises:
        RuntimeError: it failed, or the logits differ.
    """
    command = [sys.executable, run_package.__file__, str(package), "--expected", str(expected)]
    command += ["--prompt", prompt, "--bytes", str(length)]
    command += ["--context", str(context), "--device", str(device)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        status = f"exit status {done.returncode}"  # -11: a crash, which prints nothing
        raise RuntimeError(
            f"{package.name} in a fresh process, {status}:\n{done.stdout}{done.stderr}"
        )
    return done.stdout
