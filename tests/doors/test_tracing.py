"""What profilers and fake tensors see of the ops."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.profiler import ProfilerActivity, profile

import attn_ops
from tests.conformance.evaluate import cotangents, scalar, with_gradients
from tests.conformance.spec import OpSpec


def test_profiler_shows_the_ops_by_name(spec: OpSpec, device: torch.device) -> None:
    arguments = spec.build(spec.cases["everything"], torch.float32, device)
    leaves = [x.requires_grad_() for x in spec.floating(arguments).values()]
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        torch.autograd.grad(scalar(spec.run(**arguments)), leaves)
    names = {event.key for event in profiled.key_averages()}
    assert {str(spec.ops[0]).replace(".", "::")} <= names
    assert {op._schema.name for op in (spec.forward, *spec.backwards)} <= names


def test_profiler_writes_the_ops_into_its_trace(
    spec: OpSpec, device: torch.device, tmp_path: Path
) -> None:
    """Kineto's file, which other tools read."""
    arguments = spec.build(spec.cases["plain"], torch.float32, device)
    query = arguments["query"] = arguments["query"].detach().requires_grad_()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        spec.out(**arguments).sum().backward()
    assert query.grad is not None
    path = tmp_path / "trace.json"
    profiled.export_chrome_trace(str(path))
    names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
    assert {op._schema.name for op in (spec.forward, spec.backward)} <= names


@pytest.mark.ops("linear_step")
def test_profiler_and_fake_tensors_see_a_step(device: torch.device) -> None:
    sizes = ((2, 3, 1, 4),) * 3 + ((2, 3, 4, 4), (2, 3, 4))
    tensors = [torch.rand(size, device=device) for size in sizes]
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        out = attn_ops.linear_attention_step(*tensors)
    names = {event.key for event in profiled.key_averages()}
    assert {"attn::linear_step", "attn::_linear_step"} <= names
    with FakeTensorMode() as mode:
        fake = attn_ops.linear_attention_step(*(mode.from_tensor(x) for x in tensors))
    assert isinstance(fake, FakeTensor)
    assert (fake.shape, fake.dtype, fake.device) == (out.shape, out.dtype, out.device)


def test_fake_tensors_have_the_shapes_of_real_ones(spec: OpSpec, device: torch.device) -> None:
    """Forward and backward; nothing is computed."""
    arguments = spec.build(spec.cases["everything"], torch.bfloat16, device)
    grads = cotangents(*spec.run(**arguments))
    real = with_gradients(spec, spec.run, arguments, *grads)
    with FakeTensorMode() as mode:

        def fake(x: object) -> object:
            return mode.from_tensor(x) if isinstance(x, Tensor) else x

        fakes = {name: fake(x) for name, x in arguments.items()}
        results = with_gradients(spec, spec.run, fakes, *map(fake, grads))  # type: ignore[arg-type]
    for name, result in real.items():
        assert isinstance(results[name], FakeTensor), name
        assert (results[name].shape, results[name].dtype) == (result.shape, result.dtype), name
        assert results[name].device == result.device
