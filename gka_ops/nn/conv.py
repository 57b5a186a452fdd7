"""The short causal convolution in front of queries, keys and values."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Packing(NamedTuple):
    """Where the tokens of a packed batch belong.

    Attributes:
        starts: [N], index of the first token of every sequence.
        lengths: [N], number of tokens of every sequence, 0 allowed.
        sequence: [T], the sequence of every token.
        position: [T], its index within that sequence.
    """

    starts: Tensor
    lengths: Tensor
    sequence: Tensor
    position: Tensor

    @classmethod
    def of(cls, cu_seqlens: Tensor, num_tokens: int) -> Packing:
        """From the boundaries ``cu_seqlens`` [N + 1] of sequences that fill ``num_tokens`` tokens."""
        starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
        tokens = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
        sequence = torch.searchsorted(ends.contiguous(), tokens, right=True)
        return cls(starts, ends - starts, sequence, tokens - starts[sequence])


class ShortConvolution(nn.Module):
    """Depthwise causal convolution over tokens, then SiLU: y_t = SiLU(Σ_i w_i ∘ x_{t−K+1+i}), without bias.

    Written as K shifted products in fp32, which ``torch.compile`` fuses into one kernel in the token-major layout.

    Args:
        channels: number of channels C.
        kernel_size: taps K, at least 1.

    Attributes:
        weight: [C, 1, K], the last tap meets the current token.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.kernel_size = kernel_size
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in ±K^-½, as ``nn.Conv1d`` does."""
        bound = 1 / math.sqrt(self.kernel_size)
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor, tail: Tensor | None = None, packing: Packing | None = None) -> Tensor:
        """Convolves ``x`` [B, T, C] and returns the same shape and dtype.

        Args:
            tail: [N, C, K−1], what came before each sequence; **overwritten** with what a next call needs. ``None``
                means zeros.
            packing: the sequences packed in ``x`` (then B = 1); ``None`` means one sequence per batch row.
        """
        T, history = x.shape[1], self.kernel_size - 1
        before = None if tail is None else tail.mT.to(x.dtype)  # [N, K−1, C]
        if packing is None and before is not None:
            padded = torch.cat((before, x), dim=1)
        else:
            padded = F.pad(x, (0, 0, history, 0))
        taps = self.weight[:, 0].to(torch.promote_types(x.dtype, torch.float32)).unbind(1)
        total = taps[history] * x
        for i in range(history):
            shifted = padded[:, i : i + T]
            if packing is not None:
                inside = packing.position >= history - i
                earlier = shifted.new_zeros(()) if before is None else _gather(before, packing, i)
                shifted = torch.where(inside[:, None], shifted, earlier)
            total = total + taps[i] * shifted
        if tail is not None:
            last = padded[:, T:] if packing is None or before is None else _last(x[0], before, packing)
            tail.copy_(last.mT)
        return F.silu(total).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.kernel_size}"


def _gather(before: Tensor, packing: Packing, tap: int) -> Tensor:
    """[T, C]: the row of ``before`` [N, K−1, C] that ``tap`` meets at every token; any row where it meets x instead."""
    row = (packing.position + tap).clamp(max=before.shape[1] - 1)
    return before[packing.sequence, row]


def _last(x: Tensor, before: Tensor, packing: Packing) -> Tensor:
    """[N, K−1, C]: the last K−1 rows of every sequence of ``x`` [T, C], and of ``before`` where that is too short."""
    history = before.shape[1]
    slots = torch.arange(history, device=x.device)
    index = packing.lengths[:, None] - history + slots  # [N, K−1], negative where the row lies before the sequence
    if x.shape[0] == 0:
        return before
    rows = x[(packing.starts[:, None] + index).clamp(min=0, max=x.shape[0] - 1)]
    older = before.gather(1, (history + index).clamp(max=max(history - 1, 0))[..., None].expand_as(before))
    return torch.where((index >= 0)[..., None], rows, older)
