"""The README's examples run, and its table of names is the public surface."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

import gka_ops

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def test_examples_run() -> None:
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    torch.manual_seed(0)
    for block in blocks:
        exec(block, names)
    assert names["output"].isfinite().all()
    assert names["next_output"].shape == (2, 1, 4, 64)
    x = torch.randn(1, 32, 512)
    assert names["layer"](x).shape == x.shape


def test_table_lists_the_public_names() -> None:
    rows = [line.split("|")[1] for line in README.splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"`(\w+)", row)}
    assert listed == set(gka_ops.__all__) - {"__version__"}
