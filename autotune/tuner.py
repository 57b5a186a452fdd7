"""Finds the fastest configuration of a kernel: compiled side by side, checked for accuracy, then timed in turns.

What is measured comes from outside (``measure.Bench``), and runs in processes of its own (``worker.Worker``). All that
is known so far is kept on the way, so that an interrupted run goes on where it was. A candidate that is wrong, crashes
or hangs is recorded as such and never chosen.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import torch

from gka_ops.autotune import choice, space, table
from gka_ops.autotune.device import Device
from gka_ops.autotune.fingerprint import fingerprint, triton_version
from gka_ops.autotune.key import Key
from gka_ops.autotune.space import Parameters
from gka_ops.autotune.table import Entry, new_entry
from gka_ops.autotune.worker import Worker, WorkerError

_ROUNDS = 5
_HOPELESS = 1.3  # times slower than the best is not timed again
_WORTH_IT = 0.99  # of the heuristic's time: less of a gain is noise, and the heuristic stays
_MOST_STARTS = 2  # once may have been someone who stopped the tuning
_COMPILE_SECONDS = 180.0
_RUN_SECONDS = 60.0


class Bench(Protocol):
    """What measures, in a process of its own; every method may raise."""

    def compile(self, key: Key, parameters: Parameters) -> dict[str, int]:
        """Compiles the kernel where every process finds it. Returns its registers, spills and shared memory."""

    def check(self, key: Key, parameters: Parameters) -> str | None:
        """Why the results are less accurate than they may be; ``None`` if they are not."""

    def time(self, key: Key, parameters: Parameters) -> float:
        """Microseconds of a launch."""


@dataclass
class Outcome:
    """What is known of a candidate.

    Attributes:
        failure: why it cannot be chosen.
        starts: how often it was tried and this process did not live to see what came of it.
        times: microseconds, of one round each.
    """

    parameters: dict[str, int | None]
    failure: str | None = None
    resources: dict[str, int] = field(default_factory=dict)
    checked: bool = False
    starts: int = 0
    times: list[float] = field(default_factory=list)

    @property
    def microseconds(self) -> float:
        return statistics.median(self.times) if self.times else float("inf")


@dataclass(frozen=True)
class Result:
    """What came of tuning a key. ``entry`` is ``None`` where nothing that works was timed."""

    key: Key
    entry: Entry | None
    outcomes: list[Outcome]


def forbidden() -> str | None:
    """Why nothing can be tuned here and now, if so."""
    if torch.compiler.is_compiling():
        return "torch.compile is tracing"
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    if torch._C._current_graph_task_id() != -1:
        return "a backward pass is running"
    return None


# ------------------------------------------------------------------------------------------------------------- progress
def progress_file(key: Key, device: Device) -> Path | None:
    """Where the outcomes for a key are kept."""
    folder = table.user_folder()
    name = hashlib.sha256(str(key).encode()).hexdigest()[:16]
    return None if folder is None else folder / "progress" / device.slug / f"{key.kernel}-{name}.json"


def outcomes(key: Key, device: Device) -> list[Outcome]:
    """What is known of the candidates for a key, from this run or an earlier one with the same kernel."""
    path = progress_file(key, device)
    found: list[Outcome] = []
    try:
        content = None if path is None else table.content(path)
        known = {} if content is None else json.loads(content)
        if known.get("identity") != _identity(key, device):
            return []
        for fields in known["outcomes"]:
            outcome = Outcome(**fields)
            tried = space.outside(key.kernel, outcome.parameters) is None
            timed = all(type(t) in (int, float) and 0 < t < 1e9 for t in outcome.times)
            if tried and timed and isinstance(outcome.failure, str | None) and type(outcome.starts) is int:
                if outcome.starts >= _MOST_STARTS:
                    outcome.failure = "never came back"
                found.append(outcome)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []
    return found


def _identity(key: Key, device: Device) -> dict[str, str]:
    code = {"triton": triton_version(), "fingerprint": fingerprint(key.kernel)}
    return {"key": str(key), "device": device.name, **code}


def _keep(key: Key, device: Device, found: list[Outcome]) -> None:
    path = progress_file(key, device)
    if path is None:
        return
    content = {"identity": _identity(key, device), "outcomes": [asdict(outcome) for outcome in found]}
    with suppress(OSError):  # then it cannot be resumed
        path.parent.mkdir(parents=True, exist_ok=True)
        table.write(path, json.dumps(content))


# --------------------------------------------------------------------------------------------------------------- tuning
def tune_key(
    key: Key, device: Device, make: Callable[[], Bench], *, deadline: float, workers: int = 1, method: str = "spawn",
    log: Callable[[str], None] = lambda _: None,
) -> Result:  # fmt: skip
    """Finds the fastest candidate for a key on a card. See :func:`tune`; ``deadline`` is one of ``time.monotonic``."""
    heuristic = dict(choice.heuristic(key, device))
    candidates, _ = space.candidates(key.kernel, key, device)
    candidates.sort(key=lambda parameters: _steps(key.kernel, parameters, heuristic))  # the likely ones first
    earlier = {_name(outcome.parameters): outcome for outcome in outcomes(key, device)}
    found = [earlier.get(_name(parameters)) or Outcome(dict(parameters)) for parameters in candidates]
    _compile(found, key, make, deadline, workers, method, log)
    _keep(key, device, found)
    with Worker(make, method) as worker:

        def attempt(outcome: Outcome, what: str) -> Any:
            outcome.starts += 1
            _keep(key, device, found)
            try:
                return worker.call(what, key, outcome.parameters, seconds=_RUN_SECONDS)
            except WorkerError as error:
                outcome.failure = f"{what} {error}"
                return None
            finally:
                outcome.starts -= 1

        for outcome in found:
            if time.monotonic() > deadline:
                break
            if outcome.failure is None and outcome.resources and not outcome.checked:
                wrong = attempt(outcome, "check")
                if outcome.failure is None:
                    outcome.checked, outcome.failure = True, wrong
                log(f"{key} {_name(outcome.parameters)}: {outcome.failure or 'right'}")
        for round_ in range(_ROUNDS):
            best = min((outcome.microseconds for outcome in found if outcome.failure is None), default=0.0)
            for outcome in found:
                usable = outcome.failure is None and outcome.checked and len(outcome.times) <= round_
                hopeless = round_ > 0 and outcome.microseconds > _HOPELESS * best
                if usable and not hopeless and time.monotonic() < deadline:
                    microseconds = attempt(outcome, "time")
                    if microseconds is not None:
                        outcome.times.append(float(microseconds))
        _keep(key, device, found)
    entry = _winner(key, found, heuristic)
    log(f"{key}: {_name(entry.parameters) if entry else 'nothing that works'}")
    return Result(key, entry, found)


def _compile(
    found: list[Outcome], key: Key, make: Callable[[], Bench], deadline: float, workers: int, method: str,
    log: Callable[[str], None],
) -> None:  # fmt: skip
    waiting = [outcome for outcome in found if outcome.failure is None and not outcome.resources]
    pool: SimpleQueue[Worker] = SimpleQueue()
    started = [Worker(make, method) for _ in range(max(1, min(workers, len(waiting))))]
    for worker in started:
        pool.put(worker)

    def compile_one(outcome: Outcome) -> None:
        if time.monotonic() > deadline:
            return
        worker = pool.get()
        try:
            outcome.resources = worker.call("compile", key, outcome.parameters, seconds=_COMPILE_SECONDS)
        except WorkerError as error:
            outcome.failure = f"compile {error}"
            log(f"{key} {_name(outcome.parameters)}: {outcome.failure}")
        finally:
            pool.put(worker)

    with ThreadPoolExecutor(len(started)) as threads:
        list(threads.map(compile_one, waiting))
    for worker in started:
        worker.close()


def _winner(key: Key, found: list[Outcome], heuristic: Parameters) -> Entry | None:
    timed = [outcome for outcome in found if outcome.failure is None and outcome.checked and outcome.times]
    if not timed:
        return None
    most = max(len(outcome.times) for outcome in timed)
    finalists = [outcome for outcome in timed if len(outcome.times) >= most - 1]  # time may run out within a round
    best = min(finalists, key=lambda outcome: outcome.microseconds)
    base = next((outcome for outcome in timed if outcome.parameters == heuristic), None)
    if base is not None and best.microseconds > _WORTH_IT * base.microseconds:
        best = base
    base_time = best.microseconds if base is None else base.microseconds
    return new_entry(key.kernel, best.parameters, best.microseconds, base_time, len(timed))


def _name(parameters: Parameters) -> str:
    return " ".join(f"{name}={value}" for name, value in sorted(parameters.items()) if value is not None)


def _steps(kernel: str, parameters: Parameters, other: Parameters) -> int:
    """How many values of the axes lie between two combinations."""
    return sum(
        abs(values.index(parameters[name]) - values.index(other[name])) for name, values in space.KERNELS[kernel].axes
    )


def tune(
    keys: Iterable[Key], device: Device, make: Callable[[], Bench], *, seconds: float = 480.0,
    workers: int | None = None, path: Path | None = None, method: str = "spawn",
    log: Callable[[str], None] = lambda _: None,
) -> list[Result]:  # fmt: skip
    """Finds the fastest configurations and puts them into this user's table, or the one at ``path``.

    In a distributed job all ranks call it. Rank 0 tunes, and all launch what its tables say from then on.

    Args:
        keys: what to tune; see ``choice.lookup``, whose warnings name them.
        make: returns a :class:`Bench`; it is called in other processes.
        seconds: the time that all of it may take. Each key is given an even share of what is left.
        workers: processes that compile; by default as many as there are cores.

    Raises:
        RuntimeError: while a CUDA graph is captured, ``torch.compile`` traces, or a backward pass runs.
    """
    if reason := forbidden():
        raise RuntimeError(f"expected to be called outside of a captured or traced region: {reason}")
    results: list[Result] = []
    if _rank() == 0:
        keys = list(keys)
        end = time.monotonic() + seconds
        folder = table.user_folder()
        if path is None and folder is not None:
            path = folder / table.file_name(device)
        for i, key in enumerate(keys):
            now = time.monotonic()
            share = now + max(0.0, end - now) / (len(keys) - i)
            given = len(os.sched_getaffinity(0)) if workers is None else workers
            result = tune_key(key, device, make, deadline=share, workers=given, method=method, log=log)
            results.append(result)
            if result.entry is not None and path is not None:
                table.add(path, device, {key: result.entry})
    choice.reload()
    share_tables()
    return results


# ---------------------------------------------------------------------------------------------------------- distributed
def _rank() -> int:
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def share_tables() -> None:
    """Makes all ranks of a distributed job use rank 0's tables, so that they launch the same code. All must call it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    files: list[Any] = [None]
    if _rank() == 0:
        files = [[(str(path), found.to_json()) for path, found in choice.read_all()]]
    torch.distributed.broadcast_object_list(files, src=0)
    choice.adopt([(Path(path), table.parse(text, Path(path))) for path, text in files[0]])
