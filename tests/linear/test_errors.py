"""Every text of an error, pinned: the op, the argument, what was expected, what came.

EXPECTTEST_ACCEPT=1 rewrites them. Each is raised in eager mode and while tracing.
"""

import re
from typing import Any, Literal

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import attn_ops
from tests.errors import assert_compiling_raises_the_same_words, error_of, ones, texts
from tests.linear.inputs import KEY_SUM, STATE, TOKEN, TRUE
from tests.linear.wrong import LENGTH, LINEAR, SHARED, STATES, STEP, WITH_STATE

assert attn_ops.__all__  # its import registers the ops
linear = torch.ops.attn.linear
with_state = torch.ops.attn.linear_with_state
step = torch.ops.attn.linear_step


def test_texts_of_linear() -> None:
    assert_expected_inline(
        texts(linear, LINEAR),
        """\
query of rank 2
    ValueError: linear: query must have shape [B, H, M, D] or [BH, M, D], got (7, 8)
query of integers
    TypeError: linear: query must be float64, float32, bfloat16 or float16, got torch.int32
query of complex numbers
    TypeError: linear: query must be float64, float32, bfloat16 or float16, got torch.complex64
query sparse
    NotImplementedError: linear: query must be a dense tensor, got torch.sparse_coo; pack
    sequences of several lengths with cu_seqlens
query nested
    NotImplementedError: linear: query must be a dense tensor, got a nested tensor; pack
    sequences of several lengths with cu_seqlens
query too wide
    ValueError: linear: query must have width D from 1 to 256, got 257
query of width 0
    ValueError: linear: query must have width D from 1 to 256, got 0
key of rank 2
    ValueError: linear: key must have shape [B, Hk, N, D] or [B, N, D], got (7, 8)
key of rank 4 beside a merged query
    ValueError: linear: key must have shape [BH, N, D] beside a query of rank 3, got (2, 2, 7,
    8)
value of rank 4 beside a merged query
    ValueError: linear: value must have shape [BH, N, E] beside a query of rank 3, got (2, 2, 7,
    6)
key of another dtype
    TypeError: linear: key must be torch.float32 like query, got torch.float16
key on another device
    ValueError: linear: key must be on cpu like query, got meta
key of another width
    ValueError: linear: key must have width D=8 like query, got (2, 2, 7, 16)
key of another batch size
    ValueError: linear: key must have batch size B=2 like query, got (3, 2, 7, 8)
key broadcast over the batch
    ValueError: linear: key must have batch size B=2 like query, got (1, 2, 7, 8)
heads that do not divide
    ValueError: linear: key must have a number of heads that divides H=4, got (2, 3, 7, 8)
key of no heads
    ValueError: linear: key must have a number of heads that divides H=4, got (2, 0, 7, 8)
value of another rank than key
    ValueError: linear: value must have shape [B, N, E] beside a key of rank 3, got (2, 2, 7, 6)
value of another dtype
    TypeError: linear: value must be torch.float32 like query, got torch.float64
value of another batch size
    ValueError: linear: value must have batch size B=2 like query, got (3, 2, 7, 6)
value of another length
    ValueError: linear: value must have [Hk, N]=(2, 7) like key, got (2, 2, 8, 6)
value of other heads
    ValueError: linear: value must have [Hk, N]=(2, 7) like key, got (2, 4, 7, 6)
value too wide
    ValueError: linear: value must have width E from 1 to 256, got 300
mask of floats
    TypeError: linear: mask must be bool (True = may attend), got torch.float32
mask of rank 4
    ValueError: linear: mask must have shape [B, N]=(2, 7), got (2, 1, 1, 7)
mask of another length
    ValueError: linear: mask must have shape [B, N]=(2, 7), got (2, 8)
mask of another batch size
    ValueError: linear: mask must have shape [B, N]=(2, 7), got (1, 7)
mask of the heads of a merged query
    ValueError: linear: mask must have shape [B, N]=(4, 7), got (2, 7)
mask on another device
    ValueError: linear: mask must be on cpu like query, got meta
mask sparse
    NotImplementedError: linear: mask must be a dense tensor, got torch.sparse_coo; pack
    sequences of several lengths with cu_seqlens
eps below 0
    ValueError: linear: eps must be finite and at least 0, got -1e-05
eps infinite
    ValueError: linear: eps must be finite and at least 0, got inf
eps not a number
    ValueError: linear: eps must be finite and at least 0, got nan
eps below 0, not normalised
    ValueError: linear: eps must be finite and at least 0, got -1.0
decay of key heads
    ValueError: linear: decay must have shape [H]=(4,), got (2,)
decay of rank 2
    ValueError: linear: decay must have shape [H]=(4,), got (4, 1)
decay of integers
    TypeError: linear: decay must be float64, float32, bfloat16 or float16, got torch.int32
decay too precise
    TypeError: linear: decay must be torch.float32 beside this query, got torch.float64
decay of the other half
    TypeError: linear: decay must be torch.float16 or torch.float32 beside this query, got
    torch.bfloat16
decay on another device
    ValueError: linear: decay must be on cpu like query, got meta
decay sparse
    NotImplementedError: linear: decay must be a dense tensor, got torch.sparse_coo; pack
    sequences of several lengths with cu_seqlens
feature_map of no name
    ValueError: linear: feature_map must be one of identity, elu_plus_one, relu, softplus,
    taylor, got 'exp'
feature_map of another spelling
    ValueError: linear: feature_map must be one of identity, elu_plus_one, relu, softplus,
    taylor, got 'ReLU'
key of another length in causal attention
    ValueError: linear: key must have as many tokens as query in causal attention, got (2, 2, 5,
    8)
decay without causal
    ValueError: linear: decay must come with causal=True, got causal=False
cu_seqlens of floats
    TypeError: linear: cu_seqlens must be int32 or int64, got torch.float32
cu_seqlens of rank 2
    ValueError: linear: cu_seqlens must have shape [S+1], got (1, 3)
cu_seqlens of one offset
    ValueError: linear: cu_seqlens must have at least 2 offsets, [0, length], got (1,)
cu_seqlens of a batch
    ValueError: linear: query must be packed into batch size B=1 beside cu_seqlens, got (2, 4,
    7, 8)
cu_seqlens on another device
    ValueError: linear: cu_seqlens must be on cpu like query, got meta
cu_seqlens sparse
    NotImplementedError: linear: cu_seqlens must be a dense tensor, got torch.sparse_coo; pack
    sequences of several lengths with cu_seqlens
key of another length beside cu_seqlens
    ValueError: linear: key must have as many tokens as query beside cu_seqlens, got (1, 2, 5,
    8)""",
    )


