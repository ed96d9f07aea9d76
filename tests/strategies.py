"""Legal arguments of the signature that all softmax-like ops share: a description, its tensors, and
hypothesis strategies that draw descriptions.

A description is small and prints well, so a counterexample becomes an `@example` as it is.
Letters: B batch, H query heads, Hk key/value heads, M queries, N keys, D, E widths.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

PATTERNS = ("1111", "BHMN", "B1MN", "1HMN", "11MN", "B11N", "BHM1", "1H1N")
STRIDES = ("contiguous", "transposed", "expanded")


@dataclass(frozen=True)
class Case:
    """Arguments of one call. Patterns name the dimensions of a tensor, 1 where it is broadcast."""

    batch: int = 2
    heads: int = 2
    kv_heads: int = 2
    queries: int = 5
    keys: int = 7
    width: int = 8
    value_width: int = 6
    layout: str = "BHMD"  # or "BND": one key/value head without a dimension; or "merged"
    strides: str = "contiguous"
    mask: str | None = None  # "BN" or a pattern
    bias: str | None = None  # "HMN" or a pattern
    bias_hides: bool = False  # some entries of the bias are -inf
    relative_bias: str | None = None  # "H" or "1"
    causal: bool = False
    window: int | None = None
    sequences: tuple[tuple[int, int], ...] | None = None  # packed: (queries, keys) of each
    offsets: torch.dtype = torch.int32
    sink: bool = False
    wide_parameters: bool = True  # bias and parameters in the compute dtype, not in query's
    options: dict[str, Any] = field(default_factory=dict)  # of the op itself
    positive: bool = False  # query and key are above zero
    apart: bool = False  # no coordinate of a query equals one of a key
    seed: int = 0

    def but(self, **changes: Any) -> "Case":
        options = self.options | changes.pop("options", {})
        return replace(self, options=options, **changes)


_PACKED = ((3, 3), (0, 2), (4, 1), (2, 5), (5, 0))

# Named cases of every op with a query and a key.
LAYOUTS = {
    "plain": Case(),
    "transposed": Case(strides="transposed"),
    "expanded": Case(strides="expanded"),
    "grouped heads": Case(heads=6, kv_heads=2),
    "one key head of rank 3": Case(heads=3, kv_heads=1, layout="BND"),
    "merged batch and heads": Case(batch=4, heads=1, kv_heads=1, layout="merged"),
    "odd widths": Case(width=13, value_width=17, queries=33, keys=35),
    "wide": Case(width=256, value_width=256),
    "narrow": Case(width=1, value_width=1),
    "longer than a block": Case(batch=1, queries=70, keys=150, width=32, value_width=40),
}
# Of every op with a softmax.
SOFTMAX_LIKE = LAYOUTS | {
    "one key head of rank 3": LAYOUTS["one key head of rank 3"].but(bias="HMN"),
    "merged batch and heads": LAYOUTS["merged batch and heads"].but(mask="BN", bias="HMN"),
    "key mask and broadcast bias": Case(mask="BN", bias="11MN"),
    "mask of rank 4 and causal": Case(mask="B1MN", causal=True),
    "bias that hides": Case(bias="B1MN", bias_hides=True, wide_parameters=False),
    "bias of every row": Case(bias="BHM1"),
    "relative bias": Case(relative_bias="H"),
    "one relative bias for all heads": Case(relative_bias="1", causal=True),
    "causal": Case(queries=9, keys=9, causal=True),
    "causal with more queries than keys": Case(queries=9, keys=4, causal=True),
    "window": Case(queries=6, keys=20, causal=True, window=3),
    "packed": Case(batch=1, queries=15, keys=12, sequences=_PACKED),
    "packed, causal, window": Case(
        batch=1, queries=15, keys=12, sequences=_PACKED, causal=True, window=2
    ),
    "packed with relative bias": Case(
        batch=1, queries=9, keys=9, sequences=((4, 4), (3, 3)), relative_bias="H", causal=True
    ),
    "sink": Case(sink=True, causal=True, queries=9, keys=4),
    "everything": Case(
        heads=4,
        queries=6,
        keys=9,
        mask="B1MN",
        bias="1HMN",
        relative_bias="H",
        causal=True,
        window=5,
        sink=True,
    ),
}
SOFTMAX_LIKE_LONG = Case(
    heads=1, kv_heads=1, width=8, value_width=8, relative_bias="H", causal=True, sink=True
)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Maker:
    """Draws the tensors of a case, the same ones for every dtype and device."""

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device) -> None:
        self.case, self.dtype, self.device = case, dtype, device
        self.generator = torch.Generator().manual_seed(case.seed)

    def normal(
        self,
        *sizes: int,
        strides: str = "contiguous",
        positive: bool = False,
        grid: float | None = None,
    ) -> Tensor:
        """Normal numbers that float16 and bfloat16 both hold, laid out with these strides.

        positive: their absolute values, away from zero; grid: rounded to multiples of 1/16 and so
        much more.
        """
        same: dict[str, Any] = {"positive": positive, "grid": grid}
        if strides == "expanded":  # one row for all rows, as out.sum() gives its gradient
            return self.normal(*sizes[:-2], 1, sizes[-1], **same).expand(sizes)
        if strides == "transposed" and len(sizes) > 2:
            x = self.normal(*sizes[:-3], sizes[-2], sizes[-3], sizes[-1], **same)
            return x.transpose(-2, -3)
        x = torch.randn(sizes, generator=self.generator, dtype=torch.float64)
        x = x.abs() + 0.25 if positive else x
        x = x if grid is None else (x * 16).round() / 16 + grid
        x = x.to(torch.bfloat16).to(torch.float16)
        return x.to(device=self.device, dtype=self.dtype)

    def parameter(self, *sizes: int) -> Tensor:
        x = self.normal(*sizes)
        return x.to(compute_dtype(self.dtype)) if self.case.wide_parameters else x

    def chance(self, *sizes: int, p: float) -> Tensor:
        return (torch.rand(sizes, generator=self.generator) < p).to(self.device)


def sizes_of(case: Case, pattern: str) -> list[int]:
    batch, heads = (case.batch, case.heads)
    full = {"B": batch, "H": heads, "M": case.queries, "N": case.keys, "1": 1}
    return [full[letter] for letter in pattern]


def build(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[dict[str, Any], Maker]:
    """The shared arguments, and the maker for the op's own."""
    make = Maker(case, dtype, device)
    key_sizes: tuple[int, ...] = (case.batch, case.kv_heads, case.keys)
    query_sizes: tuple[int, ...] = (case.batch, case.heads, case.queries)
    if case.layout == "merged":
        assert case.heads == case.kv_heads == 1
        query_sizes, key_sizes = (case.batch, case.queries), (case.batch, case.keys)
    elif case.layout == "BND":
        assert case.kv_heads == 1
        key_sizes = (case.batch, case.keys)
    layout: dict[str, Any] = {"strides": case.strides, "positive": case.positive}
    query_grid, key_grid = (0.0, 1 / 32) if case.apart else (None, None)
    args: dict[str, Any] = {
        "query": make.normal(*query_sizes, case.width, **layout, grid=query_grid),
        "key": make.normal(*key_sizes, case.width, **layout, grid=key_grid),
        "value": make.normal(*key_sizes, case.value_width, strides=case.strides),
    }
    if case.mask is not None:
        args["mask"] = make.chance(*sizes_of(case, case.mask), p=0.7)
    if case.bias is not None:
        pattern = "BMN" if (case.bias, case.layout) == ("HMN", "merged") else case.bias
        bias = make.parameter(*sizes_of(case, pattern))
        if case.bias_hides:
            bias = bias.masked_fill(make.chance(*bias.shape, p=0.3), -torch.inf)
        args["bias"] = bias
    if case.relative_bias is not None:
        heads = case.heads if case.relative_bias == "H" else 1
        length = case.queries + case.keys - 1
        args["relative_bias"] = make.parameter(heads, max(length, 0))
    if case.sink:
        args["sink"] = make.parameter(case.heads)
    if case.causal:
        args["causal"] = True
    if case.window is not None:
        args["window"] = case.window
    if case.sequences is not None:
        for i, name in enumerate(("cu_seqlens_q", "cu_seqlens_k")):
            lengths = torch.tensor([0] + [pair[i] for pair in case.sequences])
            args[name] = lengths.cumsum(0).to(device=device, dtype=case.offsets)
    return args, make


