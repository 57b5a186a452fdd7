"""What a run shows while it works: a line for each stage, and a bar or, where there is no terminal, lines of steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINES = 10
"""Lines of steps in one training where there is no terminal to draw a bar on."""


class Display:
    """Shows stages and steps on ``console``. A context manager, in which the bars live.

    Args:
        unit: of the losses that are shown.
    """

    def __init__(self, console: Console, unit: str = "bits/byte") -> None:
        self._console = console
        self._unit = unit
        self._start = time.perf_counter()
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(f"{{task.fields[loss]}} {unit}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Display:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def seconds(self) -> float:
        """Since the display was made."""
        return time.perf_counter() - self._start

    def stage(self, text: str) -> None:
        self._console.print(f"{self.seconds():6.1f} s  {text}", markup=False, highlight=False, soft_wrap=True)
        self._console.file.flush()

    def training(self, label: str, steps: int) -> Callable[[int, float], None]:
        """Begins a training of so many steps; returns what to call after each with its number, from 1, and its loss
        in nats."""
        task = self._bars.add_task(label, total=steps, loss="-.---")

        def done(step: int, loss: float) -> None:
            bits = f"{loss / math.log(2):.3f}"
            self._bars.update(task, completed=step, loss=bits)
            if self._bars.disable and (step == 1 or step * LINES // steps > (step - 1) * LINES // steps):
                self.stage(f"{label}: step {step} of {steps}, {bits} {self._unit}")

        return done
