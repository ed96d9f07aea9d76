"""A row of benchmarks.gpu_table as tensors, its contenders, and its last queries in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import attn_ops
from benchmarks import cosine_sim
from benchmarks.cases import Call, Inputs, Setting
from benchmarks.cosine_sim import CUDNN, SCALE
from benchmarks.gpu_rows import COMPILED, EAGER, FLEX, FLEX_BIAS, NO_NORM, SDPA, Row

LAST = 32  # queries that are compared with the formula
PEERS: dict[str, Callable[[Inputs, Setting], Call | str]] = {
    NO_NORM: partial(cosine_sim.NO_NORM, backend=CUDNN),
    EAGER: partial(cosine_sim.NORM, backend=CUDNN),
    COMPILED: partial(cosine_sim.NORM, backend=CUDNN, compiled=True),
    SDPA: cosine_sim.NORM,
    FLEX: cosine_sim.flex,
}


@dataclass
class Problem:
    """The tensors of a row; `names` are those of `leaves`, which get gradients."""

    row: Row
    names: list[str]
    leaves: tuple[Tensor, ...]
    mask: Tensor | None  # [B, N], True = may attend
    offsets: Tensor | None  # [sequences + 1] int32, of packed sequences
    grad_out: Tensor

    def part(self, x: Tensor) -> Tensor:
        """The last queries of the first head of the last batch, x [B, H, M, E]."""
        return x[-1, 0, -LAST:]

    def parts_of_gradients(self, grads: tuple[Tensor, ...]) -> list[Tensor]:
        """What `exact` gives, of gradients whose grad_out is zero but in `part`."""
        query, key, value, *rest = grads
        return [self.part(query), key[-1, 0], value[-1, 0], *(x[0] for x in rest)]

    def of(self, name: str) -> Tensor | None:
        """A leaf that only some rows have."""
        return self.leaves[self.names.index(name)] if name in self.names else None


def lengths(row: Row) -> Tensor:
    """Of the packed sequences of a row, [sequences]; all tokens together, 16 each at the least."""
    total, count = row.shape[2], row.sequences
    if row.extra == "equal":
        return torch.full((count,), total // count)
    shares = torch.rand(count, generator=torch.Generator().manual_seed(0))
    sizes = 16 + (shares / shares.sum() * (total - 16 * count)).long()
    sizes[-1] += total - sizes.sum()
    return sizes


def draw(row: Row, device: str) -> Problem:
    """Normal numbers, the same for every contender."""
    generator = torch.Generator(device).manual_seed(0)
    batch, kv_heads, num_keys, width = row.shape
    heads, num_queries = kv_heads * row.group, row.queries or num_keys
    dtype = getattr(torch, row.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype, generator=generator)

    of_keys = (batch, kv_heads, num_keys, width)
    tensors = {
        "query": normal(batch, heads, num_queries, width),
        "key": normal(*of_keys),
        "value": normal(*of_keys),
    }
    if row.extra == "bias":
        tensors["bias"] = normal(heads, num_queries, num_keys)
    if row.extra == "relative_bias":
        tensors["relative_bias"] = normal(heads, num_queries + num_keys - 1)
    mask = offsets = None
    if row.extra == "mask":
        mask = torch.rand(batch, num_keys, device=device, generator=generator) >= 0.25
        mask[:, 0] = True  # with no query that sees nothing
    if row.extra in ("equal", "random"):
        offsets = F.pad(lengths(row).cumsum(0), (1, 0)).to(device, torch.int32)
    leaves = tuple(x.requires_grad_() for x in tensors.values())
    grad_out = normal(batch, heads, num_queries, width)
    return Problem(row, list(tensors), leaves, mask, offsets, grad_out)


def contender(problem: Problem, peer: str | None) -> Call:
    """What is timed: a forward of a peer, or of this library."""
    row, (query, key, value, *_) = problem.row, problem.leaves
    if peer is None:
        return lambda: attn_ops.cosine_sim_attention(
            query, key, value, problem.mask, problem.of("bias"), causal=row.causal, scale=SCALE,
            relative_bias=problem.of("relative_bias"), window=row.window,
            cu_seqlens_q=problem.offsets, cu_seqlens_k=problem.offsets,
        )  # fmt: skip
    if peer == FLEX_BIAS:
        return flex_with_bias(problem)
    batch, kv_heads, length, width = row.shape
    heads, dtype = kv_heads * row.group, query.dtype
    setting = Setting(
        query.device.type, dtype, batch, heads, kv_heads, length, width, width, row.causal
    )
    call = PEERS[peer](Inputs(query, key, value, None, problem.grad_out), setting)
    assert not isinstance(call, str), call
    return call


def flex_with_bias(problem: Problem) -> Call:
    """FlexAttention, compiled, with the bias as a tensor that its score function reads."""
    from torch.nn.attention.flex_attention import flex_attention

    @torch.compile(fullgraph=True)
    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        def add(score: Tensor, b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
            return score + bias[h, m, n]

        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        out = flex_attention(q, k, v, score_mod=add, scale=SCALE)
        assert isinstance(out, Tensor)
        return out

    return lambda: run(*problem.leaves)


def visible(problem: Problem, queries: Tensor, keys: Tensor) -> Tensor:
    """Which keys [N] these queries [LAST, 1] of the last batch see."""
    row = problem.row
    ahead = keys.numel() - problem.leaves[0].shape[2]
    seen = torch.ones(queries.numel(), keys.numel(), dtype=torch.bool, device=keys.device)
    if row.causal:
        seen &= keys <= queries + ahead
    if row.window is not None:
        seen &= keys > queries + ahead - row.window
    if problem.mask is not None:
        seen &= problem.mask[-1]
    if problem.offsets is not None:
        sequence = [torch.bucketize(x, problem.offsets, right=True) for x in (queries, keys)]
        seen &= sequence[0] == sequence[1]
    return seen


def exact(problem: Problem, with_norm: bool) -> list[Tensor]:
    """`part` of the result and the gradients it gives, by the formula in float64."""
    query, key, value, *rest = problem.leaves
    num_queries, num_keys = query.shape[2], key.shape[2]
    parts = [problem.part(query), key[-1, 0], value[-1, 0], *(x[0] for x in rest)]
    leaves = [x.detach().double().requires_grad_() for x in parts]
    q, k, v, *rest = leaves
    scale = SCALE if with_norm else q.shape[1] ** -0.5
    if with_norm:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    queries = torch.arange(num_queries, device=q.device)[-LAST:, None]
    keys = torch.arange(num_keys, device=q.device)
    score = scale * q @ k.mT
    if problem.of("bias") is not None:
        score = score + rest[0][-LAST:]
    if problem.of("relative_bias") is not None:
        score = score + rest[0][keys - queries + num_queries - 1]
    score = score.masked_fill(~visible(problem, queries, keys), -torch.inf)
    out = score.softmax(-1) @ v
    grads = torch.autograd.grad(out, leaves, problem.part(problem.grad_out).double())
    return [out.detach(), *grads]
