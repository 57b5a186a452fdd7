"""Processes in which candidates are compiled and run: one that crashes or hangs takes nothing else with it."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any


class WorkerError(Exception):
    """What was asked of a worker was not done; the message says why."""


class StartError(WorkerError):
    """A worker could not be started, whatever was to be asked of it."""


_START_SECONDS = 180.0  # imports take their time


class Worker:
    """A process that holds what ``make()`` returned, and calls its methods within a time limit.

    It is started when it is first needed and again after a failure, since a card that met an error in a process serves
    that process no more.
    """

    def __init__(self, make: Callable[[], Any], method: str = "spawn") -> None:
        self._make = make
        self._context: Any = multiprocessing.get_context(method)
        self._process: Any = None
        self._pipe: Any = None
        self._last_words: Any = None

    def call(self, method: str, *arguments: Any, seconds: float) -> Any:
        """The method's result. Raises :class:`WorkerError` where it raises, crashes or takes longer."""
        self.start()
        try:
            self._pipe.send((method, arguments))
            return self._answer(seconds, "hung")
        except OSError as error:
            self.close()
            raise WorkerError(f"crashed: {error}") from None

    def start(self) -> None:
        """Starts the process, if there is none. Raises :class:`StartError` where that fails."""
        if self._process is not None:
            return
        self._pipe, theirs = self._context.Pipe()
        self._last_words = tempfile.NamedTemporaryFile("r", prefix="gka-autotune-", errors="replace")  # noqa: SIM115  (until the process ends)
        arguments = theirs, self._make, self._last_words.name
        self._process = self._context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._answer(_START_SECONDS, "hung")
        except WorkerError as error:
            raise StartError(f"the start of a worker {error}") from None

    def close(self) -> None:
        """Ends the process, whatever it is doing. Another thread's call fails then."""
        process, pipe, last_words = self._process, self._pipe, self._last_words
        self._process = self._pipe = self._last_words = None  # first: the other thread closes too, once it is gone
        if process is not None:
            process.kill()
            process.join()
            pipe.close()
            last_words.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self, seconds: float, late: str) -> Any:
        process, pipe, last_words = self._process, self._pipe, self._last_words
        if not pipe.poll(seconds):
            self.close()
            raise WorkerError(f"{late}: no answer within {seconds:.0f} s")
        try:
            succeeded, value = pipe.recv()
        except (EOFError, OSError):
            process.join()
            how = f"crashed: {_signal(process.exitcode)}{_place(last_words)}"
            self.close()
            raise WorkerError(how) from None
        if not succeeded:
            self.close()
            raise WorkerError(f"failed: {value}")
        return value


def _signal(code: int) -> str:
    try:
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"
    except ValueError:
        return f"signal {-code}"


def _place(last_words: IO[str]) -> str:
    """Where Python was in the thread that crashed, as far as ``faulthandler`` could tell."""
    try:
        _, _, stack = last_words.read().partition("Current thread")
    except ValueError:  # closed by another thread
        return ""
    frame = re.search(r'File "(?P<file>[^"]*)", line (?P<line>\d+) in (?P<function>\S+)', stack.partition("\n\n")[0])
    return f" in {frame['function']} ({Path(frame['file']).name}:{frame['line']})" if frame else ""


def _serve(pipe: Connection, make: Callable[[], Any], last_words: str) -> None:
    faulthandler.enable(open(last_words, "w"))  # noqa: SIM115  (for as long as the process lives)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Triton prints whole kernels that do not compile
    try:
        target = make()
        pipe.send((True, None))
        while True:
            method, arguments = pipe.recv()
            pipe.send((True, getattr(target, method)(*arguments)))
    except (EOFError, KeyboardInterrupt):
        return
    except BaseException as error:
        pipe.send((False, f"{type(error).__name__}: {str(error)[:500]}"))
