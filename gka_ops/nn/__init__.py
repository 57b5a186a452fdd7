"""The Gated KalmaNet layer and its decoding cache."""

from gka_ops.nn.cache import GatedKalmaNetCache
from gka_ops.nn.layer import GatedKalmaNet, LayerOperands

__all__ = ["GatedKalmaNet", "GatedKalmaNetCache", "LayerOperands"]
