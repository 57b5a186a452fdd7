"""What pytest-benchmark stores with a run of ``benchmarks.py``."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from gka_ops_perf import timing
from gka_ops_perf.machine import machine


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Adds card, driver, versions, commit and the card's clocks."""
    machine_info.update(dataclasses.asdict(machine()))
    if (state := timing.clocks()) is not None:
        machine_info["clocks"] = state.figures()