def test_texts_of_states() -> None:
    assert_expected_inline(
        texts(with_state, STATES | LENGTH),
        """\
state of rank 3
    ValueError: linear_with_state: state must have shape [B, H, F, E]=(2, 4, 8, 6), got (4, 8,
    6)
state of key heads
    ValueError: linear_with_state: state must have shape [B, H, F, E]=(2, 4, 8, 6), got (2, 2,
    8, 6)
state of another width
    ValueError: linear_with_state: state must have shape [B, H, F, E]=(2, 4, 8, 6), got (2, 4,
    6, 8)
state of other features
    ValueError: linear_with_state: state must have shape [B, H, F, E]=(2, 4, 45, 6), got (2, 4,
    8, 6)
state of another batch size
    ValueError: linear_with_state: state must have shape [B, H, F, E]=(2, 4, 8, 6), got (1, 4,
    8, 6)
state of merged heads
    ValueError: linear_with_state: state must have shape [BH, F, E]=(4, 8, 6), got (2, 4, 8, 6)
state of half precision
    TypeError: linear_with_state: state must be torch.float32 beside this query, got
    torch.float16
state too precise
    TypeError: linear_with_state: state must be torch.float32 beside this query, got
    torch.float64
state of integers
    TypeError: linear_with_state: state must be float64, float32, bfloat16 or float16, got
    torch.int32
state on another device
    ValueError: linear_with_state: state must be on cpu like query, got meta
state sparse
    NotImplementedError: linear_with_state: state must be a dense tensor, got torch.sparse_coo;
    pack sequences of several lengths with cu_seqlens
key_sum of rank 2
    ValueError: linear_with_state: key_sum must have shape [B, H, F]=(2, 4, 8), got (4, 8)
key_sum of key heads
    ValueError: linear_with_state: key_sum must have shape [B, H, F]=(2, 4, 8), got (2, 2, 8)
key_sum of the width of value
    ValueError: linear_with_state: key_sum must have shape [B, H, F]=(2, 4, 8), got (2, 4, 6)
key_sum of merged heads
    ValueError: linear_with_state: key_sum must have shape [BH, F]=(4, 8), got (2, 4, 8)
key_sum of half precision
    TypeError: linear_with_state: key_sum must be torch.float32 beside this query, got
    torch.float16
key_sum too precise
    TypeError: linear_with_state: key_sum must be torch.float32 beside this query, got
    torch.float64
key_sum on another device
    ValueError: linear_with_state: key_sum must be on cpu like query, got meta
key of another length
    ValueError: linear_with_state: key must have as many tokens as query in causal attention,
    got (2, 2, 5, 8)""",
    )


