"""What trained models answer."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from examples.recall.mixers import SOLVERS
from examples.recall.model import RecallModel
from examples.recall.presets import Preset, TaskPreset
from examples.recall.tasks import Batch, Task, evaluation_batches
from examples.recall.train import Deadline, autocast

PRECISIONS = ("fp32", "bf16")
"""bf16 is autocast: fp32 parameters, bf16 operands."""


def exact_match(predicted: Tensor, answers: Tensor) -> float:
    """Share of rows of int64 [questions, A] that are equal in every token."""
    return (predicted == answers).all(-1).double().mean().item()


def token_f1(predicted: Tensor, answers: Tensor) -> float:
    """Mean over rows of int64 [questions, A] of the harmonic mean of precision and recall of their tokens as multisets.

    Both have A tokens, so that precision, recall and F1 are the same number.
    """
    pairs = zip(predicted.tolist(), answers.tolist(), strict=True)
    overlap = sum((Counter(given) & Counter(true)).total() for given, true in pairs)
    return overlap / answers.numel()


def decode(model: RecallModel, batch: Batch, first: Tensor) -> Tensor:
    """Answers [B, Q, A] decoded greedily from their first tokens [B, Q] on, each after the model's own before it.

    All questions of a text go side by side: those that come later read the own tokens of earlier ones, too.
    """
    tokens, positions, _ = batch
    decoded = [first]
    for index in range(1, positions.shape[-1]):
        tokens = tokens.scatter(1, positions[..., index], decoded[-1])
        decoded.append(model(tokens, positions[..., index : index + 1]).argmax(-1)[..., 0])
    return torch.stack(decoded, -1)


@dataclass(frozen=True)
class Setting:
    """One evaluation of a trained model.

    Attributes:
        solver: key of ``mixers.SOLVERS``, or ``"own"`` for the core that was trained.
        num_iter: of the solve.
        precision: of ``PRECISIONS``.
        size: of the texts.
    """

    solver: str
    num_iter: int
    precision: str
    size: int


def setting_of(stored: dict[str, Any]) -> Setting:
    """The setting of a stored evaluation."""
    return Setting(*(stored[field.name] for field in dataclasses.fields(Setting)))


def settings(preset: Preset, sizes: TaskPreset, variant: str, lengths: dict[int, int]) -> list[Setting]:
    """What a trained model is evaluated with; ``lengths`` are the tokens of a text of each size."""
    solvers: list[tuple[str, int]] = [("own", preset.num_iter)]
    if variant == "gka":
        solvers += [("chebyshev", count) for count in preset.iterations if count != preset.num_iter]
        solvers += [("cg", preset.num_iter), ("kalman", 0)]
    return [
        Setting(solver, num_iter, precision, size)
        for solver, num_iter in solvers
        for size in sizes.eval_sizes
        for precision in PRECISIONS
        if solver != "kalman" or lengths[size] <= preset.kalman_tokens
    ]


@torch.no_grad()
def evaluate(
    model: RecallModel,
    task: Task,
    preset: Preset,
    sizes: TaskPreset,
    setting: Setting,
    device: torch.device,
    deadline: Deadline,
) -> dict[str, Any]:
    """What is stored of an evaluation: its setting and scores, or ``"refused"`` where the device has too little memory.

    The exact match says whether every token of an answer is the likeliest one after the true ones before it, which is
    whether greedy decoding gives the answer. The F1 is that of decoded answers, and of the model's own core alone.

    Raises:
        OutOfTimeError: the budget is spent.
    """
    start = time.perf_counter()
    own = setting.solver == "own"
    core = model.mixers[0].core if own else SOLVERS[setting.solver]
    stored = dataclasses.asdict(setting)
    predicted, decoded, answers = [], [], []
    try:
        with model.solving(core, setting.num_iter), autocast(setting.precision == "bf16", device):
            for batch in evaluation_batches(task, sizes, setting.size, preset.eval_tokens, device):
                deadline.check()
                likeliest = model(batch.tokens, batch.positions).argmax(-1)
                predicted.append(likeliest.flatten(0, 1).cpu())
                answers.append(batch.answers.flatten(0, 1).cpu())
                if own:
                    decoded.append(decode(model, batch, likeliest[..., 0]).flatten(0, 1).cpu())
    except torch.OutOfMemoryError as error:
        return stored | {"refused": f"out of memory: {str(error).splitlines()[0]}"}
    true = torch.cat(answers)
    stored |= {"exact_match": exact_match(torch.cat(predicted), true)}
    if own:
        stored |= {"token_f1": token_f1(torch.cat(decoded), true)}
    return stored | {"questions": len(true), "seconds": time.perf_counter() - start}
