"""The compiled training loop, and the measurement of what the compiler did."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from examples.stdlib_lm.data import Batches, Corpus
from examples.stdlib_lm.model import ByteLM, next_byte_loss
from examples.stdlib_lm.presets import Preset

Loss = Callable[[ByteLM, Tensor, Tensor], Tensor]


class DemoError(RuntimeError):
    """An expectation that the run did not meet."""


@dataclass(frozen=True)
class Compilation:
    """What the compiler did with one model.

    Attributes:
        graph_breaks: of one trace of the loss.
        training_graphs: graphs that Dynamo compiled during the training.
        lengths: sequence lengths tried afterwards, forward and backward.
        recompiles: graphs compiled for them.
    """

    graph_breaks: int
    training_graphs: int
    lengths: list[int]
    recompiles: int


@dataclass(frozen=True)
class Training:
    """Result of one training.

    Attributes:
        losses: training loss of every step, nats a byte.
        first_step_seconds: duration of the first step, which compiles forward and backward.
        tokens_per_second: of all later steps together.
        compilation: see :class:`Compilation`.
    """

    losses: list[float]
    first_step_seconds: float
    tokens_per_second: float
    compilation: Compilation


def autocast(preset: Preset, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The precision in which ``preset`` trains and is evaluated."""
    if preset.autocast is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, preset.autocast)


def make_optimiser(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW that decays matrices only: not the gates' parameters, norms and biases."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))


def schedule(steps: int, warmup: int) -> Callable[[int], float]:
    """Factor of the learning rate at a step: linear warm-up, then a cosine down to a tenth."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, steps - warmup)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))

    return factor


def _any_length(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Tells the compiler that the second dimension of ``batch`` varies; it fails where the model would fix it."""
    for tensor in batch:
        torch._dynamo.mark_dynamic(tensor, 1)
    return batch


def _graphs() -> int:
    """Graphs that Dynamo has compiled since its counters were cleared."""
    return int(counters["stats"]["unique_graphs"])


def _try_lengths(loss: Loss, model: ByteLM, batches: Batches, preset: Preset) -> tuple[list[int], int]:
    """Runs forward and backward at three new sequence lengths; returns them and how many graphs that compiled.

    They are shorter than the trained one. On the CPU, Inductor sums more than 4096 numbers by another kernel than
    fewer: a graph compiled for a small batch is compiled again for one that exceeds this, whatever the model.
    """
    T = preset.sequence_length
    lengths = [T // 3, T // 2 + 1, T - T // 8]
    before = _graphs()
    for length in lengths:
        inputs, targets = _any_length(batches.next(length))
        with autocast(preset, batches.device):
            value = loss(model, inputs, targets)
        value.backward()
        model.zero_grad()
    return lengths, _graphs() - before


def train(
    model: ByteLM,
    corpus: Corpus,
    preset: Preset,
    seed: int,
    device: torch.device,
    on_step: Callable[[int, float], None],
) -> Training:
    """Trains ``model`` in place with one compiled loss. The batches depend on ``seed`` and ``preset`` alone.

    ``on_step`` is called after each step with its number, from 1, and its loss in nats a byte.

    Raises:
        DemoError: a loss or a gradient is not finite.
    """
    batches = Batches(corpus.train, preset.sequence_length, preset.batch_size, seed, device)
    optimiser = make_optimiser(model, preset.learning_rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, schedule(preset.steps, preset.warmup))

    example = Batches(corpus.train, preset.sequence_length, preset.batch_size, seed, device).next()
    with autocast(preset, device):
        explanation = torch._dynamo.explain(next_byte_loss)(model, *example)
    torch._dynamo.reset()
    counters.clear()
    loss: Loss = torch.compile(next_byte_loss, fullgraph=True, backend=preset.backend)

    losses: list[float] = []
    start = first_step_end = time.perf_counter()
    for step in range(preset.steps):
        inputs, targets = _any_length(batches.next())
        with autocast(preset, device):
            value = loss(model, inputs, targets)
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        scheduler.step()
        losses.append(value.item())
        if not math.isfinite(losses[-1]) or not math.isfinite(norm.item()):
            raise DemoError(
                f"step {step}: expected a finite loss and gradient, got {losses[-1]} and norm {norm.item()}"
            )
        if step == 0:
            first_step_end = time.perf_counter()
        on_step(step + 1, losses[-1])
    seconds = time.perf_counter() - first_step_end
    later_tokens = (preset.steps - 1) * preset.batch_size * preset.sequence_length

    training_graphs = _graphs()
    lengths, recompiles = _try_lengths(loss, model, batches, preset)
    return Training(
        losses,
        first_step_end - start,
        later_tokens / seconds,
        Compilation(explanation.graph_break_count, training_graphs, lengths, recompiles),
    )
