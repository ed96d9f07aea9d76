"""Forward mode in blocks: no [M, N] tensor, and the same tangents whichever way it is reached."""

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.func import grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from attn_ops import _flops, _forward_mode
from tests.comparison import assert_same, compute_dtype, largest_error
from tests.conformance.capture import Calls
from tests.conformance.evaluate import DTYPES, in_dtype
from tests.conformance.spec import OpSpec, given_case, only
from tests.conformance.test_autograd import as_function
from tests.strategies import Case

SOFTMAX_LIKE = True
Function = Callable[..., Any]


@pytest.fixture
def tiny_blocks() -> Iterator[None]:
    """Every call has many blocks, also where reverse mode records."""
    with pytest.MonkeyPatch.context() as patch:
        for name, scores in {"SCORES_ON_CPU": 8, "SCORES_ELSEWHERE": 8, "RECORDED": 3}.items():
            patch.setattr(_forward_mode, name, scores)
        patch.setattr(_forward_mode, "FEWEST_QUERIES", 1)
        yield


def jvp_op(spec: OpSpec) -> Any:
    return getattr(torch.ops.attn, f"_{spec.room}_jvp").default


def tangents_of(leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Normal numbers that 16 bits hold."""
    generator = torch.Generator().manual_seed(7)
    drawn = (torch.randn(x.shape, generator=generator).bfloat16().half() for x in leaves)
    # The tangent of an infinite bias is that of a constant.
    return tuple(torch.where(x.isinf(), 0, t.to(x)) for x, t in zip(leaves, drawn))


def problem(
    spec: OpSpec, case: Case, device: torch.device, op: Function | None = None
) -> tuple[Function, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The op as a function of its differentiable arguments, these, and tangents."""
    function, leaves = as_function(spec, case, device, op)
    leaves = tuple(x.detach() for x in leaves)
    return function, leaves, tangents_of(leaves)


def assert_both_agree(
    spec: OpSpec, case: Case, device: torch.device, transform: Callable[..., Any]
) -> None:
    """transform(function, leaves, tangents) for the op and for the formula."""
    actual, expected = (
        tree_leaves(transform(*problem(spec, case, device, op))) for op in (None, spec.formula)
    )
    assert len(actual) == len(expected) > 0
    for i, (a, e) in enumerate(zip(actual, expected)):
        assert_same(f"result {i}", a.contiguous(), e.contiguous())


def derivative(function: Function, leaves: Any, tangents: Any) -> Any:
    return jvp(function, leaves, tangents)


def gradient_of_derivative(function: Function, leaves: Any, tangents: Any) -> Any:
    def along(*inputs: Tensor) -> Tensor:
        return sum(x.sin().sum() for x in jvp(function, inputs, tangents)[1])  # type: ignore[return-value]

    return grad(along, tuple(range(len(leaves))))(*leaves)


def two_directions(function: Function, leaves: Any, tangents: Any) -> Any:
    directions = tuple(torch.stack([t, 0.5 - t]) for t in tangents)
    return vmap(lambda *ts: jvp(function, leaves, ts)[1])(*directions)


def test_blocks_change_nothing(
    spec: OpSpec, named: str, device: torch.device, tiny_blocks: None
) -> None:
    assert_both_agree(spec, spec.cases[named], device, derivative)


NESTED = pytest.mark.parametrize(
    "transform", (gradient_of_derivative, two_directions), ids=lambda f: f.__name__
)


@NESTED
@only("everything", "grouped heads", "window", "packed, causal, window", "bias of every row")
def test_blocks_change_nothing_below_other_transforms(
    spec: OpSpec, named: str, transform: Function, device: torch.device, tiny_blocks: None
) -> None:
    assert_both_agree(spec, spec.cases[named], device, transform)


def test_drawn_cases_in_blocks(spec: OpSpec, device: torch.device, tiny_blocks: None) -> None:
    @given_case(lambda spec: spec.drawn(largest=8), max_examples=40)
    def check(spec: OpSpec, device: torch.device, case: Case) -> None:
        assert_both_agree(spec, case, device, derivative)

    check(spec, device)


@pytest.mark.parametrize("recorded", (False, True))
def test_only_tangents_that_may_be_differentiated_are_computed_in_several_calls(
    spec: OpSpec, recorded: bool, device: torch.device, tiny_blocks: None
) -> None:
    function, leaves, tangents = problem(spec, spec.cases["plain"], device)
    leaves = tuple(x.requires_grad_(recorded) for x in leaves)
    with Calls() as calls:
        jvp(function, leaves, tangents)
    count = [call.op for call in calls.calls].count(jvp_op(spec))
    assert count > 1 if recorded else count == 1


class Largest(TorchDispatchMode):
    """The most elements that any tensor had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(results) if isinstance(x, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return results


@pytest.mark.parametrize(
    "transform", (derivative, gradient_of_derivative, two_directions), ids=lambda f: f.__name__
)
def test_no_tensor_is_as_large_as_the_scores(
    spec: OpSpec, transform: Function, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert spec.long is not None
    length = 2048
    monkeypatch.setattr(_forward_mode, "SCORES_ELSEWHERE", _forward_mode.SCORES_ON_CPU)
    monkeypatch.setattr(_forward_mode, "RECORDED", 1)
    arguments = spec.build(spec.resized(spec.long, length, length, 1), torch.float32, device)
    leaves = spec.floating(arguments)

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        return spec.run(**(arguments | dict(zip(leaves, inputs))))

    values = tuple(leaves.values())
    with Largest() as largest:
        transform(function, values, tangents_of(values))
    # Differences [D, M, N] of L1 are as many as reference.DIFFERENCES at a time.
    assert largest.elements <= length * length // 4


@only("plain", "everything", "bias that hides")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_as_exact_as_its_rounding(
    spec: OpSpec, named: str, dtype: torch.dtype, device: torch.device
) -> None:
    """At most twice the formula's error in the same dtype, and a rounding of the result."""
    arguments = spec.build(spec.cases[named], dtype, device)
    exact_arguments = in_dtype(arguments, torch.float64)
    runs = ((spec.run, arguments), (spec.formula, arguments), (spec.formula, exact_arguments))
    results = []
    for op, values in runs:
        leaves = spec.floating(values)
        inputs = tuple(x.contiguous() for x in leaves.values())

        def function(
            *xs: Tensor, op: Function = op, leaves: Any = leaves, values: Any = values
        ) -> Any:
            return op(**(values | dict(zip(leaves, xs))))

        results.append(jvp(function, inputs, tangents_of(inputs))[1])
    for name, actual, of_formula, exact in zip(spec.results, *results):
        assert actual.dtype == (dtype if name == "out" else compute_dtype(dtype))
        rounding = torch.finfo(actual.dtype).eps + 64 * torch.finfo(compute_dtype(dtype)).eps
        size = exact[exact.isfinite()].abs().max().item()
        tolerance = 2 * largest_error(of_formula, exact) + rounding * size
        assert largest_error(actual, exact) <= tolerance, name


def test_results_come_from_the_kernel_and_gradients_of_them_too(
    spec: OpSpec, device: torch.device
) -> None:
    """Training that follows a tangent which it detaches: no reverse pass through the tangent."""
    function, leaves, tangents = problem(spec, spec.cases["everything"], device)
    parameters = tuple(x.clone().requires_grad_() for x in leaves)
    expected = torch.autograd.grad(function(*parameters)[0].sin().sum(), parameters)
    with Calls() as calls:
        (out, _), (tangent, _), *_ = jvp(function, parameters, tangents)
        actual = torch.autograd.grad(out.sin().sum() + tangent.detach().sum(), parameters)
    assert [call.op for call in calls.calls] == [spec.forward, jvp_op(spec), spec.backward]
    for a, e in zip(actual, expected):
        assert_same("gradient", a, e)


def test_what_has_no_tangent_takes_the_usual_way(spec: OpSpec, device: torch.device) -> None:
    function, leaves, _ = problem(spec, spec.cases["everything"], device)

    def beside(x: Tensor) -> Tensor:
        out, *_ = function(*leaves)
        return x * out.sum()

    one = torch.ones((), device=device, dtype=torch.float64)
    with Calls() as calls:
        _, tangent, *_ = jvp(beside, (one,), (one,))
    assert_same("tangent", tangent, function(*leaves)[0].sum())
    assert [call.op for call in calls.calls] == [spec.forward]


def test_zero_tensors_are_tangents(spec: OpSpec, device: torch.device) -> None:
    function, leaves, tangents = problem(spec, spec.cases["everything"], device)
    zeros = torch._efficientzerotensor(leaves[0].shape, dtype=torch.float64, device=device)
    dense = (torch.zeros_like(leaves[0]), *tangents[1:])
    actual, expected = (jvp(function, leaves, ts)[1] for ts in ((zeros, *tangents[1:]), dense))
    for name, a, e in zip(spec.results, actual, expected):
        assert_same(name, a, e)


def test_nothing_outlives_a_dual_result(spec: OpSpec, device: torch.device) -> None:
    """No circle of references: a GPU's memory must not wait for Python's collector."""
    function, leaves, tangents = problem(spec, spec.cases["everything"], device)
    gc.disable()
    try:
        inputs = tuple(x.clone().requires_grad_() for x in leaves)
        watched = weakref.ref(inputs[0])
        results = jvp(function, inputs, tangents)
        del results, inputs
        assert watched() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
def test_compiled_forward_mode_loses_no_tangent(
    spec: OpSpec, backend: str, device: torch.device
) -> None:
    """Dynamo's graphs enter forward mode behind the back of `torch.autograd.forward_ad`."""
    function, leaves, tangents = problem(spec, spec.cases["everything"], device)

    def both(*inputs: Tensor) -> Any:
        # Beside another tangent a lost one raises nothing.
        return jvp(lambda *xs: function(*xs)[0].sum() + xs[0].sum(), inputs, tangents)[1]

    expected = both(*leaves)
    compiled = torch.compile(both, fullgraph=True, backend=backend)
    assert_same("tangent", compiled(*leaves), expected)


def test_compiled_forward_mode_keeps_the_op_whole(spec: OpSpec, device: torch.device) -> None:
    """No loop over blocks is unrolled into the graph. (PyTorch takes lengths for constants.)"""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Any:
        return spec.run(query=query, key=key, value=value, causal=True)

    def both(*inputs: Tensor) -> Any:
        return jvp(attention, inputs, tuple(x.cos() for x in inputs))

    compiled = torch.compile(both, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    inputs = [torch.randn(1, 2, 50, 8, dtype=torch.float64, device=device) for _ in "qkv"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_forward_mode, "RECORDED", 0)
        actual = tree_leaves(compiled(*inputs))
    for a, e in zip(actual, tree_leaves(both(*inputs))):
        assert_same("result", a, e)
    (graph,) = graphs
    assert [node.target for node in graph.graph.nodes].count(jvp_op(spec)) == 1


def test_op_passes_opcheck(spec: OpSpec, device: torch.device) -> None:
    function, leaves, tangents = problem(spec, spec.cases["everything"], device)
    with Calls() as calls:
        jvp(function, leaves, tangents)
    args = calls.of(jvp_op(spec))
    torch.library.opcheck(jvp_op(spec), args)
    recorded = tuple(
        x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in args
    )
    # Tracing the second derivative takes long.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(jvp_op(spec), recorded, test_utils=tests)


def test_schema_has_the_arguments_of_the_formula(spec: OpSpec) -> None:
    forward, arguments = spec.forward._schema.arguments, jvp_op(spec)._schema.arguments
    types = {a.name: str(a.type) for a in forward}
    shared = [a for a in arguments if a.name in types]
    assert [str(a.type) for a in shared] == [types[a.name] for a in shared]
    rest = [a.name for a in arguments if a.name not in {*types, "out"}]
    assert rest == ["lse", *(f"tangent_{name}" for name in _forward_mode.DIFFERENTIABLE)]


def test_flops_are_counted_as_by_hand(spec: OpSpec, device: torch.device) -> None:
    """Scores, their tangents, and two products with values of E each."""
    case = spec.cases["plain"]
    function, leaves, tangents = problem(spec, case, device)
    pairs = case.batch * case.heads * case.queries * case.keys
    d, e = case.width, case.value_width
    by_hand = {"cosine_sim": 2 * (d + 2 * d) + 4 * e, "l1": 3 * d + 3 * d + 4 * e}
    assert jvp_op(spec)._opname in _flops.LAWS
    with FlopCounterMode(display=False) as mode:
        jvp(function, leaves, tangents)
    counts = {str(op): count for op, count in mode.get_flop_counts()["Global"].items()}
    assert counts[f"attn._{spec.room}_jvp"] == pairs * by_hand[spec.name]
