"""The normalisation behind the operator."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GatedRMSNorm(nn.Module):
    """RMSNorm over the last dimension, times a SiLU gate where there is one: x / sqrt(mean(x²) + eps) · weight ·
    SiLU(gate), in fp32.

    Attributes:
        weight: [size].
    """

    def __init__(
        self,
        size: int,
        eps: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.size = size
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """``x`` and ``gate`` [..., size]; returns the shape and dtype of ``x``."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide = x.to(dtype)
        y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight.to(dtype)
        if gate is not None:
            y = y * F.silu(gate.to(dtype))
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.size}, eps={self.eps}"
