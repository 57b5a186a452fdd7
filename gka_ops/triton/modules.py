"""Lets threads load Triton's C modules side by side.

NOTE [Modules of one name]
  Triton 3.6 builds a C module for every signature of a kernel and calls all of them ``__triton_launcher``. Where one is
  loaded a second time, CPython copies its functions into the module of that name that was loaded last, whichever that
  is (PEP 489: single-phase initialisation). A thread that has loaded that one and is about to take its function gets
  another kernel's: a TypeError if it has other arguments, and a launch with arguments misread if it has as many.
  So a load and a copy of what it gave are made under one lock.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from types import ModuleType

from triton.runtime import build

_lock = threading.Lock()


def _apart(load: Callable[[str, str], ModuleType]) -> Callable[[str, str], ModuleType]:
    @functools.wraps(load)
    def load_apart(name: str, path: str) -> ModuleType:
        copy = ModuleType(name)
        with _lock:
            copy.__dict__.update(vars(load(name, path)))
        return copy

    return load_apart


def load_apart() -> None:
    """From now on in this process. Calls after the first change nothing. See NOTE [Modules of one name]."""
    with _lock:
        if not hasattr(build._load_module_from_path, "__wrapped__"):
            build._load_module_from_path = _apart(build._load_module_from_path)
