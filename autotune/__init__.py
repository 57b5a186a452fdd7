"""Launch configurations of the kernels: heuristics, tables of what was found to be faster on a card, and their tuning.

>>> from gka_ops import autotune
>>> with autotune.override("readout", num_warps=8):  # forces a configuration, to find out which is at fault
...     output, state = gka_ops.chunk_gka(q, k, v)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gka_ops.autotune.choice import Choice, disable, enable, lookup, mode, override, reload, use
    from gka_ops.autotune.device import Device
    from gka_ops.autotune.key import Key
    from gka_ops.autotune.report import Explanation, explain
    from gka_ops.autotune.shapes import Shape, keys_of
    from gka_ops.autotune.tuner import share_tables, tune

_MODULES = {
    "choice": ("Choice", "disable", "enable", "lookup", "mode", "override", "reload", "use"),
    "device": ("Device",),
    "key": ("Key",),
    "report": ("Explanation", "explain"),
    "shapes": ("Shape", "keys_of"),
    "tuner": ("share_tables", "tune"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
__all__ = [
    "Choice", "Device", "Explanation", "Key", "Shape", "disable", "enable", "explain", "keys_of", "lookup", "mode",
    "override", "reload", "share_tables", "tune", "use",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
