"""Trains and evaluates the models of the recall study, as far as they are not done, and reports what is stored.

Exits with 0 when everything that was asked for is finished, with 3 when something is left: the time budget is spent, or
another process is at it. The same command goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch
from rich.console import Console

from examples.recall import report, study
from examples.recall.mixers import VARIANTS
from examples.recall.presets import PRESETS, Preset
from examples.recall.tasks import TASKS
from examples.recall.train import Deadline, OutOfTimeError
from examples.stdlib_lm.display import Display

LEFT = 3
"""Exit code where something is left to do."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.recall", description=__doc__)
    parser.add_argument("--preset", choices=sorted(PRESETS), help="sizes; by default those for the device")
    parser.add_argument("--device", help="by default cuda if there is a card, else cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of initial parameters and training batches")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="TASK, TASK-VARIANT or TASK-VARIANT-SEED, such as facts-gka-0"
    )
    parser.add_argument("--steps", type=int, help="of each training, instead of the preset's")
    parser.add_argument("--learning-rate", type=float, help="peak, instead of the preset's")
    parser.add_argument(
        "--time-budget", type=float, metavar="SECONDS", help="stops then, to go on with the same command"
    )
    parser.add_argument("--out", type=Path, default=Path(".recall"), help="where results and weights stand (.recall)")
    parser.add_argument("--report", action="store_true", help="trains and evaluates nothing")
    parser.add_argument("--docs", type=Path, metavar="FOLDER", help="also writes the tables of the documentation")
    return parser


def chosen_preset(options: argparse.Namespace, device: torch.device) -> Preset:
    preset = PRESETS[options.preset or device.type]
    changes = {"steps": options.steps, "learning_rate": options.learning_rate}
    given = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(preset, tasks=tuple(dataclasses.replace(task, **given) for task in preset.tasks))


def chosen_jobs(parser: argparse.ArgumentParser, options: argparse.Namespace, preset: Preset) -> list[study.Job]:
    """Those of ``--seeds`` and ``--only``; a name with a seed needs no ``--seeds``."""
    if options.only is None:
        return list(study.jobs(preset, options.seeds))
    wanted = []
    for name in options.only:
        task, *rest = name.split("-")
        variants, seeds = rest[:1] or list(VARIANTS), [int(s) for s in rest[1:] if s.isdigit()] or options.seeds
        if task not in TASKS or not set(variants) <= set(VARIANTS) or len(rest) > 2 or not all(
            part.isdigit() for part in rest[1:]
        ):  # fmt: skip
            parser.error(
                f"expected --only TASK[-VARIANT[-SEED]] with a task of {', '.join(TASKS)} and a variant of "
                f"{', '.join(VARIANTS)}, got {name!r}"
            )
        wanted += [study.Job(task, variant, seed) for seed in seeds for variant in variants]
    return list(dict.fromkeys(wanted))


def parse_arguments(
    arguments: list[str] | None = None,
) -> tuple[argparse.Namespace, torch.device, Preset, list[study.Job]]:
    parser = make_parser()
    options = parser.parse_args(arguments)
    for name in ("steps", "learning_rate", "time_budget"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            parser.error(f"expected --{name.replace('_', '-')} > 0, got {value}")
    if min(options.seeds) < 0:
        parser.error(f"expected --seeds >= 0, got {min(options.seeds)}")
    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        parser.error(f"expected --device cpu or cuda, got {options.device!r}")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"expected --device cpu or cuda, got {options.device!r}")
    if device.type == "cuda" and not torch.cuda.is_available() and not options.report:
        parser.error(f"expected --device cpu where there is no CUDA card, got {options.device!r}")
    preset = chosen_preset(options, device)
    return options, device, preset, chosen_jobs(parser, options, preset)


def main(arguments: list[str] | None = None) -> int:
    options, device, preset, wanted = parse_arguments(arguments)
    console, left = Console(), False
    if not options.report:
        try:
            with Display(console, "bits/token of an answer") as display:
                deadline = Deadline(options.time_budget)
                left = bool(study.Study(preset, device, options.out, deadline, display).run(wanted))
        except study.OtherPresetError as error:
            console.print(f"FAILED: {error}", style="bold red", markup=False)
            return 2
        except OutOfTimeError:
            console.print("The time budget is spent; the same command goes on.", style="bold", markup=False)
            left = True
    results = [result for result in study.read_all(options.out) if result["finished"] or result["evaluations"]]
    if not results:
        console.print(f"No results below {options.out} yet.", markup=False)
        return 2 if options.report else LEFT
    report.publish(results, options.out, console)
    if options.docs is not None:
        report.publish_docs(results, options.docs)
    return LEFT if left else 0


if __name__ == "__main__":
    sys.exit(main())
