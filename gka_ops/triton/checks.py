"""What the Triton kernels can run, as sentences. Imports torch only, so that asking does not load Triton."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_HEAD_DIM = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def unsupported_reason(q: Tensor) -> str | None:
    """Why the kernels cannot run on queries [B, T, H, D] like ``q``, or ``None`` if they can."""
    if q.dtype not in DTYPES:
        return f"bfloat16, float16 or float32 inputs, got {q.dtype}"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"a head dimension D <= {MAX_HEAD_DIM}, got {q.shape[-1]}"
    return None


def require_supported(q: Tensor) -> None:
    """Raises TypeError (dtype) or ValueError (size) where the kernels cannot run."""
    reason = unsupported_reason(q)
    if reason is not None:
        error = TypeError if q.dtype not in DTYPES else ValueError
        raise error(f'impl="triton": expected {reason}')
