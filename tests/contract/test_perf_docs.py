"""Figures in the documentation are those that are stored."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from gka_ops_perf import bars, cli, docs, records
from gka_ops_perf.docs import DocsError
from tests.helpers import perf

BARS = {
    "card": "NVIDIA H100", "driver": "580", "torch": "2.11", "triton": "3.6", "date": "2026-01-02T00:00",
    "commit": "abc", "errors": {"default": {"o": 0.00123}},
    "rows": [{"what": "decode N=1", "measured": 12.345678, "unit": "µs", "must": 16, "reach": None, "verdict": "met"}],
}  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "perf" / "results" / "h100"
    folder.mkdir(parents=True)
    (folder / "bars.json").write_text(json.dumps(BARS))
    return folder.parent


def block(name: str, text: str = "") -> str:
    return f"<!-- figures: {name} -->\n{text}<!-- end of figures -->\n"


def cells(text: str) -> list[list[str]]:
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows[1:]]


def test_the_documentation_says_what_is_stored() -> None:
    """``gka-perf docs`` writes it anew."""
    for path, (now, wanted) in docs.files().items():
        assert now == wanted, f"{path} is stale: run gka-perf docs"
    assert any("<!-- figures: bars" in now for now, _ in docs.files().values())


def test_no_figure_is_written_by_hand() -> None:
    """Outside of blocks there is no time, share, rate or size; code blocks show what commands print."""
    for path, (text, _) in docs.files().items():
        prose = re.sub(r"<!-- figures: .*?<!-- end of figures -->|```.*?```", "", text, flags=re.S)
        found = re.findall(r"[^\n]*\d\s?(?:ms|µs|s|%|×|MiB|GiB|GB/s|TB/s|TFLOP/s)(?!\w)[^\n]*", prose)
        assert not found, f"{path}: expected figures in a block of stored ones, got {found[0]!r}"


def test_figures_are_filled_in(results: Path) -> None:
    filled = docs.fill(f"a\n{block('bars h100', 'old')}b {block('errors h100')}", results)
    assert filled.startswith("a\n<!-- figures: bars h100 -->\n\nNVIDIA H100, driver 580, ") and "old" not in filled
    assert cells(filled)[0] == ["decode N=1", "12.35 µs", "16", "", "28", "met"] and cells(filled)[-1] == [
        "default",
        "1.2e-03",
    ]
    assert docs.fill(filled, results) == filled and docs.fill("no figures", results) == "no figures"


def test_figures_of_a_run(results: Path) -> None:
    for i in (1, 2):
        records.write(perf.record(f"c{i}", f"2026-01-0{i}T00:00:00+00:00", float(i)), results)
    filled = docs.fill(block("suite nvidia-h100 chunk_gka forward 7B T8192 [gka]"), results)
    assert "commit c2." in filled
    assert [row[0] for row in cells(filled)] == ["chunk_gka forward 7B T8192 [gka]"]


def test_what_was_written_down(results: Path) -> None:
    stored = {"origin": "ncu, commit abc.", "header": ["kernel", "pipes"], "rows": [["a", "71 %"], ["b", "0.50"]]}
    (results / "h100" / "counters.json").write_text(json.dumps(stored))
    filled = docs.fill(block("table h100/counters"), results)
    assert "ncu, commit abc." in filled and cells(filled) == stored["rows"]


def test_gains(results: Path) -> None:
    rows = [
        {"what": name, "unit": "µs", "heuristic": 2.0 * r, "tuned": 2.0, "ratio": r}
        for name, r in (("a", 1.0), ("b", 1.1))
    ]
    gain: dict[str, Any] = {part: {"rows": rows, "geometric mean": 1.05} for part in ("calls", "kernels")}
    stored = results / "h100" / "gain.json"
    stored.write_text(json.dumps({**BARS, **gain}))
    filled = docs.fill(block("gain h100 calls"), results)
    assert (
        cells(filled) == [["a", "2 µs", "2", "1.000"], ["b", "2.2 µs", "2", "1.100"]] and "of 2 ratios: 1.050" in filled
    )
    filled = docs.fill(block("gain h100 kernels"), results)
    assert [row[0] for row in cells(filled)] == ["b"]
    with pytest.raises(DocsError, match="found no first call"):
        docs.fill(block("cold h100"), results)
    stored.write_text(json.dumps({**BARS, **gain, "first call, s": {"empty cache": 9.02, "filled cache": 1.25}}))
    assert cells(docs.fill(block("cold h100"), results)) == [["empty cache", "9.02 s"], ["filled cache", "1.25 s"]]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("songs", "expected figures named bars, errors, gain, cold, suite, table, got 'songs'"),
        ("bars a100", r"a100/bars\.json"),
        ("gain h100 calls", r"gain\.json"),
        ("suite h100", "expected a run of suite full in"),
    ],
)
def test_unknown_figures(results: Path, name: str, message: str) -> None:
    with pytest.raises(DocsError, match=message):
        docs.fill(block(name), results)


def test_the_command(results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    root = results.parents[1]
    monkeypatch.setattr(docs.files, "__defaults__", (root,))
    (root / "docs").mkdir()
    (root / "README.md").write_text("nothing\n")
    (root / "docs" / "recall.md").write_text("nothing\n")
    page = root / "docs" / "performance.md"
    page.write_text(block("bars h100"))
    assert cli.main(["docs", "--check"]) == 1 and "12.35" not in page.read_text()
    assert cli.main(["docs"]) == 0 and "12.35" in page.read_text()
    assert cli.main(["docs", "--check"]) == 0
    page.write_text(block("songs"))
    capsys.readouterr()
    assert cli.main(["docs"]) == 2 and "expected figures named" in capsys.readouterr().err


def test_every_time_of_others_stands_beside_a_row() -> None:
    stored = json.loads((records.RESULTS / "h100" / "bars.json").read_text())
    assert set(bars.AUTHORS_TIMES) <= {row["what"] for row in stored["rows"]}
