"""The language model: blocks of a GKA layer and a gated MLP around a residual stream, with a tied byte embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.stdlib_lm.data import VOCABULARY
from examples.stdlib_lm.presets import Preset
from gka_ops.nn import GatedKalmaNet, GatedKalmaNetCache


class GatedMLP(nn.Module):
    """down(SiLU(gate x) · up x)."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.down_proj = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Block(nn.Module):
    """x + mixer(norm x), then x + mlp(norm x)."""

    def __init__(self, preset: Preset, num_iter: int | Literal["auto"]) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(preset.hidden_size)
        self.mixer = GatedKalmaNet(
            preset.hidden_size, preset.head_dim, preset.num_heads, preset.num_kv_heads, num_iter=num_iter
        )
        self.mlp_norm = nn.RMSNorm(preset.hidden_size)
        self.mlp = GatedMLP(preset.hidden_size, preset.mlp_size)

    def forward(self, x: Tensor, cache: GatedKalmaNetCache | None = None) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x), cache)
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y


class ByteLM(nn.Module):
    """Next-byte logits.

    Args:
        preset: the sizes.
        num_iter: of every GKA layer; 0 makes them plain gated linear attention with the same parameters.
    """

    def __init__(self, preset: Preset, num_iter: int | Literal["auto"] = "auto") -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, preset.hidden_size)
        self.blocks = nn.ModuleList(Block(preset, num_iter) for _ in range(preset.layers))
        self.norm = nn.RMSNorm(preset.hidden_size)
        nn.init.normal_(self.embedding.weight, std=preset.hidden_size**-0.5)

    @property
    def mixers(self) -> list[GatedKalmaNet]:
        return [module for module in self.modules() if isinstance(module, GatedKalmaNet)]

    def init_caches(self, batch_size: int) -> list[GatedKalmaNetCache]:
        """Caches at the start of ``batch_size`` texts, for :meth:`forward`."""
        return [mixer.init_cache(batch_size) for mixer in self.mixers]

    def forward(self, tokens: Tensor, caches: Sequence[GatedKalmaNetCache] | None = None) -> Tensor:
        """Logits [B, T, 256] of the byte after each of ``tokens`` [B, T]; ``caches`` are advanced in place."""
        x = self.embedding(tokens)
        for index, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[index])
        return F.linear(self.norm(x), self.embedding.weight)


def next_byte_loss(model: ByteLM, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats of ``targets`` [B, T] given ``inputs`` [B, T]."""
    logits = model(inputs)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def build(preset: Preset, num_iter: int | Literal["auto"], seed: int, device: torch.device) -> ByteLM:
    """A model whose initial parameters depend on ``preset`` and ``seed`` alone."""
    torch.manual_seed(seed)
    return ByteLM(preset, num_iter).to(device)
