"""Where a coordinate of a query equals one of a key the derivative is zero, exactly."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.comparison import assert_same
from tests.conformance.evaluate import (
    DTYPES,
    assert_arguments_agree,
    cotangents,
    scalar,
    with_gradients,
)
from tests.conformance.spec import OpSpec
from tests.l1.spec import INVERSE, L1, SCORES
from tests.strategies import Case

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_score = pytest.mark.parametrize("options", ({}, INVERSE), ids=("negative", "inverse"))
dense = pytest.mark.parametrize("spec", (L1, SCORES), ids=("l1", "l1_scores"))

BASE = Case(heads=4, queries=40, keys=40, width=20, value_width=12)


def on_a_coarse_grid(spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device) -> dict:
    """Arguments whose coordinates are multiples of 1/2, so that every fourth pair is a tie."""
    arguments = spec.build(case, dtype, device)
    for name in ("query", "key"):
        arguments[name] = (2 * arguments[name]).round() / 2
    return arguments


def gradients(spec: OpSpec, arguments: dict) -> dict[str, Tensor]:
    return with_gradients(spec, spec.run, arguments, *cotangents(*spec.formula(**arguments)))


@every_dtype
@every_score
@dense
def test_coordinates_on_a_coarse_grid(
    spec: OpSpec, options: dict, dtype: torch.dtype, device: torch.device
) -> None:
    arguments = on_a_coarse_grid(spec, BASE.but(kv_heads=2, options=options), dtype, device)
    assert (arguments["query"][0, 0, 0] == arguments["key"][0, 0]).any()
    assert_arguments_agree(spec, arguments)


@every_dtype
@every_score
@dense
def test_equal_tokens_do_not_move(
    spec: OpSpec, options: dict, dtype: torch.dtype, device: torch.device
) -> None:
    """All queries and keys are one token: their gradients are zero, not only small."""
    arguments = spec.build(BASE.but(kv_heads=4, options=options), dtype, device)
    token = arguments["query"][:1, :1, :1].clone()
    for name in ("query", "key"):
        arguments[name] = token.expand(arguments[name].shape)
    results = gradients(spec, arguments)
    assert not results["query"].any() and not results["key"].any()
    if spec is SCORES:
        largest = 1 / options["eps"] if options else 0.0
        assert (results["out"] == largest).all()
    else:
        mean = arguments["value"].double().mean(2, keepdim=True).expand(results["out"].shape)
        assert (results["out"] - mean).abs().max() <= 4 * torch.finfo(dtype).eps


@every_dtype
@every_score
@dense
def test_equal_coordinates_do_not_move(
    spec: OpSpec, options: dict, dtype: torch.dtype, device: torch.device
) -> None:
    """Widths that are the same number in all tokens have zero gradients, the others have not."""
    arguments = spec.build(BASE.but(kv_heads=4, options=options), dtype, device)
    for name in ("query", "key"):
        arguments[name] = arguments[name].clone()
        arguments[name][..., 3:7] = 0.375
        arguments[name][..., 19] = -1.5
    results = gradients(spec, arguments)
    for name in ("query", "key"):
        grad = results[name]
        assert not grad[..., 3:7].any() and not grad[..., 19].any()
        assert grad[..., :3].any() and grad[..., 7:19].any()


@every_dtype
def test_a_token_that_is_its_own_key(dtype: torch.dtype, device: torch.device) -> None:
    """query and key are one tensor, as in self-attention without projections."""
    arguments = L1.build(BASE.but(kv_heads=4), dtype, device)
    arguments["key"] = arguments["query"]
    assert_arguments_agree(L1, arguments | {"causal": True})


@every_score
@dense
def test_repeated_tokens_share_their_gradient(
    spec: OpSpec, options: dict, device: torch.device
) -> None:
    """Keys 0 and 1 are equal, and so are the weights that they get."""
    arguments = spec.build(BASE.but(kv_heads=4, options=options), torch.float64, device)
    for name in ("key", "value"):
        if name in arguments:
            arguments[name] = arguments[name].clone()
            arguments[name][:, :, 1] = arguments[name][:, :, 0]
    leaves = [arguments[name].requires_grad_() for name in ("query", "key")]
    arguments |= dict(zip(("query", "key"), leaves))
    grad_key = torch.autograd.grad(spec.out(**arguments).sin().sum(), leaves)[1]
    assert grad_key[:, :, 0].any()
    assert_same("gradient", grad_key[:, :, 1], grad_key[:, :, 0])


@dense
def test_second_derivatives_at_ties_are_those_of_the_formula(
    spec: OpSpec, device: torch.device
) -> None:
    arguments = on_a_coarse_grid(
        spec, BASE.but(queries=6, keys=7, width=4, options=INVERSE), torch.float64, device
    )
    names = ("query", "key")

    def hessian_vector_product(op: Callable[..., Any]) -> tuple[Tensor, ...]:
        def total(*values: Tensor) -> Tensor:
            return scalar(op(**(arguments | dict(zip(names, values)))))

        inputs = tuple(arguments[name].contiguous() for name in names)
        gradient = torch.func.grad(total, (0, 1))
        return torch.func.jvp(gradient, inputs, tuple(x.cos() for x in inputs))[1]

    for name, a, e in zip(
        names, hessian_vector_product(spec.run), hessian_vector_product(spec.formula)
    ):
        assert not e.isnan().any() and e.any()
        assert_same(name, a, e)
