"""What the Triton kernels run: the limits, their messages, and that ``impl="auto"`` keeps to them."""

from __future__ import annotations

import pytest
import torch

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
