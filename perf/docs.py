"""Fills the figures into the documentation, from what is stored under ``perf/results``.

A figure stands between two comments, ``<!-- figures: NAME -->`` and ``<!-- end of figures -->``; what is between them
is written by :func:`fill` and by nobody else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from gka_ops_perf import records, tables
from gka_ops_perf.bars import AUTHORS_TIMES
from gka_ops_perf.records import RESULTS, Record

ROOT = Path(__file__).resolve().parent.parent
FILES = ("README.md", "docs/performance.md", "docs/recall.md")

_BLOCK = re.compile(
    r"(?P<begin><!-- figures: (?P<name>[^>]*?) -->\n)(?P<text>.*?)(?P<end><!-- end of figures -->)", re.S
)


class DocsError(ValueError):
    """A block of figures that nothing is known of."""


def fill(text: str, results: Path = RESULTS) -> str:
    """``text`` with every block of figures written anew. Raises ``DocsError`` where a name or its file is unknown."""

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        kind, _, argument = name.partition(" ")
        if kind not in _TABLES:
            raise DocsError(f"expected figures named {', '.join(_TABLES)}, got {name!r}")
        return f"{match['begin']}\n{_TABLES[kind](results, argument)}\n\n{match['end']}"

    return _BLOCK.sub(block, text)


def files(root: Path = ROOT) -> dict[Path, tuple[str, str]]:
    """What stands in each file that has figures, and what should."""
    found = {}
    for name in FILES:
        path = root / name
        text = path.read_text(encoding="utf-8")
        found[path] = text, fill(text, root / "perf" / "results")
    return found


def _stored(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DocsError(f"{path}: {error}") from None


def _origin(stored: Any) -> str:
    return (
        f"{stored['card']}, driver {stored['driver']}, torch {stored['torch']}, Triton {stored['triton']}, "
        f"{stored['date'][:10]}, commit {stored['commit']}."
    )


def _table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    return tabulate(rows, headers=header, tablefmt="github", disable_numparse=True)


def _bars(results: Path, folder: str) -> str:
    """The figures to beat: ``bars FOLDER``."""
    stored = _stored(results / folder / "bars.json")
    rows = [
        (
            row["what"], f"{tables.number(row['measured'])} {row['unit']}", tables.number(row["must"]),
            tables.number(row["reach"]), AUTHORS_TIMES.get(row["what"], ""), row["verdict"],
        )
        for row in stored["rows"]
    ]  # fmt: skip
    return f"{_origin(stored)}\n\n{_table(rows, ('what', 'measured', 'must', 'reach', 'others', 'verdict'))}"


def _errors(results: Path, folder: str) -> str:
    """The accuracy beside those times: ``errors FOLDER``."""
    stored = _stored(results / folder / "bars.json")
    names = list(dict.fromkeys(name for row in stored["errors"].values() for name in row))
    rows = [(label, *(f"{row[name]:.1e}" for name in names)) for label, row in stored["errors"].items()]
    return f"{_origin(stored)}\n\n{_table(rows, ('', *names))}"


def _gain(results: Path, argument: str) -> str:
    """What tables of configurations gain: ``gain FOLDER calls``, or ``kernels``."""
    folder, _, part = argument.partition(" ")
    stored = _stored(results / folder / "gain.json")
    if part not in ("calls", "host", "kernels"):
        raise DocsError(f"expected gain FOLDER calls, host or kernels, got {argument!r}")
    number = tables.number
    rows = [
        (row["what"], f"{number(row['heuristic'])} {row['unit']}", number(row["tuned"]), f"{row['ratio']:.3f}")
        for row in stored[part]["rows"]
        if part != "kernels" or round(row["ratio"], 2) != 1
    ]
    mean = f"Geometric mean of {len(stored[part]['rows'])} ratios: {stored[part]['geometric mean']:.3f}."
    return f"{_origin(stored)}\n\n{_table(rows, ('', 'heuristic', 'table', 'ratio'))}\n\n{mean}"


def _cold(results: Path, folder: str) -> str:
    """The first call of fresh processes: ``cold FOLDER``."""
    stored = _stored(results / folder / "gain.json")
    if "first call, s" not in stored:
        raise DocsError(f"expected gain --cold in {results / folder}, found no first call")
    rows = [(what, f"{tables.number(seconds)} s") for what, seconds in stored["first call, s"].items()]
    return f"{_origin(stored)}\n\n{_table(rows, ('', 'first call'))}"


def _written_down(results: Path, name: str) -> str:
    """What a profiler said or an experiment gave, as it was written down then: ``table FOLDER/NAME``."""
    stored = _stored(results / f"{name}.json")
    lines = (stored["header"], *stored["rows"])
    header, *rows = (f"| {' | '.join(cells)} |" for cells in lines)  # not padded, for cells may be sentences
    return "\n".join((stored["origin"], "", header, f"|{'---|' * len(stored['header'])}", *rows))


def _suite(results: Path, argument: str) -> str:
    """Cases of the newest full run of a card: ``suite FOLDER TEXT``, those with TEXT in their names."""
    folder, _, select = argument.partition(" ")
    found = [records.read(path) for path in sorted((results / folder).glob("*-full.jsonl"))]
    if not found:
        raise DocsError(f"expected a run of suite full in {results / folder}, found none")
    newest = max(found, key=lambda record: record.run.machine.date)
    chosen = tuple(m for m in newest.measurements if select in m.case)
    machine = newest.run.machine
    origin = (
        f"{machine.gpu}, torch {machine.torch}, Triton {machine.triton}, {machine.date[:10]}, commit {machine.commit}."
    )
    return f"{origin}\n\n{tables.run(Record(newest.run, chosen), 'github')}"


_TABLES: dict[str, Callable[[Path, str], str]] = {
    "bars": _bars, "errors": _errors, "gain": _gain, "cold": _cold, "suite": _suite, "table": _written_down,
}  # fmt: skip
