"""A run of the suite: on a card the registry's cases, without one what a CPU can say."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Literal

from gka_ops_perf import cpu, measure, providers, timing
from gka_ops_perf.cases import FLASH_LINEAR, GKA, VANILLA, Case, cases, groups
from gka_ops_perf.estimates import estimate
from gka_ops_perf.machine import machine
from gka_ops_perf.records import Measurement, Record, Run

SuiteName = Literal["quick", "full", "cpu"]

AHEAD = 14  # processes that compile at once, each with a case's operands on the card
LONGEST_AHEAD, LARGEST_AHEAD = 32768, 64  # tokens of a sequence, and sequences, for which that is done

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
    compile_ahead(chosen, progress)
    timer, done, interrupted = timing.Timer(), 0, False
    for name, group in groups(chosen).items():
        progress(name, done, len(chosen))
        if not interrupted:
            try:
                found = measure.measure(group, timer)
            except KeyboardInterrupt:  # what is measured is kept
                interrupted = True
        if interrupted:
            found = [measure.failure(case, RuntimeError("interrupted")) for case in group]
        yield from found
        done += len(group)
    progress("", done, len(chosen))


def compile_ahead(chosen: Sequence[Case], progress: Progress) -> None:
    """Fills the caches of Triton and Inductor, side by side in processes of their own, which measuring would wait for.

    What fails here fails again where it is measured, and is reported there. Left out is what would need too much of the
    card's memory beside others, and what only calls libraries.
    """
    compiled = [c for c in chosen if c.provider in (GKA, VANILLA, "flex_attention", *FLASH_LINEAR) and c.op != "model"]
    compiled = [c for c in compiled if c.shape.T <= LONGEST_AHEAD and c.shape.B <= LARGEST_AHEAD]
    compiled = [*{_code(case): case for case in reversed(compiled)}.values()]  # the first of each, the shortest
    compiled.sort(key=lambda case: (case.provider not in FLASH_LINEAR, case.stage == "forward"))  # what is slow first
    workers = min(AHEAD, len(compiled), os.cpu_count() or 1)
    if workers < 2:
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending = [pool.submit(_call, case) for case in compiled]
        for done, _ in enumerate(as_completed(pending)):
            progress("compiling", done, len(compiled))


def _code(case: Case) -> Hashable:
    """Cases for which this is equal run the same code, or nearly; FlexAttention's is compiled for a length."""
    T = case.shape.T if case.provider == "flex_attention" else None
    return case.op, case.stage, case.family, case.provider, T


def _call(case: Case) -> None:
    with contextlib.suppress(Exception):
        providers.job(case).run()


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
