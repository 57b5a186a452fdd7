"""How a backward is cut into slabs, runs of chunks: asked before tensors exist, so it loads neither Triton nor a card.

A slab has about as many chunk programs as fill a card several times over, whatever the length of the sequences, and the
buffers that a backward works in are as large as one slab.
"""

from __future__ import annotations

import torch

TOKENS = 64  # every chunk size divides it
PROGRAMS = 4352
"""The most (TOKENS tokens, head) pairs of a slab, unless it would be too short: on 132 multiprocessors with two
programs each, 16.5 rounds. The sixteenth above 4096 is for packed batches, whose chunks are counted upwards."""

LEAST_CHUNKS = 16
"""The least length of a slab in units of TOKENS: the passes that walk a sequence should have something to walk."""

Size = int | torch.SymInt


def slab_count(B: Size, T: Size, H: Size, sequences: Size | None = None, *, solve: bool = True) -> Size:
    """Into how many slabs a call is cut, at most; at least 1.

    ``sequences``: number of packed ones, or ``None``. Without a solve there is one state a chunk instead of two, so
    slabs are twice as long.
    """
    if sequences is None:
        side_by_side, length = B, (T + TOKENS - 1) // TOKENS
    else:
        side_by_side, length = 1, T // TOKENS + sequences
    heads = torch.sym_max(side_by_side * H, 1)
    programs = PROGRAMS if solve else 2 * PROGRAMS
    chunks = torch.sym_max((programs + heads - 1) // heads, LEAST_CHUNKS)
    return (torch.sym_max(length, 1) + chunks - 1) // chunks
