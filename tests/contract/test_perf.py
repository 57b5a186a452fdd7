"""The measuring programs without a card."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

from gka_ops.autotune import choice
from gka_ops.autotune.table import Table
from gka_ops_perf import bars, gain
from tests.helpers.autotune import FORWARD, H100, H200, entry, isolate, key_of


@pytest.mark.parametrize("program", [bars, gain])
def test_it_says_that_it_needs_a_card(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", [program.__name__])
    assert program.main() == 2
    assert capsys.readouterr().err == f"{program.__name__} needs a CUDA card\n"


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
    monkeypatch.setattr("sys.argv", ["gka_ops_perf.bars", "--json", str(path), "--commit", "abc"])
    assert bars.main() == 1
    report = json.loads(path.read_text())
    assert report["commit"] == "abc"
    assert [row["verdict"] for row in report["rows"]] == ["met", "failed: no such kernel"]
    assert math.isnan(report["rows"][1]["measured"])
    rows[1] = bars.Bar("only informs", "ms", None, None, lambda: 9.0)
    assert bars.main() == 0


def test_the_gain_of_tables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Heuristics and tables take turns; kernels' times come from entries that count."""
    isolate(monkeypatch, tmp_path)
    key, stale = key_of(), key_of(problem=FORWARD._replace(T=64))
    own = Table(H100, {key: entry(key, num_warps=8), stale: entry(stale, fingerprint="0")})
    tables = [(tmp_path / "a", own), (tmp_path / "b", Table(H100, {key: entry(key, microseconds=1.0)}))]
    tables.append((tmp_path / "c", Table(H200, {stale: entry(stale)})))
    monkeypatch.setattr(choice, "read_all", lambda: tables)
    turns: list[int | None] = []

    def time() -> float:
        turns.append(choice.lookup(key, H100).parameters["num_warps"])
        return {4: 3.0, 8: 2.0}[turns[-1] or 0]

    monkeypatch.setattr(gain, "cases", lambda: [gain.Case("a call", "ms", lambda: time)])
    monkeypatch.setattr(bars, "host_microseconds_of_forward", lambda: 4.0)
    monkeypatch.setattr(bars, "host_microseconds_of_step", lambda: 2.0)
    monkeypatch.setattr(gain, "current", lambda ordinal: H100)
    monkeypatch.setattr(bars, "environment", lambda commit: {"card": H100.name, "commit": commit})
    monkeypatch.setattr(bars, "first_call_seconds", lambda cache: 2.0)
    for name, value in (("is_available", True), ("empty_cache", None), ("current_device", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    path = tmp_path / "gain.json"
    monkeypatch.setattr("sys.argv", ["gka_ops_perf.gain", "--json", str(path), "--commit", "abc", "--cold"])
    assert gain.main() == 0
    assert turns == [4, 8] * gain.ROUNDS
    stored = json.loads(path.read_text())
    (call,), (kernel,) = stored["calls"]["rows"], stored["kernels"]["rows"]
    assert call == {"what": "a call", "unit": "ms", "heuristic": 3.0, "tuned": 2.0, "ratio": 1.5}
    assert [(row["what"], row["heuristic"], row["tuned"]) for row in stored["host"]["rows"]] == [
        ("chunk_gka forward", 4.0, 4.0), ("decode step", 2.0, 2.0)
    ]  # fmt: skip
    assert (kernel["what"], kernel["heuristic"], kernel["tuned"]) == (str(key), 12.0, 10.0)
    assert stored["kernels"]["geometric mean"] == pytest.approx(1.2)
    assert stored["first call, s"] == {"empty cache": 2.0, "filled cache": 2.0} and stored["commit"] == "abc"
    printed = capsys.readouterr().out
    assert "geometric mean of the ratios: 1.500" in printed and "empty cache 2.0 s" in printed


def test_the_calls_whose_gain_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each can be called; the reference stands for the kernels, which need a card."""
    monkeypatch.setattr(bars, "make_inputs", lambda B, T, grad=False, **shape: (B, T, grad))
    for name in ("forward", "solve", "forward_backward"):
        monkeypatch.setattr(bars, name, lambda inputs, name=name, **options: (name, inputs, options))
    monkeypatch.setattr(bars, "milliseconds", lambda run, repeats=0: run)
    monkeypatch.setattr(bars, "decode_microseconds", lambda N: N)
    found = {case.name: case.prepare()() for case in gain.cases()}
    assert len(found) == 11
    assert found["num_iter=0 forward"] == ("forward", (2, 8192, False), {"num_iter": 0})
    assert found["decode N=64, 8 kv heads, 30 iterations"] == 64
    assert found["forward + backward, B1 T131072"] == ("forward_backward", (1, 131072, True), {})
