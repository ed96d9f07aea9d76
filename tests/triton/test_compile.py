"""Every kernel compiles for GPUs that are not here, fits their shared memory, and hardly spills.

The launchers run on meta tensors, with a driver that only names the target.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from attn_ops import _library, masks
from tests.triton.uniform_registers import read_before_set

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
# Bytes of stack per thread: some spills measure faster than smaller blocks, thousands never do.
STACK = 512


class Target:
    """A Triton driver without a device."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton caches compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compiled(capability: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, Any]]]:
    """(name, compiled kernel) of every launch, none of which runs."""
    from attn_ops._triton import descriptors, launch

    launches: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append((self.__name__, run(self, *args, grid=grid, warmup=True, **options)))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(launch, "shared_memory", lambda device: SHARED_MEMORY[capability])
    monkeypatch.setattr(descriptors, "has_descriptors", lambda device: capability >= 90)
    monkeypatch.setattr(triton.runtime.driver, "_active", Target(capability))
    yield launches


def described(kernel: Any, tool: str, option: str) -> str:
    """What a tool of Triton's wheel says about the machine code."""
    import triton.backends.nvidia as backend

    path = Path(backend.__file__).parent / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(path), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def stack_bytes(kernel: Any) -> int:
    """Bytes of local memory per thread."""
    text = described(kernel, "cuobjdump", "-res-usage")
    found = re.search(r"STACK:(\d+)", text)
    assert found, text
    return int(found[1])


