"""A profiler trace of a compiled training step, and where its time went."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function, tensorboard_trace_handler

from gka_ops_perf import providers
from gka_ops_perf.cases import GKA, Case, cases
from gka_ops_perf.costs import Shape

WARM_UPS, STEPS = 3, 3
SMALL = Shape(B=1, T=128, H=4, Hkv=2, D=32, V=32, dtype="fp32")
"""Of a layer's training step where there is no card."""


class Hot(NamedTuple):
    """A kernel (on a CPU: an operator): its time in a step, its share, and how often it ran."""

    name: str
    milliseconds: float
    share: float
    calls: float


def training_step(device: str) -> Callable[[], Any]:
    """The model's on a card, a small layer's on a CPU."""
    case: Case = next(c for c in cases() if (c.op, c.stage, c.provider) == ("model", "training step", GKA))
    if device == "cpu":
        case = dataclasses.replace(case, op="layer", shape=SMALL)
    return providers.job(case, device).run


def record(step: Callable[[], Any], folder: Path, device: str, tensorboard: Path | None = None) -> list[Hot]:
    """Profiles steps, writes ``trace.json`` (for Perfetto or chrome://tracing) and returns the kernels by time.

    With ``tensorboard`` the trace is written there as well, the way PyTorch's profiler plugin reads it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for _ in range(WARM_UPS):
        step()
    on_card = device != "cpu"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_card else [])]
    with profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(STEPS):
            with record_function("training step"):
                step()
        if on_card:
            torch.cuda.synchronize()
    if tensorboard is None:
        profiler.export_chrome_trace(str(folder / "trace.json"))
    else:  # a trace can be saved once
        tensorboard_trace_handler(str(tensorboard))(profiler)
        newest = max(tensorboard.glob("*.pt.trace.json"), key=lambda path: path.stat().st_mtime)
        shutil.copyfile(newest, folder / "trace.json")
    return _hot(profiler, on_card)


def _hot(profiler: profile, on_card: bool) -> list[Hot]:
    rows = []
    for event in profiler.key_averages():
        own = event.self_device_time_total if on_card else event.self_cpu_time_total
        is_kernel = str(event.device_type).endswith("CUDA") or not on_card
        if is_kernel and own > 0 and not event.is_user_annotation and event.key != "training step":
            rows.append((event.key, own / 1e3 / STEPS, event.count / STEPS))
    total = sum(time for _, time, _ in rows)
    return sorted((Hot(key, time, time / total, calls) for key, time, calls in rows), key=lambda hot: -hot.milliseconds)
