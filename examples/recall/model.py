"""The model: blocks of a mixer and a gated MLP around a residual stream, with a tied embedding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.recall.mixers import Core, StudiedMixer
from examples.recall.presets import Preset
from examples.stdlib_lm.model import GatedMLP


class Block(nn.Module):
    """x + mixer(norm x), then x + mlp(norm x)."""

    def __init__(self, preset: Preset, core: Core) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(preset.hidden_size)
        self.mixer = StudiedMixer(preset.hidden_size, preset.head_dim, preset.num_heads, core, preset.num_iter)
        self.mlp_norm = nn.RMSNorm(preset.hidden_size)
        self.mlp = GatedMLP(preset.hidden_size, preset.mlp_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x))
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y


class RecallModel(nn.Module):
    """Logits of the tokens that are asked for, and of no others: at 128k tokens the rest would not fit."""

    def __init__(self, preset: Preset, vocabulary: int, core: Core) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, preset.hidden_size)
        self.blocks = nn.ModuleList(Block(preset, core) for _ in range(preset.layers))
        self.norm = nn.RMSNorm(preset.hidden_size)
        nn.init.normal_(self.embedding.weight, std=preset.hidden_size**-0.5)

    @property
    def mixers(self) -> list[StudiedMixer]:
        return [module for module in self.modules() if isinstance(module, StudiedMixer)]

    @contextmanager
    def solving(self, core: Core, num_iter: int) -> Iterator[None]:
        """All mixers with another core and number of iterations, for as long as the context lasts."""
        before = [(mixer.core, mixer.num_iter) for mixer in self.mixers]
        for mixer in self.mixers:
            mixer.core, mixer.num_iter = core, num_iter
        try:
            yield
        finally:
            for mixer, (old_core, old_num_iter) in zip(self.mixers, before, strict=True):
                mixer.core, mixer.num_iter = old_core, old_num_iter

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits [B, Q, A, vocabulary] of the tokens after ``positions`` [B, Q, A] of ``tokens`` [B, T]."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        rows = torch.arange(tokens.shape[0], device=tokens.device)[:, None, None]
        return F.linear(self.norm(x[rows, positions]), self.embedding.weight)


def build(preset: Preset, vocabulary: int, core: Core, seed: int, device: torch.device) -> RecallModel:
    """A model whose initial parameters depend on ``preset``, ``vocabulary`` and ``seed`` alone."""
    torch.manual_seed(seed)
    return RecallModel(preset, vocabulary, core).to(device)
