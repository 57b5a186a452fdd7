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
        targets = Slots.of(slots)
        for buffer in self.buffers:
            write_slots(buffer, buffer.new_zeros(()).expand(slots.shape[0], *buffer.shape[1:]), targets)

    def copy_slots(self, source: Tensor, target: Tensor) -> None:
        """Copies slots ``source`` to slots ``target``, as if all were read before any is written.

        So a permutation reorders beams, and one source named several times forks a prefix.

        Args:
            source: int32 or int64 [M].
            target: like ``source``, without repetition. Where either is negative, nothing is copied.
        """
        sources, targets = Slots.of(source), Slots.of(torch.where(source >= 0, target, -1))
        for buffer in self.buffers:
            write_slots(buffer, read_slots(buffer, sources), targets)


class Slots(NamedTuple):
    """Slots of M sequences, some of which may be padding, as indices that are safe to read and to write.

    Leaving entries out would need their number on the host. So padding reads slot 0, and repeats the write of the first
    entry that is not padding: the same values to the same place. Where all is padding, slot 0 is given what it holds.

    Attributes:
        read: [M], a slot to read for each sequence.
        writer: [M], the sequence whose row is written for each.
        write: [M], int64, the slot of ``writer``.
        used: [], whether any sequence is not padding.
    """

    read: Tensor
    writer: Tensor
    write: Tensor
    used: Tensor

    @classmethod
    def of(cls, indices: Tensor) -> Slots:
        """From slots [M], int32 or int64, negative for padding."""
        real, read = indices >= 0, indices.clamp(min=0)
        if indices.shape[0] == 0:
            return cls(read, read, read.long(), real.any())
        writer = torch.where(real, torch.arange(indices.shape[0], device=indices.device), real.int().argmax())
        return cls(read, writer, read[writer].long(), real.any())


def read_slots(buffer: Tensor, slots: Slots | None) -> Tensor:
    """[M, ...]: rows of ``buffer`` [S, ...]; ``buffer`` itself for ``None``."""
    return buffer if slots is None else buffer.index_select(0, slots.read)


def write_slots(buffer: Tensor, rows: Tensor, slots: Slots | None) -> None:
    """Writes ``rows`` [M, ...] to their slots of ``buffer`` [S, ...] in place; to all of it for ``None``."""
    if slots is None:
        buffer.copy_(rows)
    elif buffer.numel() > 0:
        rows = torch.where(slots.used, rows[slots.writer].to(buffer.dtype), buffer[:1])
        buffer.index_copy_(0, slots.write, rows)
