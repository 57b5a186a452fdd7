"""Tables: JSON files of what was found to be fastest on a card. Reading one never raises, and never executes anything.

NOTE [Untrusted tables]
  A file may be truncated, of another program, of a newer version, a device that never ends, or made to do harm. What
  is not understood is ignored with a warning. An entry's parameters have to lie in the space of its kernel
  (``space.outside``, ``space.excluded``), so no file can make a kernel be launched with sizes that nobody meant.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from gka_ops.autotune import space
from gka_ops.autotune.device import Device
from gka_ops.autotune.fingerprint import fingerprint, triton_version
from gka_ops.autotune.key import Key
from gka_ops.autotune.space import Parameters

SCHEMA = 1  # part of the files' names, so that versions of the library with different ones do not share any
SHIPPED = Path(__file__).resolve().parent / "configs"
NO_FOLDER = "there is no folder for tables: name one in GKA_OPS_AUTOTUNE_DIR, or install platformdirs"
_MOST_BYTES = 4 * 2**20
_LOCK_SECONDS = 30.0
_TEXT = re.compile(r"[\x20-\x7e]{0,200}")


class TableWarning(UserWarning):
    """A file of launch configurations was ignored, or could not be written."""


@dataclass(frozen=True)
class Entry:
    """What was found for a key.

    Attributes:
        parameters: a value for each of the kernel's parameters.
        microseconds: what a launch took, as the mean of a call's; ``heuristic_microseconds``: with what would run
            without the table.
        candidates: how many were timed.
        triton: its version.
        fingerprint: of the kernel and its space, then.
        tuned: the day, ISO 8601.
    """

    parameters: Parameters
    microseconds: float
    heuristic_microseconds: float
    candidates: int
    triton: str
    fingerprint: str
    tuned: str

    def stale(self, kernel: str) -> str | None:
        """Why the entry no longer counts, if so."""
        if self.triton != triton_version():
            return f"tuned with Triton {self.triton}, {triton_version() or 'none'} is installed"
        if self.fingerprint != fingerprint(kernel):
            return "the kernel or its space changed since"
        return None


@dataclass
class Table:
    """The entries of one file. ``foreign`` are those of kernels that only another version of the library knows."""

    device: Device
    entries: dict[Key, Entry] = field(default_factory=dict)
    foreign: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        entries = {str(key): asdict(entry) for key, entry in self.entries.items()}
        content = {
            "schema": SCHEMA,
            "device": asdict(self.device),
            "entries": dict(sorted({**self.foreign, **entries}.items())),
        }
        return json.dumps(content, indent=1) + "\n"


def new_entry(
    kernel: str, parameters: Parameters, microseconds: float, heuristic_microseconds: float, candidates: int
) -> Entry:
    """An entry of today, for the kernel as it is."""
    return Entry(
        dict(parameters), round(microseconds, 3), round(heuristic_microseconds, 3), candidates, triton_version(),
        fingerprint(kernel), date.today().isoformat(),
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- places
def file_name(device: Device) -> str:
    return f"{device.slug}.v{SCHEMA}.json"


def user_folder() -> Path | None:
    """Where tables of this user's own are: ``GKA_OPS_AUTOTUNE_DIR``, or in the platform's folder for caches.

    ``None``, and the user has no tables, where neither is known: without ``platformdirs``, or without a home.
    """
    if folder := os.environ.get("GKA_OPS_AUTOTUNE_DIR"):
        return Path(folder)
    try:
        import platformdirs

        return platformdirs.user_cache_path("gka-ops") / "autotune"
    except (ImportError, OSError, RuntimeError):
        return None


# -------------------------------------------------------------------------------------------------------------- reading
def read(path: Path) -> Table | None:
    """The table in a file; ``None``, with a warning for a file that is none, or where there is no file."""
    try:
        text = content(path)
        return None if text is None else parse(text, path)
    except (OSError, ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        warnings.warn(f"{path} is ignored: {str(error)[:300]}", TableWarning, stacklevel=2)
        return None


def parse(text: str | bytes, path: Path) -> Table:
    """The table that a text says. Raises ``ValueError`` and the like where it says none; ``path`` is for messages."""
    return _parsed(json.loads(text, parse_constant=_refused), path)


def content(path: Path) -> bytes | None:
    """The bytes of a regular file of moderate size, or ``None`` where there is nothing."""
    try:
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except (FileNotFoundError, NotADirectoryError):
        return None
    with os.fdopen(number, "rb") as file:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise ValueError("it is no regular file")
        found = file.read(_MOST_BYTES + 1)
    if len(found) > _MOST_BYTES:
        raise ValueError(f"it is larger than {_MOST_BYTES} bytes")
    return found


def _refused(constant: str) -> float:
    raise ValueError(f"{constant} is no time")


def _is_number(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not _TEXT.fullmatch(value):
        raise ValueError(f"expected {name} as a short text")
    return value


def _parsed(content: Any, path: Path) -> Table:
    if not isinstance(content, dict) or "schema" not in content:
        raise ValueError("it is no table of launch configurations")
    if content["schema"] != SCHEMA or type(content["schema"]) is not int:
        raise ValueError(f"expected schema {SCHEMA}, got {str(content['schema'])[:40]}")
    table = Table(_device(content["device"]))
    if not isinstance(content["entries"], dict):
        raise ValueError("expected entries by key")
    refused = []
    for text, fields in content["entries"].items():
        try:
            key = Key.parse(text)
            if key.kernel not in space.KERNELS:
                raise ValueError("unknown kernel")
        except ValueError:
            table.foreign[text] = fields
            continue
        try:
            table.entries[key] = _entry(fields, key, table.device)
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            refused.append(f"{key} ({error})")
    if refused:
        message = f"{path}: {len(refused)} entries are ignored: {'; '.join(refused[:3])}"
        warnings.warn(message, TableWarning, stacklevel=3)
    return table


def _device(fields: Any) -> Device:
    capability = fields["capability"]
    if not isinstance(capability, list) or len(capability) != 2 or not all(_is_number(n, 0, 99) for n in capability):
        raise ValueError("expected a compute capability [major, minor]")
    for name, most in (("multiprocessors", 2**16), ("shared_memory", 2**30)):
        if not _is_number(fields[name], 1, most):
            raise ValueError(f"expected {name} as a number up to {most}")
    return Device(
        _text(fields["name"], "the device's name"), (capability[0], capability[1]), fields["multiprocessors"],
        fields["shared_memory"],
    )  # fmt: skip


def _entry(fields: Any, key: Key, device: Device) -> Entry:
    parameters = fields["parameters"]
    reason = space.outside(key.kernel, parameters) or space.excluded(key.kernel, key, parameters, device)
    if reason is not None:
        raise ValueError(reason)
    for name in ("microseconds", "heuristic_microseconds"):
        if type(fields[name]) not in (int, float) or not 0 <= fields[name] <= 1e9:
            raise ValueError(f"expected {name} between 0 and 1e9")
    if not _is_number(fields["candidates"], 0, 10**6):
        raise ValueError("expected candidates as a number")
    return Entry(
        dict(parameters), float(fields["microseconds"]), float(fields["heuristic_microseconds"]), fields["candidates"],
        _text(fields["triton"], "triton"), _text(fields["fingerprint"], "fingerprint"), _text(fields["tuned"], "tuned"),
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- writing
def writable() -> bool:
    """Whether what it takes to change tables is installed."""
    try:
        import filelock  # noqa: F401
    except ImportError:
        return False
    return True


def update(path: Path, device: Device, change: Callable[[dict[Key, Entry]], None]) -> bool:
    """Reads the table, changes its entries and writes it, while no other process does. Whether that could be done.

    What is there and no table is kept beside it, as ``*.unreadable``.
    """
    try:
        with _locked(path):
            table = read(path)
            if table is None and path.exists():
                os.replace(path, path.with_name(path.name + ".unreadable"))
            if table is None or table.device != device:
                table = Table(device)
            change(table.entries)
            write(path, table.to_json())
            return True
    except (ImportError, OSError, TimeoutError) as error:  # without filelock nothing is written
        message = f"launch configurations are not kept: {path} could not be written ({error})"
        warnings.warn(message, TableWarning, stacklevel=2)
        return False


def add(path: Path, device: Device, entries: Mapping[Key, Entry]) -> bool:
    """Puts entries into a table, in the place of older ones. Whether that could be done."""
    return update(path, device, lambda known: known.update(entries))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock", timeout=_LOCK_SECONDS):
        yield


def write(path: Path, text: str) -> None:
    """All of it or nothing, also where the machine stops on the way."""
    number, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(number)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
