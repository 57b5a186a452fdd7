"""The Gated KalmaNet layer and its decoding cache."""

from gka_ops.nn.cache import GatedKalmaNetCache
from gka_ops.nn.layer import DraftTokens, GatedKalmaNet, LayerOperands

__all__ = ["DraftTokens", "GatedKalmaNet", "GatedKalmaNetCache", "LayerOperands"]
