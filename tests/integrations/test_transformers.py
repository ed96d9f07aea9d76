"""A tiny MiniMax of `transformers` gives the same with its linear layers served by this library."""

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers.models.minimax", reason="pip install 'attn_ops[integrations]'")

from transformers import MiniMaxConfig, MiniMaxForCausalLM
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from attn_ops.integrations.transformers import use_linear_attention
from tests.comparison import assert_same

ROOT = Path(__file__).parent.parent.parent
HEADS, WIDTH, VOCABULARY = 3, 8, 50
Models = tuple[MiniMaxForCausalLM, MiniMaxForCausalLM]


def tiny_model(block_size: int = 4) -> MiniMaxForCausalLM:
    config = MiniMaxConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        head_dim=WIDTH,
        num_local_experts=2,
        num_experts_per_tok=2,  # all of them: a choice could differ by a rounding
        layer_types=["full_attention", "linear_attention", "linear_attention"],
        block_size=block_size,
        initializer_range=0.3,
        experts_implementation="eager",  # of which the others have no float64
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return MiniMaxForCausalLM(config).eval()


@pytest.fixture(scope="module")
def in_float64() -> Models:
    """transformers' own, and the same weights with the swapped layers."""
    torch.set_default_dtype(torch.float64)  # the buffers with the decays too are made in it
    try:
        theirs = tiny_model()
    finally:
        torch.set_default_dtype(torch.float32)
    ours = copy.deepcopy(theirs)
    assert use_linear_attention(ours) == 2
    return theirs, ours


@pytest.fixture
def models(in_float64: Models, device: torch.device) -> Iterator[Models]:
    for model in in_float64:
        model.to(device).zero_grad()
    yield in_float64


def tokens(device: torch.device, batch: int = 2, length: int = 11) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), device=device)


def padding(device: torch.device, side: str, length: int = 11) -> Tensor:
    """The first sequence has four tokens of padding, the second one none."""
    mask = torch.ones(2, length, dtype=torch.int64, device=device)
    mask[0, slice(0, 4) if side == "left" else slice(-4, None)] = 0
    return mask


def test_logits_are_those_of_transformers(models: Models, device: torch.device) -> None:
    theirs, ours = models
    for length in (1, 4, 11):
        ids = tokens(device, length=length)
        expected = theirs(ids, use_cache=False).logits
        assert_same("logits", ours(ids, use_cache=False).logits, expected)
        assert_same("logits beside a cache", ours(ids, use_cache=True).logits, expected)


def test_decays_differ_by_head_and_layer(models: Models) -> None:
    layers = [m for m in models[1].modules() if isinstance(m, MiniMaxLightningAttention)]
    slopes = torch.cat([layer.slope_rate.flatten() for layer in layers])
    assert slopes.unique().numel() == 2 * HEADS


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_seen(models: Models, side: str, device: torch.device) -> None:
    theirs, ours = models
    ids, mask = tokens(device), padding(device, side)
    real = mask.bool()
    actual = ours(ids, attention_mask=mask).logits
    assert_same("logits", actual[real], theirs(ids, attention_mask=mask).logits[real])
    others = torch.where(real, ids, ids % (VOCABULARY - 1) + 1)
    assert_same("logits", ours(others, attention_mask=mask).logits[real], actual[real])


def test_gradients_are_those_of_transformers(models: Models, device: torch.device) -> None:
    ids, mask = tokens(device), padding(device, "right")
    labels = ids.masked_fill(mask == 0, -100)
    gradients = []
    for model in models:
        model(ids, attention_mask=mask, labels=labels).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    expected, actual = gradients
    assert sum("qkv_proj" in name for name in expected) == 2
    for name, gradient in actual.items():
        assert gradient is not None and gradient.abs().max() > 0, name
        assert_same(name, gradient, expected[name])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_tokens_one_by_one_equal_the_whole_sequence(
    models: Models, context: Callable[[], Any], device: torch.device
) -> None:
    _, ours = models
    ids = tokens(device)
    with context():
        expected, cache, logits = ours(ids).logits, None, []
        for part in ids.split([5, 1, 1, 3, 1], dim=1):  # several tokens continue a cache as well
            result = ours(part, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            logits.append(result.logits)
        assert_same("logits", torch.cat(logits, dim=1), expected)


def test_state_is_updated_in_place_only_where_nothing_needs_it(
    models: Models, device: torch.device
) -> None:
    _, ours = models
    ids = tokens(device)

    def decode(cache: Any, context: Callable[[], Any]) -> bool:
        """Whether the state after one more token lies where it lay before."""
        before = cache.linear_cache[1]
        with context():
            cache = ours(ids[:, :1], past_key_values=cache, use_cache=True).past_key_values
        return cache.linear_cache[1].data_ptr() == before.data_ptr()

    with torch.no_grad():
        assert decode(ours(ids, use_cache=True).past_key_values, torch.no_grad)
    with torch.inference_mode():
        cache = ours(ids, use_cache=True).past_key_values
    assert not decode(cache, torch.no_grad)
    out = ours(ids, use_cache=True)
    assert not decode(out.past_key_values, torch.no_grad)
    out.logits.sum().backward()


def test_a_cache_that_transformers_began_goes_on(models: Models, device: torch.device) -> None:
    theirs, ours = models
    ids = tokens(device)
    with torch.no_grad():
        cache = theirs(ids[:, :6], use_cache=True).past_key_values
        rest = ours(ids[:, 6:], past_key_values=cache, use_cache=True).logits
        assert_same("logits", rest, theirs(ids).logits[:, 6:])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generates_the_same_tokens(
    models: Models, options: dict[str, Any], device: torch.device
) -> None:
    mask = padding(device, "left")
    ids = tokens(device).masked_fill(mask == 0, 0)
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, **options}
    expected, actual = (model.generate(ids, **options) for model in models)
    assert expected.shape == (2, 23)
    assert expected[:, 11:].unique().numel() > 3
    assert torch.equal(actual, expected)


