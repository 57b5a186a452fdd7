"""Launch configurations of the kernels: heuristics, tables of what was found to be faster on a card, and their tuning.

>>> from gka_ops import autotune
>>> with autotune.override("readout", num_warps=8):  # forces a configuration, to find out which is at fault
...     output, state = gka_ops.chunk_gka(q, k, v)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gka_ops.autotune.choice import Choice, lookup, mode, override, reload, use
    from gka_ops.autotune.device import Device
    from gka_ops.autotune.key import Key
    from gka_ops.autotune.tuner import share_tables, tune

__all__ = ["Choice", "Device", "Key", "lookup", "mode", "override", "reload", "share_tables", "tune", "use"]
_MODULES = {"Device": "device", "Key": "key", "share_tables": "tuner", "tune": "tuner"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'choice')}"), name)
