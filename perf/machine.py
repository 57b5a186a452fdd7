"""What a run is stored with: card, driver, versions, commit and time."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from gka_ops_perf.records import Machine


def machine(commit: str | None = None) -> Machine:
    """This one. ``commit`` is named where the checkout has no history."""
    card = torch.cuda.is_available()
    here = str(Path(__file__).resolve().parent)
    return Machine(
        gpu=torch.cuda.get_device_name() if card else "",
        driver=_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0] if card else "",
        cpu=_processor(),
        torch=torch.__version__,
        triton=_version("triton"),
        python=platform.python_version(),
        commit=commit or _of("git", "-C", here, "describe", "--always", "--dirty") or "unknown",
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _of(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
