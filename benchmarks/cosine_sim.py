"""Cosine-sim attention against what a user does without it: normalise, then SDPA."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases import Bar, Call, Contender, Entry, Inputs, Setting

SCALE = 8.0


def full_mask(inputs: Inputs, setting: Setting) -> Tensor | None:
    """[B, 1, 1 or N, N] for SDPA, which takes either a mask or `is_causal`."""
    if inputs.mask is None:
        return None
    mask = inputs.mask[:, None, None, :]
    if setting.causal:
        n = setting.length
        mask = mask & torch.ones(n, n, dtype=torch.bool, device=mask.device).tril()
    return mask


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """Softmax attention as PyTorch has it."""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=scale, enable_gqa=grouped
    )


def norm_sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """The peer: unit queries and keys, then softmax attention."""
    return sdpa(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, mask, causal, scale)


def ours(inputs: Inputs, setting: Setting) -> Call:
    """The op of this library."""
    import attn_ops  # noqa: F401  (registers the op)

    op = torch.ops.attn.cosine_sim.default
    return lambda: op(*inputs.leaves(), inputs.mask, causal=setting.causal, scale=SCALE)


def softmax(
    inputs: Inputs,
    setting: Setting,
    *,
    function: Callable[..., Tensor],
    compiled: bool = False,
    backend: SDPBackend | None = None,
) -> Call:
    """A call of `sdpa` or `norm_sdpa`."""
    scale = SCALE if function is norm_sdpa else setting.width**-0.5
    mask = full_mask(inputs, setting)
    run = torch.compile(function, fullgraph=True) if compiled else function

    def call() -> Tensor:
        return run(*inputs.leaves(), mask, setting.causal, scale)

    def call_with_backend() -> Tensor:
        assert backend is not None
        with sdpa_kernel(backend):
            return call()

    return call if backend is None else call_with_backend


def flex(inputs: Inputs, setting: Setting) -> Call | str:
    """FlexAttention, compiled, after the norms."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    hidden, n = inputs.mask, setting.length
    block_mask = None
    if setting.causal or hidden is not None:

        def visible(b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
            seen = m >= n if setting.causal else m >= 0
            return seen if hidden is None else seen & hidden[b, n]

        batch = None if hidden is None else setting.batch
        block_mask = create_block_mask(visible, batch, None, n, n, device=setting.device)

    @torch.compile(fullgraph=True)
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        grouped = q.shape[1] != k.shape[1]
        out = flex_attention(q, k, v, block_mask=block_mask, scale=SCALE, enable_gqa=grouped)
        assert isinstance(out, Tensor)
        return out

    return lambda: run(*inputs.leaves())


def reference(inputs: Inputs, setting: Setting, with_norm: bool) -> Tensor:
    """The formula, one head of one batch at a time, so that long sequences fit in memory."""
    group = inputs.query.shape[1] // inputs.key.shape[1]
    mask = full_mask(inputs, setting)
    if mask is None and setting.causal:
        n = setting.length
        mask = torch.ones(1, 1, n, n, dtype=torch.bool, device=inputs.query.device).tril()
    scale = SCALE if with_norm else setting.width**-0.5
    heads = []
    for head in range(inputs.query.shape[1]):
        q, k = inputs.query[:, head], inputs.key[:, head // group]
        if with_norm:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        score = scale * q @ k.mT
        if mask is not None:
            score = score.masked_fill(~mask[:, 0], -torch.inf)
        heads.append(score.softmax(-1) @ inputs.value[:, head // group])
    return torch.stack(heads, 1)


def work(setting: Setting) -> dict[str, float]:
    """Of the matrix products alone, as `FlopCounterMode` counts the op."""
    pairs, d = setting.pairs(), setting.width
    forward, backward = 2.0 * pairs * (d + d), 2.0 * pairs * (3 * d + 2 * d)
    return {"forward": forward, "backward": backward, "forward+backward": forward + backward}


def bar(text: str, which: str, ratio: float, dtype: torch.dtype, width: int, **also: bool) -> Bar:
    """A bar for all settings of a dtype and a width."""
    return Bar(
        text,
        which,
        ratio,
        lambda s: (
            1024 <= s.length <= 4096
            and s.heads == 8
            and s.dtype == dtype
            and s.width == width
            and all(getattr(s, key) == value for key, value in also.items())
        ),
    )


NORM = partial(softmax, function=norm_sdpa)
NO_NORM = partial(softmax, function=sdpa)
CUDNN, FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
CPU, CUDA = ("cpu",), ("cuda",)

ENTRY = Entry(
    ours=Contender("attn_ops", ours),
    peers=(
        Contender("norm + SDPA", NORM),
        Contender(
            "norm + SDPA, compiled",
            partial(NORM, compiled=True),
            CPU,
            by_default=False,
            compiled=True,
        ),
        Contender("SDPA without norm", NO_NORM, CPU, by_default=False, with_norm=False),
        Contender("norm + cuDNN", partial(NORM, backend=CUDNN), CUDA),
        Contender(
            "norm + cuDNN, compiled",
            partial(NORM, backend=CUDNN, compiled=True),
            CUDA,
            compiled=True,
        ),
        Contender("norm + flash", partial(NORM, backend=FLASH), CUDA, by_default=False),
        Contender("norm + FlexAttention, compiled", flex, CUDA, compiled=True),
        Contender("cuDNN without norm", partial(NO_NORM, backend=CUDNN), CUDA, with_norm=False),
    ),
    reference=reference,
    work=work,
    unit=("TFLOP/s", 1e12),
    bars=(
        bar("float32 D64", "forward", 1.10, torch.float32, 64),
        bar("float32 D64 causal", "forward", 1.25, torch.float32, 64, causal=True),
        bar("float32 D64", "forward+backward", 1.05, torch.float32, 64),
        bar("float32 D128", "forward", 1.0, torch.float32, 128),
        bar("float32 D128", "forward+backward", 1.0, torch.float32, 128),
        bar("bfloat16 D64", "forward", 1.0, torch.bfloat16, 64),
        bar("bfloat16 D128", "forward", 1.0, torch.bfloat16, 128),
        bar("bfloat16 D64", "forward+backward", 1.0, torch.bfloat16, 64),
        bar("bfloat16 D128", "forward+backward", 1.0, torch.bfloat16, 128),
    ),
    presets={
        "cpu": (
            {
                "device": "cpu",
                "dtype": ["float32", "bfloat16"],
                "head_dim": [64, 128],
                "seq_lens": [1024, 2048, 4096],
                "threads": [1, 2],
                "causal": "both",
                "budget": 1.0,
            },
        ),
        # Compiling forward, backward and inference takes longer than all the rest of a row.
        "cuda": tuple(
            {
                "device": "cuda",
                "dtype": ["bfloat16"],
                "tokens": 16384,
                "model_width": 2048,
                "head_dim": widths,
                "seq_lens": lengths,
                "causal": causal,
                "num_times": 20,
                "budget": 0.5,
                "skip": skip,
            }
            for widths, lengths, causal, skip in (
                ([128], [4096], "no", []),
                ([64], [4096], "no", ["compiled"]),
                ([64, 128], [1024, 16384], "no", ["compiled"]),
                ([64, 128], [1024, 4096, 16384], "yes", ["compiled"]),
            )
        ),
    },
)
