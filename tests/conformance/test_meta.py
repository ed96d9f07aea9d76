"""The meta device: shapes and dtypes of results and gradients, and no memory."""

import torch
from torch import Tensor

from tests.conformance.evaluate import cotangents, with_gradients
from tests.conformance.spec import OpSpec


def test_results_and_gradients_have_the_shapes_of_real_ones(
    spec: OpSpec, named: str, device: torch.device
) -> None:
    arguments = spec.build(spec.cases[named], torch.bfloat16, device)
    grads = cotangents(*spec.run(**arguments))
    real = with_gradients(spec, spec.run, arguments, *grads)
    on_meta = {n: x.to("meta") if isinstance(x, Tensor) else x for n, x in arguments.items()}
    meta = with_gradients(spec, spec.run, on_meta, *(x.to("meta") for x in grads))
    for name, result in real.items():
        assert meta[name].device.type == "meta"
        assert (meta[name].shape, meta[name].dtype) == (result.shape, result.dtype), name
