"""Stored runs as a card would give them, without a card."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from gka_ops_perf.cases import GKA, VANILLA, Case, cases
from gka_ops_perf.compare import CaseError
from gka_ops_perf.estimates import estimate
from gka_ops_perf.measure import EAGER, KERNEL
from gka_ops_perf.records import Machine, Measurement, Record, Run

SPEEDS = {"bf16 product TFLOP/s": 750.0, "copy GB/s": 2500.0, "read GB/s": 3000.0}


def machine(commit: str = "abc1234", date: str = "2026-01-02T03:04:05+00:00", gpu: str = "NVIDIA H100") -> Machine:
    return Machine(gpu, "580.1", "a CPU", "2.11.0", "3.6.0", "3.12.3", commit, date)


def milliseconds(case: Case) -> float:
    """Some time that grows with the work: twice the floor, or a microsecond a token."""
    floor = case.cost.floor_seconds(750e12, 3e12) * 1e3 if case.cost else 0.0
    return 2 * floor or case.shape.tokens * 1e-3


def measurement(case: Case, scale: float = 1.0) -> Measurement:
    if case.provider not in (GKA, VANILLA, "sdpa"):
        return Measurement(case.name, case.group, case.provider, "unavailable", "not installed")
    time = scale * milliseconds(case)
    flops, size = case.cost or (0.0, 0.0)
    return Measurement(
        case.name, case.group, case.provider, "measured", tokens=case.shape.tokens, flops=flops, bytes=size,
        figures={KERNEL: estimate([time * x for x in (0.99, 1, 1.01)]), EAGER: estimate([1.1 * time])},
        errors={"o": 0.5**case.iterations} if case.provider == GKA else {}, parameters=dict(case.parameters),
    )  # fmt: skip


def record(commit: str = "abc1234", date: str = "2026-01-02T03:04:05+00:00", scale: float = 1.0) -> Record:
    """A full run."""
    run = Run("full", machine(commit, date), SPEEDS, {"SM MHz": 1980.0})
    return Record(run, tuple(measurement(case, scale) for case in cases()))


class FakeSide:
    """A commit whose cases take the times of :func:`milliseconds`, scaled, with noise of a few per cent.

    Raises ``CaseError`` for a case that ``broken`` names. Slow moods of the machine hit both sides alike.
    """

    def __init__(self, seed: int, scale: float = 1.0, noise: float = 0.02, broken: str = "") -> None:
        self._random = random.Random(seed)
        self._scale, self._noise, self._broken = scale, noise, broken
        self._time: Callable[[], float] | None = None
        self.samples = 0

    def prepare(self, case: str) -> Mapping[str, float]:
        if case == self._broken:
            raise CaseError("no such kernel")
        time = milliseconds(next(found for found in cases() if found.name == case))
        self._time = lambda: time * self._scale * (1 + abs(self._random.gauss(0, self._noise)))
        return {}

    def sample(self) -> Mapping[str, float]:
        assert self._time is not None
        self.samples += 1
        return {KERNEL: self._time()}

    def release(self) -> None:
        self._time = None