def resized(case: Case, queries: int, keys: int, batch: int) -> Case:
    """The case at other sizes; packed into three sequences and a token more."""
    if case.relative_bias is not None and case.sequences is not None:
        keys = queries
    case = case.but(queries=queries, keys=keys, batch=batch)
    if case.sequences is None:
        return case
    sequences = ((3, 3), (2, 2), (queries - 6, keys - 6))
    return case.but(batch=1, sequences=sequences)


@st.composite
def packed(draw: st.DrawFn, case: Case, smallest: int) -> Case:
    """The same case with sequences packed into one batch, perhaps with tokens left over."""
    equal = case.relative_bias is not None
    pairs = []
    for _ in range(draw(st.integers(1, 4))):
        queries = draw(st.integers(0, 5))  # a sequence may be empty, all of them if smallest is 0
        pairs.append((queries, queries if equal else draw(st.integers(0, 5))))
    left_over = draw(st.integers(smallest, 2)), draw(st.integers(smallest, 2))
    queries, keys = (sum(pair[i] for pair in pairs) + left_over[i] for i in (0, 1))
    return case.but(
        batch=1,
        queries=queries,
        keys=queries if equal else keys,
        sequences=tuple(pairs),
        offsets=draw(st.sampled_from((torch.int32, torch.int64))),
    )


@st.composite
def cases(
    draw: st.DrawFn,
    options: st.SearchStrategy[dict[str, Any]] | None = None,
    smallest: int = 0,
    largest: int = 12,
) -> Case:
    """Legal calls. smallest, largest: of B, M and N; options: the op's own arguments."""
    own = draw(options) if options is not None else {}
    layout = draw(st.sampled_from(("BHMD", "BHMD", "BND", "merged")))
    kv_heads = 1 if layout != "BHMD" else draw(st.integers(1, 2))
    heads = 1 if layout == "merged" else kv_heads * draw(st.integers(1, 3))
    causal = draw(st.booleans())
    groups = own.get("groups", 1)
    case = Case(
        batch=draw(st.integers(smallest, 2)),
        heads=heads,
        kv_heads=kv_heads,
        queries=draw(st.integers(smallest, largest)),
        keys=draw(st.integers(smallest, largest)),
        width=groups * draw(st.integers(1, 5)),
        value_width=draw(st.integers(1, 9)),
        layout=layout,
        strides=draw(st.sampled_from(STRIDES)),
        mask=draw(st.sampled_from((None, None, "BN", *PATTERNS))),
        bias=draw(st.sampled_from((None, None, "HMN", *PATTERNS))),
        bias_hides=draw(st.booleans()),
        relative_bias=draw(st.sampled_from((None, None, "H", "1"))),
        causal=causal,
        window=draw(st.integers(1, largest)) if causal and draw(st.booleans()) else None,
        sink=draw(st.booleans()),
        wide_parameters=draw(st.booleans()),
        options=own,
        seed=draw(st.integers(0, 99)),
    )
    return draw(packed(case, smallest)) if draw(st.integers(0, 3)) == 0 else case
