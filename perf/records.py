"""What a run measured, as JSON lines: a header, then a line for every measurement. One file a run, never changed.

A line is an object whose ``kind`` is the name of a class below; :func:`read` accepts exactly their fields and types.
Files lie under ``perf/results/<gpu>/`` and are named after the run's time and commit.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

SCHEMA = 1
RESULTS = Path(__file__).resolve().parent / "results"

Status = Literal["measured", "inaccurate", "unstable", "unavailable", "failed"]
STATUSES: tuple[str, ...] = typing.get_args(Status)


class RecordError(ValueError):
    """A file or a line of it is not what this module writes."""


@dataclass(frozen=True)
class Estimate:
    """A median and the interval that holds it with a probability of 95 %, by bootstrap over ``samples`` samples."""

    median: float
    low: float
    high: float
    samples: int


@dataclass(frozen=True)
class Machine:
    """Where and when a run was made. A driver or card that is not there is an empty text."""

    gpu: str
    driver: str
    cpu: str
    torch: str
    triton: str
    python: str
    commit: str
    date: str  # ISO 8601, UTC


@dataclass(frozen=True)
class Run:
    """The header of a file. ``reference`` has the speed of fixed work (TFLOP/s, GB/s), to compare machines by."""

    suite: str
    machine: Machine
    reference: Mapping[str, float] = field(default_factory=dict)
    clocks: Mapping[str, float] = field(default_factory=dict)  # MHz, °C and W at the end of the run
    schema: int = SCHEMA


@dataclass(frozen=True)
class Measurement:
    """What one case gave: figures by name ("kernel ms", "eager ms", "ratio", ...) or the reason why there are none.

    Attributes:
        case: the case's name, unique within a run.
        group: cases of one group do the same job by different means.
        provider: whose implementation: "gka", "gka num_iter=0", "sdpa", ...
        tokens: that a call works through; 0 where that means nothing.
        flops: floating-point operations of a call, a multiply-add being two (MATH.md §6); 0 where unknown.
        bytes: the least that a call has to move to and from memory; 0 where unknown.
        errors: relative errors against fp64 by name, of the call that was timed.
    """

    case: str
    group: str
    provider: str
    status: Status
    reason: str = ""
    tokens: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    figures: Mapping[str, Estimate] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    parameters: Mapping[str, str | int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.status == "measured") != bool(self.figures):
            raise RecordError(f"{self.case}: expected figures if and only if it was measured, got {self.status}")


@dataclass(frozen=True)
class Record:
    """A run with its measurements."""

    run: Run
    measurements: tuple[Measurement, ...]

    def by_case(self) -> dict[str, Measurement]:
        return {measurement.case: measurement for measurement in self.measurements}


_KINDS: dict[str, type[Run] | type[Measurement]] = {"Run": Run, "Measurement": Measurement}


def folder_of(gpu: str) -> str:
    """The name of a card's folder below ``perf/results``: "NVIDIA H100 80GB HBM3" → "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") or "cpu"


def file_name(run: Run) -> str:
    time = re.sub(r"[^0-9T]", "", run.machine.date.split("+")[0])
    return f"{time}-{re.sub(r'[^0-9A-Za-z]+', '-', run.machine.commit) or 'unknown'}-{run.suite}.jsonl"


def write(record: Record, root: Path = RESULTS) -> Path:
    """Writes a new file below ``root`` and returns its path. A file that is there is kept (FileExistsError)."""
    path = root / folder_of(record.run.machine.gpu) / file_name(record.run)
    lines = [_line(record.run), *map(_line, record.measurements)]
    parse("\n".join(lines), str(path))  # what could not be read again is not written
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.part")
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    try:
        os.link(temporary, path)  # unlike a rename this fails where the file exists
    finally:
        temporary.unlink()
    return path


def read(path: Path) -> Record:
    """Raises ``RecordError`` that names the line where the file is not what :func:`write` writes."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: {error}") from None
    return parse(text, str(path))


def read_all(root: Path = RESULTS) -> list[Record]:
    """Every run below ``root``, by card and then from old to new."""
    return [read(path) for path in sorted(root.glob("*/*.jsonl"))]


def parse(text: str, source: str) -> Record:
    parts = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            parts.append(_part(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise RecordError(f"{source}, line {number}: {error}") from None
    first, rest = (parts[0], parts[1:]) if parts else (None, [])
    if not isinstance(first, Run):
        raise RecordError(f"{source}: expected a run in its first line")
    measurements = [part for part in rest if isinstance(part, Measurement)]
    if len(measurements) != len(rest):
        raise RecordError(f"{source}: expected one run, got several")
    names = [measurement.case for measurement in measurements]
    if doubled := {name for name in names if names.count(name) > 1}:
        raise RecordError(f"{source}: expected every case once, got several of {', '.join(sorted(doubled))}")
    return Record(first, tuple(measurements))


def _line(part: Run | Measurement) -> str:
    return json.dumps({"kind": type(part).__name__, **dataclasses.asdict(part)}, ensure_ascii=False, allow_nan=False)


def _part(value: Any) -> Run | Measurement:
    if not isinstance(value, dict) or value.get("kind") not in _KINDS:
        raise RecordError(f"expected an object whose kind is {' or '.join(_KINDS)}")
    found: Run | Measurement = _checked(_KINDS[value.pop("kind")], value, "line")
    if isinstance(found, Run) and found.schema != SCHEMA:
        raise RecordError(f"expected schema {SCHEMA}, got {found.schema}")
    return found


def _checked(wanted: Any, value: Any, where: str) -> Any:
    """``value`` as an object of type ``wanted``. Raises ``RecordError``."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if dataclasses.is_dataclass(wanted) and isinstance(wanted, type):
        hints = typing.get_type_hints(wanted)
        if not isinstance(value, dict) or value.keys() != hints.keys():
            got = sorted(value) if isinstance(value, dict) else value
            raise RecordError(f"{where}: expected the fields {', '.join(hints)}, got {got}")
        return wanted(**{name: _checked(hint, value[name], f"{where}.{name}") for name, hint in hints.items()})
    if origin is Literal:
        if value not in arguments:
            raise RecordError(f"{where}: expected one of {', '.join(arguments)}, got {value!r}")
        return value
    if origin in (types.UnionType, typing.Union):
        if type(value) not in arguments:
            raise RecordError(f"{where}: expected {wanted}, got {value!r}")
        return value
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise RecordError(f"{where}: expected an object, got {value!r}")
        return {name: _checked(arguments[1], item, f"{where}.{name}") for name, item in value.items()}
    if wanted is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if wanted is not float and type(value) is wanted:
        return value
    raise RecordError(f"{where}: expected {wanted.__name__}, got {value!r}")


def only(measurements: Iterable[Measurement], status: Status = "measured") -> list[Measurement]:
    return [measurement for measurement in measurements if measurement.status == status]
