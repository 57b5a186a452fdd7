"""Selective activation checkpointing: keep what the solve returned, compute everything around it once more.

>>> from torch.utils.checkpoint import checkpoint
>>> y = checkpoint(layer, x, use_reentrant=False, context_fn=save_solve)

The backward of a checkpointed layer computes the layer again before it differentiates it. Under :func:`save_solve` it
takes the results of ``chunk_gka`` and ``chunk_solve`` from memory, so that projections, convolutions and norms run
twice and the solve once. Works in eager mode and under ``torch.compile``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from gka_ops import ops  # noqa: F401  (registers torch.ops.gka)

SOLVES: tuple[OpOverload, ...] = (torch.ops.gka.chunk_gka.default, torch.ops.gka.chunk_solve.default)
"""The operators whose results are worth their memory: for a list of your own, or a policy."""


def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """A policy for ``create_selective_checkpoint_contexts``: ``SOLVES`` are saved, all else is better recomputed."""
    return CheckpointPolicy.MUST_SAVE if op in SOLVES else CheckpointPolicy.PREFER_RECOMPUTE


def save_solve() -> Any:
    """The contexts of :func:`policy`, for ``torch.utils.checkpoint.checkpoint(..., context_fn=save_solve)``."""
    return create_selective_checkpoint_contexts(policy)
