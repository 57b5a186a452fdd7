"""What tables of launch configurations gain over the heuristics, on one card: ``python -m gka_ops_perf.gain``.

Calls of the public operators are timed with the heuristics alone and with the tables in force, in turns within one
process; see ``gka_ops_perf.bars`` for how. A second table has the host's time of small calls, which tables should not
change, and a third one the kernels' own times from those tables, as they were tuned. ``--cold`` measures the first call
of fresh processes too, with an empty and with a filled Triton cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from tabulate import tabulate

from gka_ops.autotune import choice
from gka_ops.autotune.device import Device, current
from gka_ops.autotune.table import Entry, Table
from gka_ops_perf import bars

ROUNDS = 5

Tables = list[tuple[Path, Table]]


class Case(NamedTuple):
    """A row: what is called, the unit, and how to make a function that measures it once."""

    name: str
    unit: str
    prepare: Callable[[], Callable[[], float]]


class Gain(NamedTuple):
    """What something takes with the heuristics and with the tables."""

    what: str
    unit: str
    heuristic: float
    tuned: float

    @property
    def ratio(self) -> float:
        return self.heuristic / self.tuned


def cases() -> list[Case]:
    few = {"num_iter": bars.ACCURATE_AS_AUTHORS}

    def timed(
        of: Callable[..., Callable[[], Any]], B: int = 2, T: int = 8192, *, repeats: int = bars.REPEATS,
        options: dict[str, Any] | None = None, **shape: Any,
    ) -> Callable[[], Callable[[], float]]:  # fmt: skip
        def prepare() -> Callable[[], float]:
            run = of(bars.make_inputs(B, T, grad=of is bars.forward_backward, **shape), **(options or {}))
            return lambda: bars.milliseconds(run, repeats)

        return prepare

    def decode(N: int) -> Case:
        name = f"decode N={N}, 8 kv heads, 30 iterations"
        return Case(name, "µs", lambda: lambda: bars.decode_microseconds(N))

    return [
        Case(f"forward, {bars.ACCURATE_AS_AUTHORS} iterations", "ms", timed(bars.forward, options=few)),
        Case("forward, default tolerance", "ms", timed(bars.forward)),
        Case("forward + backward, default tolerance", "ms", timed(bars.forward_backward)),
        Case("num_iter=0 forward", "ms", timed(bars.forward, options={"num_iter": 0})),
        Case("num_iter=0 forward + backward", "ms", timed(bars.forward_backward, options={"num_iter": 0})),
        Case("chunk_solve, 30 iterations", "ms", timed(bars.solve, options={"num_iter": 30})),
        Case(
            "prefill B1 T8192, 8 kv heads, state out", "ms",
            timed(bars.forward, 1, Hkv=8, options={"output_final_state": True}),
        ),
        *(decode(N) for N in (1, 64, 256)),
        Case("forward + backward, B1 T131072", "ms", timed(bars.forward_backward, 1, 131072, repeats=3)),
    ]  # fmt: skip


def host_cases() -> list[Case]:
    return [
        Case("chunk_gka forward", "µs", lambda: bars.host_microseconds_of_forward),
        Case("decode step", "µs", lambda: bars.host_microseconds_of_step),
    ]


def measure(case: Case, tables: Tables, rounds: int = ROUNDS) -> Gain:
    """Medians over rounds in which each of the two takes a turn."""
    measured = case.prepare()
    times: dict[bool, list[float]] = {False: [], True: []}
    try:
        for _ in range(rounds):
            for tuned in times:
                choice.adopt(tables if tuned else [])
                times[tuned].append(measured())
    finally:
        choice.reload()
    return Gain(case.name, case.unit, statistics.median(times[False]), statistics.median(times[True]))


def kernels(tables: Tables, device: Device) -> list[Gain]:
    """The times that are stored for this card, of entries that count; of two for one key, those of the first table."""
    entries: dict[str, Entry] = {}
    for _, table in tables:
        for key, entry in table.entries.items() if table.device == device else ():
            if not entry.stale(key.kernel):
                entries.setdefault(str(key), entry)
    return [
        Gain(key, "µs", entry.heuristic_microseconds, entry.microseconds)
        for key, entry in sorted(entries.items())
        if entry.microseconds and entry.heuristic_microseconds
    ]


def cold_start() -> dict[str, float]:
    """Seconds of the first call, forward and backward, of two processes that share a Triton cache, empty at first."""
    with tempfile.TemporaryDirectory() as cache:
        return {name: bars.first_call_seconds(cache) for name in ("empty cache", "filled cache")}


def mean(gains: list[Gain]) -> float | None:
    """The geometric mean of the ratios."""
    return statistics.geometric_mean(gain.ratio for gain in gains) if gains else None


def report(gains: list[Gain]) -> dict[str, Any]:
    rows = [{**gain._asdict(), "ratio": gain.ratio} for gain in gains]
    return {"rows": rows, "geometric mean": mean(gains)}


def show(title: str, gains: list[Gain]) -> None:
    print(f"\n{title}")
    print(tabulate(report(gains)["rows"], headers="keys", floatfmt=".4g"))
    if gains:
        print(f"geometric mean of the ratios: {mean(gains):.3f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to store the figures")
    parser.add_argument("--commit", help="what to store as the commit, where the checkout has no history")
    parser.add_argument("--cold", action="store_true", help="measure the first call of fresh processes as well")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gka_ops_perf.gain needs a CUDA card", file=sys.stderr)
        return 2

    tables = choice.read_all()
    cases_of = {"calls": cases(), "host": host_cases()}
    gains: dict[str, list[Gain]] = {name: [] for name in cases_of}
    every = [(name, case) for name, found in cases_of.items() for case in found]
    for name, case in track(every, "measuring", console=Console(stderr=True)):
        gains[name].append(measure(case, tables))
        torch.cuda.empty_cache()
    of_kernels = kernels(tables, current(torch.cuda.current_device()))
    show("Calls", gains["calls"])
    show("Host time", gains["host"])
    show("Kernels, as they were tuned", of_kernels)
    stored: dict[str, Any] = {**bars.environment(arguments.commit), "tables": [path.name for path, _ in tables]}
    stored |= {name: report(found) for name, found in (*gains.items(), ("kernels", of_kernels))}
    if arguments.cold:
        stored["first call, s"] = cold = cold_start()
        print(f"\nfirst call: {', '.join(f'{name} {seconds:.1f} s' for name, seconds in cold.items())}")
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
