"""Activation checkpointing: gradients stay, and a policy by the op's name saves its results."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from tests.comparison import assert_same
from tests.conformance.capture import Calls
from tests.conformance.evaluate import scalar
from tests.conformance.spec import OpSpec


def gradients(
    spec: OpSpec, device: torch.device, settings: dict[str, Any] | None
) -> tuple[int, list[Tensor]]:
    """How often the private forward ran, and all gradients."""
    arguments = spec.build(spec.cases["everything"], torch.float32, device)
    leaves = {n: x.detach().requires_grad_() for n, x in spec.floating(arguments).items()}

    def total(*tensors: Tensor) -> Tensor:
        return scalar(spec.run(**(arguments | dict(zip(leaves, tensors)))))

    with Calls() as calls:
        if settings is None:
            result = total(*leaves.values())
        else:
            result = checkpoint(total, *leaves.values(), use_reentrant=False, **settings)
        grads = torch.autograd.grad(result, list(leaves.values()))
    return [call.op for call in calls.calls].count(spec.forward), list(grads)


@pytest.mark.parametrize("saved", (False, True), ids=("computed again", "saved by its name"))
def test_gradients_are_those_without_checkpointing(
    spec: OpSpec, saved: bool, device: torch.device
) -> None:
    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        wanted = op is spec.forward
        return CheckpointPolicy.MUST_SAVE if wanted else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(policy)

    once, expected = gradients(spec, device, None)
    assert once == 1
    count, actual = gradients(spec, device, {"context_fn": contexts} if saved else {})
    assert count == (1 if saved else 2)
    for name, a, e in zip(spec.differentiable, actual, expected):
        assert_same(name, a, e)
