"""The recipes of docs/torch.md run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "torch.md"


@pytest.mark.slow
def test_recipes_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 6
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    torch._dynamo.reset()
    for block in blocks:
        exec(block, names)
    assert names["x"].grad.shape == (2, 48, 64) and names["q"].grad is not None
    assert names["state"].kv.any()
    torch._dynamo.reset()
