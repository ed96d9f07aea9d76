"""What only the Python functions can be given: arguments that are no tensors, numbers or flags."""

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline

from attn_ops import linear_attention, linear_attention_step, linear_attention_with_state
from tests.errors import case, error_of, ones, texts
from tests.linear.inputs import KEY_SUM, PACKED, STATE, TOKEN, TRUE, K, Q, V

OPTIONS: dict[str, dict[str, Any]] = {
    "normalize a number": {"normalize": 1},
    "normalize a tensor": {"normalize": TRUE},
    "eps a word": {"eps": "small"},
    "eps a truth": {"eps": True},
    "eps a tensor": {"eps": ones(1)},
    "eps beyond every float": {"eps": 10**400},
    "decay a number": {"decay": 0.9},
    "decay a list": {"decay": [0.9] * 4},
    "feature_map nothing": {"feature_map": None},
    "feature_map a function": {"feature_map": torch.relu},
}
CASES = {
    "query a list": case([1.0], K, V),
    "key nothing": case(Q, None, V),
    "value a number": case(Q, K, 1.0),
    "mask a list": case(Q, K, V, mask=[True]),
    "causal a tensor": case(Q, K, V, causal=TRUE),
    "causal nothing": case(Q, K, V, causal=None),
    "cu_seqlens a list": case(*PACKED, cu_seqlens=[0, 7]),
} | {name: case(Q, K, V, **options) for name, options in OPTIONS.items()}
STATES = {
    "state a list": case(Q, K, V, [STATE], KEY_SUM),
    "key_sum a number": case(Q, K, V, STATE, 0.0),
    "mask a list": case(Q, K, V, STATE, KEY_SUM, mask=[True]),
    "eps a word": case(Q, K, V, STATE, KEY_SUM, eps="small"),
}
STEPS = {
    "query a list": case([1.0], *TOKEN[1:], STATE, KEY_SUM),
    "state nothing": case(*TOKEN, None, KEY_SUM),
    "key_sum nothing": case(*TOKEN, STATE, None),
    "decay a number": case(*TOKEN, STATE, KEY_SUM, decay=0.9),
}


def test_texts() -> None:
    assert_expected_inline(
        texts(linear_attention, CASES),
        """\
query a list
    TypeError: linear_attention: query must be a Tensor, got list
key nothing
    TypeError: linear_attention: key must be a Tensor, got NoneType
value a number
    TypeError: linear_attention: value must be a Tensor, got float
mask a list
    TypeError: linear_attention: mask must be a Tensor or None, got list
causal a tensor
    TypeError: linear_attention: causal must be a bool, got Tensor
causal nothing
    TypeError: linear_attention: causal must be a bool, got NoneType
cu_seqlens a list
    TypeError: linear_attention: cu_seqlens must be a Tensor or None, got list
normalize a number
    TypeError: linear_attention: normalize must be a bool, got int
normalize a tensor
    TypeError: linear_attention: normalize must be a bool, got Tensor
eps a word
    TypeError: linear_attention: eps must be a float, got str
eps a truth
    TypeError: linear_attention: eps must be a float, got bool
eps a tensor
    TypeError: linear_attention: eps must be a float, got Tensor
eps beyond every float
    ValueError: linear_attention: eps must be finite, got an int beyond every float
decay a number
    TypeError: linear_attention: decay must be a Tensor or None, got float
decay a list
    TypeError: linear_attention: decay must be a Tensor or None, got list
feature_map nothing
    TypeError: linear_attention: feature_map must be a str, got NoneType
feature_map a function
    TypeError: linear_attention: feature_map must be a str, got builtin_function_or_method""",
    )


def test_texts_of_states() -> None:
    assert_expected_inline(
        texts(linear_attention_with_state, STATES),
        """\
state a list
    TypeError: linear_attention_with_state: state must be a Tensor or None, got list
key_sum a number
    TypeError: linear_attention_with_state: key_sum must be a Tensor or None, got float
mask a list
    TypeError: linear_attention_with_state: mask must be a Tensor or None, got list
eps a word
    TypeError: linear_attention_with_state: eps must be a float, got str""",
    )


def test_texts_of_a_step() -> None:
    assert_expected_inline(
        texts(linear_attention_step, STEPS),
        """\
query a list
    TypeError: linear_attention_step: query must be a Tensor, got list
state nothing
    TypeError: linear_attention_step: state must be a Tensor, got NoneType
key_sum nothing
    TypeError: linear_attention_step: key_sum must be a Tensor, got NoneType
decay a number
    TypeError: linear_attention_step: decay must be a Tensor or None, got float""",
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_all_functions_use_the_same_words(name: str) -> None:
    options = OPTIONS[name]
    expected = str(error_of(linear_attention, Q, K, V, **options))
    others = {
        "linear_attention_with_state": error_of(linear_attention_with_state, Q, K, V, **options),
        "linear_attention_step": error_of(linear_attention_step, *TOKEN, STATE, KEY_SUM, **options),
    }
    for function, error in others.items():
        assert str(error) == expected.replace("linear_attention:", f"{function}:", 1)
