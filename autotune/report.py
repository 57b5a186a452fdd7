"""What was found when a key was tuned, and how tables and parameters are written for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gka_ops.autotune import choice, space, tuner
from gka_ops.autotune.choice import Choice
from gka_ops.autotune.device import Device, current
from gka_ops.autotune.key import Key
from gka_ops.autotune.space import Parameters, Pruned
from gka_ops.autotune.table import Entry
from gka_ops.autotune.tuner import Outcome

_RESOURCES = ("registers", "spills", "shared_memory")


@dataclass(frozen=True)
class Rows:
    """A table for people: a header and rows of as many cells."""

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def __str__(self) -> str:
        widths = [max(len(row[i]) for row in (self.header, *self.rows)) for i in range(len(self.header))]
        lines = (self.header, tuple("-" * width for width in widths), *self.rows)
        cells = ((cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
        return "\n".join("  ".join(line).rstrip() for line in cells)


@dataclass(frozen=True)
class Explanation:
    """Why a kernel runs with what it runs with; ``str()`` of it is what ``gka-autotune explain`` prints.

    Attributes:
        choice: what runs, and where that comes from.
        device: the card that this is about.
        timed: candidates that are right, the fastest first, with their times, registers, spills and shared memory.
        failed: candidates that do not compile, are wrong, crash or hang, with the reason.
        waiting: how many candidates were not brought to an end.
        pruned: combinations that are never tried, with the reason.
    """

    choice: Choice
    device: Device
    timed: tuple[Outcome, ...]
    failed: tuple[Outcome, ...]
    waiting: int
    pruned: tuple[Pruned, ...]

    def parts(self, top: int = 10) -> list[str | Rows]:
        """Lines and tables; of the candidates that were timed, the fastest ``top``."""
        found, key = self.choice, self.choice.key
        where = f"{found.origin}{f', {found.file}' if found.file else ''}"
        parts: list[str | Rows] = [
            f"{key} on {self.device.name}",
            f"runs with {described(found.parameters)} ({where})",
            *(f"stale: {reason}" for reason in found.stale),
            f"{len(self.timed)} candidates timed, {len(self.failed)} failed, {self.waiting} not tried to the end, "
            f"{len(self.pruned)} combinations left out",
        ]
        if self.timed:
            rows = [
                (f"{o.microseconds:.1f}", *(str(o.resources.get(name, "")) for name in _RESOURCES),
                 described(o.parameters))
                for o in self.timed[:top]
            ]  # fmt: skip
            parts.append(Rows(("µs", "registers", "spills", "shared memory", "parameters"), rows))
        if self.failed:
            parts.append(Rows(("failed", "why"), [(described(o.parameters), o.failure or "") for o in self.failed]))
        if self.pruned:
            reasons = Counter(p.reason for p in self.pruned)
            parts.append(Rows(("left out", "why"), [(str(n), reason) for reason, n in reasons.most_common()]))
        return parts

    def __str__(self) -> str:
        return "\n".join(f"\n{part}" if isinstance(part, Rows) else part for part in self.parts())


def explain(key: Key, device: Device | None = None) -> Explanation:
    """What is known of the candidates for a key on a card, by default the current one."""
    device = device or current(torch.cuda.current_device())
    tried, pruned = space.candidates(key.kernel, key, device)
    outcomes = tuner.outcomes(key, device)
    timed = sorted((o for o in outcomes if o.times and o.failure is None), key=lambda o: o.microseconds)
    failed = [o for o in outcomes if o.failure is not None]
    waiting = max(len(tried), len(outcomes)) - len(timed) - len(failed)
    return Explanation(choice.lookup(key, device), device, tuple(timed), tuple(failed), waiting, tuple(pruned))


def described(parameters: Parameters) -> str:
    return " ".join(f"{name}={value}" for name, value in parameters.items() if value is not None)


def gain(entry: Entry | None) -> str:
    """What an entry says of its time, and how many times that of the heuristic is longer."""
    if entry is None or not entry.microseconds:
        return ""
    return f"{entry.microseconds:.1f} µs, {entry.heuristic_microseconds / entry.microseconds:.2f}x"
