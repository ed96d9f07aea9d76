"""The rows of benchmarks.gpu_table and the bars that they are to reach on one H200."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
# FLOP of a pass over those of the forward.
WORK = {FORWARD: 1.0, BACKWARD: 2.5, BOTH: 3.5}
AT_MOST = ("ms", "us", "MiB")  # units of which less is better

NO_NORM, EAGER, COMPILED = "cuDNN without norm", "norm + cuDNN", "norm + cuDNN, compiled"
FLEX, FLEX_BIAS = "norm + FlexAttention, compiled", "norm + FlexAttention with bias, compiled"
SDPA = "norm + SDPA"


@dataclass(frozen=True)
class Bar:
    """What a pass is to reach; its unit says of what.

    TFLOP/s, GB/s (of keys and values), ms, us, MiB: as they are; rate and speed: those of row `of`
    are 1.
    """

    unit: str
    number: float | None = None  # None: measured for the bars of others
    of: str = ""


@dataclass(frozen=True)
class Row:
    """One problem, and what is measured of it."""

    section: str
    name: str
    shape: tuple[int, int, int, int]  # B, key/value heads, N, D
    bars: dict[str, Bar]  # by pass, or by the quantity of the section
    dtype: str = "bfloat16"
    queries: int | None = None  # as many as keys
    group: int = 1  # query heads per key/value head
    causal: bool = False
    window: int | None = None
    extra: str = ""  # bias, mask, relative_bias, equal or random (sequences)
    sequences: int = 64
    peers: tuple[str, ...] = field(default=())


RATE = Bar("TFLOP/s")
MILLISECONDS = Bar("ms")
# width, length: forward, backward, and both causal
SPEED = {
    (128, 512): (480, 330, 310, 210),
    (128, 1024): (580, 440, 430, 320),
    (128, 4096): (680, 530, 600, 490),
    (128, 16384): (700, 560, 660, 550),
    (64, 512): (380, 300, 250, 180),
    (64, 4096): (550, 470, 480, 410),
    (64, 16384): (580, 500, 550, 480),
}


def tokens(length: int, width: int) -> tuple[int, int, int, int]:
    """16384 tokens of 2048 features."""
    return 16384 // length, 2048 // width, length, width


def both(bar: Bar) -> dict[str, Bar]:
    """One bar for both passes."""
    return {FORWARD: bar, BACKWARD: bar}


def speed() -> Iterator[Row]:
    """Norms included. Compiling FlexAttention takes as long as all else of a row: at one length."""
    for (width, length), bars in SPEED.items():
        peers = (NO_NORM, EAGER, COMPILED, *([FLEX] if length == 4096 else []))
        for causal in (False, True):
            forward, backward = (Bar("TFLOP/s", b) for b in bars[2 * causal : 2 * causal + 2])
            yield Row(
                "speed",
                f"D{width} N{length}{' causal' * causal}",
                tokens(length, width),
                {FORWARD: forward, BACKWARD: backward},
                causal=causal,
                peers=peers,
            )


def dtypes_and_widths() -> Iterator[Row]:
    """float16 beside bfloat16, and widths beside those that are powers of two."""
    for width in (64, 128):
        base = f"D{width} bfloat16"
        yield Row("dtypes and widths", base, tokens(4096, width), both(RATE))
        bars = both(Bar("rate", 0.95, base))
        yield Row("dtypes and widths", f"D{width}", tokens(4096, width), bars, dtype="float16")
    for width in (32, 80, 96, 192, 256):
        bars = both(Bar("rate", 0.75, f"D{64 if width == 32 else 128} bfloat16"))
        yield Row("dtypes and widths", f"D{width}", tokens(4096, width), bars)
    bars = {FORWARD: Bar("ms", 9), BOTH: Bar("ms", 35)}
    shape = (4, 8, 8192, 64)
    yield Row("dtypes and widths", "D64 N8192", shape, bars, dtype="float32", peers=(SDPA,))


def features() -> Iterator[Row]:
    """Biases and a mask beside none of them; a window; sequences."""
    shape = (2, 16, 4096, 64)
    yield Row("features", "nothing", shape, both(MILLISECONDS))
    bars = {FORWARD: Bar("ms", 0.5), BOTH: Bar("ms", 2.2)}
    yield Row("features", "bias [H,N,N]", shape, bars, extra="bias", peers=(FLEX_BIAS,))
    yield Row("features", "mask, 25 % hidden", shape, {BOTH: Bar("ms", 2.1)}, extra="mask")
    bars = both(Bar("speed", 1 / 1.15, "nothing"))
    yield Row("features", "relative_bias", shape, bars, extra="relative_bias")
    shape = tokens(16384, 128)
    yield Row("features", "N16384 causal", shape, both(MILLISECONDS), causal=True)
    bars = both(Bar("speed", 12, "N16384 causal"))
    yield Row("features", "window 512", shape, bars, causal=True, window=512)
    shape = (1, 16, 65536, 128)
    yield Row("features", "64 equal sequences", shape, both(RATE), extra="equal")
    bars = both(Bar("rate", 0.85, "64 equal sequences"))
    yield Row("features", "64 random sequences", shape, bars, extra="random")


def decode() -> Iterator[Row]:
    """Few queries: the time is that of reading keys and values."""
    for batch, length, least in ((8, 8192, 3900), (1, 65536, 3700)):
        for queries, group in ((1, 1), (1, 8), (4, 1), (16, 1)):
            yield Row(
                "decode",
                f"B{batch} H{16 * group}/16 M{queries} N{length}",
                (batch, 16, length, 128),
                {FORWARD: Bar("GB/s", least)},
                queries=queries,
                group=group,
                causal=queries > 1,
                peers=(NO_NORM, EAGER) if queries == group == 1 else (),
            )


ROWS = [
    *speed(),
    *dtypes_and_widths(),
    *features(),
    *decode(),
    Row("host", "beyond SDPA, with grad", (1, 8, 128, 64), {"host": Bar("us", 15)}),
    Row("memory", "beyond results", (1, 16, 131072, 128), {"memory": Bar("MiB", 256)}),
]
