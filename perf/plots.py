"""Plots of stored runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from gka_ops_perf.cases import GKA, VANILLA
from gka_ops_perf.measure import KERNEL
from gka_ops_perf.records import Measurement, Record, only
from gka_ops_perf.tables import share

COLOURS = {
    GKA: "#d1495b", VANILLA: "#edae49", "sdpa": "#00798c", "flex_attention": "#66a182", "fla simple_gla": "#8d96a3",
    "fla gated_delta_rule": "#5f4bb6", "fla mesa_net": "#2e4057",
}  # fmt: skip


def _figure(rows: int = 1, columns: int = 1, height: float = 4.2, width: float = 6.2) -> tuple[Figure, Any]:
    size = (width * columns, height * rows)
    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)


def sequence_cases(record: Record, stage: str, family: str) -> dict[str, list[Measurement]]:
    """``chunk_gka`` and its peers by provider, from short to long sequences."""
    found: dict[str, list[Measurement]] = {}
    for m in only(record.measurements):
        wanted = ("chunk_gka", stage, family)
        if tuple(m.parameters.get(name) for name in ("op", "stage", "family")) == wanted and "num_iter=" not in m.group:
            found.setdefault(m.provider, []).append(m)
    return {name: sorted(ms, key=_length) for name, ms in found.items()}


def _length(measurement: Measurement) -> int:
    return int(measurement.parameters["T"])


def over_length(record: Record, family: str = "7B") -> Figure:
    """Time of a call, and tokens a second, against the length of a sequence."""
    stages = ("forward", "forward + backward")
    figure, axes = _figure(2, len(stages))
    for column, stage in enumerate(stages):
        for name, found in sequence_cases(record, stage, family).items():
            lengths = [_length(m) for m in found]
            times = [m.figures[KERNEL].median / m.tokens for m in found]  # ms a token
            style = {"label": name, "color": COLOURS.get(name), "marker": "o"}
            axes[0, column].plot(lengths, [time * 1e3 for time in times], **style)
            axes[1, column].plot(lengths, [1e-3 / time for time in times], **style)
        for row, label in enumerate(("µs a token, all heads", "million tokens a second")):
            axis = axes[row, column]
            axis.set(xscale="log", yscale="log", xlabel="tokens a sequence", ylabel=label, title=stage)
            lengths = sorted({_length(m) for found in sequence_cases(record, stage, family).values() for m in found})
            axis.set_xticks(lengths, [f"{length // 1024}k" for length in lengths])
            axis.minorticks_off()
            axis.grid(True, alpha=0.25)
        if axes[0, column].lines:
            axes[0, column].legend(fontsize=8)
    return figure


def roofline(record: Record) -> Figure:
    """The share of the card's roofline that each of our calls reaches."""
    ours = [m for m in only(record.measurements) if m.provider in (GKA, VANILLA) and "num_iter=" not in m.group]
    found = [(m, reached) for m in ours if (reached := share(m, record))]
    figure, axes = _figure(width=9.0, height=max(2.0, 0.2 * len(found)))
    axis = axes[0, 0]
    axis.barh(
        [m.case for m, _ in found], [reached for _, reached in found], color=[COLOURS[m.provider] for m, _ in found]
    )
    axis.margins(y=0.01)
    axis.invert_yaxis()
    axis.set(xlim=(0, 1), xlabel="floor of arithmetic or memory over kernel time")
    axis.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    axis.tick_params(axis="y", labelsize=7)
    axis.grid(True, axis="x", alpha=0.25)
    return figure


def accuracy(record: Record) -> Figure:
    """The output's error against the time of a forward, by the solve's iterations."""
    figure, axes = _figure()
    axis = axes[0, 0]
    found = [m for m in only(record.measurements) if "num_iter=" in m.group]
    found.sort(key=lambda m: int(m.parameters["num_iter"]))
    times, errors = [m.figures[KERNEL].median for m in found], [m.errors["o"] for m in found]
    axis.plot(times, errors, marker="o", color=COLOURS[GKA])
    for m, time, error in zip(found, times, errors, strict=True):
        axis.annotate(
            str(m.parameters["num_iter"]), (time, error), textcoords="offset points", xytext=(5, 4), fontsize=8
        )
    axis.set(yscale="log", xlabel="ms a forward", ylabel="relative error of the output, p99 of tokens")
    axis.set_title("accuracy against time, by iterations of the solve")
    axis.grid(True, which="both", alpha=0.25)
    return figure


def history(records: Sequence[Record], chosen: Callable[[Measurement], bool]) -> Figure:
    """Kernel times over runs of one card, each relative to its first."""
    figure, axes = _figure()
    axis = axes[0, 0]
    runs = sorted(records, key=lambda record: record.run.machine.date)
    for case in dict.fromkeys(m.case for r in runs for m in only(r.measurements) if chosen(m)):
        points = [
            (i, m.figures[KERNEL].median)
            for i, r in enumerate(runs)
            if (m := r.by_case().get(case)) is not None and KERNEL in m.figures
        ]
        places, times = zip(*points, strict=True)
        axis.plot(places, [time / times[0] for time in times], marker="o", label=case)
    axis.set_xticks(range(len(runs)), [f"{r.run.machine.commit}\n{r.run.machine.date[:10]}" for r in runs], fontsize=7)
    axis.set(ylabel="kernel time over the first run's")
    axis.grid(True, alpha=0.25)
    if axis.lines:
        axis.legend(fontsize=7)
    return figure


def close(figures: Iterable[Figure]) -> None:
    for figure in figures:
        plt.close(figure)
