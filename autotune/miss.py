"""Tuning on a miss: what a call does, where ``choice.enable`` lets it, before it launches kernels that no table knows.

It is done by ``gka-autotune tune`` in a process of its own. The workers of ``multiprocessing`` would run the caller's
program again, and what goes wrong there goes wrong without the caller.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Sequence

import torch

from gka_ops.autotune import choice, table, tuner
from gka_ops.autotune.device import Device, current
from gka_ops.autotune.key import Key

_START_SECONDS = 600.0  # for what the budget does not limit: imports, and the candidate that is at work when it ends

_log = logging.getLogger("gka_ops.autotune")
_tuning = threading.Lock()
_tried: set[tuple[Key, Device]] = set()


class MissWarning(UserWarning):
    """Calls are to tune what no table knows, and this one did not or could not."""


def tune(keys: Sequence[Key], device: Device, seconds: float, training: bool) -> bool:
    """Tunes the keys that were not tried before in this process. Never raises.

    Returns whether that is settled, for good or ill: ``False`` in a training step, a capture, a trace or a backward.
    """
    if _tried.issuperset((key, device) for key in keys):
        return True
    if training or tuner.forbidden():
        return False
    with _tuning:  # other threads wait, and find in the tables what this one found
        keys = [key for key in keys if (key, device) not in _tried]
        if not keys:
            return True
        try:
            if reason := _impossible():
                _warn(reason, "is off")
            else:
                _log.info("tuning %s for up to %.0f s", ", ".join(map(str, keys)), seconds)
                _run(keys, _ordinal(device), seconds)
        except Exception as error:
            _warn(f"{type(error).__name__}: {str(error)[:500]}", "failed")
        _tried.update((key, device) for key in keys)
        choice.reload()
        return True


def _impossible() -> str | None:
    """Why nothing can be tuned in this process."""
    if _ranks() > 1:
        return (
            "the ranks of a distributed job have to launch the same code: call gka_ops.autotune.tune on all of them, "
            "or tune beforehand and call gka_ops.autotune.share_tables"
        )
    return None if table.user_folder() is not None else table.NO_FOLDER


def _ranks() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))  # torchrun's, where there is no process group yet


def _ordinal(device: Device) -> int:
    """The card to tune on: the current one, if it is such a card."""
    present = (torch.cuda.current_device(), *range(torch.cuda.device_count()))
    return next(ordinal for ordinal in present if current(ordinal) == device)


def _run(keys: Sequence[Key], ordinal: int, seconds: float) -> None:
    """Raises what says why the keys are not in this user's table."""
    torch.cuda.synchronize(ordinal)  # what is queued would slow down some candidates and not others
    torch.cuda.empty_cache()  # the other process needs memory
    command = [sys.executable, "-P", "-m", "gka_ops.autotune.cli", "tune", "--ordinal", str(ordinal)]
    command += ["--time-budget", str(round(seconds)), *(word for key in keys for word in ("--key", str(key)))]
    result = subprocess.run(
        command, env={**os.environ, "GKA_OPS_AUTOTUNE": "cached"}, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=seconds + _START_SECONDS,
    )  # fmt: skip
    if result.returncode:
        said = (result.stderr or result.stdout).strip().splitlines()
        raise RuntimeError(said[-1] if said else f"exit code {result.returncode}")


def _warn(reason: str, what: str) -> None:
    if choice.first("miss", what):
        message = f"tuning of launch configurations on a miss {what}; heuristics run. {reason}"
        warnings.warn(message, MissWarning, stacklevel=2)
