"""What one :class:`gka_ops.GatedKalmaNet` layer remembers between calls, for a batch or as a pool of slots."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gka_ops.types import GKAState

BUFFERS = ("q_tail", "k_tail", "v_tail", "state.kk", "state.kv")
"""Names of :attr:`GatedKalmaNetCache.buffers`."""


class GatedKalmaNetCache(NamedTuple):
    """Memory of one layer in S slots, one sequence each. Zeros are the start of a sequence; calls advance it in place.

    Slot n belongs to sequence n of a call, or to whichever ``state_indices`` names: then it is a pool, which sequences
    enter and leave without a copy. It is a tuple of fixed buffers, so that it passes through ``torch.compile`` as a
    pytree and stays valid in a CUDA graph; nothing here waits for the device. K is the width of the short convolutions.

    Attributes:
        q_tail: [S, Hq·D, K−1], the last K−1 inputs of the query convolution, oldest first.
        k_tail: [S, Hk·D, K−1], the same for keys.
        v_tail: [S, Hv·V, K−1], the same for values; [S, Hv·V, 0] without a convolution.
        state: the operator's state, fp32 (fp64 for an fp64 layer), ``kk`` [S, H, D, D] and ``kv`` [S, H, D, V].
    """

    q_tail: Tensor
    k_tail: Tensor
    v_tail: Tensor
    state: GKAState

    @property
    def buffers(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Tails and states, each with S rows."""
        return self.q_tail, self.k_tail, self.v_tail, self.state.kk, self.state.kv

    def reset(self, slots: Tensor) -> None:
        """Puts ``slots`` at the start of a sequence: int32 or int64 [M], negative entries are ignored."""
        for buffer in self.buffers:
            write_slots(buffer, buffer.new_zeros(()).expand(slots.shape[0], *buffer.shape[1:]), slots)

    def copy_slots(self, source: Tensor, target: Tensor) -> None:
        """Copies slots ``source`` to slots ``target``, as if all were read before any is written.

        So a permutation reorders beams, and one source named several times forks a prefix.

        Args:
            source: int32 or int64 [M].
            target: like ``source``, without repetition. Where either is negative, nothing is copied.
        """
        target = torch.where(source >= 0, target, -1)
        for buffer in self.buffers:
            write_slots(buffer, read_slots(buffer, source), target)


def read_slots(buffer: Tensor, slots: Tensor | None) -> Tensor:
    """Rows ``slots`` [M] of ``buffer`` [S, ...], any row where it is negative; ``buffer`` itself for ``None``."""
    return buffer if slots is None else buffer.index_select(0, slots.clamp(min=0))


def write_slots(buffer: Tensor, rows: Tensor, slots: Tensor | None) -> None:
    """Writes ``rows`` [M, ...] to ``slots`` [M] of ``buffer`` [S, ...] in place, but for negative ones; to all rows for
    ``None``.

    Leaving entries out would need their number on the host. So a negative entry repeats the write of the first other
    one, which is the same value to the same place; where there is no other, slot 0 is given what it holds.
    """
    if slots is None:
        buffer.copy_(rows)
    elif buffer.numel() > 0 and rows.shape[0] > 0:
        used = slots >= 0
        entry = torch.where(used, torch.arange(len(slots), device=slots.device), used.int().argmax())
        index = slots[entry].clamp(min=0).long()
        values = torch.where(used.any(), rows[entry].to(buffer.dtype), buffer[:1])
        buffer.index_copy_(0, index, values)
