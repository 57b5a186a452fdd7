"""Which configuration runs: what tables say about a call, and where they say nothing, the heuristics.

The order is: what :func:`override` forces; an entry for the very key; the one for the nearest buckets of N and T; the
same two in tables of other cards of this compute capability; the heuristic of ``config.py``. This user's tables come
before those that are shipped. Files are read once a process, and a choice is made once a key.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import torch

from gka_ops.autotune import space, table
from gka_ops.autotune.config import ChunkConfig, RecurrentConfig, chunk_config, recurrent_config
from gka_ops.autotune.device import Device, current
from gka_ops.autotune.key import Key, Problem
from gka_ops.autotune.space import Config, Parameters
from gka_ops.autotune.table import Entry, Table

Mode: TypeAlias = Literal["cached", "shipped", "tune"]
"""Which tables count: this user's and the shipped ones (``cached``), or the shipped ones alone (``shipped``), so that
what runs depends on the version of the library and the card, and not on what was tuned on a machine. ``tune`` is
``cached``, and calls tune what no table knows."""

Overrides: TypeAlias = tuple[tuple[str, tuple[tuple[str, int | None], ...]], ...]

_K = TypeVar("_K")
_V = TypeVar("_V")

_MOST_CHOICES = 4096
_MOST_FILES = 64  # of a folder
_MISS_SECONDS = 60.0


class UntunedWarning(UserWarning):
    """There are tables, and none has an entry for a kernel that runs."""


class StaleWarning(UserWarning):
    """An entry was skipped because the kernel, its space or Triton changed since."""


@dataclass(frozen=True)
class Choice:
    """What a kernel runs with, and why.

    Attributes:
        key: what was looked up.
        parameters: a value for each of the kernel's parameters.
        origin: ``exact``, ``nearest``, ``architecture`` or ``heuristic``.
        file, found, entry: the table's file, the key in it and what it says; ``None`` for a heuristic.
        stale: why entries that would have come before were skipped.
    """

    key: Key
    parameters: Parameters
    origin: str
    file: Path | None = None
    found: Key | None = None
    entry: Entry | None = None
    stale: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Tables:
    """The tables of one card, and those of its kin, with their files; this user's first."""

    own: list[tuple[Path, Table]]
    kin: list[tuple[Path, Table]]
    known: bool  # whether there is any table at all


@dataclass(frozen=True)
class _Configured:
    """A call's configuration, with what its key names by identity, which has to live as long."""

    config: ChunkConfig | RecurrentConfig
    heuristic: ChunkConfig | RecurrentConfig
    device: Device | None


@dataclass(eq=False)
class _Settings:
    """What choices depend on beside the call, and what they were; replaced as a whole when it changes."""

    mode: Mode | None = None  # None: as the environment says
    miss_seconds: float = _MISS_SECONDS
    adopted: list[tuple[Path, Table]] | None = None  # in the place of all files
    tables: dict[tuple[Mode, Device], _Tables] = field(default_factory=dict, init=False)
    choices: dict[tuple[Mode, Key, Device], Choice] = field(default_factory=dict, init=False)
    configs: dict[tuple[object, ...], _Configured] = field(default_factory=dict, init=False)


_settings = _Settings()
_lock = threading.RLock()
_warned: set[tuple[str, str]] = set()


# ------------------------------------------------------------------------------------------------------------- settings
def state() -> tuple[object, Overrides, bool]:
    """What a recorded launch depends on: equal as long as all choices are."""
    return _settings, _active() if _overridden else (), _deterministic()


def use(mode: Mode | None) -> None:
    """Says which tables count in this process; ``None``: what the environment variable GKA_OPS_AUTOTUNE says whenever a
    choice is made, ``cached`` by default. A call that is already known keeps its choice when the variable changes.

    Under ``torch.use_deterministic_algorithms(True)`` it is ``shipped``, whatever is said here.
    """
    if mode is not None and mode not in get_args(Mode):
        raise ValueError(f"expected one of {get_args(Mode)} or None, got {mode!r}")
    _change(mode=mode)


