"""Fused, ``torch.compile``-native operators for Gated KalmaNet (arXiv 2511.21016).

Importing this package registers the ``torch.ops.gka`` operators. It needs torch alone: Triton is imported when an
operator first runs on a CUDA tensor.
"""

from typing import TYPE_CHECKING

from gka_ops._version import __version__
from gka_ops.api import chunk_gka, chunk_solve, recurrent_gka
from gka_ops.flops import tell_flop_counter as _tell_flop_counter
from gka_ops.numerics import iterations_for
from gka_ops.types import ChunkSolveOutput, DecayGate, GKAOutput, GKAState, Ridge
from gka_ops.validation import debug_mode

if TYPE_CHECKING:
    from gka_ops.nn import GatedKalmaNet

__all__ = [
    "ChunkSolveOutput",
    "DecayGate",
    "GKAOutput",
    "GKAState",
    "GatedKalmaNet",
    "Ridge",
    "__version__",
    "chunk_gka",
    "chunk_solve",
    "debug_mode",
    "iterations_for",
    "recurrent_gka",
]

_tell_flop_counter()


def __getattr__(name: str) -> object:
    if name == "GatedKalmaNet":  # a layer, not an operator: loaded on demand so that single-op users do not pay for it
        from gka_ops.nn import GatedKalmaNet

        return GatedKalmaNet
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