def test_texts_of_a_step() -> None:
    own = {name: one for name, one in STEP.items() if name not in SHARED}
    assert_expected_inline(
        texts(step, own),
        """\
state of rank 3
    ValueError: linear_step: state must have shape [B, H, F, E]=(2, 4, 8, 6), got (4, 8, 6)
state of key heads
    ValueError: linear_step: state must have shape [B, H, F, E]=(2, 4, 8, 6), got (2, 2, 8, 6)
state of another width
    ValueError: linear_step: state must have shape [B, H, F, E]=(2, 4, 8, 6), got (2, 4, 6, 8)
state of other features
    ValueError: linear_step: state must have shape [B, H, F, E]=(2, 4, 45, 6), got (2, 4, 8, 6)
state of another batch size
    ValueError: linear_step: state must have shape [B, H, F, E]=(2, 4, 8, 6), got (1, 4, 8, 6)
state of merged heads
    ValueError: linear_step: state must have shape [BH, F, E]=(4, 8, 6), got (2, 4, 8, 6)
state of half precision
    TypeError: linear_step: state must be torch.float32 beside this query, got torch.float16
state too precise
    TypeError: linear_step: state must be torch.float32 beside this query, got torch.float64
state of integers
    TypeError: linear_step: state must be float64, float32, bfloat16 or float16, got torch.int32
state on another device
    ValueError: linear_step: state must be on cpu like query, got meta
state sparse
    NotImplementedError: linear_step: state must be a dense tensor, got torch.sparse_coo; pack
    sequences of several lengths with cu_seqlens
key_sum of rank 2
    ValueError: linear_step: key_sum must have shape [B, H, F]=(2, 4, 8), got (4, 8)
key_sum of key heads
    ValueError: linear_step: key_sum must have shape [B, H, F]=(2, 4, 8), got (2, 2, 8)
key_sum of the width of value
    ValueError: linear_step: key_sum must have shape [B, H, F]=(2, 4, 8), got (2, 4, 6)
key_sum of merged heads
    ValueError: linear_step: key_sum must have shape [BH, F]=(4, 8), got (2, 4, 8)
key_sum of half precision
    TypeError: linear_step: key_sum must be torch.float32 beside this query, got torch.float16
key_sum too precise
    TypeError: linear_step: key_sum must be torch.float32 beside this query, got torch.float64
key_sum on another device
    ValueError: linear_step: key_sum must be on cpu like query, got meta
query of two tokens
    ValueError: linear_step: query must have one token, got (2, 4, 2, 8)
query of no token
    ValueError: linear_step: query must have one token, got (2, 4, 0, 8)
key of two tokens
    ValueError: linear_step: key must have as many tokens as query in causal attention, got (2,
    2, 2, 8)""",
    )


