"""Estimates and comparisons: planted regressions are found, and equals are equal."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from gka_ops_perf import compare, tables
from gka_ops_perf.compare import CompareError, Row
from gka_ops_perf.estimates import estimate, ratio, spread, verdict
from gka_ops_perf.records import Estimate
from tests.helpers.perf import FakeSide

CASES = compare.names("quick")
SEEDS = range(10)


def test_estimates() -> None:
    found = estimate([3.0, 1.0, 2.0])
    assert (found.median, found.samples) == (2.0, 3) and 1.0 <= found.low <= 2.0 <= found.high <= 3.0
    assert estimate([5.0]) == Estimate(5.0, 5.0, 5.0, 1)
    assert spread([1.0, 1.0, 1.0, 1.0]) == 0 and spread([1.0, 2.0, 3.0]) == pytest.approx(0.5)


def test_the_interval_holds_the_median_about_as_often_as_it_says() -> None:
    generator = random.Random(0)
    held = 0
    for _ in range(200):
        found = estimate([generator.gauss(1.0, 0.1) for _ in range(21)])
        held += found.low <= 1.0 <= found.high
    assert 0.88 <= held / 200 <= 1.0


def test_what_slows_both_down_cancels() -> None:
    moods = [1.0, 3.0, 1.2, 2.5, 1.1, 4.0, 1.0]
    found = ratio(moods, [1.1 * mood for mood in moods])
    assert found.median == pytest.approx(1.1) and found.low == pytest.approx(1.1)
    with pytest.raises(ValueError, match="as many samples of both, got 1 and 2"):
        ratio([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("median", "low", "high", "expected"),
    [
        (1.10, 1.02, 1.2, "slower"), (1.10, 0.99, 1.2, "unclear"), (1.04, 1.03, 1.05, "same"),
        (0.90, 0.85, 0.97, "faster"), (0.90, 0.85, 1.01, "unclear"), (1.00, 0.90, 1.20, "same"),
    ],
)  # fmt: skip
def test_verdicts(median: float, low: float, high: float, expected: str) -> None:
    assert verdict(Estimate(median, low, high, 9)) == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_a_planted_slowdown_of_a_tenth_is_found(seed: int) -> None:
    rows = list(compare.compare(FakeSide(seed), FakeSide(seed + 100, 1.1), CASES))
    assert [row.case for row in rows] == CASES
    assert all(row.verdict == "slower" and row.bad for row in rows)
    faster = list(compare.compare(FakeSide(seed, 1.1), FakeSide(seed + 100), CASES))
    assert all(row.verdict == "faster" and not row.bad for row in faster)


@pytest.mark.parametrize("seed", SEEDS)
def test_one_commit_against_itself_passes(seed: int) -> None:
    rows = list(compare.compare(FakeSide(seed), FakeSide(seed + 100), CASES))
    assert len(rows) == len(CASES) and all(row.verdict == "same" for row in rows)


def test_a_change_is_measured_again_before_it_is_believed() -> None:
    calm, changed = FakeSide(0), FakeSide(0)
    list(compare.compare(calm, FakeSide(1), CASES[:1]))
    list(compare.compare(changed, FakeSide(1, 1.1), CASES[:1]))
    assert changed.samples > 5 * calm.samples


def test_cases_that_one_side_cannot_measure() -> None:
    rows = list(compare.compare(FakeSide(0), FakeSide(1, broken=CASES[0]), CASES[:2]))
    assert [row.verdict for row in rows] == ["broken", "same"] and rows[0].bad
    assert rows[0].reason == "head: no such kernel"
    rows = list(compare.compare(FakeSide(0, broken=CASES[0]), FakeSide(1), CASES[:2]))
    assert [row.verdict for row in rows] == ["not compared", "same"] and not rows[0].bad


def slower(case: str = "a", found: float = 1.1) -> Row:
    return Row(case, "kernel ms", 1.0, found, Estimate(found, found, found, 9), "slower")


def test_an_accepted_regression_is_no_failure(tmp_path: Path) -> None:
    path = tmp_path / "accepted.json"
    noted = compare.accept([slower(), slower("b")], "a", "base", "the solve is exact now", path)
    assert compare.read_accepted(path) == noted and len(noted) == 1
    compare.accept([slower("b")], "b", "base", "so is this", path)
    accepted = compare.read_accepted(path)
    assert [entry.case for entry in accepted] == ["a", "b"]

    def judged(row: Row, base: str = "base") -> Row:
        return compare.judge([row], accepted, base)[0]

    assert judged(slower()).verdict == "accepted" and judged(slower()).reason == "the solve is exact now"
    assert not judged(slower()).bad
    assert judged(slower(found=1.3)).bad  # worse than what was accepted
    assert judged(slower(), "another base").bad
    assert judged(slower("c")).bad


def test_what_cannot_be_accepted(tmp_path: Path) -> None:
    path = tmp_path / "accepted.json"
    with pytest.raises(CompareError, match="expected a reason with --accept, got none"):
        compare.accept([slower()], "a", "base", " ", path)
    with pytest.raises(CompareError, match="expected a case that got slower, got 'c'"):
        compare.accept([slower()], "c", "base", "why not", path)
    assert not path.exists()


def test_the_table() -> None:
    text = tables.comparison([slower()._replace(verdict="accepted", reason="exact")], "github")
    assert [cell.strip() for cell in text.splitlines()[2].split("|")[1:-1]] == [
        "a", "kernel ms", "1", "1.1", "1.100", "1.100–1.100", "accepted: exact",
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------- real processes
@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A package named gka_ops with two commits; the second one's operators call ten times as many functions."""
    root = tmp_path / "repository"
    (root / "gka_ops").mkdir(parents=True)

    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True)

    git("init", "-q")
    (root / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "gka-ops"\nversion = "0"\n[tool.setuptools]\npackages = ["gka_ops"]\n'
    )
    for calls in (10, 100):
        (root / "gka_ops" / "__init__.py").write_text(f"CALLS = {calls}\n")
        git("add", "-A")
        git("commit", "-qm", str(calls))
    return root


