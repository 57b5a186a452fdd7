"""Times on a card that can be trusted.

Kernel time is that of a CUDA graph's replay between two events, with L2 flushed before; where a call cannot be captured
it is queued behind a sleep, so that the host's time does not show. Eager latency is the wall time of a call and of
waiting for it. What is compared takes turns, round by round. :class:`KernelClock` gives the same times to
pytest-benchmark, as its timer.
"""

from __future__ import annotations

import functools
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from gka_ops_perf.estimates import spread

WARM_UPS = 3
ROUNDS = range(7, 41)  # at least, and fewer than
SECONDS = 0.6  # of rounds for one case, between these
MAX_SPREAD = 0.1  # of kernel times: the middle half over the median

_SLEEP_CYCLES = 2_000_000  # about a millisecond, in which the host queues what follows
_THROTTLED = {
    "hw_slowdown": 0x8, "sw_thermal_slowdown": 0x20, "hw_thermal_slowdown": 0x40, "hw_power_brake_slowdown": 0x80,
}  # fmt: skip
"""Reasons (NVML's bits) for which figures do not count; the software power cap is how a card under load is."""


class UnstableError(RuntimeError):
    """The card or the samples are in no state to take a figure from."""


class Prepared(NamedTuple):
    """A call that is ready to be timed."""

    replay: Callable[[], Any]
    eager: Callable[[], Any]
    captured: bool


def prepare(run: Callable[[], Any]) -> Prepared:
    """Warms ``run`` up and captures it in a CUDA graph; where that fails the calls themselves are timed."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return Prepared(run, run, captured=False)
    graph.replay()
    torch.cuda.synchronize()
    return Prepared(graph.replay, run, captured=True)


class Timer:
    """Takes samples, in milliseconds."""

    def __init__(self) -> None:
        size = 2 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._flush = torch.empty(max(size, 1 << 26), dtype=torch.int8, device="cuda")
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def kernel(self, prepared: Prepared, replays: int = 1) -> float:
        """The median of so many replays."""
        return statistics.median(self._kernel(prepared) for _ in range(replays))

    def _kernel(self, prepared: Prepared) -> float:
        self._flush.zero_()
        torch.cuda._sleep(_SLEEP_CYCLES)
        self._start.record()
        prepared.replay()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end)

    def eager(self, prepared: Prepared) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        prepared.eager()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3


def rounds_for(milliseconds: float) -> int:
    """As many as fit into ``SECONDS``, within ``ROUNDS``."""
    wanted = int(SECONDS * 1e3 / max(milliseconds, 1e-3))
    return min(max(wanted, ROUNDS.start), ROUNDS.stop - 1)


def replays_for(milliseconds: float, rounds: int) -> int:
    """How many replays make one sample of a call that has ``rounds`` rounds, because of a slower one beside it.

    What ran before, and how it left the card's clocks, is then only felt by the first of them.
    """
    return math.ceil(rounds_for(milliseconds) / rounds)


def in_turns(measures: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """``rounds`` samples of each; who is first in a round changes from one to the next."""
    samples: dict[str, list[float]] = {name: [] for name in measures}
    names = list(measures)
    for i in range(rounds):
        for name in names if i % 2 == 0 else reversed(names):
            samples[name].append(measures[name]())
    return samples


def check_spread(samples: list[float], what: str, limit: float) -> None:
    """Raises ``UnstableError`` where the middle half of the samples is wider than ``limit`` times their median."""
    found = spread(samples)
    if not found <= limit:
        raise UnstableError(f"{what}: samples spread by {found:.0%} of their median, more than {limit:.0%}")


class KernelClock:
    """A timer for pytest-benchmark that stands still but while :meth:`run` adds a call's kernel time to it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._timer: Timer | None = None

    def __call__(self) -> float:
        return self.seconds

    def run(self, prepared: Prepared) -> None:
        self._timer = self._timer or Timer()
        self.seconds += self._timer.kernel(prepared) / 1e3


# ------------------------------------------------------------------------------------------------------- the machine
class Clocks(NamedTuple):
    """The card's state: MHz, °C, W, and why it runs slower than it could."""

    sm_mhz: float
    memory_mhz: float
    celsius: float
    watts: float
    throttled: tuple[str, ...]

    def figures(self) -> dict[str, float]:
        return {"SM MHz": self.sm_mhz, "memory MHz": self.memory_mhz, "°C": self.celsius, "W": self.watts}


def clocks(query: Callable[[str], str] | None = None) -> Clocks | None:
    """What nvidia-smi says of the current card, or ``None`` where it says nothing that is understood."""
    fields = "clocks.sm,clocks.mem,temperature.gpu,power.draw,clocks_event_reasons.active"
    try:
        values = (query or _nvidia_smi)(fields).split(",")
        sm, memory, celsius, watts = (float(value) for value in values[:4])
        reasons = int(values[4].strip(), 16)
    except (ValueError, IndexError, OSError, subprocess.SubprocessError):
        return None
    return Clocks(sm, memory, celsius, watts, tuple(name for name, bit in _THROTTLED.items() if reasons & bit))


def _nvidia_smi(fields: str) -> str:
    card = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    command = ["nvidia-smi", "-i", f"GPU-{card}", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout


def check_clocks(found: Clocks | None) -> None:
    """Raises ``UnstableError`` where the card is slowed down by heat or by a power brake."""
    if found is not None and found.throttled:
        raise UnstableError(f"the card is throttling: {', '.join(found.throttled)}, {found.celsius:.0f} °C")


def reference_speeds() -> dict[str, float]:
    """Fixed work on random data beyond L2, to put machines side by side: a bf16 product, a copy, and reading."""
    timer = Timer()
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    work = {
        "product": prepare(lambda: torch.matmul(a, b, out=out)),
        "copy": prepare(lambda: target.copy_(source)),
        "sum": prepare(source.sum),
    }
    samples = in_turns({name: functools.partial(timer.kernel, prepared) for name, prepared in work.items()}, 15)
    middle = {name: statistics.median(found) for name, found in samples.items()}
    return {
        "bf16 product TFLOP/s": 2 * 8192**3 / middle["product"] * 1e-9,
        "copy GB/s": 2 * source.nbytes / middle["copy"] * 1e-6,
        "read GB/s": source.nbytes / middle["sum"] * 1e-6,
    }