@pytest.mark.parametrize("name", SHARED)
def test_with_state_uses_the_same_words(name: str) -> None:
    args, options = LINEAR[name]
    expected = error_of(linear, *args, **options)
    args, options = WITH_STATE[name]
    error = error_of(with_state, *args, **options)
    assert type(error) is type(expected)
    assert str(error) == str(expected).replace("linear:", "linear_with_state:", 1)


def without_sizes(error: Exception) -> str:
    text = re.sub(r"=\(.*\)", "=(#)", str(error).split(", got")[0])
    return re.sub(r"s?\d+( [+-] s?\d+)*", "#", text)


@pytest.mark.parametrize("name", [name for name in STEP if name in SHARED])
def test_a_step_uses_the_same_words(name: str) -> None:
    args, options = LINEAR[name]
    expected = error_of(linear, *args, **options)
    args, options = STEP[name]
    error = error_of(step, *args, **options)
    assert type(error) is type(expected)
    assert without_sizes(error) == without_sizes(expected).replace("linear:", "linear_step:", 1)


ALL = {
    f"{op.__name__}: {name}": (op, one)
    for op, cases in ((linear, LINEAR), (with_state, STATES | LENGTH), (step, STEP))
    for name, one in cases.items()
}
NOT_TRACED = ("sparse", "nested")


@pytest.mark.parametrize("mode", ("fake", "symbolic"))
@pytest.mark.parametrize("name", [name for name in ALL if not name.endswith(NOT_TRACED)])
def test_tracing_raises_the_same(name: str, mode: Literal["fake", "symbolic"]) -> None:
    """make_fx with fake tensors, as export and AOTAutograd trace; symbols stand for sizes."""
    op, (args, options) = ALL[name]
    expected = error_of(op, *args, **options)
    tensors = {k: x for k, x in options.items() if isinstance(x, Tensor)}
    rest = {k: x for k, x in options.items() if k not in tensors}

    def call(args: tuple[Tensor, ...], tensors: dict[str, Tensor]) -> Any:
        return op(*args, **tensors, **rest)

    error = error_of(make_fx(call, tracing_mode=mode), args, tensors)
    assert type(error) is type(expected)
    assert without_sizes(error) == without_sizes(expected)


COMPILED = (
    "linear: key of another width",
    "linear: key of another length in causal attention",
    "linear: mask of floats",
    "linear: eps below 0",
    "linear: decay without causal",
    "linear: feature_map of no name",
    "linear: cu_seqlens of floats",
    "linear_with_state: state of key heads",
    "linear_with_state: state of half precision",
    "linear_step: key_sum too precise",
    "linear_step: query of two tokens",
)


@pytest.mark.parametrize("name", COMPILED)
def test_compiling_raises_the_same_words(name: str) -> None:
    op, (args, options) = ALL[name]
    assert_compiling_raises_the_same_words(op, args, options)


def test_exporting_raises_the_same() -> None:
    class Module(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return linear(query, key, value)

    args = LINEAR["key of another width"][0]
    error = error_of(lambda: torch.export.export(Module(), args, strict=False))
    assert str(error) == str(error_of(linear, *args))


def test_an_error_leaves_the_state_as_it_was() -> None:
    state, key_sum = STATE.clone(), KEY_SUM.clone()
    for name in ("eps below 0", "feature_map of no name", "decay of key heads"):
        args, options = STEP[name]
        error_of(step, *args[:3], state, key_sum, **options)
    error_of(step, *TOKEN, state, KEY_SUM.double())
    assert torch.equal(state, STATE) and torch.equal(key_sum, KEY_SUM)


def test_bad_input_touches_no_memory() -> None:
    """Tensors of a terabyte that exist only as views: an error comes, not an allocation."""
    huge = ones(1).expand(1, 1, 1 << 34, 8)
    with pytest.raises(ValueError, match="mask must have shape"):
        linear(huge, huge, huge, mask=TRUE.expand(1, 1 << 20))
