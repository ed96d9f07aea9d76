"""What a benchmark is made of: a setting, contenders, and an entry that names them for one op.

Letters: B batch, H query heads, Hk key/value heads, N queries and keys, D width of queries and
keys, E width of values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Tensor]  # runs one forward pass
WORDS: dict[object, str] = {True: "yes", False: "no"}


@dataclass(frozen=True)
class Setting:
    """One row of the table. The last four are None where the op has no such argument."""

    device: str
    dtype: torch.dtype
    batch: int
    heads: int
    kv_heads: int
    length: int
    width: int
    value_width: int
    causal: bool = False
    mask_prob: float = 0.0
    threads: int = 1
    normalize: bool | None = None
    feature_map: str | None = None
    decay: bool | None = None
    edges: int | None = None  # of each query

    def pairs(self) -> int:
        """Visible pairs of query and key, a random mask not counted."""
        n = self.length
        per_head = n * (n + 1) // 2 if self.causal else n * n
        return self.batch * self.heads * per_head

    def words(self) -> dict[str, object]:
        """The columns that tell rows apart."""
        options: dict[str, object] = {
            "normalized": self.normalize,
            "features": self.feature_map,
            "decay": self.decay,
            "edges": self.edges,
        }
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "B": self.batch,
            "H": self.heads if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}",
            "N": self.length,
            "D": self.width,
            "E": self.value_width,
            "causal": WORDS[self.causal],
            **{k: WORDS.get(v, v) for k, v in options.items() if v is not None},
            "hidden": self.mask_prob,
            "threads": self.threads if self.device == "cpu" else "-",
        }


@dataclass(frozen=True)
class Inputs:
    """The tensors of a setting; those that require grad are what the backward pass is timed for."""

    query: Tensor  # [B, H, N, D]
    key: Tensor  # [B, Hk, N, D]
    value: Tensor  # [B, Hk, N, E]
    mask: Tensor | None  # [B, N], True = may attend
    grad_out: Tensor  # [B, H, N, E]
    decay: Tensor | None = None  # [H], float32
    edges: Tensor | None = None  # [L, 2], rows (query, key)

    def leaves(self) -> tuple[Tensor, ...]:
        """What the backward pass gives gradients of."""
        return self.query, self.key, self.value

    def head(self, batch: int, head: int, group: int) -> Inputs:
        """One key/value head of one batch and its `group` query heads, as float64 leaves."""
        rows, keys = slice(batch, batch + 1), slice(head, head + 1)
        queries = slice(head * group, (head + 1) * group)

        def part(x: Tensor, heads: slice) -> Tensor:
            return x.detach()[rows, heads].double().requires_grad_()

        return replace(
            self,
            query=part(self.query, queries),
            key=part(self.key, keys),
            value=part(self.value, keys),
            mask=None if self.mask is None else self.mask[rows],
            grad_out=self.grad_out[rows, queries].double(),
            decay=None if self.decay is None else self.decay[queries].double(),
        )

    def tokens_first(self) -> Inputs:
        """The same tensors with `[B, N, H, D]` in memory, as leaves of their own."""

        def moved(x: Tensor) -> Tensor:
            return x.detach().transpose(1, 2).contiguous().transpose(1, 2)

        query, key, value = (moved(x).requires_grad_() for x in self.leaves())
        return replace(self, query=query, key=key, value=value, grad_out=moved(self.grad_out))


def draw(setting: Setting, seed: int = 0) -> Inputs:
    """Random normal inputs, the same for every contender.

    Queries and keys of a normalised op are positive, as such an op needs: the sum of weights that
    it divides by is far from zero.
    """
    generator = torch.Generator(setting.device).manual_seed(seed)
    device, b, n = setting.device, setting.batch, setting.length

    def normal(heads: int, width: int) -> Tensor:
        return torch.randn(b, heads, n, width, device=device, generator=generator)

    query = normal(setting.heads, setting.width)
    key = normal(setting.kv_heads, setting.width)
    value = normal(setting.kv_heads, setting.value_width)
    grad_out = normal(setting.heads, setting.value_width).to(setting.dtype)
    if setting.normalize:
        query, key = query.abs_(), key.abs_()
    mask = decay = None
    if setting.mask_prob:
        mask = torch.rand(b, n, device=device, generator=generator) >= setting.mask_prob
        mask[:, 0] = True  # with no row that sees nothing: peers differ on those
    if setting.decay:
        decay = 1 - 2.0 ** torch.linspace(-5, -9, setting.heads, device=device)  # as RetNet has it
    query, key, value = (x.to(setting.dtype).requires_grad_() for x in (query, key, value))
    return Inputs(query, key, value, mask, grad_out, decay)


@dataclass(frozen=True)
class Contender:
    """One way to compute the op.

    `prepare(inputs, setting)` returns the call to time, or the reason why it cannot run.
    """

    name: str
    prepare: Callable[[Inputs, Setting], Call | str]
    devices: tuple[str, ...] = ("cpu", "cuda")
    by_default: bool = True
    with_norm: bool = True  # False: computes less than the op does, shown as a floor
    compiled: bool = False  # its first call compiles, and says nothing about speed
    tokens_first: bool = False  # reads and writes [B, N, H, D] in memory


@dataclass(frozen=True)
class Bar:
    """What must hold in every setting that `where` accepts."""

    text: str
    which: str  # forward, backward or forward+backward
    least: float
    where: Callable[[Setting], bool]
    of_rate: bool = False  # least is in the entry's unit, not a ratio of the best peer to ours


@dataclass(frozen=True)
class Entry:
    """Everything the runner knows of an op."""

    ours: Contender
    peers: tuple[Contender, ...]  # the ratio is the fastest one with the norm / ours
    reference: Callable[[Inputs, Setting, bool], Tensor]  # last argument: with the norm or without
    work: Callable[[Setting], dict[str, float]]  # by forward, backward, forward+backward
    unit: tuple[str, float]  # work per second is shown in it: its name, and how much it is
    bars: tuple[Bar, ...] = ()
    draw: Callable[[Setting], Inputs] = draw
    # Defaults of those of the last four arguments of Setting that the op has.
    takes: Mapping[str, Any] = field(default_factory=dict)
    # What `make bench-cpu` and `make bench-gpu` run: other defaults of arguments, in parts.
    presets: Mapping[str, tuple[Mapping[str, Any], ...]] = field(default_factory=dict)

    def contenders(self, device: str, everyone: bool) -> list[Contender]:
        """Who runs on a device; `everyone` adds those that are left out by default."""
        return [
            one
            for one in (self.ours, *self.peers)
            if device in one.devices and (everyone or one.by_default)
        ]

    def rate(self, setting: Setting, which: str, seconds: float) -> float:
        """Work per second, in the unit."""
        return self.work(setting)[which] / seconds / self.unit[1]
