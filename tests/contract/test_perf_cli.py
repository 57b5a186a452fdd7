"""``gka-perf``: its tables, files and exit codes; and the report, as a browser shows it."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gka_ops_perf import baseline, cli, compare, cpu, records, report, suite, tables, timing, trace
from gka_ops_perf.estimates import estimate
from gka_ops_perf.records import Measurement, Record, Run
from tests.helpers import perf
from tests.helpers.perf import FakeSide

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def call(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


def on_cpu(growth: float = 1.0, status: str = "measured", triton: str = "3.7.1", **figures: float) -> Record:
    machine = dataclasses.replace(perf.machine(gpu=""), triton=triton)
    known = {"ratio": 2.0, "Python calls": 100.0} | figures
    found = {name: estimate([growth * value]) for name, value in known.items()}
    code = Measurement(
        f"{cpu.MACHINE_CODE} a", cpu.MACHINE_CODE, "gka", "measured", figures={"instructions": estimate([growth * 50])}
    )
    if status == "measured":
        return Record(Run("cpu", machine), (Measurement("a", "a", "gka", "measured", figures=found), code))
    return Record(Run("cpu", machine), (Measurement("a", "a", "gka", "failed", "broke"), code))


# ---------------------------------------------------------------------------------------------------------------- run
def test_run_on_a_cpu(call: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "run", lambda *_: on_cpu())
    code, out, _ = call("run", "--results", tmp_path)
    assert code == 0 and "Python calls  100" in out
    (path,) = tmp_path.glob("cpu/*.jsonl")
    assert out.splitlines()[-1] == str(path) and records.read(path) == on_cpu()
    code, _, err = call("run", "--results", tmp_path)
    assert code == 2 and "File exists" in err


def test_a_broken_case_fails_the_run(call: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "run", lambda *_: on_cpu(status="failed"))
    code, out, _ = call("run", "--results", tmp_path)
    assert code == 1 and "failed: broke" in out and list(tmp_path.glob("cpu/*.jsonl"))


def test_run_says_what_it_lacks(call: Cli, tmp_path: Path) -> None:
    assert call("run", "--suite", "full") == (3, "", "gka-perf: suite full needs a CUDA card\n")
    code, _, err = call("run", "--select", "nothing", "--results", tmp_path)
    assert (code, err.splitlines()[-1]) == (2, "gka-perf: expected part of a case's name in suite cpu, got 'nothing'")
    with pytest.raises(SystemExit) as stopped:
        call("sing")
    assert stopped.value.code == 2


def test_run_on_a_card_that_throttles(call: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(timing, "clocks", lambda: timing.Clocks(1, 1, 90, 1, ("hw_slowdown",)))
    assert call("run") == (3, "", "gka-perf: the card is throttling: hw_slowdown, 90 °C\n")


def test_the_table_of_a_run_on_a_card() -> None:
    record = perf.record()
    lines = {line.split("[")[0].strip(): line for line in tables.run(record).splitlines() if "[gka]" in line}
    assert len(lines) > 20 and "50%" in lines["chunk_gka forward 7B T8192"]
    assert "o 6.0e-08" in lines["chunk_gka forward 7B T8192"]
    shown = tables.run(record)
    assert "unavailable (1)" in shown and shown.count("not installed") == 1 and "\n\n(1) " in shown
    assert "<p>(1) " in tables.run(record, "html")


# -------------------------------------------------------------------------------------------------- against the stored
@pytest.mark.parametrize(
    ("now", "bad"),
    [
        (on_cpu(), []),
        (on_cpu(growth=1.05), []),
        (on_cpu(growth=1.12), [("machine code a", "instructions")]),
        (on_cpu(growth=1.12, triton="3.8.0"), []),
        (on_cpu(growth=1.5), [("a", "Python calls"), ("machine code a", "instructions")]),
        (on_cpu(growth=0.5), []),
        (on_cpu(stack=9.0), []),
        (on_cpu(status="failed"), [("a", "")]),
        (Record(on_cpu().run, on_cpu().measurements[:1]), [("machine code a", "")]),
    ],
)
def test_growth_beyond_the_stored_run_is_found(now: Record, bad: list[tuple[str, str]]) -> None:
    drifts = baseline.compare(on_cpu(), now)
    assert [(drift.case, drift.figure) for drift in drifts if drift.bad] == bad


def test_a_noisy_ratio_is_no_growth() -> None:
    def of(samples: list[float]) -> Record:
        return Record(on_cpu().run, (Measurement("a", "a", "gka", "measured", figures={"ratio": estimate(samples)}),))

    calm = of([1.0, 1.1, 0.9, 1.0, 1.0])
    assert not any(drift.bad for drift in baseline.compare(calm, of([1.0, 3.0, 2.9, 1.0, 3.1])))
    assert any(drift.bad for drift in baseline.compare(calm, of([3.0, 3.1, 2.9, 3.0, 3.1])))


def test_check(call: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "run", lambda *_: on_cpu(growth=1.5))
    monkeypatch.setattr(records, "read_all", lambda: [])
    code, _, err = call("run", "--check", "--results", tmp_path / "1")
    assert code == 2 and "expected a stored run of suite cpu" in err
    monkeypatch.setattr(records, "read_all", lambda: [on_cpu()])
    code, out, _ = call("run", "--check", "--results", tmp_path / "2")
    assert code == 1 and "grew beyond 1.15x" in out and "against commit abc1234" in out
    monkeypatch.setattr(suite, "run", lambda *_: on_cpu())
    assert call("run", "--check", "--results", tmp_path / "3")[0] == 0


def test_there_is_a_stored_run_to_check_against() -> None:
    stored = [found for found in records.read_all() if found.run.suite == "cpu"]
    newest = max(stored, key=lambda found: found.run.machine.date)
    assert {m.group for m in newest.measurements} == {case.name for case in cpu.cases()}


# ------------------------------------------------------------------------------------------------------------- compare
@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[float], None]:
    """Makes the commits of a comparison fake ones, the second so many times as slow."""
    import contextlib

    def fake(scale: float) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
        monkeypatch.setattr(compare, "resolve", lambda commit: f"{commit} resolved")
        monkeypatch.setattr(compare, "ACCEPTED", tmp_path / "accepted.json")
        monkeypatch.setattr(compare.read_accepted, "__defaults__", (tmp_path / "accepted.json",))
        monkeypatch.setattr(compare.accept, "__defaults__", (tmp_path / "accepted.json",))
        pair = FakeSide(0), FakeSide(1, scale)
        monkeypatch.setattr(compare, "both", lambda *_: contextlib.nullcontext(pair))

    return fake


SOLVE = "chunk_solve forward 7B T8192 [gka]"


def test_compare(call: Cli, sides: Callable[[float], None], tmp_path: Path) -> None:
    sides(1.0)
    code, out, _ = call("compare", "main", "HEAD", "--select", "chunk_solve", "--markdown", tmp_path / "m" / "c.md")
    assert code == 0 and SOLVE in out and "same" in out
    text = (tmp_path / "m" / "c.md").read_text()
    assert text.startswith("`main reso` → `HEAD reso` on NVIDIA H100\n\n| case") and SOLVE in text
    sides(1.1)
    code, out, _ = call("compare", "main", "HEAD", "--select", "chunk_solve")
    assert code == 1 and "slower" in out


def test_compare_and_accept(call: Cli, sides: Callable[[float], None], tmp_path: Path) -> None:
    sides(1.1)
    code, _, err = call("compare", "main", "HEAD", "--accept", SOLVE)
    assert (code, err) == (2, "gka-perf: expected a --reason with --accept, got none\n")
    arguments = ("compare", "main", "HEAD", "--select", "chunk_solve")
    code, out, _ = call(*arguments, "--accept", SOLVE, "--reason", "it is exact now")
    assert code == 0 and "accepted: it is exact now" in out
    (entry,) = json.loads((tmp_path / "accepted.json").read_text())
    assert (entry["case"], entry["base"], entry["reason"]) == (SOLVE, "main resolved", "it is exact now")
    assert call(*arguments)[0] == 0
    assert call("compare", "other", "HEAD", "--select", "chunk_solve")[0] == 1


def test_compare_says_what_it_lacks(call: Cli) -> None:
    code, _, err = call("compare", "HEAD", "HEAD", "--select", "nothing")
    assert (code, err) == (2, "gka-perf: expected part of a case's name in suite cpu, got 'nothing'\n")
    code, _, err = call("compare", "no-such-commit", "HEAD")
    assert code == 2 and "got 'no-such-commit'" in err


# -------------------------------------------------------------------------------------------------------------- report
RUNS = [perf.record(f"c{i}", f"2026-01-0{i}T00:00:00+00:00", 1 + 0.1 * i) for i in (1, 2, 3)]


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    for run in RUNS:
        records.write(run, folder / "results")
    assert cli.main(["report", "--results", str(folder / "results"), "--out", str(folder)]) == 0
    return folder


def test_the_report_has_every_case_and_plot(reported: Path) -> None:
    text = (reported / "report.md").read_text()
    page = (reported / "report.html").read_text()
    for m in RUNS[-1].measurements:
        assert f"| {m.case} " in text and html.escape(m.case) in page
    assert "commit c3" in text and "commit c3" in page
    plots = re.findall(r"!\[.*\]\((.*)\)", text)
    assert len(plots) == 4 and all((reported / plot).stat().st_size > 10_000 for plot in plots)
    assert not re.search(r"(src|href)=\"(?!data:)", page)  # needs nothing from elsewhere


def test_a_browser_shows_the_plots(reported: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium")
    script = "<script>onload=()=>{document.title=[...document.images].map(i=>i.id+' '+i.naturalWidth).join()}</script>"
    page = tmp_path / "page.html"
    page.write_text((reported / "report.html").read_text().replace("</head>", f"{script}</head>"))
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND",
        "--virtual-time-budget=10000", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    (title,) = re.findall(r"<title>(.*?)</title>", shown)
    widths = dict(part.split() for part in title.split(","))
    assert widths.keys() == {section.name for section in report.sections(RUNS[-1], RUNS)}
    assert all(int(width) > 500 for width in widths.values())


def test_plots_draw_what_was_measured() -> None:
    found = {section.name: section.figure for section in report.sections(RUNS[-1], RUNS)}
    lines = {line.get_label(): line for line in found["length"].axes[0].lines}
    assert lines.keys() == {"gka", "gka num_iter=0", "sdpa"}
    assert list(lines["gka"].get_xdata()) == [2048, 8192, 32768, 131072]
    kernel = RUNS[-1].by_case()["chunk_gka forward 7B T8192 [gka]"]
    assert lines["gka"].get_ydata()[1] == pytest.approx(kernel.figures["kernel ms"].median * 1e3 / kernel.tokens)
    (curve,) = found["accuracy"].axes[0].lines
    assert len(curve.get_xdata()) == 8 and sorted(curve.get_ydata(), reverse=True) == list(curve.get_ydata())
    tracked = found["history"].axes[0].lines
    assert len(tracked) == len(report.TRACKED)
    assert all(list(line.get_ydata()) == pytest.approx([1, 1.2 / 1.1, 1.3 / 1.1]) for line in tracked)
    shares = [bar.get_width() for bar in found["roofline"].axes[0].patches]
    assert len(shares) > 20 and all(0.3 < share < 0.6 for share in shares)


def test_report_without_runs(call: Cli, tmp_path: Path) -> None:
    code, _, err = call("report", "--results", tmp_path)
    assert code == 2 and "expected runs of suite full on a card" in err
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.jsonl").write_text("{}")
    code, _, err = call("report", "--results", tmp_path)
    assert code == 2 and "b.jsonl, line 1" in err


# --------------------------------------------------------------------------------------------------------------- trace
def test_trace(call: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(64, 64, requires_grad=True)
    monkeypatch.setattr(trace, "training_step", lambda device: lambda: (weight @ weight).relu().sum().backward())
    code, out, _ = call("trace", "--out", tmp_path, "--tensorboard", tmp_path / "board", "--top", 3)
    assert code == 0 and len(out.splitlines()) == 6 and "aten::mm" in out
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert any(event.get("name") == "training step" for event in events)
    assert list((tmp_path / "board").glob("*.pt.trace.json"))