def empty(*sizes: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


def inputs(dtype: torch.dtype, width: int, length: int = 1024) -> tuple[torch.Tensor, ...]:
    """Query, key and value, [B, N, H, D] transposed."""
    return tuple(empty(2, length, heads, width, dtype=dtype).transpose(1, 2) for heads in (4, 2, 2))


def launch_cosine_sim(dtype: torch.dtype, width: int, with_terms: bool) -> None:
    """Forward and backward; `with_terms` with all that changes the kernels, else with nothing."""
    batch, heads, kv_heads, length = 2, 4, 2, 1024
    tensors: list[torch.Tensor | None] = [None] * 9
    if with_terms:
        parameter = torch.float32
        tensors = [
            empty(batch, 1, 1, length, dtype=torch.bool),
            empty(1, heads, length, length, dtype=dtype),
            empty(heads, 2 * length - 1, dtype=parameter),
            empty(heads, dtype=parameter),
            empty(heads, width, dtype=parameter),
            empty(kv_heads, width, dtype=parameter),
            empty(heads, dtype=parameter),
            empty(1, length, dtype=torch.int32),
            empty(1, length, dtype=torch.int32),
        ]
    options = (masks.UNBOUNDED, 0, 8.0, 2 if with_terms else 1)
    kernels = _library.triton_room("cosine_sim")
    arguments = (*inputs(dtype, width), *tensors)
    out, lse = kernels.forward(*arguments, *options)
    wanted = [True] * 3 + [with_terms] * 6
    grad_out = empty(*out.shape, dtype=dtype)
    kernels.backward(grad_out, None, *arguments, out, lse, *options, wanted)


def launch_forward_mode(dtype: torch.dtype, width: int, with_terms: bool) -> None:
    """Unit vectors and the tangents of attention: of query, key and value, or of everything."""
    batch, heads, length = 2, 4, 1024
    kernels = _library.triton_room("cosine_sim", "triton_jvp")
    query, key, value = inputs(dtype, width)
    results = [kernels.unit_jvp(x, x, 2 if with_terms else 1) for x in (query, key)]
    (query, tangent_query), (key, tangent_key) = results
    terms: list[torch.Tensor | None] = [None] * 4
    if with_terms:
        terms = [
            empty(batch, 1, 1, length, dtype=torch.bool),
            empty(1, heads, length, length, dtype=dtype),
            empty(heads, 2 * length - 1, dtype=torch.float32),
            empty(heads, dtype=torch.float32),
        ]
    out = empty(batch, heads, length, width, dtype=dtype)
    lse = empty(batch, heads, length, dtype=torch.float32)
    tangents = (tangent_query, tangent_key, value, *terms[1:])
    arguments = (query, key, value, *terms, None, None, out, lse, *tangents)
    kernels.jvp(*arguments, masks.UNBOUNDED, 0, 8.0)


def launch_linear(dtype: torch.dtype, width: int, with_terms: bool) -> None:
    """The same; with terms also a step, and without none that is divided."""
    kernels = _library.triton_room("linear")
    query, key, value = inputs(dtype, width)
    feature_map = "taylor" if width <= 16 else "softplus" if with_terms else "identity"
    features = 153 if feature_map == "taylor" else width
    tensors: list[torch.Tensor | None] = [None] * 5
    if with_terms:
        tensors = [
            empty(2, 1, 1, 1024, dtype=torch.bool),
            empty(4, dtype=torch.float32),
            empty(2, 4, features, width, dtype=torch.float32),
            empty(2, 4, features, dtype=torch.float32),
            None,
        ]
    options = (True, 1e-5 if with_terms else None, feature_map)
    arguments = (query, key, value, *tensors)
    out, denominator, *_ = kernels.forward(*arguments, *options)
    of_results = (out, denominator) if with_terms else (None, None)
    grad_out = empty(*out.shape, dtype=dtype)
    wanted = [True] * 3 + [with_terms] * 2
    kernels.backward(grad_out, None, None, *arguments, *of_results, *options, wanted)
    if with_terms:
        one = (x[:, :, :1] for x in (query, key, value))
        kernels.step(*one, tensors[2], tensors[3], tensors[1], *options[1:])


def launch_l1_sparse(dtype: torch.dtype, width: int, with_terms: bool) -> None:
    """The same; with terms also in the reverse direction and with heads that share a key head."""
    from attn_ops.l1 import triton_sparse

    tokens, count = 1024, 20000
    query, key, value = inputs(dtype, width)
    key, value = (key, value) if with_terms else (query, query)
    sizes = (tokens + 1, count, tokens + 1, count, count)
    lists = [empty(size, dtype=torch.int64) for size in sizes]
    arguments: tuple[Any, ...] = (query, key, value, value if with_terms else None, *lists)
    options: tuple[Any, ...] = (with_terms, True, 0.125)  # without softmax, or with it
    out, weight = triton_sparse.forward(*arguments, *options)
    grad_out = empty(*out.shape, dtype=dtype)
    wanted = [True] * 3 + [with_terms]
    everything: tuple[Any, ...] = (grad_out, *arguments, weight, *options, wanted)
    triton_sparse.backward(*everything)


def check(compiled: list[tuple[str, Any]], capability: int, most: int = STACK) -> None:
    for name, kernel in compiled:
        shared, stack = kernel.metadata.shared, stack_bytes(kernel)
        assert shared <= SHARED_MEMORY[capability], f"{name} takes {shared} bytes of shared memory"
        assert stack <= most, f"{name} spills {stack} bytes per thread"
        if capability == 90 and "wgmma" in kernel.asm["ptx"]:
            unset = read_before_set(described(kernel, "nvdisasm", "-c"))
            assert not unset, f"{name} reads registers that nothing set: {unset}"


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "with_terms", "stack"),
    [
        (90, torch.bfloat16, 64, False, STACK),
        (90, torch.bfloat16, 128, False, STACK),
        (90, torch.bfloat16, 256, False, STACK),
        (90, torch.bfloat16, 128, True, STACK),
        (90, torch.float32, 64, False, STACK),
        (90, torch.float32, 128, False, 1024),  # the gradients of keys and values, not in terms
        (90, torch.float32, 128, True, 544),  # the gradient of a bias, of parts of float32
        (90, torch.float32, 256, False, STACK),
        (80, torch.float32, 64, True, STACK),
        (80, torch.bfloat16, 80, False, STACK),
        (80, torch.bfloat16, 256, True, STACK),
        (89, torch.bfloat16, 128, True, STACK),
        (100, torch.float16, 128, True, STACK),
    ],
)
def test_kernels_of_cosine_sim_fit(
    compiled: list[tuple[str, Any]],
    capability: int,
    dtype: torch.dtype,
    width: int,
    with_terms: bool,
    stack: int,
) -> None:
    launch_cosine_sim(dtype, width, with_terms)
    names = {name for name, _ in compiled}
    # One norm over the whole row is part of the core.
    assert len(names - {"split_kernel"}) == (9 if with_terms else 5), names
    # Hopper's matrix units read float32 from shared memory as terms of 16 bits.
    terms = capability == 90 and dtype == torch.float32 and width <= 128 and not with_terms
    assert ("split_kernel" in names) == terms
    check(compiled, capability, stack)


