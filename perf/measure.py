"""Measures cases: each is checked, then those of a group are timed in turns."""

from __future__ import annotations

import functools
import gc
from collections.abc import Sequence
from typing import Any

import torch

from gka_ops_perf import timing
from gka_ops_perf.cases import Case
from gka_ops_perf.estimates import estimate, spread
from gka_ops_perf.providers import Job, UnavailableError, job
from gka_ops_perf.records import Measurement, Status
from gka_ops_perf.timing import Prepared, Timer, UnstableError

ATTEMPTS = 2  # at figures whose samples lie too far apart

KERNEL, EAGER = "kernel ms", "eager ms"


class InaccurateError(RuntimeError):
    """A call whose results are further off than it may be."""

    def __init__(self, errors: dict[str, float], bars: dict[str, float]) -> None:
        self.errors = errors
        wrong = (f"{name} {error:.1e} > {bars[name]:.1e}" for name, error in errors.items() if not error <= bars[name])
        super().__init__(", ".join(wrong))


def checked(job: Job) -> dict[str, float]:
    """The errors of a job. Raises ``InaccurateError`` where one is too large, or is NaN."""
    errors = job.errors()
    if any(not error <= job.bars[name] for name, error in errors.items()):
        raise InaccurateError(errors, dict(job.bars))
    return errors


def failure(case: Case, error: Exception) -> Measurement:
    """What is recorded of a case that gave no figure."""
    statuses: dict[type[Exception], Status] = {
        InaccurateError: "inaccurate", UnavailableError: "unavailable", UnstableError: "unstable",
    }  # fmt: skip
    status = next((status for kind, status in statuses.items() if isinstance(error, kind)), "failed")
    reason = str(error) if status != "failed" else f"{type(error).__name__}: {error}"
    errors = {name: value for name, value in getattr(error, "errors", {}).items() if value < float("inf")}
    return _of(case, status=status, reason=reason.split("\n")[0][:300], errors=errors)


def _of(case: Case, **fields: Any) -> Measurement:
    flops, size = case.cost or (0.0, 0.0)
    return Measurement(
        case=case.name, group=case.group, provider=case.provider, tokens=case.shape.tokens, flops=flops, bytes=size,
        parameters=dict(case.parameters), **fields,
    )  # fmt: skip


def measure(group: Sequence[Case], timer: Timer) -> list[Measurement]:
    """A measurement of every case of a group, timed in turns with the others."""
    found: dict[Case, Measurement] = {}
    ready: dict[Case, Prepared] = {}
    errors: dict[Case, dict[str, float]] = {}
    for case in group:
        try:
            ready[case], errors[case] = _ready(case)
        except Exception as error:  # a case must not cost the others
            found[case] = failure(case, error)
    try:
        timing.check_clocks(timing.clocks())
        samples = _samples(ready, timer)
    except UnstableError as error:
        found |= {case: failure(case, error) for case in ready}
    else:
        for case, figures in samples.items():
            try:
                timing.check_spread(figures[KERNEL], KERNEL, timing.MAX_SPREAD)
            except UnstableError as error:
                found[case] = failure(case, error)
            else:
                estimates = {name: estimate(values) for name, values in figures.items()}
                found[case] = _of(case, status="measured", figures=estimates, errors=errors[case])
    ready.clear()
    forget()
    return [found[case] for case in group]


def _ready(case: Case) -> tuple[Prepared, dict[str, float]]:
    """What is timed, and its errors. Raises where there is nothing, or nothing right, to be timed."""
    made = job(case)
    errors = checked(made)
    return timing.prepare(made.run), errors


def _samples(ready: dict[Case, Prepared], timer: Timer) -> dict[Case, dict[str, list[float]]]:
    """Kernel and eager samples of each; a group whose samples spread is measured again, a few times at most."""
    if not ready:
        return {}
    first = {case: timer.kernel(prepared) for case, prepared in ready.items()}
    rounds = timing.rounds_for(max(first.values()))
    names = {case.name: case for case in ready}
    kernels = {
        case.name: functools.partial(timer.kernel, prepared, timing.replays_for(first[case], rounds))
        for case, prepared in ready.items()
    }
    eagers = {case.name: functools.partial(timer.eager, prepared) for case, prepared in ready.items()}
    for attempt in range(ATTEMPTS):
        kernel = timing.in_turns(kernels, rounds)
        if attempt == ATTEMPTS - 1 or all(spread(values) <= timing.MAX_SPREAD for values in kernel.values()):
            break
    eager = timing.in_turns(eagers, max(timing.ROUNDS.start, rounds // 2))
    timing.check_clocks(timing.clocks())
    return {case: {KERNEL: kernel[name], EAGER: eager[name]} for name, case in names.items()}


def forget() -> None:
    """Gives memory back to the card."""
    gc.collect()
    torch.cuda.empty_cache()
    torch._dynamo.reset()
