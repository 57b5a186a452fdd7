"""The numerics contract of docs/numerics.md on the card."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import contract
from tests.helpers.problems import run_gka, run_solve

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("row", contract.ROWS, ids=lambda row: row.name)
def test_contract(row: contract.Row, dtype: torch.dtype) -> None:
    bars = contract.bars_for(dtype, row.keys, row.mean_decay)
    for run in (run_gka, run_solve):
        contract.check(contract.measure(run, row.problem(dtype, "cuda"), 30, "triton"), bars, dtype)