def enable(seconds: float = _MISS_SECONDS) -> contextlib.AbstractContextManager[Any]:
    """Lets calls tune: one whose kernels no table knows tunes them before it launches them, and keeps what was found.

    From now on, or in the block of a ``with`` statement. The environment variable GKA_OPS_AUTOTUNE=tune does the same.
    A kernel is tuned once a process, in a process beside this one, into this user's table. Nothing is tuned while a
    CUDA graph is captured or ``torch.compile`` traces, in a training step, in a distributed job (there,
    :func:`~gka_ops.autotune.tune` does it on all ranks at once), and by ``chunk_solve``, which cannot tell a training
    step; the tables' or the heuristics' choice runs. So it does, with one warning, where tuning fails.

    ``seconds``: the time that one call may take for it, beside the start of processes.
    """
    if not seconds >= 1:
        raise ValueError(f"expected at least one second, got {seconds}")
    before = _settings
    _change(mode="tune", miss_seconds=seconds)
    block = contextlib.ExitStack()
    block.callback(_change, mode=before.mode, miss_seconds=before.miss_seconds)
    return block


def disable() -> None:
    """Calls use tables only from now on, this user's among them, also where the environment variable says ``tune``."""
    use("cached")


def reload() -> None:
    """Reads the tables anew when they are next needed, and forgets what was chosen and adopted."""
    adopt(None)


def adopt(tables: list[tuple[Path, Table]] | None) -> None:
    """Uses these tables, with the files that they came from, in the place of all files; ``None``: files again.

    Without any table, the heuristics run. While tables are adopted, no call tunes.
    """
    _change(adopted=tables)


def _change(**changed: Any) -> None:
    global _settings
    with _lock:
        _settings = replace(_settings, **changed)


def mode() -> Mode:
    """Which tables count now."""
    if _deterministic():
        return "shipped"
    if _settings.mode is not None:
        return _settings.mode
    said = os.environ.get("GKA_OPS_AUTOTUNE", "cached")
    for known in get_args(Mode):
        if said == known:
            return known
    if first("mode", said):
        message = (
            f"GKA_OPS_AUTOTUNE: expected one of {get_args(Mode)}, got {said[:40]!r}; shipped tables alone are used"
        )
        warnings.warn(message, UserWarning, stacklevel=2)
    return "shipped"


_deterministic: Callable[[], bool] = torch.are_deterministic_algorithms_enabled


# ------------------------------------------------------------------------------------------------------------ overrides
_overrides: ContextVar[Overrides] = ContextVar("gka_ops_autotune_overrides", default=())
_overridden = False  # whether this process ever forced anything
_IN_BACKWARD = "gka_ops_autotune_overrides"


@contextlib.contextmanager
def override(kernel: str, **parameters: int | None) -> Iterator[None]:
    """Forces parameters of a kernel, also ones that are excluded from tuning, in the calls of a block.

    That is for finding out which configuration is at fault. ``kernel`` is one of ``space.KERNELS``; what is not given
    stays as it would be. It holds for this thread or task alone, and for the backward passes that are called in the
    block. Raises ``ValueError`` for other names and values than those of the kernel's space.
    """
    if kernel not in space.KERNELS:
        raise ValueError(f"expected a kernel among {', '.join(space.KERNELS)}, got {kernel!r}")
    if reason := space.outside(kernel, parameters, some=True):
        raise ValueError(f"{kernel}: {reason}")
    try:
        with forcing({kernel: parameters}):
            _tell_backward()
            yield
    finally:
        _tell_backward()


@contextlib.contextmanager
def forcing(options: Mapping[str, Mapping[str, int | None]]) -> Iterator[None]:
    """As :func:`override`, of kernels' parameters that are known to be allowed, but for no backward."""
    global _overridden
    forced = {name: dict(given) for name, given in _active()}
    for kernel, parameters in options.items():
        forced[kernel] = {**forced.get(kernel, {}), **parameters}
    _overridden = True
    token = _overrides.set(tuple(sorted((name, tuple(sorted(given.items()))) for name, given in forced.items())))
    try:
        yield
    finally:
        _overrides.reset(token)


