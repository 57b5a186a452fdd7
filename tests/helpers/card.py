"""A stand-in card: Triton compiles for it, and ctypes carries out the launches of one small kernel on CPU tensors."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any, NamedTuple

import pytest
import torch
import triton.language as tl
from torch._C._dynamo.guards import _empty_strided_cpu
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from gka_ops.triton import launcher


def scale(x, y, factor, count, N: tl.constexpr):
    """y = x·factor + count"""
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i) * factor + count)


kernel = JITFunction(scale, do_not_specialize=["count"])


class Launched(NamedTuple):
    compiled: int
    addresses: tuple[int, int]
    replayed: bool


log: list[Launched] = []


class Launcher:
    """In place of Triton's: does what ``scale`` does, on the CPU."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, gx, gy, gz, stream, function, metadata, launch_metadata, enter, leave, *arguments) -> None:
        if enter is not None:
            enter(launch_metadata)
        x, y, factor, count, N = arguments
        source, target = (t if isinstance(t, int) else t.data_ptr() for t in (x, y))
        values = list((ctypes.c_float * N).from_address(source))
        (ctypes.c_float * N).from_address(target)[:] = [value * factor + count for value in values]
        log.append(Launched(function, (source, target), isinstance(x, int)))


class Utilities:
    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

    @staticmethod
    def load_binary(name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return None, hash(binary), 32, 0, 1024


class Driver:
    launcher_cls = Launcher
    utils = Utilities

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return -1

    def get_current_stream(self, device: int) -> int:
        return 0


_LANGUAGE = {
    part: dict(vars(part)) for part in (tl, tl.core, tl.math, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base)
}


def _compiled_language(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's language as it was when tests were collected: a device function that is interpreted replaces parts of it
    for good, and then nothing can be compiled."""
    for part, members in _LANGUAGE.items():
        for name, value in list(vars(part).items()):
            if name in members and value is not members[name]:
                monkeypatch.setattr(part, name, members[name])
            elif name not in members and isinstance(part, type):  # modules gain submodules that are imported later
                monkeypatch.delattr(part, name)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors pass for tensors of a card, whose index is then -1."""
    _compiled_language(monkeypatch)
    monkeypatch.setattr(driver, "_active", Driver())
    monkeypatch.setattr(launcher, "_replayable", lambda tensor: True)
    monkeypatch.setattr(launcher, "_current_device", lambda: -1)
    monkeypatch.setattr(launcher, "_empty_strided", _empty_strided_cpu)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    log.clear()
