"""The contract that exported programs carry, word by word."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline

import attn_ops

OPS: dict[str, Callable[..., Any]] = {
    "linear": attn_ops.linear_attention,
    "linear_with_state": attn_ops.linear_attention_with_state,
    "linear_step": attn_ops.linear_attention_step,
}


def wrapped(overload: torch._ops.OpOverload) -> str:
    """One argument per line."""
    return str(overload._schema).replace(", ", ",\n  ")


def test_public_schema() -> None:
    assert_expected_inline(
        wrapped(torch.ops.attn.linear.default),
        """\
attn::linear(Tensor query,
  Tensor key,
  Tensor value,
  *,
  Tensor? mask=None,
  bool causal=False,
  bool normalize=True,
  float eps=1.0000000000000001e-05,
  Tensor? decay=None,
  str feature_map="identity",
  Tensor? cu_seqlens=None) -> Tensor""",
    )


def test_public_schema_with_state() -> None:
    assert_expected_inline(
        wrapped(torch.ops.attn.linear_with_state.default),
        """\
attn::linear_with_state(Tensor query,
  Tensor key,
  Tensor value,
  Tensor? state=None,
  Tensor? key_sum=None,
  *,
  Tensor? mask=None,
  bool normalize=True,
  float eps=1.0000000000000001e-05,
  Tensor? decay=None,
  str feature_map="identity") -> (Tensor out,
  Tensor state,
  Tensor key_sum)""",
    )


def test_public_schema_of_a_step() -> None:
    assert_expected_inline(
        wrapped(torch.ops.attn.linear_step.default),
        """\
attn::linear_step(Tensor query,
  Tensor key,
  Tensor value,
  Tensor(a!) state,
  Tensor(b!) key_sum,
  *,
  bool normalize=True,
  float eps=1.0000000000000001e-05,
  Tensor? decay=None,
  str feature_map="identity") -> Tensor""",
    )


def test_private_forward_schema() -> None:
    assert_expected_inline(
        wrapped(torch.ops.attn._linear_fwd.default),
        """\
attn::_linear_fwd(Tensor query,
  Tensor key,
  Tensor value,
  Tensor? mask,
  Tensor? decay,
  Tensor? state,
  Tensor? key_sum,
  Tensor? offsets,
  bool causal,
  float? eps,
  str feature_map) -> (Tensor out,
  Tensor denominator,
  Tensor final_state,
  Tensor final_key_sum)""",
    )


def test_private_backward_schema() -> None:
    assert_expected_inline(
        wrapped(torch.ops.attn._linear_bwd.default),
        """\
attn::_linear_bwd(Tensor grad_out,
  Tensor? grad_final_state,
  Tensor? grad_final_key_sum,
  Tensor query,
  Tensor key,
  Tensor value,
  Tensor? mask,
  Tensor? decay,
  Tensor? state,
  Tensor? key_sum,
  Tensor? offsets,
  Tensor? out,
  Tensor? denominator,
  bool causal,
  float? eps,
  str feature_map,
  bool[] output_mask) -> (Tensor grad_query,
  Tensor grad_key,
  Tensor grad_value,
  Tensor grad_state,
  Tensor grad_key_sum)""",
    )


def test_private_schema_of_the_gradient_of_decay() -> None:
    assert_expected_inline(
        wrapped(torch.ops.attn._linear_grad_decay.default),
        """\
attn::_linear_grad_decay(Tensor grad_out,
  Tensor? grad_final_state,
  Tensor? grad_final_key_sum,
  Tensor query,
  Tensor key,
  Tensor value,
  Tensor? mask,
  Tensor decay,
  Tensor? state,
  Tensor? key_sum,
  Tensor? offsets,
  float? eps,
  str feature_map) -> Tensor""",
    )


def test_private_schema_of_a_step() -> None:
    assert_expected_inline(
        wrapped(torch.ops.attn._linear_step.default),
        """\
attn::_linear_step(Tensor query,
  Tensor key,
  Tensor value,
  Tensor(a!) state,
  Tensor(b!) key_sum,
  Tensor? decay,
  float? eps,
  str feature_map) -> Tensor""",
    )


@pytest.mark.parametrize("name", ("linear_step", "_linear_step"))
def test_a_step_says_that_it_changes_the_state_and_nothing_else(name: str) -> None:
    schema = getattr(torch.ops.attn, name).default._schema
    written = [a.name for a in schema.arguments if a.alias_info is not None]
    assert written == ["state", "key_sum"]
    assert all(a.alias_info.is_write for a in schema.arguments if a.name in written)
    assert all(r.alias_info is None for r in schema.returns)


@pytest.mark.parametrize("name", OPS)
def test_python_function_takes_what_the_op_takes(name: str) -> None:
    """The same names in the same order and the same defaults; eps may also be left to the op."""
    function = inspect.signature(OPS[name]).parameters
    op = getattr(torch.ops.attn, name).default._schema.arguments
    assert [a.name for a in op] == [*function]
    for argument in op:
        keyword = function[argument.name].kind is inspect.Parameter.KEYWORD_ONLY
        assert keyword == argument.kwarg_only
        default = function[argument.name].default
        if argument.name == "eps":
            assert default is None and argument.default_value == 1e-5
        elif argument.has_default_value():
            assert default == argument.default_value
        else:
            assert default is inspect.Parameter.empty
