"""What MultiheadAttention refuses, and how it says so."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor

from attn_ops.nn import MultiheadAttention


def message(run: Callable[[], object], kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as raised:
        run()
    return str(raised.value)


def test_sizes_that_do_not_fit_are_refused() -> None:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((0, 4), {}),
        ((24, 0), {}),
        ((24, 4, 0), {}),
        ((24, 4, 3), {}),
        ((24, 4, 8), {}),
        ((24, 5), {}),
        ((24, 4), {"head_dim": 0}),
        ((24, 4), {"context_dim": -1}),
        ((24, 8), {"rotary_base": 100.0}),
        ((24, 4), {"rotary_base": 0.0}),
    ]
    texts = [message(partial(MultiheadAttention, *sizes, **options)) for sizes, options in calls]
    assert_expected_inline(
        "\n".join(texts),
        """\
MultiheadAttention: dim must be at least 1, got 0
MultiheadAttention: heads must be at least 1, got 0
MultiheadAttention: kv_heads must be at least 1, got 0
MultiheadAttention: kv_heads must divide heads=4, got 3
MultiheadAttention: kv_heads must divide heads=4, got 8
MultiheadAttention: heads must divide dim=24 where head_dim is not given, got 5
MultiheadAttention: head_dim must be at least 1, got 0
MultiheadAttention: context_dim must be at least 1, got -1
MultiheadAttention: head_dim must be even with rotary_base, got 3
MultiheadAttention: rotary_base must be positive, got 0.0""",
    )


def inputs_that_do_not_fit() -> list[tuple[MultiheadAttention, tuple[Tensor, ...], dict[str, Any]]]:
    x = torch.randn(2, 7, 24)
    plain = MultiheadAttention(24, 4)
    cross = MultiheadAttention(24, 4, context_dim=10)
    turned = MultiheadAttention(24, 4, rotary_base=100.0)
    learned = MultiheadAttention(24, 4, learned_scale=3.0)
    return [
        (plain, (x[0],), {}),
        (plain, (x[..., :8],), {}),
        (plain, (x, x[0]), {}),
        (cross, (x,), {}),
        (cross, (x, x), {}),
        (turned, (x, x[:, :3]), {}),
        (learned, (x,), {"scale": 3.0}),
        (plain, (x, x[:1]), {}),
        (MultiheadAttention(512, 1), (torch.randn(2, 7, 512),), {}),
    ]


def test_inputs_that_do_not_fit_are_refused() -> None:
    texts = [
        message(partial(module, *inputs, **options))
        for module, inputs, options in inputs_that_do_not_fit()
    ]
    assert_expected_inline(
        "\n".join(texts),
        """\
MultiheadAttention: x must have shape [batch, length, dim=24], got (7, 24)
MultiheadAttention: x must have shape [batch, length, dim=24], got (2, 7, 8)
MultiheadAttention: context must have shape [batch, length, context_dim=24], got (7, 24)
MultiheadAttention: context must be given: its width context_dim=10 is not dim, got None
MultiheadAttention: context must have shape [batch, length, context_dim=10], got (2, 7, 24)
MultiheadAttention: context must be None beside rotary_base, got (2, 3, 24)
MultiheadAttention: scale must not be given beside learned_scale, got 3.0
cosine_sim: key must have batch size B=2 like query, got (1, 4, 7, 6)
cosine_sim: query must have width D from 1 to 256, got 512""",
    )


def test_inputs_that_do_not_fit_are_refused_while_tracing() -> None:
    for module, inputs, options in inputs_that_do_not_fit():
        eager = message(partial(module, *inputs, **options))
        if not eager.startswith("MultiheadAttention"):
            continue  # tests of the op ask this
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        with pytest.raises(Exception) as raised:
            compiled(*inputs, **options)
        assert eager in str(raised.value)


@pytest.mark.parametrize("heads", [1, 4])
def test_learned_scale_needs_an_attention_that_takes_one(heads: int) -> None:
    x = torch.randn(2, 7, 24)
    of_floats = MultiheadAttention(
        24, heads, attention=F.scaled_dot_product_attention, learned_scale=3.0
    )
    text = message(lambda: of_floats(x), TypeError)
    assert "argument 'scale' must be float, not Parameter" in text

    def without_scale(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return value

    none = MultiheadAttention(24, heads, attention=without_scale, learned_scale=3.0)
    assert "unexpected keyword argument 'scale'" in message(lambda: none(x), TypeError)