def test_result_does_not_depend_on_the_block_size(device: torch.device) -> None:
    ids = tokens(device)
    logits = []
    for block_size in (1, 4, 256):
        model = tiny_model(block_size).to(device)
        use_linear_attention(model)
        logits.append(model(ids).logits)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_models_are_as_near_to_float64_as_theirs(
    models: Models, dtype: torch.dtype, device: torch.device
) -> None:
    ids = tokens(device)
    theirs = copy.deepcopy(models[0]).to(dtype)
    truth = copy.deepcopy(theirs).double()(ids).logits  # of the rounded weights and slopes
    of_theirs = (theirs(ids).logits - truth).abs().max()
    use_linear_attention(theirs)
    ours = theirs(ids).logits
    assert ours.dtype == dtype
    rounding = 16 * torch.finfo(dtype).eps * truth.abs().max()
    assert (ours - truth).abs().max() <= 2 * of_theirs + rounding


def test_one_layer_is_one_graph(models: Models, device: torch.device) -> None:
    layer = models[1].model.layers[1].self_attn
    x = torch.randn(2, 11, 24, device=device, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (11, 7):
        inputs = (x[:, :length], None, padding(device, "left", length))
        (actual, _), (expected, _) = compiled(*inputs), layer(*inputs)
        assert_same("out", actual, expected)
        of_actual, of_expected = (
            torch.autograd.grad(out.square().sum(), x) for out in (actual, expected)
        )
        assert_same("gradient", *of_actual, *of_expected)


def test_a_swapped_model_is_copied_saved_and_undone(models: Models, device: torch.device) -> None:
    theirs, ours = models
    ids = tokens(device)
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    again = copy.deepcopy(ours)
    layer = again.model.layers[1].self_attn
    assert layer.forward.__self__ is layer
    with torch.no_grad():
        layer.qkv_proj.weight.zero_()
        assert not torch.equal(again(ids).logits, ours(ids).logits)
    del layer.forward
    assert layer.forward.__func__ is MiniMaxLightningAttention.forward


def message(error: type[Exception], model: nn.Module) -> str:
    with pytest.raises(error) as raised:
        use_linear_attention(model)
    return str(raised.value)


def test_a_model_without_such_layers_is_refused() -> None:
    assert message(ValueError, nn.Linear(2, 2)) == (
        "use_linear_attention: model must have layers of Lightning Attention "
        "(MiniMaxLightningAttention), got Linear"
    )


def test_a_layer_that_others_have_wrapped_is_refused(models: Models) -> None:
    model = copy.deepcopy(models[0])
    layers = [m for m in model.modules() if isinstance(m, MiniMaxLightningAttention)]
    before = layers[1].forward
    layers[1].forward = lambda *args, **options: before(*args, **options)
    assert "whose forward nothing else has replaced" in message(ValueError, model)
    assert "forward" not in vars(layers[0])  # all layers or none
    del layers[1].forward
    assert use_linear_attention(model) == use_linear_attention(model) == 2


def test_heads_that_are_too_wide_are_refused(models: Models) -> None:
    model = copy.deepcopy(models[0])
    model.model.layers[2].self_attn.head_dim = 257
    assert "have heads of width 1 to 256, got 257" in message(ValueError, model)


def test_masks_of_other_shapes_are_refused(models: Models, device: torch.device) -> None:
    layer = models[1].model.layers[1].self_attn
    x = torch.randn(2, 5, 24, device=device, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"attention_mask must have shape \[B, N\], got \(2, 1"):
        layer(x, None, torch.ones(2, 1, 5, 5, device=device))


def test_transformers_is_imported_when_it_is_needed() -> None:
    program = "import sys, attn_ops.integrations.transformers as t; assert t.use_linear_attention; "
    program += "assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_missing_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.models.minimax.modeling_minimax", None)
    assert "pip install 'attn_ops[integrations]'" in message(ImportError, nn.Linear(2, 2))