@pytest.mark.parametrize(
    ("capability", "width", "batches"),
    [(90, 64, 2), (90, 128, 3), (89, 64, 1)],
)
def test_kernels_of_a_bias_in_tiles_fit(
    compiled: list[tuple[str, Any]], capability: int, width: int, batches: int
) -> None:
    """Two batches that share a bias are summed with the gradient of queries, more by themselves.

    relative_bias alone comes in tiles too.
    """
    heads, length = 2, 1024
    query = empty(batches, heads, length, width, dtype=torch.bfloat16)
    bias = empty(1, heads, length, length, dtype=torch.bfloat16)
    options = (masks.UNBOUNDED, masks.UNBOUNDED, 8.0, 1)
    kernels = _library.triton_room("cosine_sim")
    arguments = (query, query, query, None, bias, *[None] * 7)
    out, lse = kernels.forward(*arguments, *options)
    wanted = [True] * 4 + [False] * 5
    kernels.backward(out, None, *arguments, out, lse, *options, wanted)
    of_bias = ["grad_query_bias_kernel", "grad_key_value_kernel"]
    if batches == 3:
        of_bias = ["grad_query_kernel", "grad_key_value_kernel", "grad_bias_kernel"]
    assert [name for name, _ in compiled][-len(of_bias) :] == of_bias
    check(compiled, capability)

    del compiled[:]
    relative_bias = empty(heads, 2 * length - 1, dtype=torch.float32)
    arguments = (query, query, query, None, None, relative_bias, *[None] * 6)
    out, lse = kernels.forward(*arguments, *options)
    wanted = [True] * 3 + [False, True] + [False] * 4
    kernels.backward(out, None, *arguments, out, lse, *options, wanted)
    expanded = [name for name, _ in compiled].count("expand_diagonals_kernel")
    assert expanded == (2 if capability == 90 else 0)
    check(compiled, capability)


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "queries"),
    [
        (90, torch.bfloat16, 128, 1),
        (90, torch.bfloat16, 128, 32),  # two heads a group: the most rows, by warpgroups
        (90, torch.float16, 64, 1),
        (90, torch.float32, 128, 16),
        (80, torch.bfloat16, 128, 1),
        (89, torch.bfloat16, 256, 16),
    ],
)
def test_kernels_of_few_queries_fit(
    compiled: list[tuple[str, Any]],
    capability: int,
    dtype: torch.dtype,
    width: int,
    queries: int,
) -> None:
    query, key, value = inputs(dtype, width)
    options = (masks.UNBOUNDED, 0, 8.0, 1)
    kernels = _library.triton_room("cosine_sim")
    kernels.forward(query[:, :, :queries], key, value, *[None] * 9, *options)
    assert [name for name, _ in compiled] == ["span_kernel", "add_spans_kernel"]
    half = dtype != torch.float32
    check(compiled, capability, most=0 if half else 64)
    if half:  # keys and values do not pass through registers on their way to shared memory
        copy = "cp.async.bulk.tensor" if capability == 90 else "cp.async.cg.shared.global"
        assert copy in compiled[0][1].asm["ptx"]


