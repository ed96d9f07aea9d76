"""No output is left unwritten, results repeat bit by bit, and memory grows with M and N alone."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from tests.comparison import assert_same
from tests.conformance.evaluate import DTYPES, cotangents, with_gradients
from tests.conformance.spec import OpSpec, only


@pytest.fixture
def uninitialized_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Deterministic mode fills what `torch.empty` returns with NaN."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


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


@only("longer than a block", "everything", "grouped heads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_repeat_bit_by_bit(
    spec: OpSpec, named: str, dtype: torch.dtype, device: torch.device
) -> None:
    arguments = spec.build(spec.cases[named], dtype, device)
    grads = cotangents(*spec.formula(**arguments))
    first = with_gradients(spec, spec.run, arguments, *grads)
    for _ in range(3):
        again = with_gradients(spec, spec.run, arguments, *grads)
        assert all(torch.equal(again[name], result) for name, result in first.items())


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
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, spec.name, str(length)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
        grown = int(done.stdout.split()[-1])
    assert grown < 4 * length * length * 0.5
