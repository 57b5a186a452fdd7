"""Fake cards, problems and entries for tables, and what tests do in other processes."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from gka_ops.autotune import choice, space, table
from gka_ops.autotune.device import Device
from gka_ops.autotune.key import Key, Problem

H100 = Device("NVIDIA H100 80GB HBM3", (9, 0), 132, 232448)
H200 = replace(H100, name="NVIDIA H200")
CONSUMER = Device("NVIDIA GeForce RTX 4090", (8, 9), 128, 101376)
A100 = Device("NVIDIA A100-SXM4-80GB", (8, 0), 108, 166912)

FORWARD = Problem("forward", "bf16", 128, 128, 64, 8192, 64, frozenset({"beta", "decay", "l2norm", "solve"}))
BACKWARD = FORWARD._replace(when="backward")
DECODE = Problem("decode", "bf16", 128, 128, 1, 1, 64, frozenset({"beta", "decay", "solve"}))


def key_of(kernel: str = "readout", problem: Problem = FORWARD) -> Key:
    return space.KERNELS[kernel].key(problem)


def entry(key: Key, **changed: Any) -> table.Entry:
    """An entry that counts: what the heuristic says, with changes to its parameters or to its fields."""
    parameters = dict(choice.heuristic(key, H100))
    fields = {name: changed.pop(name) for name in list(changed) if name not in parameters}
    found = table.new_entry(key.kernel, {**parameters, **changed}, 10.0, 12.0, 5)
    return replace(found, **fields)


# ------------------------------------------------------------------------------------------------------------ processes
def run_processes(function: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> list[Any]:
    """Calls the function in as many processes at once, and returns what they return."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.autotune"])
    with ProcessPoolExecutor(len(arguments), context) as pool:
        running = [pool.submit(function, *given) for given in arguments]
        return [process.result(timeout=120) for process in running]


def write_and_read(path: Path, process: int, rounds: int) -> int:
    """Adds entries of its own to a table and reads it while others do the same. Returns how many it found again."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = 0
        for i in range(rounds):
            key = key_of(problem=FORWARD._replace(T=2**i, N=2**process))
            assert table.add(path, H100, {key: entry(key)})
            now = table.read(path)
            found += now is not None and key in now.entries
    return found