def _tell_backward() -> None:
    """Autograd's threads know nothing of this thread's context, but PyTorch hands them what is kept here."""
    _stash(_IN_BACKWARD, _overrides.get())


def _stash(key: str, value: object) -> None:
    """Keeps ``value`` for this thread, and for autograd's that work for it.

    PyTorch 2.11 keeps it without counting the reference and yet gives one back later, for an object that is then freed
    while it is in use. There, one is counted here.
    """
    if _stash_steals():
        _count(value)
    torch._C._stash_obj_in_tls(key, value)


def _count(value: object) -> None:
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))


@cache
def _stash_steals() -> bool:
    probe = object()
    before = sys.getrefcount(probe)
    torch._C._stash_obj_in_tls("gka_ops_probe", probe)
    steals = sys.getrefcount(probe) == before
    if steals:
        _count(probe)
    return steals


def _active() -> Overrides:
    overrides = _overrides.get()
    if not overrides and torch._C._current_graph_task_id() != -1 and torch._C._is_key_in_tls(_IN_BACKWARD):
        overrides = torch._C._get_obj_in_tls(_IN_BACKWARD)
    return overrides


# --------------------------------------------------------------------------------------------------------------- tables
def folders(mode: Mode) -> list[Path]:
    """Where tables are looked for, in order."""
    own = None if mode == "shipped" else table.user_folder()
    return [table.SHIPPED] if own is None else [own, table.SHIPPED]


def _tables(settings: _Settings, mode: Mode, device: Device) -> _Tables:
    with _lock:
        if (mode, device) not in settings.tables:
            found = read_all(mode) if settings.adopted is None else settings.adopted
            settings.tables[mode, device] = _sorted(found, device)
        return settings.tables[mode, device]


def read_all(using: Mode | None = None) -> list[tuple[Path, Table]]:
    """All tables that count, by default now, with their files, in order."""
    found = ((path, table.read(path)) for folder in folders(using or mode()) for path in _files(folder))
    return [(path, content) for path, content in found if content is not None]


def _sorted(tables: list[tuple[Path, Table]], device: Device) -> _Tables:
    filled = [(path, content) for path, content in tables if content.entries]
    own = [item for item in filled if item[1].device == device]
    kin = [item for item in filled if item not in own and item[1].device.capability == device.capability]
    kin.sort(key=lambda item: abs(item[1].device.multiprocessors - device.multiprocessors))
    return _Tables(own, kin, known=bool(filled))


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(folder.glob(f"*.v{table.SCHEMA}.json"))[:_MOST_FILES]
    except OSError:
        return []


# -------------------------------------------------------------------------------------------------------------- choices
def lookup(key: Key, device: Device | None = None) -> Choice:
    """What a kernel runs with on a card, by default the current one, without overrides."""
    device = device or current(torch.cuda.current_device())
    settings, using = _settings, mode()
    choice = settings.choices.get((using, key, device))
    if choice is None:
        choice = _choose(_tables(settings, using, device), key, device)
        _keep(settings.choices, (using, key, device), choice)
    return choice


def heuristic(key: Key, device: Device) -> Parameters:
    """What a kernel runs with where no table says anything."""
    config = heuristic_config(key.kernel, key.dtype, key.D, key.V, key.T)
    return space.fitted(key.kernel, key, space.parameters_of(key.kernel, config), device)


def heuristic_config(kernel: str, dtype: str, D: int, V: int, T: int) -> ChunkConfig | RecurrentConfig:
    block_d, block_v = space.padded(D), space.padded(V or D)
    if kernel == "recurrent":
        return recurrent_config(block_d, block_v, T == 1)
    return chunk_config(block_d, block_v, dtype == "fp32")


