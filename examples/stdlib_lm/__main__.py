"""Trains the language model twice, with and without the ridge solve, and reports what was measured.

Exits with 1 if an expectation is not met: a graph break, a recompilation, a non-finite loss, an operator error beyond
its bar, or a decoded text that differs from the chunked recomputation.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from examples.stdlib_lm import data, evaluate, report
from examples.stdlib_lm.display import Display
from examples.stdlib_lm.model import build, parameter_count
from examples.stdlib_lm.presets import PRESETS, Preset
from examples.stdlib_lm.train import DemoError, train
from gka_ops import iterations_for

MODELS: dict[str, tuple[str, int | Literal["auto"]]] = {
    "gka": ("Gated KalmaNet", "auto"),
    "linear": ("gated linear attention", 0),
}
"""The two models: label and ``num_iter``."""

ERROR_BARS = {"x": 3e-3, "output": 5e-2}
"""Largest 99th percentile of the operator's relative error that passes (``docs/numerics.md``)."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.stdlib_lm", description=__doc__)
    parser.add_argument("--preset", choices=sorted(PRESETS), help="sizes; by default those for the device")
    parser.add_argument("--device", help="by default cuda if there is a card, else cpu")
    parser.add_argument("--steps", type=int, help="optimiser steps of each training, instead of the preset's")
    parser.add_argument("--seed", type=int, default=0, help="of initial parameters and batches")
    parser.add_argument("--backend", help="of torch.compile; aot_eager needs no compiler on the machine")
    parser.add_argument("--out", type=Path, default=Path(".demo"), help="where figures.json and loss.png go")
    options = parser.parse_args(arguments)
    if options.steps is not None and options.steps < 2:
        parser.error(f"expected --steps of at least 2, got {options.steps}")
    return options


def find_failures(
    preset: Preset,
    models: dict[str, report.ModelResult],
    errors: list[evaluate.OperatorError],
    decoding: evaluate.Decoding,
) -> list[str]:
    """The expectations that were not met."""
    failures = []
    counts = {model.parameters for model in models.values()}
    if len(counts) != 1:
        failures.append(f"expected equal numbers of parameters, got {sorted(counts)}")
    for model in models.values():
        compilation = model.training.compilation
        if compilation.graph_breaks:
            failures.append(f"{model.label}: expected no graph break, got {compilation.graph_breaks}")
        if compilation.recompiles:
            failures.append(
                f"{model.label}: expected no recompilation for sequence lengths {compilation.lengths}, "
                f"got {compilation.recompiles}"
            )
    for error in errors:
        if not error.p99 <= ERROR_BARS[error.tensor]:  # also catches NaN
            failures.append(
                f"layer {error.layer}: expected a relative error of {error.tensor} with p99 <= "
                f"{ERROR_BARS[error.tensor]}, got {error.p99:.2e}"
            )
    if decoding.matching < decoding.tokens and not decoding.largest_mismatch_margin < preset.tie_margin:
        failures.append(
            f"expected decoding to equal the chunked recomputation byte for byte, got {decoding.matching} of "
            f"{decoding.tokens} equal, and logits {decoding.largest_mismatch_margin:.2e} apart where they differ"
        )
    return failures


def run(preset: Preset, seed: int, device: torch.device, display: Display) -> report.Run:
    """Everything but the printing of the report."""
    display.stage("reads the standard library")
    corpus = data.load_corpus()
    inputs, targets = data.held_out_windows(corpus, preset.sequence_length, preset.eval_windows, device)
    trained, results, bits = {}, {}, {}
    for name, (label, num_iter) in MODELS.items():
        display.stage(f"{label}: compiles and trains")
        model = build(preset, num_iter, seed, device)
        training = train(model, corpus, preset, seed, device, display.training(label, preset.steps))
        display.stage(f"{label}: evaluates on held-out files")
        bits[name] = evaluate.bits_per_byte(model, inputs, targets, preset)
        first = model.mixers[0]
        iterations = iterations_for(first.ridge, first.tol) if num_iter == "auto" else num_iter
        results[name] = report.ModelResult(
            label, iterations, parameter_count(model), training, bits[name].mean().item()
        )
        trained[name] = model
    saved = bits["linear"] - bits["gka"]
    display.stage("compares the operators with fp64")
    errors = evaluate.operator_errors(trained["gka"], inputs[:1, : preset.error_tokens], preset)
    display.stage("decodes, and recomputes what was decoded")
    prompt_file, prompt = data.held_out_prompt(corpus, preset.prompt_bytes)
    decoding = evaluate.decode(trained["gka"], prompt.to(device), preset.generated_bytes)
    return report.Run(
        preset=preset,
        seed=seed,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        torch_version=torch.__version__,
        threads=torch.get_num_threads(),
        corpus=corpus,
        eval_bytes=targets.numel(),
        models=results,
        saved_bits=saved.mean().item(),
        saved_bits_error=saved.std().item() / len(saved) ** 0.5,
        operator_errors=errors,
        prompt_file=prompt_file,
        decoding=decoding,
        wall_seconds=display.seconds(),
        failures=find_failures(preset, results, errors, decoding),
    )


def main() -> int:
    options = parse_arguments()
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    preset = PRESETS[options.preset or device.type]
    if options.steps is not None:
        preset = dataclasses.replace(preset, steps=options.steps)
    if options.backend is not None:
        preset = dataclasses.replace(preset, backend=options.backend)
    console = Console()
    try:
        with Display(console) as display:
            result = run(preset, options.seed, device, display)
    except DemoError as error:
        console.print(f"FAILED: {error}", style="bold red", markup=False)
        return 1
    report.publish(result, options.out, console)
    for failure in result.failures:
        console.print(f"FAILED: {failure}", style="bold red", markup=False)
    return 1 if result.failures else 0


if __name__ == "__main__":
    sys.exit(main())
