"""A pytest plugin (``-p tests.helpers.stalls``): every warp stalls for random times around its barriers and waits.

What a kernel computes may not depend on how far its warps are apart. compute-sanitizer's racecheck does not see what
warpgroup products and bulk copies read; a missing barrier or wait before them shows here, as a result that is wrong.
Up to ``GKA_OPS_STALL`` ns (2047) are slept, by the clock and the warp's number. Use a ``TRITON_CACHE_DIR`` of its own.
"""

from __future__ import annotations

import os
import re
from itertools import count
from typing import Any

from triton.backends.nvidia.compiler import CUDABackend

_POINTS = re.compile(r"\s*(bar\.sync|barrier\.sync|fence\.proxy\.async|wgmma\.wait_group|cp\.async\.wait_group)\b")
_NANOSECONDS = int(os.environ.get("GKA_OPS_STALL", "2047"))


def stalled(ptx: str) -> str:
    """The kernels in ``ptx`` with a random sleep before and after every barrier, fence and wait."""
    numbers = count()

    def sleep() -> str:
        i = next(numbers)
        return (
            f"{{ .reg .u32 %stall{i}, %warp{i}; mov.u32 %stall{i}, %clock; mov.u32 %warp{i}, %tid.x;"
            f" shr.u32 %warp{i}, %warp{i}, 5; mad.lo.u32 %stall{i}, %warp{i}, 2654435761, %stall{i};"
            f" mul.lo.u32 %stall{i}, %stall{i}, 2246822519; shr.u32 %stall{i}, %stall{i}, 16;"
            f" rem.u32 %stall{i}, %stall{i}, {_NANOSECONDS + 1}; nanosleep.u32 %stall{i}; }}"
        )

    lines = []
    for line in ptx.split("\n"):
        lines += [sleep(), line, sleep()] if _POINTS.match(line) else [line]
    return "\n".join(lines)


_make_ptx = CUDABackend.make_ptx


def _make_stalled_ptx(*arguments: Any) -> str:
    return stalled(_make_ptx(*arguments))


CUDABackend.make_ptx = _make_stalled_ptx
