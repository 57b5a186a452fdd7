"""The sizes of a study."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TaskPreset:
    """How much of one task there is.

    Attributes:
        name: key of ``tasks.TASKS``.
        train_sizes: what training texts are made of, in turns: numbers of pairs (mqar) or of tokens (facts).
        eval_sizes: the same for evaluation.
        items: facts of a text (facts); unused where the sizes say it (mqar).
        words: made-up words that entities and answers are of (facts).
        vocabulary: number of tokens.
        tokens_per_step: tokens of a batch, of any size; at least one text.
        steps: optimiser steps of each training.
        learning_rate: peak of the schedule.
        warmup: steps to reach it.
        eval_texts: texts of each size that are evaluated.
    """

    name: str
    train_sizes: tuple[int, ...]
    eval_sizes: tuple[int, ...]
    items: int
    words: int
    vocabulary: int
    tokens_per_step: int
    steps: int
    learning_rate: float
    warmup: int
    eval_texts: int


@dataclass(frozen=True)
class Preset:
    """Everything that fixes a study, apart from device and seeds.

    Attributes:
        hidden_size: width of the residual stream.
        layers: blocks, each a mixer and a gated MLP.
        num_heads: heads of a mixer, and of its state.
        head_dim: key and value dimension of a head.
        mlp_size: inner width of the gated MLP.
        num_iter: Chebyshev iterations in training, and at evaluation where nothing else is said.
        iterations: further counts that the trained GKA model is evaluated with.
        bf16: train under autocast to bf16 (fp32 parameters), else in fp32.
        eval_tokens: tokens of an evaluation batch, of any size; at least one text.
        kalman_tokens: longest text that the covariance recursion, which is sequential, is evaluated on.
        tasks: the tasks.
    """

    name: str
    hidden_size: int
    layers: int
    num_heads: int
    head_dim: int
    mlp_size: int
    num_iter: int
    iterations: tuple[int, ...]
    bf16: bool
    eval_tokens: int
    kalman_tokens: int
    tasks: tuple[TaskPreset, ...]

    def task(self, name: str) -> TaskPreset:
        return next(task for task in self.tasks if task.name == name)


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="tiny",
            hidden_size=32,
            layers=1,
            num_heads=2,
            head_dim=16,
            mlp_size=32,
            num_iter=6,
            iterations=(3,),
            bf16=False,
            eval_tokens=512,
            kalman_tokens=128,
            tasks=(
                TaskPreset("mqar", (2, 4), (4, 8), 0, 0, 64, 128, 4, 3e-3, 2, 4),
                TaskPreset("facts", (128,), (128, 256), 3, 64, 1024, 256, 4, 3e-3, 2, 4),
            ),
        ),
        # Meant for two cores and some ten minutes with one seed; beside other work it took longer.
        Preset(
            name="cpu",
            hidden_size=64,
            layers=2,
            num_heads=2,
            head_dim=32,
            mlp_size=128,
            num_iter=10,
            iterations=(5, 20, 30),
            bf16=False,
            eval_tokens=8192,
            kalman_tokens=2048,
            tasks=(
                TaskPreset("mqar", (4, 8, 16), (8, 16, 32), 0, 0, 256, 1024, 800, 5e-3, 40, 64),
                TaskPreset("facts", (96,), (96, 512, 2048), 4, 64, 1024, 1536, 1000, 1e-2, 50, 64),
            ),
        ),
        Preset(
            name="cuda",
            hidden_size=256,
            layers=2,
            num_heads=4,
            head_dim=64,
            mlp_size=512,
            num_iter=30,
            iterations=(5, 10, 20),
            bf16=True,
            eval_tokens=524288,
            kalman_tokens=16384,
            tasks=(
                TaskPreset(
                    "mqar", (16, 64, 128, 256, 512), (64, 128, 256, 512), 0, 0, 8192, 65536, 2400, 3e-3, 100, 64
                ),
                # Shorter texts in turns with those of 4096 tokens, and few words: with 1024 tokens at least, 32 facts
                # and 256 words no model had learnt anything by step 1200.
                TaskPreset(
                    "facts",
                    (320, 640, 1024, 4096),
                    (4096, 16384, 65536, 131072),
                    16,
                    64,
                    4096,
                    65536,
                    2400,
                    3e-3,
                    100,
                    32,
                ),
            ),
        ),
    )
}
