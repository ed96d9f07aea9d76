"""The contract that exported programs carry, word by word."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline

import attn_ops
from tests.pinned import wrapped


def test_public_schema() -> None:
    assert_expected_inline(
        wrapped(torch.ops.attn.l1.default),
        """\
attn::l1(Tensor query,
  Tensor key,
  Tensor value,
  Tensor? mask=None,
  Tensor? bias=None,
  *,
  bool causal=False,
  float? scale=None,
  str score="negative",
  float eps=0.001,
  Tensor? relative_bias=None,
  SymInt? window=None,
  Tensor? cu_seqlens_q=None,
  Tensor? cu_seqlens_k=None,
  Tensor? sink=None) -> Tensor""",
    )


def test_public_schema_with_lse() -> None:
    assert_expected_inline(
        wrapped(torch.ops.attn.l1_with_lse.default),
        """\
attn::l1_with_lse(Tensor query,
  Tensor key,
  Tensor value,
  Tensor? mask=None,
  Tensor? bias=None,
  *,
  bool causal=False,
  float? scale=None,
  str score="negative",
  float eps=0.001,
  Tensor? relative_bias=None,
  SymInt? window=None,
  Tensor? cu_seqlens_q=None,
  Tensor? cu_seqlens_k=None,
  Tensor? sink=None) -> (Tensor out,
  Tensor lse)""",
    )


def test_schema_of_scores() -> None:
    assert_expected_inline(
        wrapped(torch.ops.attn.l1_scores.default),
        """\
attn::l1_scores(Tensor query,
  Tensor key,
  *,
  float? scale=None,
  str score="negative",
  float eps=0.001) -> Tensor""",
    )


def test_private_forward_schema() -> None:
    assert_expected_inline(
        wrapped(torch.ops.attn._l1_fwd.default),
        """\
attn::_l1_fwd(Tensor query,
  Tensor key,
  Tensor value,
  Tensor? mask,
  Tensor? bias,
  Tensor? relative_bias,
  Tensor? sink,
  Tensor? start,
  Tensor? stop,
  SymInt left,
  SymInt right,
  float scale,
  float? eps) -> (Tensor out,
  Tensor lse)""",
    )


def test_private_backward_schema() -> None:
    assert_expected_inline(
        wrapped(torch.ops.attn._l1_bwd.default),
        """\
attn::_l1_bwd(Tensor grad_out,
  Tensor? grad_lse,
  Tensor query,
  Tensor key,
  Tensor value,
  Tensor? mask,
  Tensor? bias,
  Tensor? relative_bias,
  Tensor? sink,
  Tensor? start,
  Tensor? stop,
  Tensor out,
  Tensor lse,
  SymInt left,
  SymInt right,
  float scale,
  float? eps,
  bool[] output_mask) -> (Tensor grad_query,
  Tensor grad_key,
  Tensor grad_value,
  Tensor grad_bias,
  Tensor grad_relative_bias,
  Tensor grad_sink)""",
    )


def test_private_schemas_of_scores() -> None:
    assert_expected_inline(
        wrapped(torch.ops.attn._l1_scores_fwd.default),
        """\
attn::_l1_scores_fwd(Tensor query,
  Tensor key,
  float scale,
  float? eps) -> Tensor""",
    )
    assert_expected_inline(
        wrapped(torch.ops.attn._l1_scores_bwd.default),
        """\
attn::_l1_scores_bwd(Tensor grad,
  Tensor query,
  Tensor key,
  float scale,
  bool[] output_mask) -> (Tensor grad_query,
  Tensor grad_key)""",
    )


@pytest.mark.parametrize(
    ("function", "op", "more"),
    (
        (attn_ops.l1_attention, torch.ops.attn.l1, ["return_lse"]),
        (attn_ops.l1_scores, torch.ops.attn.l1_scores, []),
    ),
    ids=("l1", "l1_scores"),
)
def test_python_function_takes_what_the_op_takes(
    function: Callable[..., Any], op: Any, more: list[str]
) -> None:
    """The same names in the same order; an eps that is not given is the op's own."""
    parameters = inspect.signature(function).parameters
    arguments = op.default._schema.arguments
    assert [*(a.name for a in arguments), *more] == list(parameters)
    for argument in arguments:
        keyword = parameters[argument.name].kind is inspect.Parameter.KEYWORD_ONLY
        assert keyword == argument.kwarg_only
        if argument.name != "eps" and argument.default_value is not None:
            assert parameters[argument.name].default == argument.default_value
