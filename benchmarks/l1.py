"""L1 attention, and its scores alone, against the formulas that a user can write.

An element is one |q - k|: there are B * H * M * N * D of them, half as many when causal, and the
unit of speed counts them, backward passes too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import Bar, Call, Contender, Entry, Inputs, Setting, draw

BLOCK = 256  # queries of the reference at a time
# The compiled formula's gradient is a tensor of all elements, on a CPU soon more than there is.
LARGEST_GRADIENT = 4 << 30

Distance = Callable[[Tensor, Tensor], Tensor]  # [B, H, M, D], [B, H, N, D] -> [B, H, M, N]


def broadcast_distance(query: Tensor, key: Tensor) -> Tensor:
    """What a compiler can fuse: [B, H, M, N, D] is reduced as it arises. float32 for 16 bits."""
    query, key = wide(query), wide(key)
    return (query.unsqueeze(-2) - key.unsqueeze(-3)).abs().sum(-1)


def cdist(query: Tensor, key: Tensor) -> Tensor:
    """The same by PyTorch's own kernel, which has no 16 bit."""
    return torch.cdist(wide(query), wide(key), p=1)


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def per_query_head(x: Tensor, heads: int) -> Tensor:
    """[B, Hk, N, D] -> [B, H, N, D]."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def visible(inputs: Inputs, setting: Setting, queries: slice) -> Tensor | None:
    """[B or 1, 1, M or 1, N] for some of the queries; None where they see everything."""
    mask = None if inputs.mask is None else inputs.mask[:, None, None, :]
    if setting.causal:
        places = torch.arange(setting.length, device=inputs.query.device)
        earlier = places <= places[queries, None]
        mask = earlier if mask is None else mask & earlier
    return mask


def scores(inputs: Inputs, distance: Distance, queries: slice = slice(None)) -> Tensor:
    """[B, H, M, N], in at least float32."""
    query = inputs.query[:, :, queries]
    key = per_query_head(inputs.key, query.shape[1])
    return -(query.shape[-1] ** -0.5) * distance(query, key)


def attention(
    inputs: Inputs, setting: Setting, distance: Distance, queries: slice = slice(None)
) -> Tensor:
    """The formula."""
    score, mask = scores(inputs, distance, queries), visible(inputs, setting, queries)
    if mask is not None:
        score = score.masked_fill(~mask, -torch.inf)
    value = per_query_head(inputs.value, score.shape[1])
    return score.softmax(-1).to(value.dtype) @ value


def only_scores(
    inputs: Inputs, setting: Setting, distance: Distance, queries: slice = slice(None)
) -> Tensor:
    """The formula of `l1_scores`."""
    return scores(inputs, distance, queries).to(inputs.query.dtype)


def ours(inputs: Inputs, setting: Setting) -> Call:
    """The op of this library."""
    import attn_ops  # noqa: F401  (registers the op)

    op = torch.ops.attn.l1.default
    return lambda: op(*inputs.leaves(), inputs.mask, causal=setting.causal)


def our_scores(inputs: Inputs, setting: Setting) -> Call:
    """The same without softmax and values."""
    import attn_ops  # noqa: F401  (registers the op)

    op = torch.ops.attn.l1_scores.default
    return lambda: op(*inputs.leaves())


def formula(
    inputs: Inputs,
    setting: Setting,
    *,
    law: Callable[..., Tensor],
    distance: Distance,
    compiled: bool = False,
) -> Call:
    """A call of `attention` or `only_scores`."""

    def compute(inputs: Inputs) -> Tensor:
        return law(inputs, setting, distance)

    if not compiled:
        return lambda: compute(inputs)
    run = torch.compile(compute, fullgraph=True, dynamic=False)
    elements = setting.batch * setting.heads * setting.length**2 * setting.width

    def call() -> Tensor:
        too_large = setting.device == "cpu" and 4 * elements > LARGEST_GRADIENT
        if too_large and torch.is_grad_enabled():
            raise MemoryError
        return run(inputs)

    return call


def reference(
    inputs: Inputs, setting: Setting, with_norm: bool, *, law: Callable[..., Tensor]
) -> Tensor:
    """The formula on float64 inputs, in blocks: cdist's gradient on CUDA holds all elements."""
    blocks = [
        law(inputs, setting, cdist, slice(start, start + BLOCK))
        for start in range(0, setting.length, BLOCK)
    ]
    return torch.cat(blocks, 2)


class QueryAndKey(Inputs):
    """Inputs of an op that takes no values; its output is [B, H, N, N]."""

    def leaves(self) -> tuple[Tensor, ...]:
        return self.query, self.key


def draw_scores(setting: Setting) -> QueryAndKey:
    """Random normal queries, keys and gradients."""
    inputs = draw(setting)
    generator = torch.Generator(setting.device).manual_seed(1)
    shape = (setting.batch, setting.heads, setting.length, setting.length)
    grad_out = torch.randn(shape, device=setting.device, generator=generator).to(setting.dtype)
    return QueryAndKey(inputs.query, inputs.key, inputs.value, None, grad_out)


