"""What the shortest way to a kernel must not leave out."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

import attn_ops
from attn_ops import _autograd

CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "cosine_sim": lambda x: attn_ops.cosine_sim_attention(x, x, x),
    "l1": lambda x: attn_ops.l1_attention(x, x, x),
    "l1_scores": lambda x: attn_ops.l1_scores(x, x),
    "linear": lambda x: attn_ops.linear_attention(x, x, x),
}


@pytest.fixture(params=CALLS)
def op(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def leaf() -> Tensor:
    return torch.randn(1, 2, 3, 4, requires_grad=True)


def test_below_autograd_nothing_is_recorded(op: str) -> None:
    """As in the kernel of somebody's op that is made of these."""
    with torch._C._AutoDispatchBelowAutograd():
        assert not CALLS[op](leaf()).requires_grad
    assert CALLS[op](leaf()).requires_grad


def test_a_profiler_sees_the_public_and_the_private_op(op: str) -> None:
    with profile() as profiler:
        CALLS[op](leaf()).sum().backward()
    seen = {event.key for event in profiler.key_averages()}
    assert {f"attn::{op}", f"attn::_{op}_fwd", f"attn::_{op}_bwd"} <= seen


def test_a_mode_sees_the_private_op_once_with_its_gradient(op: str) -> None:
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x = leaf()
    with Mode():
        CALLS[op](x).sum().backward()
    assert seen.count(f"attn._{op}_fwd.default") == seen.count(f"attn._{op}_bwd.default") == 1
    expected = torch.autograd.grad(CALLS[op](x).sum(), x)[0]
    assert x.grad is not None and torch.equal(x.grad, expected)


def test_grad_modes_are_as_they_were(op: str) -> None:
    torch._C._set_fwd_grad_enabled(False)
    try:
        CALLS[op](leaf())
        assert not torch._C._is_fwd_grad_enabled() and torch.is_grad_enabled()
    finally:
        torch._C._set_fwd_grad_enabled(True)


def test_an_int_is_a_float_to_a_function() -> None:
    x = leaf()
    three = attn_ops.cosine_sim_attention(x, x, x, scale=3)
    assert torch.equal(three, attn_ops.cosine_sim_attention(x, x, x, scale=3.0))
    with pytest.raises(ValueError, match="scale must be at least 0 with score='inverse', got -1.0"):
        attn_ops.l1_attention(x, x, x, scale=-1, score="inverse")


@pytest.mark.skipif(_autograd.unavailable is not None, reason="of a torch with the private names")
def test_the_way_is_short_where_nothing_is_in_between() -> None:
    assert _autograd._nothing_is_in_between()
    assert not torch.func.vmap(lambda x: x + _autograd._nothing_is_in_between())(
        torch.zeros(2)
    ).any()
