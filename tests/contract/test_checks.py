"""What the Triton kernels run: the limits, their messages, and that ``impl="auto"`` keeps to them."""

from __future__ import annotations

import pytest
import torch

from gka_ops import ops
from gka_ops.reference import backend as reference
from gka_ops.triton import checks

CHUNK_OPS = ("chunk_solve", "chunk_solve_backward", "chunk_gka", "chunk_gka_backward")


@pytest.mark.parametrize("op", [*CHUNK_OPS, "recurrent_gka"])
def test_limits(op: str) -> None:
    largest = 128 if op in CHUNK_OPS else 256
    for dtype, limit in ((torch.bfloat16, 256), (torch.float16, 256), (torch.float32, largest)):
        assert checks.unsupported_reason(op, dtype, limit) is None
        with pytest.raises(
            ValueError, match=rf'impl="triton": expected a head dimension D <= {limit}.*, got {limit + 1}'
        ):
            checks.require_supported(op, dtype, limit + 1)
    with pytest.raises(TypeError, match=r"expected bfloat16, float16 or float32 inputs, got torch\.float64"):
        checks.require_supported(op, torch.float64, 64)


def test_auto_takes_the_reference_beyond_them() -> None:
    launch = pytest.importorskip("gka_ops.triton.launch", reason="needs Triton")
    for op in CHUNK_OPS:
        assert ops._module(op, "auto", True, torch.float32, 160) is reference
        assert ops._module(op, "auto", True, torch.bfloat16, 160) is launch
    assert ops._module("recurrent_gka", "auto", True, torch.float32, 160) is launch
