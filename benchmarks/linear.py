"""Linear attention against its chunked formula in PyTorch and flash-linear-attention.

Causal linear attention is quadratic within chunks of tokens and carries a state from one chunk to
the next. The formula exists in two shapes: all chunks at once, and a march over segments of a few
chunks, which stays in the caches of a CPU.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from attn_ops.feature_maps import FEATURE_MAPS
from benchmarks.cases import Bar, Call, Contender, Entry, Inputs, Setting
from benchmarks.linear_formula import chunked, march, whole

EPS = 1e-5


def folded(inputs: Inputs, setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
    """Features of queries and keys, hidden keys zero, one key/value head for each query head."""
    features = FEATURE_MAPS[setting.feature_map or "identity"]
    query, key, value = features(inputs.query), features(inputs.key), inputs.value
    if inputs.mask is not None:
        key = key.masked_fill(~inputs.mask[:, None, :, None], 0)
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    return query, key, value


def ours(inputs: Inputs, setting: Setting) -> Call:
    """The op of this library."""
    import attn_ops  # noqa: F401  (registers the op)

    op = torch.ops.attn.linear.default
    options: dict[str, Any] = {
        "mask": inputs.mask,
        "causal": setting.causal,
        "normalize": bool(setting.normalize),
        "eps": EPS,
        "decay": inputs.decay,
        "feature_map": setting.feature_map,
    }
    return lambda: op(*inputs.leaves(), **options)


def formula(
    inputs: Inputs,
    setting: Setting,
    *,
    chunk: int,
    segment: int | None = None,
    compiled: bool = False,
) -> Call | str:
    """The chunked formula; `segment` None takes all chunks at once."""
    if segment is not None and not setting.causal:
        return "causal only"
    eps = EPS if setting.normalize else None

    def compute(inputs: Inputs) -> Tensor:
        query, key, value = folded(inputs, setting)
        if not setting.causal:
            return whole(query, key, value, eps)
        if segment == chunk:
            return march(query, key, value, inputs.decay, eps, chunk)
        return chunked(query, key, value, inputs.decay, eps, chunk, segment)

    run = torch.compile(compute, fullgraph=True, dynamic=False) if compiled else compute
    return lambda: run(inputs)


def fla(inputs: Inputs, setting: Setting) -> Call | str:
    """flash-linear-attention: `[B, T, H, D]`, its scale and its normaliser."""
    if not setting.causal:
        return "causal only"
    if setting.decay and setting.normalize:
        return "has no decay beside its normaliser"
    chunk_linear_attn = import_module("fla.ops.linear_attn").chunk_linear_attn
    chunk_simple_gla = import_module("fla.ops.simple_gla").chunk_simple_gla
    log_decay = None if inputs.decay is None else inputs.decay.log()

    def call() -> Tensor:
        tensors = (x.transpose(1, 2) for x in folded(inputs, setting))
        if log_decay is not None:
            out, _ = chunk_simple_gla(*tensors, g_gamma=log_decay, scale=1.0)
        else:
            out, _ = chunk_linear_attn(*tensors, scale=1.0, normalize=bool(setting.normalize))
        return out.transpose(1, 2)

    return call


def reference(inputs: Inputs, setting: Setting, with_norm: bool) -> Tensor:
    """The formula on float64 inputs, in chunks: time and memory grow linearly with the length."""
    query, key, value = folded(inputs, setting)
    eps = EPS if setting.normalize else None
    if not setting.causal:
        return whole(query, key, value, eps)
    return chunked(query, key, value, inputs.decay, eps, 64, 1024)


def work(setting: Setting) -> dict[str, float]:
    """The floor: bytes of every input and result of a pass, moved once."""
    size = torch.empty(0, dtype=setting.dtype).element_size() * setting.batch * setting.length
    query = size * setting.heads * setting.width
    out = size * setting.heads * setting.value_width
    keys = size * setting.kv_heads * (setting.width + setting.value_width)
    forward, backward = query + keys + out, 2 * (query + keys) + out
    return {"forward": forward, "backward": backward, "forward+backward": forward + backward}


def cpu_bars() -> tuple[Bar, ...]:
    """Ratios to the best chunked formula, 1 and 2 threads."""
    least = {
        (torch.float32, 64): (2.0, 1.8),
        (torch.float32, 128): (1.7, 1.7),
        (torch.bfloat16, 64): (1.5, 1.5),
        (torch.bfloat16, 128): (1.5, 1.5),
    }

    def held(setting: Setting, dtype: torch.dtype, width: int) -> bool:
        return (
            setting.device == "cpu"
            and setting.causal
            and 1024 <= setting.length <= 16384
            and setting.dtype == dtype
            and setting.width == setting.value_width == width
        )

    return tuple(
        Bar(
            f"{str(dtype).removeprefix('torch.')} D{width}",
            which,
            ratio,
            partial(held, dtype=dtype, width=width),
        )
        for (dtype, width), ratios in least.items()
        for which, ratio in zip(("forward", "forward+backward"), ratios, strict=True)
    )


# B, H, N, D, E: GB/s forward, backward, forward normalised, backward normalised.
RATES = {
    (8, 16, 4096, 128, 128): (3600, 2100, 3300, 1900),
    (8, 16, 8192, 128, 128): (3600, 2100, 3300, 1900),
    (4, 16, 16384, 128, 128): (2600, 1600, 2400, 1500),
    (1, 16, 65536, 128, 128): (2200, 1200, 2000, 1100),
    (8, 16, 1024, 128, 128): (2500, 1500, 2300, 1400),
    (8, 16, 4096, 64, 64): (3500, 2400, 3200, 2100),
    (8, 16, 4096, 64, 16): (2400, 1500, 2200, 1400),
    (8, 16, 4096, 128, 32): (2400, 1500, 2200, 1400),
}
SHAPES = [list(shape) for shape in RATES]


def cuda_bars() -> tuple[Bar, ...]:
    """GB/s on one H200, bfloat16."""

    def held(setting: Setting, shape: tuple[int, ...], normalize: bool) -> bool:
        its = (setting.batch, setting.heads, setting.length, setting.width, setting.value_width)
        return (
            setting.device == "cuda"
            and setting.dtype == torch.bfloat16
            and setting.causal
            and its == shape
            and setting.kv_heads == setting.heads
            and setting.normalize == normalize
            and setting.feature_map == "identity"
            and not setting.decay
            and not setting.mask_prob
        )

    return tuple(
        Bar(
            f"{','.join(map(str, shape))}{' normalized' if normalize else ''}",
            which,
            least,
            partial(held, shape=shape, normalize=normalize),
            of_rate=True,
        )
        for shape, numbers in RATES.items()
        for (normalize, which), least in zip(
            ((False, "forward"), (False, "backward"), (True, "forward"), (True, "backward")),
            numbers,
            strict=True,
        )
    )


CPU, CUDA = ("cpu",), ("cuda",)

ENTRY = Entry(
    ours=Contender("attn_ops", ours),
    peers=(
        Contender("chunks of 64", partial(formula, chunk=64)),
        Contender("chunks of 128", partial(formula, chunk=128)),
        Contender("march of 64", partial(formula, chunk=64, segment=64), CPU),
        Contender("march of 1024, chunks of 64", partial(formula, chunk=64, segment=1024), CPU),
        Contender("march of 2048, chunks of 128", partial(formula, chunk=128, segment=2048), CPU),
        Contender(
            "chunks of 64, compiled", partial(formula, chunk=64, compiled=True), compiled=True
        ),
        Contender(
            "chunks of 128, compiled",
            partial(formula, chunk=128, compiled=True),
            compiled=True,
            by_default=False,
        ),
        Contender("fla chunk_linear_attn", fla, CUDA, compiled=True, tokens_first=True),
    ),
    reference=reference,
    work=work,
    unit=("GB/s", 1e9),
    bars=(*cpu_bars(), *cuda_bars()),
    takes={"normalize": "yes", "feature_map": ["identity"], "decay": "no"},
    presets={
        "cpu": tuple(
            {
                "device": "cpu",
                "dtype": ["float32", "bfloat16"],
                "heads": 4,
                "head_dim": [64, 128],
                "seq_lens": lengths,
                "threads": [1, 2],
                "causal": "yes",
                "normalize": normalize,
                "budget": 1.0,
            }
            for normalize, lengths in (("no", [1024, 4096, 16384]), ("yes", [4096]))
        ),
        # Compiling forward, backward and inference takes longer than all the rest of a row.
        "cuda": tuple(
            {
                "device": "cuda",
                "dtype": ["bfloat16"],
                "shapes": shapes,
                "causal": "yes",
                "normalize": "both",
                "passes": ["forward", "backward"],
                "num_times": 20,
                "budget": 0.5,
                "skip": skip,
            }
            for shapes, skip in ((SHAPES[:1], []), (SHAPES[1:], ["compiled"]))
        ),
    },
)
