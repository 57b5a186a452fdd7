"""The numerics contract of docs/numerics.md on the card."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import contract
from tests.helpers.problems import ErrorSummary

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("row", contract.ROWS, ids=lambda row: row.name)
def test_contract(row: contract.Row, dtype: torch.dtype) -> None:
    errors = dict(contract.measure(row.problem(dtype, "cuda"), 30, "triton"))
    x, o = errors["x"], errors["o"]
    assert isinstance(x, ErrorSummary) and isinstance(o, ErrorSummary)
    assert x.p99 <= contract.X_P99, x
    assert o.p99 <= (contract.SHORT_MEMORY_O_P99 if row.short_memory else contract.O_P99), o
    bar = contract.SHORT_MEMORY_GRADIENT if row.short_memory else contract.GRADIENT
    gradients = {name: error for name, error in errors.items() if isinstance(error, float)}
    assert all(error <= bar for error in gradients.values()), gradients
