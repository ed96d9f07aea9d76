"""The training loop's state: one step, validation, checkpoints that continue exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpt.data import Corpus, batch, windows
from gpt.model import GPT, GPTConfig

BITS_PER_NAT = 1 / math.log(2)


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000
    seq_len: int = 256
    batch_size: int = 4
    accumulate: int = 1  # batches per step
    learning_rate: float = 4e-3
    weight_decay: float = 0.1
    clip: float = 1.0
    float32: bool = False  # on CUDA; without it bfloat16 autocast
    valid_bytes: int = 32768
    seed: int = 0


@dataclass
class History:
    """Bits per byte after so many steps."""

    train: list[tuple[int, float]] = field(default_factory=list)
    valid: list[tuple[int, float]] = field(default_factory=list)


class Trainer:
    """Everything that a checkpoint holds, and what moves it forward.

    The losses of steps stay on the device until :meth:`read_losses`: a step waits for nothing.
    """

    def __init__(
        self,
        model_config: GPTConfig,
        config: TrainConfig,
        corpus: Corpus,
        device: torch.device,
        backend: str = "inductor",
    ) -> None:
        torch.manual_seed(config.seed)
        self.model_config, self.config, self.device = model_config, config, device
        self.model = GPT(model_config).to(device)
        self.loss: Callable[[Tensor], Tensor] = torch.compile(
            self.model.loss, fullgraph=True, backend=backend
        )
        self.optimizer = _optimizer(self.model, config)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.train_data = corpus.train.to(device)
        self.valid_windows = windows(
            corpus.valid, max(1, config.valid_bytes // config.seq_len), config.seq_len
        )
        self.steps, self.step = config.steps, 0
        self.history = History()
        self._unread: list[Tensor] = []

    def advance(self) -> None:
        """One step of the optimiser, over ``accumulate`` batches."""
        config = self.config
        rate = config.learning_rate * schedule(self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        mean = torch.zeros((), device=self.device)
        for _ in range(config.accumulate):
            tokens = batch(self.train_data, config.batch_size, config.seq_len, self.generator)
            with self.autocast():
                loss = self.loss(tokens) / config.accumulate
            loss.backward()
            mean += loss.detach()
        nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self._unread.append(mean)

    def read_losses(self) -> float:
        """Moves the losses of the steps since the last call into the history; the latest one."""
        if self._unread:
            bits = (torch.stack(self._unread) * BITS_PER_NAT).tolist()
            first = self.step - len(bits) + 1
            self.history.train += [(first + i, value) for i, value in enumerate(bits)]
            self._unread.clear()
        return self.history.train[-1][1]

    @torch.no_grad()
    def validate(self) -> float:
        """Bits per byte of ``valid_windows``, noted in the history."""
        total = torch.zeros((), device=self.device)
        parts = self.valid_windows.split(max(1, 8192 // self.config.seq_len))
        for tokens in parts:
            with self.autocast():
                total += self.model.loss(tokens.to(self.device)) * len(tokens)
        bits = total.item() / len(self.valid_windows) * BITS_PER_NAT
        self.history.valid.append((self.step, bits))
        return bits

    def autocast(self) -> torch.autocast:
        amp = self.device.type == "cuda" and not self.config.float32
        return torch.autocast(self.device.type, torch.bfloat16, enabled=amp)

    def save(self, path: Path) -> None:
        """Writes a checkpoint; an interrupted write leaves the one before."""
        self.read_losses()
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "steps": self.steps,
            "history": asdict(self.history),
            "batches": self.generator.get_state(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
            "config": _comparable(self.model_config, self.config),
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        part.replace(path)

    def load(self, path: Path, steps: int | None = None) -> None:
        """Continues from a checkpoint, to its number of steps or to ``steps``."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        wanted = _comparable(self.model_config, self.config)
        for name, value in state["config"].items():
            if wanted[name] != value:
                raise ValueError(f"{path}: was trained with {name}={value}, not {wanted[name]}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.steps = state["step"], steps or state["steps"]
        self.history = History(**state["history"])
        self.generator.set_state(state["batches"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] and self.device.type == "cuda":
            torch.cuda.set_rng_state_all(state["cuda_rng"])


def schedule(step: int, steps: int) -> float:
    """Factor on the learning rate: up over the first 5 %, then down in a line to a twentieth."""
    warmup = max(1, steps // 20)
    return min((step + 1) / warmup, 1 - 0.95 * step / max(steps, 1))


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    ids = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in ids]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)


def _comparable(model_config: GPTConfig, config: TrainConfig) -> dict[str, Any]:
    """What has to agree for a run to continue as it would have: all but the number of steps."""
    named = {**asdict(model_config), **asdict(config)}
    del named["steps"]
    return named
