"""Runs the jobs of a study and keeps what they found.

A job is one trained model, ``TASK-VARIANT-SEED``. Below the study's folder stand ``results/JOB.json``, written after
every evaluation, and ``weights/JOB.pt``. Whatever was interrupted goes on from there. A lock on each job lets any
number of processes work in one folder.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout

from examples.recall import evaluate
from examples.recall.mixers import VARIANTS
from examples.recall.model import RecallModel, build
from examples.recall.presets import Preset
from examples.recall.tasks import TASKS, Task
from examples.recall.train import Deadline, OutOfTimeError, StudyError, train
from examples.stdlib_lm.display import Display
from examples.stdlib_lm.model import parameter_count


class Job(NamedTuple):
    """One model to train and to evaluate."""

    task: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        return "-".join(map(str, self))


class OtherPresetError(ValueError):
    """A folder holds results of another preset."""


def jobs(preset: Preset, seeds: list[int]) -> Iterator[Job]:
    """Seed by seed, so that a whole comparison comes first."""
    for seed in seeds:
        for task in preset.tasks:
            for variant in VARIANTS:
                yield Job(task.name, variant, seed)


def environment(device: torch.device) -> dict[str, object]:
    """What a result was found with."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def read(path: Path) -> dict[str, Any]:
    stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return stored


def read_all(out: Path) -> list[dict[str, Any]]:
    """Every stored result below ``out``, by name."""
    return [read(path) for path in sorted((out / "results").glob("*.json"))]


def _write(stored: dict[str, Any], path: Path) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _plain(value: object) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(value))


class Study:
    """A study in the folder ``out``.

    Raises:
        OtherPresetError: the folder holds results of another preset.
    """

    def __init__(self, preset: Preset, device: torch.device, out: Path, deadline: Deadline, display: Display) -> None:
        self.preset = preset
        self.device = device
        self.deadline = deadline
        self.display = display
        self.results, self.weights = out / "results", out / "weights"
        for folder in (self.results, self.weights):
            folder.mkdir(parents=True, exist_ok=True)
        self._tasks: dict[str, Task] = {}
        for stored in read_all(out):
            if stored["preset"] != _plain(dataclasses.asdict(preset)):
                raise OtherPresetError(
                    f"expected results of the same preset and options below {out}, got others in {stored['name']}: "
                    "take another folder"
                )

    def task(self, name: str) -> Task:
        if name not in self._tasks:
            self.display.stage(f"{name}: prepares its texts")
            self._tasks[name] = TASKS[name](self.preset.task(name))
        return self._tasks[name]

    def run(self, wanted: list[Job]) -> list[Job]:
        """Runs jobs, in order, past those that other processes are at; returns the latter.

        Raises:
            OutOfTimeError: the budget is spent.
        """
        skipped = []
        for job in wanted:
            try:
                with FileLock(self.results / f"{job.name}.lock", timeout=0):
                    self._run(job)
            except Timeout:
                self.display.stage(f"{job.name}: another process is at it")
                skipped.append(job)
        return skipped

    def _run(self, job: Job) -> None:
        path = self.results / f"{job.name}.json"
        stored = read(path) if path.exists() else None
        if stored is not None and stored["finished"]:
            self.display.stage(f"{job.name}: is finished")
            return
        self.deadline.check()
        task, sizes, variant = self.task(job.task), self.preset.task(job.task), VARIANTS[job.variant]
        model = build(self.preset, sizes.vocabulary, variant.core, job.seed, self.device)
        result: dict[str, Any] = {
            "name": job.name,
            **job._asdict(),
            "preset": _plain(dataclasses.asdict(self.preset)),
            "environment": environment(self.device),
            "parameters": parameter_count(model),
            "evaluations": [],
            "finished": False,
        }
        if stored is not None:
            result["evaluations"] = stored["evaluations"]
        try:
            training = train(
                model, task, self.preset, sizes, job.seed, self.device, self.weights / f"{job.name}.pt", self.deadline,
                self.display.training(job.name, sizes.steps),
            )  # fmt: skip
            result["training"] = dataclasses.asdict(training)
            model.eval()
            self._evaluate(model, task, job, result, path)
        except OutOfTimeError:
            raise
        except Exception as error:
            if not (isinstance(error, StudyError) or variant.peer):
                raise
            lines = str(error).splitlines() or ["no message"]
            result["refused"] = f"{type(error).__name__}: {lines[0]}"
            self.display.stage(f"{job.name}: {result['refused']}")
        result["finished"] = True
        _write(result, path)

    def _evaluate(self, model: RecallModel, task: Task, job: Job, result: dict[str, Any], path: Path) -> None:
        sizes = self.preset.task(job.task)
        lengths = {size: task.length(size) for size in sizes.eval_sizes}
        done = [evaluate.setting_of(stored) for stored in result["evaluations"]]
        for setting in evaluate.settings(self.preset, sizes, job.variant, lengths):
            if setting in done:
                continue
            self.deadline.check()
            found = evaluate.evaluate(model, task, self.preset, sizes, setting, self.device, self.deadline)
            result["evaluations"].append(found)
            _write(result, path)
            told = found.get("refused") or f"exact match {found['exact_match']:.3f}"
            self.display.stage(
                f"{job.name}: {setting.solver} ({setting.num_iter}), {setting.precision}, size {setting.size}: {told}"
            )
