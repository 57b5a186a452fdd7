"""Holds a run on a CPU against the one that is stored: fails where a case broke or a figure grew for certain.

The limits are wide enough for machines that others use too; ``gka-perf compare`` on a quiet one sees less.
"""

from __future__ import annotations

from typing import NamedTuple

from gka_ops_perf.cpu import MACHINE_CODE
from gka_ops_perf.records import Estimate, Record

LIMITS = {"ratio": 2.0, "Python calls": 1.15, "graph nodes": 1.15, "instructions": 1.1, "registers": 1.1, "stack": 1.1}
"""The largest growth of each figure over the stored one."""

_STACK = 64  # bytes that a kernel may spill more, whatever it spilt before


class Drift(NamedTuple):
    """A figure now and as it is stored; ``growth`` is their quotient."""

    case: str
    figure: str
    stored: float
    now: float
    verdict: str

    @property
    def bad(self) -> bool:
        return self.verdict not in ("", "new")


def compare(stored: Record, now: Record) -> list[Drift]:
    """Every figure of ``now``, and every case of ``stored`` that is no longer there or no longer works."""
    before = stored.by_case()
    same_compiler = stored.run.machine.triton == now.run.machine.triton
    found = []
    for case, measurement in now.by_case().items():
        if measurement.status != "measured":
            found.append(Drift(case, "", 0, 0, f"{measurement.status}: {measurement.reason}"))
        if case.startswith(MACHINE_CODE) and not same_compiler:
            continue  # another Triton makes other code
        known = before[case].figures if case in before else {}
        for figure, value in measurement.figures.items():
            old = known.get(figure)
            verdict = "new" if old is None else _verdict(figure, old, value)
            found.append(Drift(case, figure, old.median if old else 0, value.median, verdict))
    broken = {drift.case for drift in found}
    gone = [case for case in before if case not in broken and (same_compiler or not case.startswith(MACHINE_CODE))]
    return found + [Drift(case, "", 0, 0, "gone") for case in gone]


def _verdict(figure: str, old: Estimate, new: Estimate) -> str:
    """Of intervals, so that a median of few samples is not taken for more than it is."""
    if figure == "stack":
        return f"more than {old.median + _STACK:.0f}" if new.median > LIMITS[figure] * old.median + _STACK else ""
    limit = LIMITS[figure]
    return f"grew beyond {limit:g}x" if new.low > limit * old.high else ""
