"""The short causal convolution in front of queries, keys and values."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

FUSED_DEVICE = "cuda"
"""Where the ``causal-conv1d`` package runs."""

FUSED_KERNEL_SIZES = range(2, 5)
"""Taps that it supports."""

FUSED_CHANNEL_MULTIPLE = 8
"""Its token-major kernels ask for channels and token strides that are a multiple of it."""

FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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
        # Not of `ends`: Inductor's searchsorted of a view reads from where its base begins (pytorch/pytorch#182343).
        sequence = torch.searchsorted(ends - 1, tokens)
        return cls(starts, ends - starts, sequence, tokens - starts[sequence])


class ShortConvolution(nn.Module):
    """Depthwise causal convolution over tokens, then SiLU: y_t = SiLU(Σ_i w_i ∘ x_{t−K+1+i}), without bias, in fp32.

    Under ``torch.compile``, and wherever nothing else can run, it is K shifted products, which Inductor fuses into one
    kernel in the token-major layout. In eager mode on CUDA the ``causal-conv1d`` package runs it, if installed.

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
            tail: [N, C, K−1], what came before each sequence, oldest first; ``None`` means zeros.
            packing: the sequences packed in ``x`` (then B = 1); ``None`` means one sequence per batch row.
        """
        taps = self.weight[:, 0]
        if _can_fuse(x, taps, tail, packing):
            sequence = None if packing is None else packing.sequence.to(torch.int32)[None]
            before = None if tail is None else tail.mT.to(x.dtype).contiguous().mT  # the package wants it token-major
            fused: Tensor = _FusedConvolution.apply(x, taps, sequence, before)
            return fused
        T, history = x.shape[1], self.kernel_size - 1
        earlier = None if tail is None else tail.mT.to(x.dtype)  # [N, K−1, C]
        if packing is None and earlier is not None:
            padded = torch.cat((earlier, x), dim=1)
        else:
            padded = F.pad(x, (0, 0, history, 0))
        weights = taps.to(torch.promote_types(x.dtype, torch.float32)).unbind(1)
        total = weights[history] * x
        for i in range(history):
            shifted = padded[:, i : i + T]
            if packing is not None:
                inside = packing.position >= history - i
                outside = shifted.new_zeros(()) if earlier is None else _gather(earlier, packing, i)
                shifted = torch.where(inside[:, None], shifted, outside)
            total = total + weights[i] * shifted
        return F.silu(total).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.kernel_size}"


def next_tail(tail: Tensor, x: Tensor, starts: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
    """[N, C, K−1]: the last K−1 inputs of every sequence after those in ``x``, where ``tail`` [N, C, K−1] came before.

    Args:
        x: [B, T, C].
        starts: [N], index of each sequence's first token in ``x`` with B and T flattened; ``None`` means one sequence
            per batch row.
        lengths: [N], number of its tokens; given with ``starts``.
    """
    before, history = tail.mT.to(x.dtype), tail.shape[2]
    if starts is None or lengths is None:
        return torch.cat((before, x), dim=1)[:, x.shape[1] :].mT
    x = x.flatten(0, 1)
    if x.shape[0] == 0 or history == 0:
        return tail
    index = lengths[:, None] - history + torch.arange(history, device=x.device)  # negative where it precedes x
    newer = x[(starts[:, None] + index).clamp(min=0, max=x.shape[0] - 1)]
    older = before.gather(1, (history + index).clamp(max=history - 1).long()[..., None].expand_as(before))
    return torch.where((index >= 0)[..., None], newer, older).mT


def _gather(before: Tensor, packing: Packing, tap: int) -> Tensor:
    """[T, C]: the row of ``before`` [N, K−1, C] that ``tap`` meets at every token; any row where it meets x instead."""
    row = (packing.position + tap).clamp(max=before.shape[1] - 1)
    return before[packing.sequence, row]


@cache
def _causal_conv1d() -> Callable[..., Any] | None:
    """The package's function, or ``None`` where it is missing or was built for another PyTorch."""
    try:
        from causal_conv1d import causal_conv1d_fn
    except ImportError:
        return None
    function: Callable[..., Any] = causal_conv1d_fn
    return function


def _can_fuse(x: Tensor, taps: Tensor, tail: Tensor | None, packing: Packing | None) -> bool:
    """Whether the package can run this call. It has no packed sequences that continue others, and knows no transforms
    of ``torch.func``; in a compiled graph it would keep the projections and norms around it from being fused.
    """
    return (
        not torch.compiler.is_compiling()
        and x.device.type == FUSED_DEVICE
        and taps.shape[1] in FUSED_KERNEL_SIZES
        and x.dtype in FUSED_DTYPES
        and taps.dtype in FUSED_DTYPES
        and x.numel() > 0
        and x.stride(2) == 1
        and all(n % FUSED_CHANNEL_MULTIPLE == 0 for n in (x.shape[2], x.stride(0), x.stride(1)))
        and (tail is None or packing is None)
        and not torch._C._are_functorch_transforms_active()
        and _causal_conv1d() is not None
    )


def _fused(x: Tensor, taps: Tensor, sequence: Tensor | None, before: Tensor | None) -> Tensor:
    function = _causal_conv1d()
    assert function is not None  # _can_fuse
    y: Tensor = function(x.mT, taps, seq_idx=sequence, initial_states=before, activation="silu")
    return y.mT


class _FusedConvolution(torch.autograd.Function):
    """The package's convolution, with an error in place of second derivatives, which it would silently leave out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor, sequence: Tensor | None, before: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, taps, sequence, before)
        return _fused(x, taps, sequence, before)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, taps, sequence, before = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        x, taps = (t.detach().requires_grad_(wanted) for t, wanted in zip((x, taps), needed, strict=True))
        with torch.enable_grad():
            y = _fused(x, taps, sequence, before)
        found = iter(torch.autograd.grad(y, [t for t in (x, taps) if t.requires_grad], dy))
        return *(next(found) if wanted else None for wanted in needed), None, None
