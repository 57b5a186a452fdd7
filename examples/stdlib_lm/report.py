"""Tables, figure and JSON of a run."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from tabulate import tabulate  # type: ignore[import-untyped]

from examples.stdlib_lm.data import Corpus
from examples.stdlib_lm.evaluate import Decoding, OperatorError
from examples.stdlib_lm.presets import Preset
from examples.stdlib_lm.train import Training


@dataclasses.dataclass(frozen=True)
class ModelResult:
    """One of the two models.

    Attributes:
        label: its name in tables.
        num_iter: iterations of its GKA layers.
        parameters: all of them.
        training: how it was trained.
        bits_per_byte: on the held-out windows.
    """

    label: str
    num_iter: int
    parameters: int
    training: Training
    bits_per_byte: float


@dataclasses.dataclass(frozen=True)
class Run:
    """Every figure of a run.

    ``saved_bits`` a byte is what GKA saves against the other model, ``saved_bits_error`` the standard error of that
    mean over the windows that both were evaluated on. ``failures`` are the expectations that were not met.
    """

    preset: Preset
    seed: int
    device: str
    torch_version: str
    threads: int
    corpus: Corpus
    eval_bytes: int
    models: dict[str, ModelResult]
    saved_bits: float
    saved_bits_error: float
    operator_errors: list[OperatorError]
    prompt_file: str
    decoding: Decoding
    wall_seconds: float
    failures: list[str]


def _models_table(run: Run) -> str:
    rows = []
    for model in run.models.values():
        training = model.training
        rows.append(
            [
                model.label,
                model.num_iter,
                f"{model.parameters:,}",
                f"{model.bits_per_byte:.4f}",
                f"{training.losses[-1] / math.log(2):.4f}",
                f"{training.tokens_per_second:,.0f}",
                f"{training.first_step_seconds:.1f}",
            ]
        )
    headers = [
        "model",
        "iterations",
        "parameters",
        "held-out bits/byte",
        "last training batch",
        "tokens/s",
        "first step, s",
    ]
    return tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * 6))


def _compilation_table(run: Run) -> str:
    rows = []
    for model in run.models.values():
        c = model.training.compilation
        lengths = ", ".join(map(str, c.lengths))
        rows.append([model.label, c.graph_breaks, c.training_graphs, lengths, c.recompiles])
    headers = ["model", "graph breaks", "graphs in training", "further sequence lengths", "recompiles for them"]
    return tabulate(rows, headers)


def _errors_table(run: Run) -> str:
    rows = [[e.layer, e.tensor, *(f"{value:.1e}" for value in (e.p50, e.p99, e.max))] for e in run.operator_errors]
    return tabulate(rows, ["layer", "tensor", "p50", "p99", "max"], disable_numparse=True)


def _decoding_table(run: Run) -> str:
    d = run.decoding
    rows = [
        ["bytes equal to the chunked recomputation", f"{d.matching} of {d.tokens}"],
        ["largest difference of a logit", f"{d.largest_logit_difference:.1e}"],
        ["smallest distance of the two best logits", f"{d.smallest_margin:.1e}"],
        ["decoded bytes/s (one text, eager)", f"{d.tokens_per_second:,.0f}"],
    ]
    if d.matching < d.tokens:
        rows.append(["largest such distance where they differ", f"{d.largest_mismatch_margin:.1e}"])
    return tabulate(rows, disable_numparse=True)


def tables(run: Run) -> str:
    """All figures of the run as plain text."""
    preset, corpus = run.preset, run.corpus
    precision = "fp32" if preset.autocast is None else f"autocast to {str(preset.autocast).removeprefix('torch.')}"
    sections = [
        f"Preset {preset.name} on {run.device}, {run.threads} threads, torch {run.torch_version}, {precision}, "
        f"seed {run.seed}\n"
        f"{preset.steps} steps of {preset.batch_size} windows of {preset.sequence_length} bytes from "
        f"{corpus.train_files} files ({corpus.train.numel():,} bytes); evaluated on {run.eval_bytes:,} bytes of "
        f"{len(corpus.held_out_files)} files that were held out ({corpus.held_out.numel():,} bytes)",
        "Equal parameters, initial values, batches and steps\n" + _models_table(run),
        f"The solve saves {run.saved_bits:+.4f} bits a byte in this run; standard error over the evaluated windows "
        f"{run.saved_bits_error:.4f}, the spread between seeds comes on top",
        f"Compilation, fullgraph=True, backend {preset.backend}\n" + _compilation_table(run),
        "Relative error of the operator per token and head against fp64, trained model, real text\n"
        + _errors_table(run),
        f"Greedy continuation of {run.prompt_file}: chunk_gka prefill, then recurrent_gka\n" + _decoding_table(run),
    ]
    return "\n\n".join(sections)


def figures(run: Run) -> dict[str, Any]:
    """All figures of the run as JSON values."""
    preset = dataclasses.asdict(run.preset) | {
        "autocast": None if run.preset.autocast is None else str(run.preset.autocast)
    }
    corpus = {
        "train_files": run.corpus.train_files,
        "train_bytes": run.corpus.train.numel(),
        "held_out_files": run.corpus.held_out_files,
        "held_out_bytes": run.corpus.held_out.numel(),
        "evaluated_bytes": run.eval_bytes,
    }
    return {
        "preset": preset,
        "seed": run.seed,
        "device": run.device,
        "torch": run.torch_version,
        "threads": run.threads,
        "corpus": corpus,
        "models": {name: dataclasses.asdict(model) for name, model in run.models.items()},
        "saved_bits": run.saved_bits,
        "saved_bits_error": run.saved_bits_error,
        "operator_errors": [dataclasses.asdict(error) for error in run.operator_errors],
        "decoding": {"file": run.prompt_file, **dataclasses.asdict(run.decoding)},
        "wall_seconds": run.wall_seconds,
        "failures": run.failures,
    }


def plot_losses(run: Run, path: Path) -> None:
    """Training loss of both models, each step faint and a running mean over a twentieth of the steps on top."""
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for model in run.models.values():
        bits = [loss / math.log(2) for loss in model.training.losses]
        width = max(1, len(bits) // 20)
        mean = [sum(bits[i : i + width]) / width for i in range(len(bits) - width + 1)]
        label = f"{model.label}: {model.bits_per_byte:.3f} bits/byte held out"
        (line,) = axes.plot(range(width, len(bits) + 1), mean, label=label)
        axes.plot(range(1, len(bits) + 1), bits, color=line.get_color(), alpha=0.2)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, bits a byte")
    axes.set_title(f"Python standard library, {next(iter(run.models.values())).parameters:,} parameters")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def publish(run: Run, out: Path, console: Console) -> None:
    """Prints tables and continued text; writes ``figures.json``, ``report.txt`` and ``loss.png`` into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    text = tables(run)
    (out / "report.txt").write_text(text + "\n", encoding="utf-8")
    (out / "figures.json").write_text(json.dumps(figures(run), indent=2) + "\n", encoding="utf-8")
    plot_losses(run, out / "loss.png")
    console.print(Text(text), soft_wrap=True)
    continued = Text(run.decoding.prompt[-200:], style="dim") + Text(run.decoding.text, style="bold")
    console.print(Panel(continued, title=f"{run.prompt_file} (dim), continued (bold)"))
    console.print(Text(f"{run.wall_seconds:.0f} s in all; figures.json, report.txt and loss.png are in {out}"))
