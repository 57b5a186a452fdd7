"""The corpus: the sources of the standard library that runs this program, split by whole files."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 256

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
"""Directories left out: installed packages, tests, and two that are generated: character tables (near-duplicates of
each other, which would leak into the held-out files) and the text of the language reference."""

HELD_OUT_EVERY = 10
"""One file in so many is held out."""

SEPARATOR = b"\n\x00"
"""Stands after every file."""


@dataclass(frozen=True)
class Corpus:
    """Bytes of the training and of the held-out files, each file followed by ``SEPARATOR``.

    Attributes:
        train: [bytes], uint8.
        held_out: [bytes], uint8.
        train_files: number of files in ``train``.
        held_out_files: names of those in ``held_out``, relative to the library's root, in order.
        held_out_starts: where each of them starts in ``held_out``.
    """

    train: Tensor
    held_out: Tensor
    train_files: int
    held_out_files: list[str]
    held_out_starts: list[int]


def is_held_out(name: str) -> bool:
    """Whether the file is held out: a function of its name (with ``/`` between parts) alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % HELD_OUT_EVERY == 0


def load_corpus(root: Path | None = None) -> Corpus:
    """Reads every ``*.py`` below ``root``, by default the standard library's directory.

    Raises:
        FileNotFoundError: there are no sources for one of the two halves.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    train, held_out = bytearray(), bytearray()
    train_files, held_out_files, held_out_starts = 0, [], []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED.intersection(relative.parts[:-1]) or relative.name.startswith("_sysconfigdata"):
            continue
        content = path.read_bytes()
        if not content:
            continue
        name = relative.as_posix()
        if is_held_out(name):
            held_out_files.append(name)
            held_out_starts.append(len(held_out))
            held_out += content + SEPARATOR
        else:
            train_files += 1
            train += content + SEPARATOR
    if not train_files or not held_out_files:
        raise FileNotFoundError(f"expected Python sources for training and for evaluation below {root}, found none")
    return Corpus(
        torch.frombuffer(train, dtype=torch.uint8),
        torch.frombuffer(held_out, dtype=torch.uint8),
        train_files,
        held_out_files,
        held_out_starts,
    )


def windows(data: Tensor, starts: Tensor, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets, int64 [len(starts), length]: the targets are the inputs one byte later."""
    index = starts[:, None] + torch.arange(length + 1)
    tokens = data[index].to(device, torch.int64)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class Batches:
    """Random training windows. The same seed gives the same sequence of batches."""

    def __init__(self, data: Tensor, length: int, batch_size: int, seed: int, device: torch.device) -> None:
        if data.numel() <= length:
            raise ValueError(f"expected more than {length} bytes of training data, got {data.numel()}")
        self.data = data
        self.length = length
        self.batch_size = batch_size
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)

    def next(self, length: int | None = None) -> tuple[Tensor, Tensor]:
        """Inputs and targets [batch_size, length]."""
        length = self.length if length is None else length
        starts = torch.randint(self.data.numel() - length, (self.batch_size,), generator=self.generator)
        return windows(self.data, starts, length, self.device)


def held_out_windows(corpus: Corpus, length: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``count`` windows spread evenly over the held-out bytes."""
    last = corpus.held_out.numel() - length - 1
    if last < 0:
        raise ValueError(f"expected more than {length} held-out bytes, got {corpus.held_out.numel()}")
    starts = torch.linspace(0, last, count, dtype=torch.float64).long()
    return windows(corpus.held_out, starts, length, device)


def held_out_prompt(corpus: Corpus, length: int) -> tuple[str, Tensor]:
    """The name and the first ``length`` bytes, int64 [1, length], of the first held-out file that is long enough."""
    ends = [*corpus.held_out_starts[1:], corpus.held_out.numel()]
    for name, start, end in zip(corpus.held_out_files, corpus.held_out_starts, ends, strict=True):
        if end - start - len(SEPARATOR) >= length:
            return name, corpus.held_out[start : start + length].to(torch.int64)[None]
    raise ValueError(f"expected a held-out file of at least {length} bytes, found none")
