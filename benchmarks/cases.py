"""What a benchmark is made of: a setting, contenders, and an entry that names them for one op.

Letters: B batch, H query heads, Hk key/value heads, N queries and keys, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Call = Callable[[], Tensor]  # runs one forward pass


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    device: str
    dtype: torch.dtype
    batch: int
    heads: int
    kv_heads: int
    length: int
    width: int
    causal: bool = False
    mask_prob: float = 0.0
    threads: int = 1

    def pairs(self) -> int:
        """Visible pairs of query and key, a random mask not counted."""
        n = self.length
        per_head = n * (n + 1) // 2 if self.causal else n * n
        return self.batch * self.heads * per_head

    def words(self) -> dict[str, object]:
        """The columns that tell rows apart."""
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "B": self.batch,
            "H": self.heads if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}",
            "N": self.length,
            "D": self.width,
            "causal": "yes" if self.causal else "no",
            "hidden": self.mask_prob,
            "threads": self.threads if self.device == "cpu" else "-",
        }


@dataclass(frozen=True)
class Inputs:
    """The tensors of a setting; those that require grad are what the backward pass is timed for."""

    query: Tensor  # [B, H, N, D]
    key: Tensor  # [B, Hk, N, D]
    value: Tensor  # [B, Hk, N, D]
    mask: Tensor | None  # [B, N], True = may attend
    grad_out: Tensor  # [B, H, N, D]

    def leaves(self) -> tuple[Tensor, ...]:
        """What the backward pass gives gradients of."""
        return self.query, self.key, self.value

    def heads(self, first: int, count: int, group: int) -> Inputs:
        """`count` key/value heads from `first` on and their query heads, as float64 leaves."""

        def part(x: Tensor, start: int, length: int) -> Tensor:
            return x.detach()[:, start : start + length].double().requires_grad_()

        return Inputs(
            part(self.query, first * group, count * group),
            part(self.key, first, count),
            part(self.value, first, count),
            self.mask,
            self.grad_out[:, first * group : (first + count) * group].double(),
        )


def draw(setting: Setting, seed: int = 0) -> Inputs:
    """Random normal inputs, the same for every contender."""
    generator = torch.Generator(setting.device).manual_seed(seed)
    device, b, n, d = setting.device, setting.batch, setting.length, setting.width

    def normal(heads: int) -> Tensor:
        x = torch.randn(b, heads, n, d, device=device, generator=generator)
        return x.to(setting.dtype).requires_grad_()

    mask = None
    if setting.mask_prob:
        mask = torch.rand(b, n, device=device, generator=generator) >= setting.mask_prob
        mask[:, 0] = True  # with no row that sees nothing: peers differ on those
    query, key, value = normal(setting.heads), normal(setting.kv_heads), normal(setting.kv_heads)
    return Inputs(query, key, value, mask, normal(setting.heads).detach())


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


@dataclass(frozen=True)
class Bar:
    """A ratio that must hold in every setting that `where` accepts."""

    text: str
    which: str  # forward, backward or forward+backward
    ratio: float
    where: Callable[[Setting], bool]


@dataclass(frozen=True)
class Entry:
    """Everything the runner knows of an op."""

    ours: Contender
    peers: tuple[Contender, ...]  # the ratio is the fastest one with the norm / ours
    reference: Callable[[Inputs, Setting, bool], Tensor]  # last argument: with the norm or without
    flops: Callable[[Setting], dict[str, float]]  # by forward, backward, forward+backward
    bars: tuple[Bar, ...] = ()

    def contenders(self, device: str, everyone: bool) -> list[Contender]:
        """Who runs on a device; `everyone` adds those that are left out by default."""
        return [
            one
            for one in (self.ours, *self.peers)
            if device in one.devices and (everyone or one.by_default)
        ]
