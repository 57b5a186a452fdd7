"""Training that can be stopped and gone on with."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from examples.recall.model import RecallModel
from examples.recall.presets import Preset, TaskPreset
from examples.recall.tasks import Task, training_batch
from examples.stdlib_lm.train import make_optimiser, schedule

FLUSH = 20
"""Steps between two looks at the losses: each waits for the device."""

SAVE = 200
"""Steps between two checkpoints."""


class StudyError(RuntimeError):
    """A training that cannot go on."""


class OutOfTimeError(RuntimeError):
    """The time budget is spent."""


class Deadline:
    """Says when the time budget is spent. ``None`` seconds never are."""

    def __init__(self, seconds: float | None = None) -> None:
        self._end = math.inf if seconds is None else time.monotonic() + seconds

    def check(self) -> None:
        """Raises :class:`OutOfTimeError` if so."""
        if time.monotonic() >= self._end:
            raise OutOfTimeError


@dataclass(frozen=True)
class Training:
    """Result of a training.

    Attributes:
        losses: of every step, nats a token of an answer.
        seconds: of all steps, over all sittings.
        tokens: that were read.
    """

    losses: list[float]
    seconds: float
    tokens: int


def autocast(bf16: bool, device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()


def save(value: Any, path: Path) -> None:
    """Writes ``path`` as a whole or not at all."""
    partial = path.with_suffix(".partial")
    torch.save(value, partial)
    partial.replace(path)


def train(
    model: RecallModel,
    task: Task,
    preset: Preset,
    sizes: TaskPreset,
    seed: int,
    device: torch.device,
    checkpoint: Path,
    deadline: Deadline,
    on_step: Callable[[int, float], None],
) -> Training:
    """Trains ``model`` in place, from ``checkpoint`` on if there is one, and leaves it there when finished or stopped.

    The batches depend on ``seed`` and ``sizes`` alone. ``on_step`` is called with the number of a step, from 1, and its
    loss in nats, some steps late.

    Raises:
        OutOfTimeError: the budget is spent; the checkpoint holds every finished step.
        StudyError: a loss is not finite.
    """
    optimiser = make_optimiser(model, sizes.learning_rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, schedule(sizes.steps, sizes.warmup))
    losses: list[float] = []
    seconds, tokens = 0.0, 0
    if checkpoint.exists():
        stored = torch.load(checkpoint, map_location="cpu", weights_only=True)  # loading moves what belongs elsewhere
        model.load_state_dict(stored["model"])
        optimiser.load_state_dict(stored["optimiser"])
        scheduler.load_state_dict(stored["scheduler"])
        losses, seconds, tokens = stored["losses"], stored["seconds"], stored["tokens"]

    waiting: list[torch.Tensor] = []
    start = time.perf_counter()

    def flush() -> None:
        for loss in torch.stack(waiting).tolist() if waiting else ():
            losses.append(loss)
            on_step(len(losses), loss)
            if not math.isfinite(loss):
                raise StudyError(f"step {len(losses)}: expected a finite loss, got {loss}")
        waiting.clear()

    def keep() -> None:
        flush()
        save(
            {
                "model": model.state_dict(),
                "optimiser": optimiser.state_dict(),
                "scheduler": scheduler.state_dict(),
                "losses": losses,
                "seconds": seconds + time.perf_counter() - start,
                "tokens": tokens,
            },
            checkpoint,
        )

    try:
        for step in range(len(losses), sizes.steps):
            deadline.check()
            batch = training_batch(task, sizes, seed, step, device)
            with autocast(preset.bf16, device):
                logits = model(batch.tokens, batch.positions)
            loss = F.cross_entropy(logits.flatten(0, 2).float(), batch.answers.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            scheduler.step()
            waiting.append(loss.detach())
            tokens += batch.tokens.numel()
            if (step + 1) % FLUSH == 0:
                flush()
            if (step + 1) % SAVE == 0:
                keep()
    except (OutOfTimeError, KeyboardInterrupt):
        keep()
        raise
    keep()
    return Training(losses, seconds + time.perf_counter() - start, tokens)