def test_commits_are_installed_side_by_side(repository: Path, tmp_path: Path) -> None:
    found = []
    for i, commit in enumerate(("HEAD~1", "HEAD")):
        resolved = compare.resolve(commit, repository)
        with compare.installed(resolved, tmp_path / str(i), repository) as path:
            code = f"import sys; sys.path[:0] = {list(map(str, path))}; import gka_ops; print(gka_ops.CALLS)"
            command = [sys.executable, "-c", code]
            found.append(subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout)
            assert (path[0] / "gka_ops_perf" / "cases.py").exists()
    assert found == ["10\n", "100\n"]
    trees = subprocess.run(["git", "-C", str(repository), "worktree", "list"], capture_output=True, text=True).stdout
    assert len(trees.splitlines()) == 1
    with pytest.raises(CompareError, match=r"expected a commit of .*, got 'nothing'"):
        compare.resolve("nothing", repository)


def test_a_worker_measures_and_reports_errors(tmp_path: Path) -> None:
    suite = tmp_path / "suite"
    suite.mkdir()
    (suite / "gka_ops_perf").symlink_to(compare.HERE, target_is_directory=True)
    process = compare.Process("cpu", [suite])
    try:
        with pytest.raises(compare.CaseError, match="KeyError: 'nothing'"):
            process.prepare("nothing")
        with pytest.raises(compare.CaseError, match="expected a case to have been prepared"):
            process.sample()
        process.prepare("host")
        found = process.sample()
        assert found["chunk_gka Python calls"] > 50 and process.sample() == found
    finally:
        process.close()


def test_a_worker_that_dies_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compare.sys, "executable", "/bin/false")
    process = compare.Process("cpu", [tmp_path])
    with pytest.raises(CompareError, match="a worker ended with code 1 when asked to prepare"):
        process.prepare("host")
    process.close()


def test_the_stored_exceptions_are_sound() -> None:
    for entry in compare.read_accepted():
        assert entry.reason.strip() and entry.ratio > 1 and json.dumps(entry.case)
