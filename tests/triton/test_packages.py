"""A package for CUDA calls nothing that only Python has, and nothing in it depends on one size.

Compiled ahead of time without a GPU, as far as the graph that Inductor gets: tensors are fake, the
ops of the CUDA library are known by their schemas, and a driver only names the target.
"""

import base64
import functools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import attn_ops
from attn_ops import _library
from attn_ops.cosine_sim import cuda as cosine_sim_cuda
from attn_ops.l1 import cuda as l1_cuda

triton = pytest.importorskip("triton")
from tests.triton.test_compile import Target  # noqa: E402

ROOT = Path(__file__).parent.parent.parent


def cuda_schemas() -> list[str]:
    """What the sources of the CUDA library define."""
    texts = [file.read_text() for file in sorted((ROOT / "csrc").rglob("*.cu"))]
    found = [m for text in texts for m in re.findall(r'm\.def\(\s*((?:"[^"]*"\s*)+)\)', text)]
    return ["".join(re.findall(r'"([^"]*)"', lines)) for lines in found]


@pytest.fixture
def cuda_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The names of ops that a process without Python has kernels for."""
    from attn_ops._triton import launch
    from attn_ops.linear import triton_launches

    schemas = cuda_schemas()
    names = {schema.partition("(")[0] for schema in schemas}
    library = torch.library.Library("attn", "FRAGMENT")
    for schema in schemas:
        if not hasattr(torch.ops.attn, schema.partition("(")[0]):
            library.define(schema)
    for op, function in _library._cuda_fakes.items():
        torch.library.register_fake(f"attn::{op}", function, lib=library)
    monkeypatch.setattr(_library, "load_cuda_library", lambda: None)
    monkeypatch.setattr(l1_cuda, "missing", lambda device: None)
    monkeypatch.setattr(cosine_sim_cuda, "_is_there", lambda device: True)
    for module in (launch, triton_launches):
        monkeypatch.setattr(module, "shared_memory", lambda device: launch.LARGE)
    monkeypatch.setattr(triton_launches, "processors", lambda device: 132)
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
    monkeypatch.setattr(triton.runtime.driver, "_active", Target(90))
    yield names
    library._destroy()


class Call(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, inputs: list[Tensor]) -> Any:
        return self.function(*inputs)


def sparse(query: Tensor, key: Tensor, value: Tensor, *edges: Tensor) -> Any:
    return torch.ops.attn._l1_sparse_fwd(query, key, value, value, *edges, True, True, 0.5)


def step(query: Tensor, key: Tensor, value: Tensor, state: Tensor, key_sum: Tensor) -> Tensor:
    query, key, value = (x.narrow(2, 0, 1) for x in (query, key, value))
    return attn_ops.linear_attention_step(query, key, value, state, key_sum)


def with_everything(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, bias: Tensor) -> Any:
    return attn_ops.cosine_sim_attention(query, key, value, mask, bias, causal=True, window=9)


ROWS = {0: Dim("batch", max=64), 2: Dim("length", max=4096)}
EDGE, PLACE = {0: Dim("edges", max=1 << 20)}, {0: Dim.AUTO}
BATCH = {0: ROWS[0]}
Argument = tuple[tuple[int, ...], torch.dtype | None, dict[int, Any]]  # None: of the call
INDICES: list[Argument] = [
    ((17,), torch.int64, PLACE),
    ((999,), torch.int64, EDGE),
    ((17,), torch.int64, PLACE),
    ((999,), torch.int64, EDGE),
    ((999,), torch.int64, EDGE),
]
STATE: list[Argument] = [((2, 4, 32, 32), torch.float32, BATCH), ((2, 4, 32), torch.float32, BATCH)]
MASKS: list[Argument] = [
    ((2, 1, 1, 16), torch.bool, {0: ROWS[0], 3: ROWS[2]}),
    ((1, 4, 16, 16), None, {2: ROWS[2], 3: ROWS[2]}),
]
CALLS: dict[str, tuple[Callable[..., Any], list[Argument]]] = {
    "cosine_sim": (attn_ops.cosine_sim_attention, []),
    "cosine_sim with everything": (with_everything, MASKS),
    "l1": (attn_ops.l1_attention, []),
    "l1_scores": (lambda query, key, _: attn_ops.l1_scores(query, key), []),
    "l1_sparse": (sparse, INDICES),
    "linear": (attn_ops.linear_attention, []),
    "linear_with_state": (attn_ops.linear_attention_with_state, []),
    "linear_step": (step, STATE),
}


@functools.cache
def exported(call: str, dtype: torch.dtype) -> torch.export.ExportedProgram:
    """On CUDA, of any batch size and length, with queries [B, M, H, D] transposed."""
    function, others = CALLS[call]
    with FakeTensorMode(shape_env=ShapeEnv()):
        rows = [torch.empty(2, 16, h, 32, dtype=dtype, device="cuda") for h in (4, 2, 2)]
        inputs = [x.transpose(1, 2) for x in rows]
        inputs += [torch.empty(size, dtype=t or dtype, device="cuda") for size, t, _ in others]
    sizes = [ROWS] * 3 + [dynamic for *_, dynamic in others]
    return torch.export.export(Call(function), (inputs,), dynamic_shapes=(sizes,))


@functools.cache
def packaged(call: str, dtype: torch.dtype) -> Any:
    """The graph that AOTInductor gets."""
    with V.set_aot_compilation(True):
        return exported(call, dtype).run_decompositions().graph


def our_ops(graph: Any) -> list[tuple[str, dict[str, Any]]]:
    """Names and arguments; of one that writes to its arguments, by the op it stands for."""
    found = []
    for node in graph.nodes:
        op = node.args[0] if "auto_functionalized" in str(node.target) else node.target
        if str(op).startswith("attn."):
            found.append((str(op).split(".")[1], node.kwargs))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("call", CALLS)
def test_package_calls_only_what_the_cuda_library_has(
    call: str, dtype: torch.dtype, cuda_library: set[str]
) -> None:
    ops = our_ops(packaged(call, dtype))
    assert ops
    assert {name for name, _ in ops} <= cuda_library


@pytest.mark.parametrize("call", CALLS)
def test_nothing_in_a_package_depends_on_one_size(call: str, cuda_library: set[str]) -> None:
    def conditions(graph: Any) -> set[str]:
        values = (node.meta.get("val") for node in graph.nodes)
        tensor: Any = next(x for x in values if isinstance(x, Tensor))
        return {str(guard.expr) for guard in tensor.fake_mode.shape_env.guards}

    allowed = conditions(exported(call, torch.float32).run_decompositions().graph)
    assert conditions(packaged(call, torch.float32)) <= allowed


def sizes_of_parameters(code: str) -> list[int]:
    """In bytes, of the one kernel in this machine code."""
    text = described_by_cuobjdump(base64.b64decode(code + "=" * (-len(code) % 4)))
    found = re.findall(r"Ordinal : 0x(\w+).*?Size    : 0x(\w+)", text)
    return [int(size, 16) for _, size in sorted(found, key=lambda pair: int(pair[0], 16))]


def described_by_cuobjdump(code: bytes) -> str:
    import triton.backends.nvidia as backend

    tool = Path(backend.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        return subprocess.run([tool, "-elf", file.name], capture_output=True, text=True).stdout


@pytest.mark.parametrize("call", [x for x in CALLS if x not in ("l1", "l1_scores")])
def test_kernel_is_passed_the_parameters_it_was_compiled_for(
    call: str, cuda_library: set[str]
) -> None:
    launches = [kwargs for name, kwargs in our_ops(packaged(call, torch.float32))]
    assert launches
    for launch in launches:
        sizes = [4 if kind in "if" else 8 for kind in launch["kinds"]]
        assert sizes_of_parameters(launch["code"]) == [*sizes, 8, 8]  # and two of Triton's own


def test_exported_program_keeps_the_private_op(cuda_library: set[str]) -> None:
    graph = exported("cosine_sim", torch.float32).run_decompositions().graph
    assert [name for name, _ in our_ops(graph)] == ["_cosine_sim_fwd"]


def test_float64_stays_a_call_by_name(cuda_library: set[str]) -> None:
    assert [name for name, _ in our_ops(packaged("linear", torch.float64))] == ["_linear_fwd"]
