"""Modifiers that people want, each a few lines: ``python -m examples.modifiers`` runs them all.

A modifier is called with what it modifies and with indices that broadcast with it: of the batch row b, the head h and
the token t. It may use tensors, which get gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

from gka_ops import chunk_gka

B, T, H, D = 2, 256, 4, 32


class LearnedRidge(nn.Module):
    """λ = r_h ‖H‖ with a learned r_h, never below 0.02 ‖H‖: the three lines are those of ``ridge_mod``."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.log_ratio = nn.Parameter(torch.full((num_heads,), -3.0))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        def ridge_mod(fro: Any, b: Tensor, h: Tensor, t: Tensor) -> Any:
            learned = self.log_ratio.exp()[h] * fro
            return torch.maximum(learned, 0.02 * fro)

        return chunk_gka(q, k, v, log_decay, ridge_mod=ridge_mod).output


def ridge_floor(least: Tensor) -> Any:
    """λ is never below ``least`` [H]: a memory with little in it answers like one with more."""
    return lambda fro, b, h, t: torch.maximum(0.02 * fro, least[h])


def distance_decay(slopes: Tensor) -> Any:
    """ALiBi's idea for a state: later tokens decay it more, by ``slopes`` [H] a token and thousand tokens."""
    return lambda g, b, h, t: g - slopes[h] * t / 1000


def temperature(scales: Tensor) -> Any:
    """Queries times ``scales`` [H]."""
    return lambda q, b, h, t: q * scales[h].to(q.dtype)


def reset_at(starts: Tensor) -> Any:
    """Forgets everything at the tokens where ``starts`` [B, T] is true: documents of a batch row do not mix."""
    return lambda g, b, h, t: torch.where(starts[b, t], -120.0, g)


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = (F.normalize(torch.randn(B, T, H, D, device=device), dim=-1) for _ in range(3))
    log_decay = -0.02 * torch.rand(B, T, H, device=device)
    slopes = 0.1 * 2.0 ** -torch.arange(H, device=device)
    starts = torch.zeros(B, T, dtype=torch.bool, device=device)
    starts[:, T // 2] = True
    layer = LearnedRidge(H).to(device)
    plain = chunk_gka(q, k, v, log_decay).output
    modified = {
        "learned ridge": torch.compile(layer, fullgraph=True)(q, k, v, log_decay),
        "floor on λ": chunk_gka(q, k, v, log_decay, ridge_mod=ridge_floor(slopes)).output,
        "decay by distance": chunk_gka(q, k, v, log_decay, decay_mod=distance_decay(slopes)).output,
        "temperature": chunk_gka(q, k, v, log_decay, query_mod=temperature(1 + slopes)).output,
        "document boundary": chunk_gka(q, k, v, log_decay, decay_mod=reset_at(starts)).output,
    }
    rows = [(name, f"{float((o - plain).norm() / plain.norm()):.3f}") for name, o in modified.items()]
    print(tabulate(rows, headers=("modifier", "relative change of the output")))
    modified["learned ridge"].square().sum().backward()
    print("gradient of the learned ridge:", layer.log_ratio.grad)


if __name__ == "__main__":
    main()
