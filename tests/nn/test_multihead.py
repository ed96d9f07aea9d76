"""MultiheadAttention against its formula written out by hand, and inside PyTorch's transforms."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

from attn_ops import cosine_sim_attention
from attn_ops.nn import MultiheadAttention
from attn_ops.nn.multihead import rotary
from tests.comparison import Rounding, assert_close, assert_same

softmax_attention = partial(F.scaled_dot_product_attention, enable_gqa=True)


def by_hand(
    module: MultiheadAttention, x: Tensor, context: Tensor | None = None, *, causal: bool = False
) -> Tensor:
    """Projections, F.normalize and softmax, one head after the other."""
    source = x if context is None else context
    project = [
        F.linear(tokens, proj.weight, proj.bias)
        for tokens, proj in ((x, module.q_proj), (source, module.k_proj), (source, module.v_proj))
    ]
    query, key, value = (tokens.split(module.head_dim, dim=-1) for tokens in project)
    outs = []
    for head in range(module.heads):
        kv_head = head * module.kv_heads // module.heads
        scale = 8.0 if module.learned_scale is None else module.learned_scale[head]
        cosine = F.normalize(query[head], dim=-1) @ F.normalize(key[kv_head], dim=-1).mT
        score = scale * cosine
        if causal:
            hidden = torch.ones_like(score, dtype=torch.bool).triu(1)
            score = score.masked_fill(hidden, -torch.inf)
        outs.append(score.softmax(-1) @ value[kv_head])
    return F.linear(torch.cat(outs, dim=-1), module.out_proj.weight, module.out_proj.bias)


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped heads": {"kv_heads": 2},
    "one key/value head": {"kv_heads": 1},
    "narrow heads": {"head_dim": 5},
    "bias": {"bias": True},
    "learned scale": {"learned_scale": 3.0, "kv_heads": 2},
}


def gradients(module: nn.Module, out: Tensor, *inputs: Tensor) -> dict[str, Tensor]:
    """Of a fixed, uneven sum of `out`, with regard to all parameters and these inputs."""
    of = {f"input {i}": tensor for i, tensor in enumerate(inputs)} | dict(module.named_parameters())
    weights = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype)
    return dict(zip(of, torch.autograd.grad((out.flatten() * weights).sum(), list(of.values()))))


def assert_equal_with_gradients(
    module: nn.Module, actual: Tensor, expected: Tensor, *inputs: Tensor
) -> None:
    assert_same("out", actual, expected)
    truth = gradients(module, expected, *inputs)
    for name, gradient in gradients(module, actual, *inputs).items():
        assert_same(f"gradient of {name}", gradient, truth[name])


def tokens(
    *size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    return torch.randn(*size, device=device, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("config", CONFIGS)
def test_self_attention_is_the_formula(
    config: str, dtype: torch.dtype, device: torch.device
) -> None:
    module = MultiheadAttention(24, 4, **CONFIGS[config], device=device, dtype=dtype)
    x = tokens(2, 7, 24, device=device, dtype=dtype)
    expected = by_hand(module, x, causal=True)
    assert_equal_with_gradients(module, module(x, causal=True), expected, x)


@pytest.mark.parametrize("config", CONFIGS)
def test_cross_attention_is_the_formula(config: str, device: torch.device) -> None:
    module = MultiheadAttention(24, 4, context_dim=10, **CONFIGS[config], device=device).double()
    x = tokens(2, 3, 24, device=device, dtype=torch.float64)
    context = tokens(2, 9, 10, device=device, dtype=torch.float64)
    assert_equal_with_gradients(module, module(x, context), by_hand(module, x, context), x, context)


def test_options_reach_the_attention(device: torch.device) -> None:
    module = MultiheadAttention(24, 4, device=device)
    x = tokens(2, 7, 24, device=device)
    mask = torch.arange(7, device=device).expand(2, 7) < 4
    assert_same("out", module(x, mask=mask), module(x, x[:, :4]))


def test_options_given_once_reach_the_attention(device: torch.device) -> None:
    attention = partial(cosine_sim_attention, scale=3.0, groups=2)
    module = MultiheadAttention(24, 4, attention=attention, device=device)
    sharper = MultiheadAttention(24, 4, device=device)
    sharper.load_state_dict(module.state_dict())
    x = tokens(2, 7, 24, device=device)
    assert_same("out", module(x), sharper(x, scale=3.0, groups=2))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_softmax_attention_is_the_module_of_pytorch(kv_heads: int, device: torch.device) -> None:
    module = MultiheadAttention(24, 4, kv_heads, softmax_attention, bias=True, device=device)
    theirs = nn.MultiheadAttention(24, 4, batch_first=True, device=device)

    def every_head(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (kv_heads, 6)).repeat_interleave(4 // kv_heads, 0).flatten(0, 1)

    with torch.no_grad():
        k_proj, v_proj = module.k_proj, module.v_proj
        theirs.in_proj_weight.copy_(
            torch.cat([module.q_proj.weight, every_head(k_proj.weight), every_head(v_proj.weight)])
        )
        theirs.in_proj_bias.copy_(
            torch.cat([module.q_proj.bias, every_head(k_proj.bias), every_head(v_proj.bias)])
        )
        theirs.out_proj.load_state_dict(module.out_proj.state_dict())
    x = tokens(2, 7, 24, device=device)
    assert_same("out", module(x), theirs(x, x, x, need_weights=False)[0])
    hidden = torch.ones(7, 7, dtype=torch.bool, device=device).triu(1)
    expected = theirs(x, x, x, need_weights=False, attn_mask=hidden)[0]
    assert_same("causal", module(x, is_causal=True), expected)


def test_gradcheck(device: torch.device) -> None:
    module = MultiheadAttention(
        4, 2, 1, head_dim=2, learned_scale=2.0, rotary_base=100.0, device=device
    ).double()
    names = [name for name, _ in module.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        arguments = dict(zip(names, parameters))
        return torch.func.functional_call(module, arguments, (x,), {"causal": True})

    x = tokens(1, 3, 4, device=device, dtype=torch.float64)
    assert torch.autograd.gradcheck(run, (x, *module.parameters()), check_forward_ad=True)


# Rotary


def rotary_by_hand(x: Tensor, base: float) -> Tensor:
    """Complex numbers turned, one position after the other."""
    half = x.shape[-1] // 2
    turned = []
    for position in range(x.shape[-2]):
        pair = torch.complex(x[..., position, :half], x[..., position, half:])
        angle = torch.tensor([position * base ** (-i / half) for i in range(half)]).to(x)
        pair = pair * torch.polar(torch.ones_like(angle), angle)
        turned.append(torch.cat([pair.real, pair.imag], dim=-1))
    return torch.stack(turned, dim=-2)


def test_rotary_turns_complex_numbers(device: torch.device) -> None:
    x = torch.randn(2, 3, 11, 6, device=device)
    assert_same("rotary", rotary(x, 100.0), rotary_by_hand(x, 100.0))


def test_rotary_is_applied_to_queries_and_keys_before_the_norm(device: torch.device) -> None:
    module = MultiheadAttention(24, 4, 2, rotary_base=100.0, device=device)
    x = tokens(2, 7, 24, device=device)
    query, key, value = (
        proj(x).unflatten(-1, (-1, 6)).transpose(1, 2)
        for proj in (module.q_proj, module.k_proj, module.v_proj)
    )
    query, key = rotary_by_hand(query, 100.0), rotary_by_hand(key, 100.0)
    out = cosine_sim_attention(query, key, value, causal=True)
    expected = module.out_proj(out.transpose(1, 2).flatten(2))
    assert_equal_with_gradients(module, module(x, causal=True), expected, x)


def test_rotary_knows_distances_alone(device: torch.device) -> None:
    module = MultiheadAttention(24, 4, rotary_base=100.0, device=device)
    x = tokens(1, 20, 24, device=device)
    late = module(x, causal=True, window=3)[:, 12:]
    assert_same("out", late, module(x[:, 10:], causal=True, window=3)[:, 2:])


# State, devices and dtypes


def test_state_dict_round_trip(device: torch.device) -> None:
    module = MultiheadAttention(24, 4, 2, learned_scale=3.0, bias=True, device=device)
    assert module.learned_scale is not None
    with torch.no_grad():
        module.learned_scale.mul_(torch.tensor([1.0, 2.0, 3.0, 4.0], device=device))
    again = MultiheadAttention(24, 4, 2, learned_scale=8.0, bias=True, device=device)
    assert not again.load_state_dict(module.state_dict()).missing_keys
    x = tokens(2, 7, 24, device=device)
    assert torch.equal(again(x), module(x))


def test_state_dict_has_the_parameters_alone() -> None:
    plain = MultiheadAttention(24, 4, rotary_base=100.0)
    projections = [f"{name}_proj.weight" for name in ("q", "k", "v", "out")]
    assert list(plain.state_dict()) == projections
    learned = MultiheadAttention(24, 4, learned_scale=3.0)
    assert sorted(learned.state_dict()) == sorted([*projections, "learned_scale"])


def test_device_and_dtype_are_those_of_every_parameter() -> None:
    module = MultiheadAttention(
        24, 4, bias=True, learned_scale=3.0, device="meta", dtype=torch.bfloat16
    )
    for name, parameter in module.named_parameters():
        assert (parameter.device.type, parameter.dtype) == ("meta", torch.bfloat16), name
    out = module(torch.empty(2, 7, 24, device="meta", dtype=torch.bfloat16), causal=True)
    assert (out.device.type, out.dtype, out.shape) == ("meta", torch.bfloat16, (2, 7, 24))


def assert_near_the_formula(
    module: MultiheadAttention, x: Tensor, out: Tensor, dtype: torch.dtype
) -> None:
    narrow = by_hand(copy.deepcopy(module).to(dtype), x.to(dtype))
    truth = by_hand(copy.deepcopy(module).double(), x.double())
    magnitudes = {"out": truth.abs().max().item()}
    assert_close("out", out, narrow, truth, Rounding(dtype, score=3.0, magnitudes=magnitudes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_near_the_formula(dtype: torch.dtype, device: torch.device) -> None:
    module = MultiheadAttention(24, 4, 2, learned_scale=3.0, device=device, dtype=dtype)
    x = tokens(2, 7, 24, device=device, dtype=dtype)
    out = module(x)
    assert out.dtype == dtype
    assert_near_the_formula(module, x, out, dtype)


def test_autocast_leaves_the_parameters_in_float32(device: torch.device) -> None:
    module = MultiheadAttention(24, 4, 2, learned_scale=3.0, device=device)
    x = tokens(2, 7, 24, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    assert_near_the_formula(module, x, out, torch.bfloat16)
    out.float().sum().backward()
    assert {p.grad.dtype for p in module.parameters() if p.grad is not None} == {torch.float32}


# Transforms


@pytest.mark.parametrize("attention", [cosine_sim_attention, softmax_attention])
@pytest.mark.parametrize("cross", [False, True])
def test_one_fullgraph_compilation_serves_all_lengths(
    attention: Callable[..., Tensor], cross: bool, device: torch.device
) -> None:
    rotary_base = None if cross else 100.0
    module = MultiheadAttention(24, 4, 2, attention, rotary_base=rotary_base, device=device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for batch, length in [(2, 7), (3, 12), (5, 33)]:
        inputs = [tokens(batch, length, 24, device=device)]
        if cross:
            inputs.append(tokens(batch, 2 * length + 1, 24, device=device))
        assert_equal_with_gradients(module, compiled(*inputs), module(*inputs), *inputs)
        counts.append(counter.frame_count)
    # torch 2.11 starts tracing over once, when it finds that rotary_base has to be a constant.
    assert counts[0] == counts[-1] <= 2


def test_inductor_compiles_the_learned_scale(device: torch.device) -> None:
    module = MultiheadAttention(24, 4, 2, learned_scale=3.0, rotary_base=100.0, device=device)
    x = tokens(2, 7, 24, device=device)
    compiled = torch.compile(module, fullgraph=True)
    assert_equal_with_gradients(module, compiled(x, causal=True), module(x, causal=True), x)


@pytest.mark.parametrize("strict", [False, True])
def test_export_keeps_the_op(strict: bool, device: torch.device) -> None:
    module = MultiheadAttention(24, 4, 2, learned_scale=3.0, device=device)
    batch, length = Dim("batch"), Dim("length", max=4096)
    example = (torch.randn(2, 7, 24, device=device), torch.randn(2, 9, 24, device=device))
    sizes = ({0: batch, 1: length}, {0: batch, 1: Dim("keys", max=4096)})
    program = torch.export.export(module, example, dynamic_shapes=sizes, strict=strict)
    x, context = torch.randn(3, 30, 24, device=device), torch.randn(3, 5, 24, device=device)
    assert_same("out", program.module()(x, context), module(x, context))
    ops = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [op for op in ops if op.startswith("attn.")] == ["attn.cosine_sim.default"]


def test_repr_names_the_attention() -> None:
    assert_expected_inline(
        repr(MultiheadAttention(8, 4, 2, partial(cosine_sim_attention, groups=2))),
        """\
MultiheadAttention(
  heads=4, kv_heads=2, attention=cosine_sim_attention
  (q_proj): Linear(in_features=8, out_features=8, bias=False)
  (k_proj): Linear(in_features=8, out_features=4, bias=False)
  (v_proj): Linear(in_features=8, out_features=4, bias=False)
  (out_proj): Linear(in_features=8, out_features=8, bias=False)
)""",
    )


# Errors


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
