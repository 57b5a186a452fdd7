"""The measuring programs without a card."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from perf import bars


def test_bars_says_that_it_needs_a_card(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["perf.bars"])
    assert bars.main() == 2
    assert capsys.readouterr().err == "perf.bars needs a CUDA card\n"


def test_a_failing_or_missed_row_fails_the_run_but_not_the_other_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken() -> float:
        raise RuntimeError("no such kernel")

    rows = [bars.Bar("a", "ms", 2.0, 1.0, lambda: 1.5), bars.Bar("b", "ms", 2.0, 1.0, broken)]
    for name, value in (("bars", rows), ("errors", {}), ("warm_up", None)):
        monkeypatch.setattr(bars, name, lambda value=value: value)
    monkeypatch.setattr(bars, "environment", lambda commit: {"card": "none", "commit": commit})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    path = tmp_path / "bars.json"
    monkeypatch.setattr("sys.argv", ["perf.bars", "--json", str(path), "--commit", "abc"])
    assert bars.main() == 1
    report = json.loads(path.read_text())
    assert report["commit"] == "abc"
    assert [row["verdict"] for row in report["rows"]] == ["met", "failed: no such kernel"]
    assert math.isnan(report["rows"][1]["measured"])
    rows[1] = bars.Bar("only informs", "ms", None, None, lambda: 9.0)
    assert bars.main() == 0
