"""No output is left unwritten, results repeat bit by bit, and memory grows with M and N alone."""

import ctypes
import os
import platform
import subprocess
import sys

import pytest
import torch

from tests.comparison import assert_same
from tests.conformance.evaluate import DTYPES, cotangents, with_gradients
from tests.conformance.spec import OpSpec, only
from tests.conftest import DEVICE


def run(program: str, *args: str, **environment: str) -> str:
    """What a process of its own prints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *args],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_output_is_written(
    spec: OpSpec,
    named: str,
    dtype: torch.dtype,
    device: torch.device,
    uninitialized_memory_is_nan: None,
) -> None:
    arguments = spec.build(spec.cases[named], dtype, device)
    grads = cotangents(*spec.formula(**arguments))
    results = with_gradients(spec, spec.run, arguments, *grads)
    for name, result in results.items():
        assert not result.isnan().any(), f"{name} has unwritten elements"


of_the_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="the CPU's allocator")

# glibc fills what malloc returns with 0xFE: huge numbers, NaN in float16.
PERTURBED = {"MALLOC_PERTURB_": "1", "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
AGREE = """
import sys, torch
from tests.conformance.evaluate import DTYPES, assert_agrees
from tests.conformance.spec import all_specs
assert torch.empty(1000).abs().min() > 1e30
spec = next(s for s in all_specs() if s.name == sys.argv[1])
for case in (*spec.cases.values(), *spec.examples):
    for dtype in DTYPES:
        assert_agrees(spec, case, dtype, torch.device("cpu"))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc")
@of_the_cpu
def test_nothing_unwritten_is_read_in_native_code(spec: OpSpec) -> None:
    """What C++ allocates is not filled in deterministic mode."""
    run(AGREE, spec.name, **PERTURBED)


KEEP_NOTHING = """
import ctypes, sys, torch
from tests.conformance.evaluate import cotangents, with_gradients
from tests.conformance.spec import all_specs

class Allocated(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (*"0123456", "bytes", *"89")]

libc = ctypes.CDLL("libc.so.6")
libc.mallinfo2.restype = Allocated
torch.set_num_threads(1)
spec = next(s for s in all_specs() if s.name == sys.argv[1])
arguments = spec.build(spec.cases["plain"], torch.float32, torch.device("cpu"))
grads = cotangents(*spec.formula(**arguments))

def allocated_by_calls(calls):
    before = libc.mallinfo2().bytes
    for _ in range(calls):
        with_gradients(spec, spec.run, arguments, *grads)
    return libc.mallinfo2().bytes - before

allocated_by_calls(50)
assert allocated_by_calls(500) < 500 * 16
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc counts from 2.33 on")
@of_the_cpu
def test_calls_leave_no_memory_behind(spec: OpSpec) -> None:
    """Strings that ops are called with were kept forever: PyTorch's stable ABI does not free."""
    run(KEEP_NOTHING, spec.name)


@only("longer than a block", "everything", "grouped heads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_repeat_bit_by_bit(
    spec: OpSpec, named: str, dtype: torch.dtype, device: torch.device
) -> None:
    arguments = spec.build(spec.cases[named], dtype, device)
    grads = cotangents(*spec.formula(**arguments))
    first = with_gradients(spec, spec.run, arguments, *grads)
    # Of gradients that need deterministic mode for it: see doors/test_deterministic.py.
    names = spec.results if device.type in spec.unordered else (*first,)
    for _ in range(3):
        again = with_gradients(spec, spec.run, arguments, *grads)
        for name in names:
            assert torch.equal(again[name], first[name]), name


@pytest.mark.parametrize("threads", (1, 2, 3, 7))
@only("longer than a block", "everything", "packed, causal, window", "packed and causal")
def test_number_of_threads_does_not_matter(
    spec: OpSpec, named: str, threads: int, device: torch.device
) -> None:
    default = torch.get_num_threads()
    arguments = spec.build(spec.cases[named], torch.float32, device)
    grads = cotangents(*spec.formula(**arguments))
    expected = with_gradients(spec, spec.run, arguments, *grads)
    try:
        torch.set_num_threads(threads)
        actual = with_gradients(spec, spec.run, arguments, *grads)
    finally:
        torch.set_num_threads(default)
    for name, result in actual.items():
        assert_same(name, result, expected[name])


@only("plain", "everything")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_outputs_are_contiguous_and_share_no_memory(
    spec: OpSpec, named: str, dtype: torch.dtype, device: torch.device
) -> None:
    arguments = spec.build(spec.cases[named].but(strides="transposed"), dtype, device)
    grads = cotangents(*spec.formula(**arguments))
    results = with_gradients(spec, spec.run, arguments, *grads)
    assert all(results[name].is_contiguous() for name in spec.results)
    inputs = {x.untyped_storage().data_ptr() for x in spec.floating(arguments).values()}
    outputs = [x.untyped_storage().data_ptr() for x in results.values() if x.numel()]
    assert len(set(outputs)) == len(outputs)
    assert inputs.isdisjoint(outputs)


# In a process of its own: the peak of memory never goes down again.
MEASURE = """
import resource, sys, torch
from tests.conformance.evaluate import scalar
from tests.conformance.spec import all_specs
spec = next(s for s in all_specs() if s.name == sys.argv[1])
length = int(sys.argv[2])
def run(length):
    case = spec.resized(spec.long, length, length, 1)
    arguments = spec.build(case, torch.float32, torch.device("cpu"))
    leaves = [x.requires_grad_() for x in spec.floating(arguments).values()]
    torch.autograd.grad(scalar(spec.run(**arguments)), leaves)
run(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(length)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10)
"""


def test_memory_does_not_grow_with_the_number_of_scores(spec: OpSpec, device: torch.device) -> None:
    if spec.long is None:
        pytest.skip("its results are as large as the scores")
    if device.type == "cuda":
        length = 32768
        case = spec.resized(spec.long, length, length, 1)
        arguments = spec.build(case, torch.bfloat16, device)
        leaves = [x.requires_grad_() for x in spec.floating(arguments).values()]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.max_memory_allocated()
        torch.autograd.grad(spec.out(**arguments).sum(), leaves)
        grown = torch.cuda.max_memory_allocated() - before
    else:
        length = 12288  # scores of 576 MiB
        grown = int(run(MEASURE, spec.name, str(length)).split()[-1])
    assert grown < 4 * length * length * 0.5
