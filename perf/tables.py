"""Tables for people: on a terminal, and as Markdown for a comment."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Literal

from tabulate import tabulate

from gka_ops_perf.baseline import Drift
from gka_ops_perf.compare import Row
from gka_ops_perf.measure import EAGER, KERNEL
from gka_ops_perf.records import Estimate, Measurement, Record
from gka_ops_perf.trace import Hot

Format = Literal["simple", "github", "html"]


def number(value: float | None) -> str:
    """Four digits."""
    return "" if value is None else f"{value:.4g}"


def interval(found: Estimate | None) -> str:
    return "" if found is None else f"{found.low:.3f}–{found.high:.3f}"


def comparison(rows: Iterable[Row], form: Format = "simple") -> str:
    """Case, base, head, ratio, its interval and the verdict."""
    cells = [
        (
            row.case, row.figure, number(row.base), number(row.head), f"{row.ratio.median:.3f}" if row.ratio else "",
            interval(row.ratio), f"{row.verdict}: {row.reason}" if row.reason else row.verdict,
        )
        for row in rows
    ]  # fmt: skip
    header = ("case", "figure", "base", "head", "head / base", "95 %", "verdict")
    return tabulate(cells, headers=header, tablefmt=form, disable_numparse=True)


def drifts(found: Iterable[Drift]) -> str:
    cells = [(drift.case, drift.figure, number(drift.stored), number(drift.now), drift.verdict) for drift in found]
    return tabulate(cells, headers=("case", "figure", "stored", "now", "verdict"), disable_numparse=True)


def floor_milliseconds(measurement: Measurement, record: Record) -> float | None:
    """What arithmetic or memory allows at the speeds that the run saw; ``None`` where either is not known."""
    speeds = record.run.reference
    if not measurement.flops or not measurement.bytes or not speeds:
        return None
    arithmetic = measurement.flops / (speeds["bf16 product TFLOP/s"] * 1e12)
    memory = measurement.bytes / (max(speeds["copy GB/s"], speeds["read GB/s"]) * 1e9)
    return max(arithmetic, memory) * 1e3


def share(measurement: Measurement, record: Record) -> float | None:
    """Of the roofline that a call's kernel time reaches."""
    floor = floor_milliseconds(measurement, record)
    return floor / measurement.figures[KERNEL].median if floor and KERNEL in measurement.figures else None


def run(record: Record, form: Format = "simple") -> str:
    """Every measurement of a run on a card; below, why some are none."""
    cells, reasons = [], list(dict.fromkeys(m.reason for m in record.measurements if m.reason))
    for m in record.measurements:
        kernel, eager = m.figures.get(KERNEL), m.figures.get(EAGER)
        reached, median = share(m, record), kernel.median if kernel else None
        cells.append((
            m.case, number(median), interval(kernel), number(eager.median if eager else None),
            number(m.tokens / median * 1e-3) if median else "", f"{reached:.0%}" if reached else "",
            ", ".join(f"{name} {error:.1e}" for name, error in worst(m)),
            f"{m.status} ({reasons.index(m.reason) + 1})" if m.reason else m.status,
        ))  # fmt: skip
    header = ("case", "kernel ms", "95 %", "eager ms", "M tokens/s", "roofline", "error", "")
    table = tabulate(cells, headers=header, tablefmt=form, disable_numparse=True)
    notes = [f"({i}) {reason}" for i, reason in enumerate(reasons, 1)]
    if form == "html":
        return "\n".join((table, *(f"<p>{html.escape(note)}</p>" for note in notes)))
    return "\n\n".join((table, *notes))


def worst(measurement: Measurement) -> Sequence[tuple[str, float]]:
    """The output's error and the largest of a gradient."""
    errors = dict(measurement.errors)
    outputs = [(name, errors.pop(name)) for name in ("x", "o") if name in errors]
    return [*outputs, *sorted(errors.items(), key=lambda item: item[1])[-1:]]


def figures(record: Record) -> str:
    """Every figure of a run on a CPU."""
    cells: list[tuple[str, ...]] = []
    for m in record.measurements:
        for name, value in m.figures.items():
            cells.append((m.case, name, number(value.median), interval(value), m.status))
        if not m.figures:
            cells.append((m.case, "", "", "", f"{m.status}: {m.reason}"))
    return tabulate(cells, headers=("case", "figure", "median", "95 %", ""), disable_numparse=True)


def hot(found: Iterable[Hot]) -> str:
    """What a training step spends its time on."""
    cells = [(h.name[:90], number(h.milliseconds), f"{h.share:.1%}", number(h.calls)) for h in found]
    return tabulate(cells, headers=("kernel", "ms a step", "share", "calls a step"), disable_numparse=True)
