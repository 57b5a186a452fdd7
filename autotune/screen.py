"""What the command line shows: drawn by rich where that is installed and a terminal looks on, else plain text."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from gka_ops.autotune.report import Rows
from gka_ops.autotune.tuner import Progress

_LINES = 10  # of a phase, in plain text


def console() -> Any:
    """rich's, or ``None`` where plain text is to be written."""
    if not sys.stdout.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(markup=False, highlight=False)


def show(part: str | Rows) -> None:
    """Prints a line or, with an empty line before it, a table."""
    drawn = console()
    if isinstance(part, str):
        print(part)
    elif drawn is None:
        print(f"\n{part}")
    else:
        from rich.table import Column, Table

        columns = Table(*(Column(name, overflow="fold") for name in part.header))  # keys are there to be copied
        for row in part.rows:
            columns.add_row(*row)
        drawn.print(columns)


@contextlib.contextmanager
def progress() -> Iterator[Progress]:
    """Shows how far phases are: as bars, or in plain text as a few lines for each."""
    drawn = console()
    if drawn is None:
        yield _in_lines()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, TextColumn("{task.fields[text]}", markup=False), console=drawn) as bars:
        tasks: dict[str, Any] = {}

        def advance(phase: str, done: int, total: int, text: str) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total, text=text)
            bars.update(tasks[phase], completed=done, total=total, text=text)

        yield advance


def _in_lines() -> Progress:
    shown: dict[str, int] = {}

    def advance(phase: str, done: int, total: int, text: str) -> None:
        tenth = done * _LINES // max(1, total)
        if shown.get(phase) != tenth:
            shown[phase] = tenth
            print(f"{phase} {done}/{total}: {text}", flush=True)

    return advance