@pytest.mark.parametrize("capability", [90])
def test_kernels_of_cosine_sim_set_what_they_read_whatever_the_strides(
    compiled: list[tuple[str, Any]], capability: int
) -> None:
    """The gradient of a sum is expanded; of columns, row after row is not contiguous."""
    kernels = _library.triton_room("cosine_sim")
    query, out, lse = (empty(2, 2, 5, *width, dtype=torch.float32) for width in ((8,), (6,), ()))
    key, value = (empty(2, 2, width, 7, dtype=torch.float32).mT for width in (8, 6))
    options = (masks.UNBOUNDED, masks.UNBOUNDED, 8.0, 1)
    grad_out = torch.empty((), device="meta").expand_as(out)
    arguments = (query, key, value, *[None] * 9, out, lse)
    kernels.backward(grad_out, None, *arguments, *options, [True] * 3 + [False] * 6)
    assert "grad_key_value_kernel" in [name for name, _ in compiled]
    check(compiled, capability)


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "with_terms"),
    [
        (90, torch.bfloat16, 64, False),
        (90, torch.bfloat16, 128, False),
        (90, torch.bfloat16, 256, False),
        (90, torch.float32, 128, False),
        (90, torch.float16, 64, False),
        (80, torch.bfloat16, 128, True),
        (80, torch.float32, 64, True),
        (89, torch.bfloat16, 256, True),
        (100, torch.float16, 128, True),
    ],
)
def test_kernels_of_forward_mode_fit(
    compiled: list[tuple[str, Any]],
    capability: int,
    dtype: torch.dtype,
    width: int,
    with_terms: bool,
) -> None:
    launch_forward_mode(dtype, width, with_terms)
    assert {name for name, _ in compiled} == {
        "normalize_kernel",
        "normalize_backward_kernel",
        "jvp_kernel",
    }
    check(compiled, capability)


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "with_terms", "stack"),
    [
        (90, torch.bfloat16, 64, False, STACK),
        (90, torch.bfloat16, 128, False, STACK),
        (90, torch.bfloat16, 128, True, STACK),
        (90, torch.bfloat16, 16, True, 1408),  # taylor, known to be slow
        (90, torch.float32, 256, False, 4096),  # known to be slow
        (90, torch.float16, 128, True, STACK),
        (80, torch.bfloat16, 128, True, STACK),
        (80, torch.bfloat16, 256, False, STACK),
        (89, torch.float16, 64, True, STACK),
        (100, torch.bfloat16, 128, False, STACK),
    ],
)
def test_kernels_of_linear_fit(
    compiled: list[tuple[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capability: int,
    dtype: torch.dtype,
    width: int,
    with_terms: bool,
    stack: int,
) -> None:
    from attn_ops.linear import triton_launches, triton_problem

    segments = 4 if with_terms else 1
    monkeypatch.setattr(triton_problem, "num_segments", lambda *sizes: segments)
    monkeypatch.setattr(triton_launches, "shared_memory", lambda device: SHARED_MEMORY[capability])
    launch_linear(dtype, width, with_terms)
    names = {name for name, _ in compiled}
    assert len(names) == (7 if with_terms else 3), names
    check(compiled, capability, stack)


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "with_terms"),
    [
        (80, torch.float16, 64, True),
        (89, torch.float32, 256, True),
        (90, torch.float32, 64, True),
        (90, torch.float32, 128, False),
        (90, torch.bfloat16, 13, True),
        (100, torch.bfloat16, 64, False),
    ],
)
def test_kernels_of_sparse_l1_fit(
    compiled: list[tuple[str, Any]],
    capability: int,
    dtype: torch.dtype,
    width: int,
    with_terms: bool,
) -> None:
    launch_l1_sparse(dtype, width, with_terms)
    names = [name for name, _ in compiled]
    # Over pieces and over rows; the rows of the backward in three steps.
    columns = 4 if with_terms else 2
    assert names.count("forward_kernel") == 2 and names.count("rows_kernel") == 3
    assert names.count("columns_kernel") == columns and len(names) == 6 + columns
    check(compiled, capability)
