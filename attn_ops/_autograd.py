"""The one place that touches PyTorch's private autograd names.

`torch.library.register_autograd` serves eager mode, the compiler and double backward, but
`torch.func.grad` over it raises and `torch.func.jvp` over it returns a silent zero. An
`autograd.Function` of a single functorch level, called from the op's Autograd kernel, serves all of
them. Where a private name is missing the ops fall back to `register_autograd`, and forward mode
raises instead of returning zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import has_torch_function

from attn_ops import _library

unavailable: str | None = None
try:
    from torch._C import (  # type: ignore[attr-defined]
        DispatchKey,
        DispatchKeySet,
        _after_autograd_keyset,
        _any_requires_grad,
        _are_functorch_transforms_active,
        _AutoDispatchBelowAutograd,
        _dispatch_tls_is_dispatch_key_excluded,
        _dispatch_tls_is_dispatch_key_included,
        _get_tracing_state,
        _is_any_autocast_enabled,
        _len_torch_dispatch_stack,
        _set_fwd_grad_enabled,
        _set_grad_enabled,
    )
    from torch._C._functorch import (
        TransformType,
        get_interpreter_stack,
        get_unwrapped,
        is_functorch_wrapped_tensor,
    )
    from torch._functorch.utils import enable_single_level_autograd_function
    from torch.autograd import _profiler_enabled
    from torch.autograd.function import _SingleLevelFunction

    # Read here so that their absence is found at import.
    forward_ad._current_level, forward_ad._set_fwd_grad_enabled  # noqa: B018
    _AUTOGRAD, _PRE_DISPATCH = DispatchKey.AutogradFunctionality, DispatchKey.PreDispatch
except (ImportError, AttributeError) as error:
    unavailable = f"torch {torch.__version__} lacks a private name: {error}"

Setup = Callable[[Any, tuple[Any, ...], Any], None]
Formula = Callable[..., Any]

# What an op is in plain PyTorch: every differentiable one, and those that stand beside them.
formulas: dict[str, Formula] = {}


def differentiable(
    op: str,
    setup: Setup,
    backward: Formula,
    formula: Formula,
    *,
    tangents: Formula | None = None,
    at_once: Formula | None = None,
    plain: bool = False,
) -> Formula:
    """Gives `attn::op` derivatives of every order in both modes.

    setup(ctx, args, output): saves.
    backward(ctx, *grad_outputs) -> a gradient or None per argument.
    formula(*args): the op in plain PyTorch. In forward mode it takes the op's place, so PyTorch
        itself differentiates it, whatever transforms are nested around.
    tangents(output, *args) -> the tangents of the outputs, for dual args: used instead.
    at_once(*args) -> (output, its tangents), for dual args; None where the op and `tangents` are
        to be called. Derivatives of its results are lost.
    plain: the formula runs for dual arguments alone. It must not call torch.func, which fails
        below outer transforms.

    Returns what the op's own composites and backwards call: the op, by the shortest way.
    """
    formulas[op] = formula
    overload = getattr(torch.ops.attn, op).default
    if unavailable is not None:
        torch.library.register_autograd(
            f"attn::{op}",
            lambda ctx, *grads: tuple(backward(ctx, *grads)),
            setup_context=lambda ctx, inputs, output: setup(ctx, inputs, output),
            lib=_library._library,
        )
        return overload

    function = _function(overload, setup, backward, tangents, at_once)

    def kernel(keyset: Any, *args: Any) -> Any:
        dual = _in_forward_mode()
        if dual and (plain or tangents is not None):
            dual = _any_dual(args)
        if dual and tangents is None:
            with torch.autocast(args[0].device.type, enabled=False):
                return formula(*args)
        if dual or (torch.is_grad_enabled() and _any_requires_grad(*args)):
            with enable_single_level_autograd_function():
                return function.apply(keyset, *args)
        with _AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & _after_autograd_keyset, *args)

    _library.implement(op, kernel, "Autograd", with_keyset=True)

    def call(*args: Any) -> Any:
        if not (_nothing_is_in_between() and _records_nothing_else()):
            return overload(*args)
        if torch.is_grad_enabled() and (args[0].requires_grad or _any_requires_grad(*args)):
            return function.apply(None, *args)
        with _AutoDispatchBelowAutograd():
            return overload(*args)

    return call


def _function(
    overload: Any,
    setup: Setup,
    backward: Formula,
    tangents: Formula | None,
    at_once: Formula | None,
) -> Any:
    """The node of the graph. Its first argument is the keyset below autograd, None for all keys."""

    def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
        # `apply` switches both grad modes off until it returns; an outer functorch level still
        # records.
        _set_grad_enabled(True)
        _set_fwd_grad_enabled(True)
        dual = tangents is not None and _in_forward_mode() and _any_dual(args)
        both = at_once(*args) if dual and at_once is not None else None
        with _AutoDispatchBelowAutograd():
            if both is not None:
                output = both[0]
            elif keyset is None:
                output = overload(*args)
            else:
                output = overload.redispatch(keyset & _after_autograd_keyset, *args)
        setup(ctx, args, output)
        if dual:
            ctx.dual = output, args, both
        return output

    def jvp(ctx: Any, *_tangents: Any) -> Any:
        assert tangents is not None
        output, args, both = ctx.dual
        del ctx.dual  # it would keep itself alive
        if both is not None:
            return both[1]
        with forward_ad._set_fwd_grad_enabled(True):
            with torch.autocast(args[0].device.type, enabled=False):
                return tangents(output, *args)

    return _node(overload._opname, backward, forward=forward, jvp=jvp)


def _node(op: str, backward: Formula, **methods: Formula) -> Any:
    """A function of the graph, whose first argument has no gradient."""
    methods |= {
        "backward": lambda ctx, *grads: (None, *backward(ctx, *grads)),
        # As `autograd.Function` has it: compiled autograd asks which function a node is of.
        "_compiled_autograd_key": lambda ctx: (ctx._autograd_function_id,),
    }
    body = {name: staticmethod(method) for name, method in methods.items()}
    return type(op.strip("_"), (_SingleLevelFunction,), body)


def plain(op: str, on_cpu: Formula, elsewhere: Formula, backward: Formula) -> Formula:
    """What makes plain calls (see _plain.py) of `attn::op`: call(query, key, value, options).

    on_cpu, elsewhere: what computes, (query, key, value, *options) -> both results.
    """

    def forward(
        ctx: Any, options: tuple[Any, ...], query: Tensor, key: Tensor, value: Tensor
    ) -> Any:
        kernel = on_cpu if query.is_cpu else elsewhere
        results = kernel(query, key, value, *options)
        ctx.save_for_backward(query, key, value, *results)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return results

    node: Any = None if unavailable is not None else _node(op, backward, forward=forward)

    def call(query: Tensor, key: Tensor, value: Tensor, options: tuple[Any, ...]) -> Any:
        recorded = query.requires_grad or key.requires_grad or value.requires_grad
        if recorded and torch.is_grad_enabled():
            return node.apply(options, query, key, value)
        kernel = on_cpu if query.is_cpu else elsewhere
        return kernel(query, key, value, *options)

    return call


def kernel(op: str, key: str) -> Formula:
    """The kernel of `attn::op` for a device's key, past the dispatcher."""
    overload = getattr(torch.ops.attn, op).default
    if unavailable is not None:
        return overload
    return partial(overload._handle.redispatch_boxed, DispatchKeySet(getattr(DispatchKey, key)))