def work(setting: Setting) -> dict[str, float]:
    """Elements of visible pairs."""
    elements = float(setting.pairs() * setting.width)
    return {"forward": elements, "backward": elements, "forward+backward": 2 * elements}


def full_work(setting: Setting) -> dict[str, float]:
    """Elements of all pairs: scores hide nothing."""
    return work(replace(setting, causal=False))


def contenders(law: Callable[..., Tensor]) -> tuple[Contender, ...]:
    """The two formulas."""
    return (
        Contender(
            "broadcast, compiled",
            partial(formula, law=law, distance=broadcast_distance, compiled=True),
            compiled=True,
        ),
        Contender("cdist", partial(formula, law=law, distance=cdist)),
    )


def cpu_bars() -> tuple[Bar, ...]:
    """Ratios to the better formula, 1 and 2 threads."""

    def held(setting: Setting) -> bool:
        return (
            setting.device == "cpu"
            and setting.dtype == torch.float32
            and 1024 <= setting.length <= 2048
            and setting.width in (64, 128)
        )

    return (
        Bar("float32 on a CPU", "forward", 1.8, held),
        Bar("float32 on a CPU", "forward+backward", 5.0, held),
    )


def cuda_bars() -> tuple[Bar, ...]:
    """T elements/s on one H200."""

    def held(setting: Setting, dtype: torch.dtype) -> bool:
        return (
            setting.device == "cuda"
            and setting.dtype == dtype
            and not setting.causal
            and (setting.batch, setting.heads) == (4, 8)
            and setting.length in (2048, 8192)
            and setting.width in (64, 128)
        )

    least = {torch.float32: (9.0, 2.5), torch.bfloat16: (14.0, 4.5), torch.float16: (14.0, 4.5)}
    return tuple(
        Bar(str(dtype).removeprefix("torch."), which, rate, partial(held, dtype=dtype), True)
        for dtype, rates in least.items()
        for which, rate in zip(("forward", "backward"), rates, strict=True)
    )


def scores_held(setting: Setting) -> bool:
    """The setting of the scores' bar."""
    its = (setting.device, setting.dtype, setting.length, setting.width)
    return its == ("cuda", torch.float32, 2048, 64)


CPU_PRESET = {
    "device": "cpu",
    "dtype": ["float32"],
    "head_dim": [64, 128],
    "threads": [1, 2],
    "budget": 1.0,
}
CUDA_PRESET = {
    "device": "cuda",
    "passes": ["forward", "backward"],
    "num_times": 20,
    "budget": 0.5,
}
SHAPES = [[4, 8, length, width] for width in (64, 128) for length in (2048, 8192)]
# On a GPU the formulas take seconds to run and longer to compile: a few rows tell enough of them.
# torch.cdist (32 heads, N = 2048, torch 2.11) read illegal memory there, which ends the process.
FORMULAS = ["broadcast", "cdist"]

ENTRY = Entry(
    ours=Contender("attn_ops", ours),
    peers=contenders(attention),
    reference=partial(reference, law=attention),
    work=work,
    unit=("T elements/s", 1e12),
    bars=(*cpu_bars(), *cuda_bars()),
    presets={
        "cpu": (
            {**CPU_PRESET, "seq_lens": [1024, 2048], "passes": ["forward"]},
            {**CPU_PRESET, "seq_lens": [1024, 2048], "passes": ["forward+backward"]},
        ),
        "cuda": (
            {**CUDA_PRESET, "dtype": ["float32"], "shapes": SHAPES[:2], "skip": ["cdist"]},
            {**CUDA_PRESET, "dtype": ["float32"], "shapes": SHAPES[2:], "skip": FORMULAS},
            {
                **CUDA_PRESET,
                "dtype": ["bfloat16", "float16"],
                "shapes": SHAPES,
                "skip": FORMULAS,
            },
            {
                **CUDA_PRESET,
                "dtype": ["float32", "bfloat16"],
                "shapes": SHAPES[1::2],
                "causal": "yes",
                "skip": FORMULAS,
            },
        ),
    },
)

SCORES = Entry(
    ours=Contender("attn_ops", our_scores),
    peers=contenders(only_scores),
    reference=partial(reference, law=only_scores),
    work=full_work,
    unit=("T elements/s", 1e12),
    bars=(Bar("float32", "forward", 9.0, scores_held, True),),
    draw=draw_scores,
    presets={
        "cpu": (
            {**CPU_PRESET, "seq_lens": [1024], "passes": ["forward"]},
            {**CPU_PRESET, "seq_lens": [1024], "passes": ["forward+backward"]},
        ),
        "cuda": (
            {**CUDA_PRESET, "dtype": ["float32"], "shapes": SHAPES[:1], "skip": ["cdist"]},
            {
                **CUDA_PRESET,
                "dtype": ["float32", "bfloat16"],
                "shapes": SHAPES[::2],
                "skip": FORMULAS,
            },
        ),
    },
)
