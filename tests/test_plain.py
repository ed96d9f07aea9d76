"""Plain calls (attn_ops/_plain.py): they give what the op gives, and only what is plain is one."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import attn_ops
from attn_ops import _autograd, _plain
from attn_ops.cosine_sim import ops as cosine_sim_ops
from attn_ops.l1 import ops as l1_ops
from attn_ops.linear import ops as linear_ops

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "cosine_sim": [{}, {"causal": True, "scale": 3.5}, {"groups": 2}],
    "l1": [{}, {"causal": True, "scale": 0.3}],
    "linear": [{}, {"causal": True, "eps": 0.1}, {"feature_map": "elu_plus_one"}],
}
CASES = [(op, options) for op, all_options in OPTIONS.items() for options in all_options]
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "cosine_sim": attn_ops.cosine_sim_attention,
    "l1": attn_ops.l1_attention,
    "linear": attn_ops.linear_attention,
}
ROOMS: dict[str, Any] = {"cosine_sim": cosine_sim_ops, "l1": l1_ops, "linear": linear_ops}

pytestmark = pytest.mark.skipif(
    _autograd.unavailable is not None, reason="of a torch with the private names"
)


def draw(dtype: torch.dtype = torch.float64, *, transposed: bool = False) -> list[Tensor]:
    """Query, key and value with grouped heads, all with gradients."""
    torch.manual_seed(0)
    sizes = [(2, 4, 5, 6), (2, 2, 5, 6), (2, 2, 5, 3)]
    if transposed:
        return [
            torch.randn(b, n, h, d, dtype=dtype).transpose(1, 2).requires_grad_()
            for b, h, n, d in sizes
        ]
    return [torch.randn(size, dtype=dtype, requires_grad=True) for size in sizes]


@pytest.fixture
def plain_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The rooms whose plain calls were made, in order."""
    calls: list[str] = []

    def counted(room: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls.append(room)
            return plain(*args)

        return call

    for name, room in ROOMS.items():
        monkeypatch.setattr(room, "plain", counted(name, room.plain))
    return calls


def both(op: str, options: dict[str, Any]) -> list[Callable[..., Tensor]]:
    """The function, whose call is plain, and the op, of which none is."""
    function, packet = FUNCTIONS[op], getattr(torch.ops.attn, op)
    return [lambda *x: function(*x, **options), lambda *x: packet(*x, **options)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("op", "options"), CASES)
def test_result_and_gradients_are_those_of_the_op(
    op: str, options: dict[str, Any], dtype: torch.dtype, transposed: bool, plain_calls: list[str]
) -> None:
    results = []
    for call in both(op, options):
        leaves = draw(dtype, transposed=transposed)
        out = call(*leaves)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert plain_calls == [op]
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize(("op", "options"), CASES)
def test_gradients_of_gradients_are_those_of_the_op(op: str, options: dict[str, Any]) -> None:
    results = []
    for call in both(op, options):
        leaves = draw()
        grads = torch.autograd.grad(call(*leaves).square().sum(), leaves, create_graph=True)
        squares = torch.stack([grad.square().sum() for grad in grads])
        results.append(torch.autograd.grad(squares.sum(), leaves))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("op", ["cosine_sim", "l1"])
def test_lse_has_its_gradient(op: str, plain_calls: list[str]) -> None:
    results = []
    for call in (FUNCTIONS[op], getattr(torch.ops.attn, f"{op}_with_lse")):
        options = {"return_lse": True} if call is FUNCTIONS[op] else {}
        leaves = draw()
        out, lse = call(*leaves, **options)
        results.append(torch.autograd.grad(out.sum() + lse.square().sum(), leaves))
        only_lse = torch.autograd.grad(call(*leaves, **options)[1].sum(), leaves[:2])
        results[-1] += only_lse
    assert plain_calls == [op] * 2
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("op", OPTIONS)
def test_only_what_needs_a_gradient_gets_one(op: str) -> None:
    for i in range(3):
        leaves = [x.detach() for x in draw()]
        leaves[i].requires_grad_()
        FUNCTIONS[op](*leaves).sum().backward()
        assert [x.grad is not None for x in leaves] == [j == i for j in range(3)]


@pytest.mark.parametrize("op", OPTIONS)
def test_tensors_without_elements(op: str, plain_calls: list[str]) -> None:
    for shapes in ([(0, 2, 3, 4)] * 3, [(1, 2, 0, 4)] * 3):
        leaves = [torch.zeros(shape, requires_grad=True) for shape in shapes]
        out = FUNCTIONS[op](*leaves)
        out.sum().backward()
        assert out.shape == shapes[0] and all(x.grad is not None for x in leaves)
    assert plain_calls == [op] * 2


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


class Asked(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


PLAIN_IN: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "eager mode": nullcontext,
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "saved tensors hooks": lambda: torch.autograd.graph.save_on_cpu(),
    "anomaly mode": torch.autograd.detect_anomaly,
}
NOT_PLAIN_IN: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "a dispatch mode": Seen,
    "a function mode": Asked,
    "autocast": lambda: torch.autocast("cpu"),
    "a profiler": lambda: torch.profiler.profile(),
    "forward mode": forward_ad.dual_level,
    "below autograd": torch._C._AutoDispatchBelowAutograd,
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("where", [*PLAIN_IN, *NOT_PLAIN_IN])
def test_a_call_is_plain_where_nothing_looks_on(where: str, plain_calls: list[str]) -> None:
    with (PLAIN_IN | NOT_PLAIN_IN)[where]():
        for function in FUNCTIONS.values():
            function(*draw(torch.float32))
    assert plain_calls == ([*FUNCTIONS] if where in PLAIN_IN else [])


def test_a_call_below_a_transform_is_not_plain(plain_calls: list[str]) -> None:
    x = torch.randn(2, 1, 2, 3, 4)
    for function in FUNCTIONS.values():
        torch.func.vmap(lambda x, function=function: function(x, x, x))(x)
        torch.func.grad(lambda x, function=function: function(x, x, x).sum())(x[0])
    assert not plain_calls


def test_a_call_that_is_compiled_is_not_plain(plain_calls: list[str]) -> None:
    x = torch.randn(1, 2, 3, 4)
    for function in FUNCTIONS.values():
        torch.compile(lambda x, function=function: function(x, x, x), backend="eager")(x)
    assert not plain_calls


def test_tensors_that_are_not_as_usual_are_not_plain() -> None:
    x = torch.randn(1, 2, 3, 4)
    assert _plain.is_plain(x, x, x)
    assert not _plain.is_plain(x, x, x.as_subclass(Subclass))
    assert not _plain.is_plain(x, torch.nn.Parameter(x), x)
    assert not _plain.is_plain(x, x, None)  # type: ignore[arg-type]
    assert not _plain.is_plain(x, x[:, :, :, :3], x)
    assert not _plain.is_plain(x, x, x.double())
    assert not _plain.is_plain(x, x.to("meta"), x)
    assert not _plain.is_plain(x[0], x[0], x[0])


@pytest.mark.parametrize(
    ("op", "option"),
    [
        ("cosine_sim", {"normalize": False}),
        ("cosine_sim", {"scale": torch.ones(())}),
        ("cosine_sim", {"sink": torch.zeros(4)}),
        ("cosine_sim", {"causal": True, "window": 2}),
        ("l1", {"score": "inverse"}),
        ("l1", {"mask": torch.ones(2, 5, dtype=torch.bool)}),
        ("linear", {"normalize": False}),
        ("linear", {"causal": True, "decay": torch.ones(4)}),
    ],
    ids=str,
)
def test_other_options_are_not_left_out(
    op: str, option: dict[str, Any], plain_calls: list[str]
) -> None:
    FUNCTIONS[op](*draw(torch.float32), **option)
    assert not plain_calls