def _choose(tables: _Tables, key: Key, device: Device) -> Choice:
    stale: list[str] = []
    choice = None
    for tables_of, exact, near in ((tables.own, "exact", "nearest"), (tables.kin, "architecture", "architecture")):
        for distance, path, known, entry in _by_distance(tables_of, key):
            if reason := entry.stale(key.kernel):
                stale.append(f"{known} in {path}: {reason}")
                if first("stale", f"{path}: {reason}"):  # a new Triton makes whole files stale
                    message = f"launch configurations in {path} are skipped, that of {known} for one: {reason}"
                    warnings.warn(f"{message}. To tune anew: {command(key)}", StaleWarning, stacklevel=2)
            elif space.excluded(key.kernel, key, entry.parameters, device) is None:
                origin = exact if distance == (0, 0) else near
                choice = Choice(key, entry.parameters, origin, path, known, entry, tuple(stale))
                break
        if choice is not None:
            break
    if choice is None:
        choice = Choice(key, heuristic(key, device), "heuristic", stale=tuple(stale))
        if tables.known and not stale and first("untuned", key.kernel):
            looked = " and ".join(str(folder / table.file_name(device)) for folder in folders(mode()))
            message = f"no launch configuration for {key} on {device.name} in {looked}: a heuristic is used"
            warnings.warn(f"{message}. To tune it: {command(key)}", UntunedWarning, stacklevel=2)
    return choice


def _by_distance(tables: list[tuple[Path, Table]], key: Key) -> list[tuple[tuple[int, int], Path, Key, Entry]]:
    found = [
        (distance, path, known, entry)
        for path, content in tables
        for known, entry in content.entries.items()
        if (distance := key.distance(known)) is not None
    ]
    return sorted(found, key=lambda item: item[0])


def command(key: Key) -> str:
    """What tunes a key."""
    return f"gka-autotune tune --key {key}"


def first(kind: str, what: str) -> bool:
    """Whether this is the first time in this process."""
    with _lock:
        if (kind, what) in _warned:
            return False
        _warned.add((kind, what))
        return True


def _keep(choices: dict[_K, _V], key: _K, choice: _V) -> None:
    with _lock:
        if len(choices) >= _MOST_CHOICES:
            choices.clear()
        choices[key] = choice


# ------------------------------------------------------------------------------------------------------- configurations
def chosen(config: Config, problem: Problem, device: Device | None, *, training: bool = False) -> Config:
    """The configuration that a call is launched with.

    ``config``: the heuristic's; any other object was meant by whoever made it, and only overrides change it.
    ``device``: ``None`` for the interpreter, which has no tables.
    ``training``: whether it may be part of a training step, in which nothing is tuned.
    """
    settings, overrides = _settings, _active() if _overridden else ()
    if device is None and not overrides:
        return config
    # by identity: the hash of a configuration takes microseconds
    key = (problem, id(config), id(device), overrides, _deterministic())
    known = settings.configs.get(key)
    if known is not None:
        return known.config  # type: ignore[return-value]
    found, final = _configure(config, problem, device, overrides, training)
    if final:
        _keep(settings.configs, key, _Configured(found, config, device))
    return found


def _configure(
    config: Config, problem: Problem, device: Device | None, overrides: Overrides, training: bool
) -> tuple[Config, bool]:
    """See :func:`chosen`. Also whether the next call gets the same; not where tuning had to wait for another one."""
    kernels = space.kernels_of(problem, config, device)
    final = True
    if device is not None and config is heuristic_config(kernels[0], problem.dtype, problem.D, problem.V, problem.T):
        keys = {kernel: space.KERNELS[kernel].key(problem) for kernel in kernels}
        final = _tune_misses(list(keys.values()), device, training)
        for kernel, key in keys.items():
            config = space.with_parameters(kernel, config, lookup(key, device).parameters)
    for kernel, forced in overrides:
        if (kernel == "recurrent") == (problem.when == "decode"):
            config = space.with_parameters(kernel, config, dict(forced))
    return config, final


def _tune_misses(keys: list[Key], device: Device, training: bool) -> bool:
    """Tunes what no table has an entry for, if calls do that. Whether that is settled, and need not be tried again."""
    settings = _settings
    if settings.adopted is not None or mode() != "tune":
        return True
    own = _tables(settings, "tune", device).own
    missing = [key for key in keys if not any(_counts(content.entries.get(key), key) for _, content in own)]
    if not missing:
        return True
    from gka_ops.autotune import miss

    return miss.tune(missing, device, settings.miss_seconds, training)


def _counts(entry: Entry | None, key: Key) -> bool:
    return entry is not None and not entry.stale(key.kernel)
