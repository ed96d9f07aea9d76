"""What profilers and fake tensors see of the ops."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.profiler import ProfilerActivity, profile

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