def composite(op: str, function: Formula) -> Formula:
    """Registers `function`, made of other ops, as the meaning of the public `attn::op`.

    Returns what the Python functions call: the op, by the shortest way. It takes options by name.
    """
    _library.decompose(op, function)
    packet = getattr(torch.ops.attn, op)
    floats = [a.name for a in packet.default._schema.arguments if "float" in str(a.type)]

    def call(*args: Any, **options: Any) -> Any:
        if (
            unavailable is not None
            or not _nothing_is_in_between()
            or has_torch_function((*args, *options.values()))
            or _profiler_enabled()  # which is to see the op
        ):
            return packet(*args, **options)
        for name in floats:
            if name in options:
                options[name] = float(options[name])  # as the schema has it
        return function(*args, **options)

    return call


def _nothing_is_in_between() -> bool:
    """Whether the dispatcher would go from here to the kernel for autograd or for the device.

    Then the way through the dispatcher, microseconds through two languages, can be left out.
    """
    return (
        # First: the compiler can trace none of the rest, in the captured backward neither.
        not torch.compiler.is_compiling()
        and not _are_functorch_transforms_active()
        and not _len_torch_dispatch_stack()
        and _get_tracing_state() is None
        and not _dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)
    )


def _records_nothing_else() -> bool:
    """Whether of all kinds of derivatives a backward alone is recorded, if any."""
    below = torch.is_grad_enabled() and _dispatch_tls_is_dispatch_key_excluded(_AUTOGRAD)
    return forward_ad._current_level < 0 and not below


