"""What the Triton kernels run: the limits, their messages, and that ``impl="auto"`` keeps to them."""

from __future__ import annotations

import pytest
import torch

import gka_ops
from gka_ops import ops
from gka_ops.reference import backend as reference
from gka_ops.triton import checks


@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
def test_limits(dtype: torch.dtype) -> None:
    assert checks.unsupported_reason(dtype, 256) is None
    with pytest.raises(ValueError, match='impl="triton": expected a head dimension D <= 256, got 257'):
        checks.require_supported(dtype, 257)
    with pytest.raises(TypeError, match=r"expected bfloat16, float16 or float32 inputs, got torch\.float64"):
        checks.require_supported(torch.float64, 64)


def test_auto_takes_the_reference_beyond_them() -> None:
    launch = pytest.importorskip("gka_ops.triton.launch", reason="needs Triton")
    assert ops._module("auto", True, torch.float32, 256) is launch
    assert ops._module("auto", True, torch.float32, 257) is reference


def test_states_of_a_launch() -> None:
    checks.require_states(65_535 // 32, 32, 128 * 128, parts=1)
    with pytest.raises(ValueError, match="expected at most 2047 sequences of 32 heads in a call, got 2048; split them"):
        checks.require_states(2048, 32, 128 * 128, parts=1)
    checks.require_states(1023, 32, 256 * 256, parts=2)
    with pytest.raises(ValueError, match="expected at most 1023 sequences of 32 heads in a call, got 1024"):
        checks.require_states(1024, 32, 256 * 256, parts=2)


@pytest.mark.parametrize("packed", [False, True])
def test_too_many_sequences_are_refused(packed: bool) -> None:
    pytest.importorskip("triton")
    N, H = 2048, 32
    q, k, v = torch.zeros(3, 1 if packed else N, N if packed else 1, H, 1)
    bounds = torch.arange(N + 1, dtype=torch.int32) if packed else None
    with pytest.raises(ValueError, match="expected at most 2047 sequences of 32 heads in a call, got 2048"):
        gka_ops.chunk_gka(q, k, v, cu_seqlens=bounds, impl="triton")
