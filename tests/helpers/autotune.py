"""Fake cards, problems and entries for tables, and what tests do in other processes."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gka_ops.autotune import choice, miss, space, table, tuner
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


def isolate(monkeypatch: pytest.MonkeyPatch, root: Path) -> tuple[Path, Path]:
    """A process in which nothing was chosen or tuned yet, until the test ends. Returns its user's and shipped folders.

    pytest undoes changes of attributes, also those of the code under test.
    """
    user, shipped = root / "user", root / "shipped"
    monkeypatch.setattr(table, "SHIPPED", shipped)
    monkeypatch.setenv("GKA_OPS_AUTOTUNE_DIR", str(user))
    for name in ("GKA_OPS_AUTOTUNE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(choice, "_settings", choice._Settings())
    monkeypatch.setattr(choice, "_overridden", False)
    monkeypatch.setattr(choice, "_warned", set())
    monkeypatch.setattr(miss, "_tried", set())
    return user, shipped


# ------------------------------------------------------------------------------------------------------------ processes
def forkserver() -> multiprocessing.context.BaseContext:
    """Where processes come from that need not import everything anew."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.autotune"])
    return context


def run_processes(function: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> list[Any]:
    """Calls the function in as many processes at once, and returns what they return."""
    with ProcessPoolExecutor(len(arguments), forkserver()) as pool:
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


class FakeBench:
    """Candidates of the read-out that are fast, slow, wrong, crash, hang or raise, by what they are; no card is needed.

    What is asked of it is written to ``log``, one line each.
    """

    def __init__(self, log: Path) -> None:
        self._log = log

    def compile(self, key: Key, parameters: space.Parameters) -> dict[str, int]:
        self._note("compile", parameters)
        if parameters["num_stages"] == 3:
            raise RuntimeError("out of shared memory")
        return {"registers": 128, "spills": 0, "shared_memory": 1024}

    def check(self, key: Key, parameters: space.Parameters) -> str | None:
        self._note("check", parameters)
        match parameters["num_warps"], parameters["num_stages"], parameters["max_registers"]:
            case 2, 1, None:
                os.kill(os.getpid(), signal.SIGSEGV)
            case 2, 1, 128:
                time.sleep(1000)
            case 2, 1, 168:
                return "wrong: output differs by 0.5"
            case 2, 2, None:
                raise RuntimeError("an illegal memory access was encountered")
        return None

    def time(self, key: Key, parameters: space.Parameters) -> float:
        self._note("time", parameters)
        if (parameters["num_warps"], parameters["num_stages"]) == (8, 2):
            return 5.0 if parameters["max_registers"] == 128 else 6.0
        return 10.0 + (parameters["num_warps"] or 0)

    def _note(self, what: str, parameters: space.Parameters) -> None:
        with self._log.open("a") as file:
            file.write(f"{what} {sorted(parameters.items())}\n")


def without_card() -> FakeBench:
    """A bench that cannot be made."""
    raise RuntimeError("CUDA error: device busy")


def share_among_ranks(rank: int, store: str, folder: str) -> object:
    """One rank of a job with a table of its own: what it uses after tuning, of which rank 0 alone does something."""
    os.environ["GKA_OPS_AUTOTUNE_DIR"] = f"{folder}/{rank}"
    tuner._RUN_SECONDS = 0.5
    forkserver()
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    key, other = key_of(), key_of("state")
    path = Path(folder, str(rank), table.file_name(H100))
    table.add(path, H100, {other: entry(other, num_warps=4 if rank else 8)})
    make = functools.partial(FakeBench, Path(folder, f"log{rank}"))
    results = tuner.tune([key], H100, make, seconds=60, workers=1, method="forkserver")
    found = [choice.lookup(k, H100) for k in (key, other)]
    torch.distributed.destroy_process_group()
    return len(results), [(c.parameters, c.origin, str(c.file)) for c in found]
