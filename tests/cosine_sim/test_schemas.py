"""The contract that exported programs carry, word by word."""

import inspect

import torch
from expecttest import assert_expected_inline

import attn_ops
from tests.pinned import wrapped


def test_public_schema() -> None:
    assert_expected_inline(
        wrapped(torch.ops.attn.cosine_sim.default),
        """\
attn::cosine_sim(Tensor query,
  Tensor key,
  Tensor value,
  Tensor? mask=None,
  Tensor? bias=None,
  *,
  bool causal=False,
  float scale=8.,
  bool normalize=True,
  SymInt groups=1,
  Tensor? relative_bias=None,
  SymInt? window=None,
  Tensor? cu_seqlens_q=None,
  Tensor? cu_seqlens_k=None,
  Tensor? sink=None,
  Tensor? head_scale=None,
  Tensor? query_gain=None,
  Tensor? key_gain=None) -> Tensor""",
    )


def test_public_schema_with_lse() -> None:
    assert_expected_inline(
        wrapped(torch.ops.attn.cosine_sim_with_lse.default),
        """\
attn::cosine_sim_with_lse(Tensor query,
  Tensor key,
  Tensor value,
  Tensor? mask=None,
  Tensor? bias=None,
  *,
  bool causal=False,
  float scale=8.,
  bool normalize=True,
  SymInt groups=1,
  Tensor? relative_bias=None,
  SymInt? window=None,
  Tensor? cu_seqlens_q=None,
  Tensor? cu_seqlens_k=None,
  Tensor? sink=None,
  Tensor? head_scale=None,
  Tensor? query_gain=None,
  Tensor? key_gain=None) -> (Tensor out,
  Tensor lse)""",
    )


def test_private_forward_schema() -> None:
    assert_expected_inline(
        wrapped(torch.ops.attn._cosine_sim_fwd.default),
        """\
attn::_cosine_sim_fwd(Tensor query,
  Tensor key,
  Tensor value,
  Tensor? mask,
  Tensor? bias,
  Tensor? relative_bias,
  Tensor? head_scale,
  Tensor? query_gain,
  Tensor? key_gain,
  Tensor? sink,
  Tensor? start,
  Tensor? stop,
  SymInt left,
  SymInt right,
  float scale,
  SymInt groups) -> (Tensor out,
  Tensor lse)""",
    )


def test_private_backward_schema() -> None:
    assert_expected_inline(
        wrapped(torch.ops.attn._cosine_sim_bwd.default),
        """\
attn::_cosine_sim_bwd(Tensor grad_out,
  Tensor? grad_lse,
  Tensor query,
  Tensor key,
  Tensor value,
  Tensor? mask,
  Tensor? bias,
  Tensor? relative_bias,
  Tensor? head_scale,
  Tensor? query_gain,
  Tensor? key_gain,
  Tensor? sink,
  Tensor? start,
  Tensor? stop,
  Tensor out,
  Tensor lse,
  SymInt left,
  SymInt right,
  float scale,
  SymInt groups,
  bool[] output_mask) -> (Tensor grad_query,
  Tensor grad_key,
  Tensor grad_value,
  Tensor grad_bias,
  Tensor grad_relative_bias,
  Tensor grad_head_scale,
  Tensor grad_query_gain,
  Tensor grad_key_gain,
  Tensor grad_sink)""",
    )


def test_normalize_schema() -> None:
    assert_expected_inline(
        wrapped(torch.ops.attn.l2_normalize.default),
        """\
attn::l2_normalize(Tensor x,
  SymInt groups=1) -> Tensor""",
    )


def test_python_function_takes_what_the_op_takes() -> None:
    """The same names in the same order; it adds return_lse, and its scale may be a tensor."""
    function = inspect.signature(attn_ops.cosine_sim_attention).parameters
    op = torch.ops.attn.cosine_sim.default._schema.arguments
    assert [*(a.name for a in op), "return_lse"] == list(function)
    for argument in op:
        keyword = function[argument.name].kind is inspect.Parameter.KEYWORD_ONLY
        assert keyword == argument.kwarg_only
        if argument.name != "scale" and argument.default_value is not None:
            assert function[argument.name].default == argument.default_value
