"""What the Triton kernels can run, as sentences. Imports torch only, so that asking does not load Triton."""

from __future__ import annotations

import torch

MAX_HEAD_DIM = 256
MAX_STATES = 65_535  # of a launch: CUDA's limit of a grid beyond its first axis
MAX_ENTRIES = 2**31 - 1  # of all states at one time, where sequences are worked off in parts: 32-bit strides
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def unsupported_reason(dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the kernels cannot run on queries of this dtype and head dimension D, or ``None`` if they can."""
    if dtype not in DTYPES:
        return f"bfloat16, float16 or float32 inputs, got {dtype}"
    if head_dim > MAX_HEAD_DIM:
        return f"a head dimension D <= {MAX_HEAD_DIM}, got {head_dim}"
    return None


def require_supported(dtype: torch.dtype, head_dim: int) -> None:
    """Raises TypeError (dtype) or ValueError (size) where the kernels cannot run."""
    reason = unsupported_reason(dtype, head_dim)
    if reason is not None:
        error = TypeError if dtype not in DTYPES else ValueError
        raise error(f'impl="triton": expected {reason}')


def require_states(sequences: int, heads: int, entries: int, parts: int) -> None:
    """Raises ValueError where there are too many states, one a sequence and head of so many entries, for a launch.

    ``parts``: how many one after the other a sequence is worked off in.
    """
    most = MAX_STATES // heads
    if parts > 1:
        most = min(most, MAX_ENTRIES // (heads * entries))
    if sequences > most:
        raise ValueError(
            f'impl="triton": expected at most {most} sequences of {heads} heads in a call, got {sequences}; split them '
            "over several calls"
        )
