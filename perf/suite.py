"""A run of the suite: on a card the registry's cases, without one what a CPU can say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Literal

from gka_ops_perf import cpu, measure, timing
from gka_ops_perf.cases import GKA, cases, groups
from gka_ops_perf.estimates import estimate
from gka_ops_perf.machine import machine
from gka_ops_perf.records import Measurement, Record, Run

SuiteName = Literal["quick", "full", "cpu"]

Progress = Callable[[str, int, int], None]
"""Is told what is measured, how many cases are done, and of how many."""


def run(suite: SuiteName, select: str = "", commit: str | None = None, progress: Progress = lambda *_: None) -> Record:
    """Measures all of a suite whose names have ``select`` in them.

    Raises:
        ValueError: nothing has such a name.
        UnstableError: the card is throttling before anything is measured.
    """
    if suite == "cpu":
        header = Run("cpu", dataclasses.replace(machine(commit), gpu="", driver=""))
        measurements = tuple(_on_cpu(select, progress))
    else:
        timing.check_clocks(timing.clocks())
        speeds = timing.reference_speeds()
        measurements = tuple(_on_card(suite, select, progress))
        state = timing.clocks()
        header = Run(suite, machine(commit), speeds, state.figures() if state else {})
    if not measurements:
        raise ValueError(f"expected part of a case's name in suite {suite}, got {select!r}")
    return Record(header, measurements)


def _on_card(suite: Literal["quick", "full"], select: str, progress: Progress) -> Iterator[Measurement]:
    chosen = cases(suite, select)
    timer, done = timing.Timer(), 0
    for name, group in groups(chosen).items():
        progress(name, done, len(chosen))
        yield from measure.measure(group, timer)
        done += len(group)
    progress("", done, len(chosen))


def _on_cpu(select: str, progress: Progress) -> Iterator[Measurement]:
    chosen = cpu.cases(select)
    for done, case in enumerate(chosen):
        progress(case.name, done, len(chosen))
        try:
            parts = case.measure()
        except Exception as error:  # a case must not cost the others
            reason = f"{type(error).__name__}: {error}".split("\n")[0][:300]
            yield Measurement(case.name, case.name, GKA, "failed", reason)
            continue
        for part, figures in parts.items():
            estimates = {name: estimate(samples) for name, samples in figures.items()}
            name = f"{case.name} {part}".rstrip()
            yield Measurement(name, case.name, GKA, "measured", figures=estimates)
    progress("", len(chosen), len(chosen))
