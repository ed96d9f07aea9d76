"""Training in half precision: `GradScaler`."""

import torch

from tests.conformance.evaluate import scalar
from tests.conformance.spec import OpSpec


def test_grad_scaler_gives_unscaled_gradients(spec: OpSpec, device: torch.device) -> None:
    """A scale of a power of two changes no digit where nothing over- or underflows."""
    arguments = spec.build(spec.cases["everything"], torch.float32, device)
    leaves = [x.requires_grad_() for x in spec.floating(arguments).values()]

    def loss() -> torch.Tensor:
        with torch.autocast(device.type, torch.float16):
            return scalar(tuple(x.float() for x in spec.run(**arguments)))

    expected = torch.autograd.grad(loss(), leaves)
    scaler = torch.amp.GradScaler(device.type, init_scale=256.0)
    optimizer = torch.optim.SGD(leaves, lr=0.0)
    scaler.scale(loss()).backward()
    scaler.unscale_(optimizer)
    for leaf, e in zip(leaves, expected, strict=True):
        assert leaf.grad is not None
        # What is below float16's normal numbers without the scale has lost digits.
        torch.testing.assert_close(leaf.grad, e, rtol=2e-3, atol=1e-3 * e.abs().max().item())


def test_grad_scaler_skips_a_step_that_overflows(spec: OpSpec, device: torch.device) -> None:
    arguments = spec.build(spec.cases["plain"], torch.float32, device)
    query = arguments["query"] = arguments["query"].detach().requires_grad_()
    before = query.detach().clone()
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**40)
    optimizer = torch.optim.SGD([query], lr=1.0)
    with torch.autocast(device.type, torch.float16):
        out = spec.out(**arguments)
    assert out.dtype == torch.float16
    scaler.scale(out.float().square().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(query, before)
    assert scaler.get_scale() == 2.0**39
