"""Bytes to train on, bytes to validate on, and what a bigram model makes of them."""

from __future__ import annotations

import gzip
import hashlib
import platform
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

TEXT_SUFFIXES = {"", ".c", ".cpp", ".cu", ".h", ".html", ".json", ".md", ".py", ".rst", ".txt"}
# Tests are half of the library's bytes and not installed everywhere; the packages are not its own.
NOT_THE_LIBRARY = {"__pycache__", "dist-packages", "idlelib", "site-packages", "test", "tests"}


@dataclass(frozen=True)
class Corpus:
    name: str
    train: Tensor  # uint8 [bytes]
    valid: Tensor  # uint8 [bytes]


def load_corpus(path: Path | None, valid_fraction: float = 0.05) -> Corpus:
    """enwik8 (or enwik8.gz), a file or a folder of text; the Python standard library for None.

    enwik8 is split 90M / 5M (/ 5M for testing, not read here). Of another file the end is held
    out, of a folder whole top-level entries, so that no package has files on both sides.
    """
    if path is None:
        library = Path(sysconfig.get_path("stdlib"))
        corpus = _folder(library, {".py"}, NOT_THE_LIBRARY, valid_fraction)
        return replace(corpus, name=f"the standard library of Python {platform.python_version()}")
    if path.is_dir():
        return _folder(path, TEXT_SUFFIXES, {"__pycache__", ".git"}, valid_fraction)
    data = gzip.open(path).read() if path.suffix == ".gz" else path.read_bytes()
    if path.name in ("enwik8", "enwik8.gz") and len(data) == 100_000_000:
        return Corpus("enwik8", _tensor(data[:90_000_000]), _tensor(data[90_000_000:95_000_000]))
    return _cut(path.name, data, valid_fraction)


def batch(data: Tensor, size: int, seq_len: int, generator: torch.Generator) -> Tensor:
    """``size`` random stretches of ``seq_len + 1`` bytes, int64 ``[size, seq_len + 1]``.

    The generator lives on the CPU, so that a seed gives the same batches on every device.
    """
    starts = torch.randint(len(data) - seq_len, (size, 1), generator=generator)
    starts = starts.to(data.device, non_blocking=True)
    return data[starts + torch.arange(seq_len + 1, device=data.device)].long()


def windows(data: Tensor, count: int, seq_len: int) -> Tensor:
    """At most ``count`` stretches that do not overlap in what is predicted, spread evenly.

    int64 ``[windows, seq_len + 1]``: always the same bytes, so that numbers can be compared.
    """
    room = (len(data) - 1) // seq_len
    if room < 1:
        raise ValueError(f"{len(data)} bytes to validate on are not one stretch of {seq_len + 1}")
    count = min(count, room)
    starts = torch.arange(count) * room // count * seq_len
    return data[starts[:, None] + torch.arange(seq_len + 1)].long()


def bigram_bits_per_byte(train: Tensor, windows: Tensor) -> float:
    """Bits per byte of ``windows[:, 1:]`` under p(byte | byte before), counted on ``train``.

    Unseen pairs back off to the frequency of the byte (itself counted with add-one): stronger
    than add-one on the pairs, hence the harder mark to beat.
    """
    pairs = torch.zeros(65536, dtype=torch.int64)
    for part in _overlapping(train):
        pairs += torch.bincount(part[:-1].long() * 256 + part[1:].long(), minlength=65536)
    table = pairs.view(256, 256).double()
    single = (table.sum(0) + 1) / (table.sum() + 256)
    backoff = 1.0  # as many pseudo-pairs after each byte, spread like the single bytes
    probability = (table + backoff * single) / (table.sum(1, keepdim=True) + backoff)
    return -probability.log2()[windows[:, :-1], windows[:, 1:]].mean().item()


def _overlapping(data: Tensor, size: int = 1 << 22) -> Iterator[Tensor]:
    """Parts that share one byte: every pair of neighbours is in exactly one of them."""
    for start in range(0, len(data) - 1, size):
        yield data[start : start + size + 1]


def _folder(root: Path, suffixes: set[str], skip: set[str], valid_fraction: float) -> Corpus:
    entries: dict[str, list[bytes]] = defaultdict(list)
    for file in sorted(root.rglob("*")):
        relative = file.relative_to(root)
        if file.suffix in suffixes and not skip.intersection(relative.parts) and file.is_file():
            entries[relative.parts[0]].append(file.read_bytes())
    texts = {name: b"\n".join(files) for name, files in entries.items()}
    room = valid_fraction * sum(map(len, texts.values()))
    held_out: list[str] = []
    # The hash shuffles: the same entries on every machine, whatever the order of the folder.
    for name in sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if len(texts[name]) <= room:
            held_out.append(name)
            room -= len(texts[name])
    if not held_out:  # one entry that is larger than the whole validation part
        return _cut(root.name, b"\n".join(texts.values()), valid_fraction)
    train = b"\n".join(text for name, text in texts.items() if name not in held_out)
    valid = b"\n".join(texts[name] for name in held_out)
    return Corpus(root.name, _tensor(train), _tensor(valid))


def _cut(name: str, data: bytes, valid_fraction: float) -> Corpus:
    valid = int(len(data) * valid_fraction)
    if valid < 256:
        raise ValueError(f"{name}: {len(data)} bytes of text are too few to train on")
    return Corpus(name, _tensor(data[:-valid]), _tensor(data[-valid:]))


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