def nothing_looks_on() -> bool:
    """Whether nobody but autograd could tell a call of an op from one of its kernel."""
    return (
        unavailable is None
        and _nothing_is_in_between()
        and _records_nothing_else()
        and not _is_any_autocast_enabled()
        and not _profiler_enabled()
    )


def _in_forward_mode() -> bool:
    """Whether any of the nested transforms is forward mode."""
    if forward_ad._current_level >= 0:
        return True
    # Graphs of Dynamo enter it behind the back of `forward_ad`: without this, silent zeros.
    stack = get_interpreter_stack()
    return stack is not None and any(level.key() == TransformType.Jvp for level in stack)


def _any_dual(args: Sequence[Any]) -> bool:
    """Whether the innermost of the nested transforms gave any argument a tangent."""
    return any(isinstance(x, Tensor) and unpack_dual(x)[1] is not None for x in args)


def derivatives_may_follow(tensors: Sequence[Tensor]) -> bool:
    """Whether, within forward mode, results of these are differentiated once more."""
    stack = get_interpreter_stack()
    if stack is not None and len(stack) > 1:
        return True
    # What was recorded outside of a transform is seen below its wrapper alone.
    return _any_requires_grad(*map(unwrapped, tensors))


def unwrapped(x: Tensor) -> Tensor:
    """What is below the wrapper of a transform, if any: at all levels if there is one."""
    return get_unwrapped(x) if is_functorch_wrapped_tensor(x) else x


def dispatch_mode_is_on() -> bool:
    """Whether a mode is to see the ops that are called."""
    return _len_torch_dispatch_stack() > 0


def unpack_dual(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A tensor and its tangent at this level of nested transforms, all of which PyTorch calls 0."""
    return forward_ad.unpack_dual(x, level=0)


def check_forward_mode(op: str, *tensors: Tensor | None) -> None:
    """Without the private names forward mode would return silent zeros: it raises instead."""
    if unavailable is None:
        return
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(f"{op}: forward-mode AD is not available: {unavailable}")


def needed(ctx: Any) -> Sequence[bool]:
    """Which arguments of the op need a gradient."""
    return ctx.needs_input_grad if unavailable is not None else ctx.needs_input_grad[1:]


def saving(num_tensors: int) -> Setup:
    """Saves the arguments, of which the first so many are tensors, and no result."""

    def setup(ctx: Any, args: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*args[:num_tensors])
        ctx.options = args[num_tensors:]
        ctx.set_materialize_grads(False)

    return setup


def vjp_of_formula(
    formula: Formula,
    args: Sequence[Any],
    cotangents: Sequence[Tensor | None],
    differentiable: Sequence[int],
) -> list[Tensor | None]:
    """A gradient or None per argument of `formula`; itself differentiable.

    differentiable: the places of the arguments that have a gradient.
    """
    places = [i for i in differentiable if args[i] is not None]

    def function(*tensors: Tensor) -> Any:
        full = list(args)
        for i, tensor in zip(places, tensors, strict=True):
            full[i] = tensor
        return formula(*full)

    with torch.autocast(args[0].device.type, enabled=False):
        outputs, pullback, *_ = torch.func.vjp(function, *(args[i] for i in places))
        filled = tuple(
            torch.zeros_like(output) if cotangent is None else cotangent
            for output, cotangent in zip(outputs, cotangents, strict=True)
        )
        results = pullback(filled)
    grads: list[Tensor | None] = [None] * len(args)
    for i, grad in zip(places, results, strict=True):
        grads[i] = grad
    return grads
