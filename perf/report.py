"""Writes a run down for people: Markdown, and one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from gka_ops_perf import plots, tables
from gka_ops_perf.cases import GKA
from gka_ops_perf.records import Measurement, Record

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto; }
td, th { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap; }
img { max-width: 100%; }
.note { color: #666; }
"""


class Section(NamedTuple):
    """A headline, what it says, and a plot with what it shows."""

    title: str
    text: str
    name: str
    figure: Figure


def sections(record: Record, history: Sequence[Record]) -> list[Section]:
    """The plots of a run; ``history`` are the card's runs, this one among them."""

    def tracked(m: Measurement) -> bool:
        return m.provider == GKA and m.group in TRACKED

    return [
        Section(
            "Over the length of a sequence",
            "Kernel time a token and tokens a second, of every implementation that ran here.",
            "length", plots.over_length(record),
        ),
        Section(
            "Share of the roofline",
            "The least time that the card's arithmetic or memory allows, at the speeds of this run's fixed product and "
            "copy, over the time that was measured.",
            "roofline", plots.roofline(record),
        ),
        Section(
            "Accuracy against time",
            "Every further iteration of the solve costs time and makes the answer more exact.",
            "accuracy", plots.accuracy(record),
        ),
        Section(
            "History", "Kernel times over the commits that were measured on this card.", "history",
            plots.history(history, tracked),
        ),
    ]  # fmt: skip


TRACKED = (
    "chunk_gka forward 7B T8192", "chunk_gka forward + backward 7B T8192", "chunk_solve forward 7B T8192",
    "recurrent_gka decode 7B N64", "layer training step 7B T8192",
)  # fmt: skip
"""Groups that the history shows."""


def machine_lines(record: Record) -> list[str]:
    """Where, when and from what the figures are."""
    machine = record.run.machine
    state = ", ".join(f"{name} {tables.number(value)}" for name, value in record.run.clocks.items())
    speeds = ", ".join(f"{name} {tables.number(value)}" for name, value in record.run.reference.items())
    return [
        f"{machine.gpu or machine.cpu}, driver {machine.driver or 'none'}, torch {machine.torch}, "
        f"Triton {machine.triton or 'none'}, Python {machine.python}",
        f"commit {machine.commit}, {machine.date}, suite {record.run.suite}",
        f"fixed work: {speeds}; at the end: {state}",
    ]


def write(record: Record, history: Sequence[Record], folder: Path) -> list[Path]:
    """Writes ``report.md``, with its plots beside it, and ``report.html``. Returns their paths."""
    found = sections(record, history)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for section in found:
            section.figure.savefig(folder / f"{section.name}.png", dpi=130)
        paths = [folder / "report.md", folder / "report.html"]
        paths[0].write_text(_markdown(record, found), encoding="utf-8")
        paths[1].write_text(_page(record, found), encoding="utf-8")
    finally:
        plots.close(section.figure for section in found)
    return paths


def _markdown(record: Record, found: Sequence[Section]) -> str:
    parts = ["# Performance", "", *(f"{line}  " for line in machine_lines(record))]
    for section in found:
        parts += ["", f"## {section.title}", "", section.text, "", f"![{section.title}]({section.name}.png)"]
    return "\n".join([*parts, "", "## Every case", "", tables.run(record, "github"), ""])


def _page(record: Record, found: Sequence[Section]) -> str:
    lines = "<br>\n".join(map(html.escape, machine_lines(record)))
    plotted = "\n".join(
        f"<h2>{html.escape(section.title)}</h2>\n<p>{html.escape(section.text)}</p>\n"
        f'<img id="{section.name}" alt="{html.escape(section.title)}" src="{_png(section.figure)}">'
        for section in found
    )
    table = tables.run(record, "html")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>gka-ops performance</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>Performance</h1>\n"
        f'<p class="note">{lines}</p>\n{plotted}\n<h2>Every case</h2>\n{table}\n</body>\n</html>\n'
    )


def _png(figure: Figure) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=130)
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
