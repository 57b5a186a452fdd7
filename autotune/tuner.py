"""Finds the fastest configurations of kernels: compiled side by side, checked for accuracy, then timed in turns.

What is measured comes from outside (``measure.Bench``), and runs in processes of its own (``worker.Worker``): several
compile ahead while one checks and times what is ready. All that is known so far is kept on the way, so that an
interrupted run goes on where it was. A candidate that is wrong, crashes or hangs is recorded as such and never chosen.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol, TypeAlias

import torch

from gka_ops.autotune import choice, space, table
from gka_ops.autotune.device import Device, current
from gka_ops.autotune.fingerprint import fingerprint, triton_version
from gka_ops.autotune.key import Key
from gka_ops.autotune.space import Parameters
from gka_ops.autotune.table import Entry, new_entry
from gka_ops.autotune.worker import StartError, Worker, WorkerError

HEADS = 32
"""The heads of what is measured, at most: more of N are sequences."""

_ROUNDS = 5
_HOPELESS = 1.1  # times slower than the best is not timed again
_WORTH_IT = 0.99  # of the heuristic's time: less of a gain is noise, and the heuristic stays
_MOST_STARTS = 2  # once may have been someone who stopped the tuning
_COMPILING = 0.7  # of all the time: keys wait no longer for builds other than the heuristic's
_POLL_SECONDS = 0.1
_MORE_SPILLS = 256  # registers a thread: so many more than the heuristic's never pay
_COMPILE_SECONDS = 180.0
_RUN_SECONDS = 60.0


Progress: TypeAlias = Callable[[str, int, int, str], None]
"""Called with a phase, how much of it is done, of how much, and what it is at."""


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
                elif outcome.failure is not None and "OutOfMemoryError" in outcome.failure:  # somebody else had it then
                    outcome.failure = None
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


# ---------------------------------------------------------------------------------------------------------- compilation
class _Builds:
    """Compiles candidates ahead, in ``workers`` processes; each build once, however many keys want it."""

    def __init__(self, make: Callable[[], Bench], method: str, workers: int, deadline: float) -> None:
        self._deadline = deadline
        self._pool: SimpleQueue[Worker] = SimpleQueue()
        self._workers = [Worker(make, method) for _ in range(workers)]
        for worker in self._workers:
            self._pool.put(worker)
        self._threads = ThreadPoolExecutor(workers)
        self._builds: dict[Hashable, Future[dict[str, int]]] = {}

    def want(self, key: Key, parameters: Parameters) -> None:
        build = self._name(key, parameters)
        if build not in self._builds:
            self._builds[build] = self._threads.submit(self._compile, key, parameters)

    def ready(self, key: Key, parameters: Parameters) -> bool:
        """Whether the build is through, or was never wanted."""
        build = self._builds.get(self._name(key, parameters))
        return build is None or build.done()

    def result(self, key: Key, parameters: Parameters) -> dict[str, int]:
        """What the build takes. Raises ``TimeoutError`` if it is not through, ``WorkerError`` if there is none."""
        return self._builds[self._name(key, parameters)].result(0)

    def done(self) -> tuple[int, int]:
        """How many builds are through, and how many there are."""
        return sum(build.done() for build in self._builds.values()), len(self._builds)

    def _compile(self, key: Key, parameters: Parameters) -> dict[str, int]:
        if time.monotonic() > self._deadline:
            raise TimeoutError
        worker = self._pool.get()
        try:
            found: dict[str, int] = worker.call("compile", key, parameters, seconds=_COMPILE_SECONDS)
            return found
        finally:
            self._pool.put(worker)

    @staticmethod
    def _name(key: Key, parameters: Parameters) -> Hashable:
        """T and N are no part of a forward kernel's code, but that one token and the heads are constants in some, and
        that the state pass is cut into narrower blocks for few programs; a backward is cut into one slab or several."""
        if key.when != "backward":
            key = replace(key, T=min(key.T, 2), N=min(key.N, 2 * HEADS if key.kernel == "state" else HEADS))
        return key, _name(parameters)

    def __enter__(self) -> _Builds:
        return self

    def __exit__(self, *_: object) -> None:
        self._deadline = 0.0
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.close()


# --------------------------------------------------------------------------------------------------------------- tuning
def _tune(
    keys: Sequence[Key], device: Device, make: Callable[[], Bench], seconds: float, workers: int, method: str,
    reach: bool, log: Callable[[str], None], progress: Progress,
) -> Iterator[Result]:  # fmt: skip
    begin = time.monotonic()
    end, patience = begin + seconds, begin + _COMPILING * seconds
    jobs, again = [], set[Key]()
    for key in keys:
        heuristic = dict(choice.heuristic(key, device))
        jobs.append((key, heuristic, _outcomes_to_be(key, device, heuristic, reach)))
    with _Builds(make, method, workers, end) as builds, Worker(make, method) as runner:
        for first in (True, False):  # without its heuristic a key has nothing to compare with
            for key, heuristic, found in jobs:
                for outcome in found:
                    likely = outcome.parameters == heuristic
                    if likely is first and outcome.failure is None and not outcome.resources:
                        builds.want(key, outcome.parameters)
        while jobs:
            progress("compile", *builds.done(), "")
            now = time.monotonic()
            ready = (
                i
                for i, (key, heuristic, found) in enumerate(jobs)
                if all(builds.ready(key, o.parameters) for o in found if now < patience or o.parameters == heuristic)
            )
            place = next(ready, None)
            if place is None and now < end:
                time.sleep(_POLL_SECONDS)
                continue
            key, heuristic, found = job = jobs.pop(place or 0)
            progress("measure", max(0, len(keys) - len(jobs) - 1), len(keys), str(key))
            _collect(found, key, heuristic, builds, log)
            _keep(key, device, found)
            through = _measure(found, key, device, runner, now + max(0.0, end - now) / (len(jobs) + 1), log)
            if not through and key not in again:  # later keys may leave some of their time
                again.add(key)
                jobs.append(job)
                continue
            entry = _winner(key, found, heuristic)
            log(f"{key}: {_name(entry.parameters) if entry else 'nothing that works'}")
            yield Result(key, entry, found)
        progress("compile", *builds.done(), "")
        progress("measure", len(keys), len(keys), "")


def _outcomes_to_be(key: Key, device: Device, heuristic: Parameters, reach: bool) -> list[Outcome]:
    """The candidates with what is known of them, the likely ones first."""
    tried, _ = space.candidates(key.kernel, key, device, None if reach else heuristic)
    tried.sort(key=lambda parameters: space.steps(key.kernel, parameters, heuristic))
    earlier = {_name(outcome.parameters): outcome for outcome in outcomes(key, device)}
    return [earlier.get(_name(parameters)) or Outcome(dict(parameters)) for parameters in tried]


def _collect(
    found: list[Outcome], key: Key, heuristic: Parameters, builds: _Builds, log: Callable[[str], None]
) -> None:
    """Notes what the builds take that are through, and which there are none of. Raises ``StartError``."""
    for outcome in found:
        if outcome.failure is None and not outcome.resources:
            try:
                outcome.resources = builds.result(key, outcome.parameters)
            except StartError:
                raise
            except WorkerError as error:
                outcome.failure = f"compile {error}"
                log(f"{key} {_name(outcome.parameters)}: {outcome.failure}")
            except (TimeoutError, CancelledError):
                continue
    base = next((o.resources.get("spills", 0) for o in found if o.resources and o.parameters == heuristic), None)
    for outcome in found:
        spills = outcome.resources.get("spills", 0)
        if base is not None and outcome.failure is None and spills > base + _MORE_SPILLS:
            outcome.failure = f"spills {spills} registers a thread, the heuristic {base}"


def _measure(
    found: list[Outcome], key: Key, device: Device, runner: Worker, deadline: float, log: Callable[[str], None]
) -> bool:
    """Checks what is compiled, and times what is right: all candidates once, then again those that may win.

    Returns whether it came to the end before the deadline.
    """

    def attempt(outcome: Outcome, what: str) -> Any:
        runner.start()  # a failure here is none of the candidate's
        outcome.starts += 1
        _keep(key, device, found)
        try:
            return runner.call(what, key, outcome.parameters, seconds=_RUN_SECONDS)
        except WorkerError as error:
            outcome.failure = f"{what} {error}"
            return None
        finally:
            outcome.starts -= 1

    def once_more(outcome: Outcome) -> None:
        microseconds = attempt(outcome, "time")
        if microseconds is not None:
            outcome.times.append(float(microseconds))

    for outcome in found:
        if time.monotonic() > deadline:
            return False
        if outcome.failure is None and outcome.resources and not outcome.checked:
            wrong = attempt(outcome, "check")
            if outcome.failure is None:
                outcome.checked, outcome.failure = True, wrong
            log(f"{key} {_name(outcome.parameters)}: {outcome.failure or 'right'}")
        if outcome.failure is None and outcome.checked and not outcome.times:
            once_more(outcome)
    for round_ in range(1, _ROUNDS):
        best = min((outcome.microseconds for outcome in found if outcome.failure is None), default=0.0)
        for outcome in found:
            hopeful = outcome.failure is None and outcome.times and outcome.microseconds <= _HOPELESS * best
            if hopeful and len(outcome.times) <= round_:
                if time.monotonic() > deadline:
                    return False
                once_more(outcome)
    _keep(key, device, found)
    return True


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


def bench_on(ordinal: int) -> Bench:
    """What measures on a card. It belongs into a process of its own, whose launches it changes."""
    from gka_ops.autotune.measure import Bench

    torch.cuda.set_device(ordinal)
    os.environ["GKA_OPS_AUTOTUNE"] = "shipped"  # the other kernels of a call run as they do everywhere
    return Bench()


def tune(
    keys: Iterable[Key], device: Device | None = None, make: Callable[[], Bench] | None = None, *,
    seconds: float = 450.0,
    workers: int | None = None, path: Path | None = None, method: str = "spawn", reach: bool = False,
    log: Callable[[str], None] = lambda _: None, progress: Progress = lambda *_: None,
) -> list[Result]:  # fmt: skip
    """Finds the fastest configurations and puts them into this user's table, or the one at ``path``.

    In a distributed job all ranks call it. Rank 0 tunes, and all launch what its tables say from then on.

    Args:
        keys: what to tune: ``keys_of`` makes them from shapes, and warnings of ``lookup`` name them.
        device: what it is for; by default the current card.
        make: returns a :class:`Bench`, in other processes; by default one that measures on the current card.
        seconds: the time that all of it may take. Keys are measured as their builds are through, each for an even share
            of the time that is left then.
        workers: processes that compile; by default as many as there are cores, less the one that measures.
        reach: try all of the space, not only what is near the heuristic.
        progress: is told how far the phases are: (phase, done, total, what is next).

    Raises:
        RuntimeError: while a CUDA graph is captured, ``torch.compile`` traces, or a backward pass runs.
        WorkerError: a process could not be started, for want of a card, say. What was found until then is kept.
    """
    if reason := forbidden():
        raise RuntimeError(f"expected to be called outside of a captured or traced region: {reason}")
    results: list[Result] = []
    if _rank() == 0:
        device = device or current(torch.cuda.current_device())
        make = make or partial(bench_on, torch.cuda.current_device())
        folder = table.user_folder()
        if path is None and folder is None:
            warnings.warn(f"what is found is not kept: {table.NO_FOLDER}, or give a path", UserWarning, stacklevel=2)
        elif path is None and folder is not None:
            path = folder / table.file_name(device)
        given = max(1, len(os.sched_getaffinity(0)) - 1) if workers is None else workers
        keys = list(dict.fromkeys(keys))
        for result in _tune(keys, device, make, seconds, given, method, reach, log, progress):
            results.append(result)
            if result.entry is not None and path is not None:
                table.add(path, device, {result.key: result.entry})
        results.sort(key=lambda result: keys.index(result.key))
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
