"""Stored runs: what is written can be read, and nothing else."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from gka_ops_perf import records
from gka_ops_perf.records import Estimate, Measurement, Record, RecordError
from tests.helpers import perf

RECORD = perf.record()


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = records.write(RECORD, tmp_path)
    assert path == tmp_path / "nvidia-h100" / "20260102T030405-abc1234-full.jsonl"
    assert records.read(path) == RECORD
    assert records.read_all(tmp_path) == [RECORD]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_stored_run_is_never_replaced(tmp_path: Path) -> None:
    path = records.write(RECORD, tmp_path)
    text = path.read_text()
    other = dataclasses.replace(RECORD, measurements=RECORD.measurements[:1])
    with pytest.raises(FileExistsError):
        records.write(other, tmp_path)
    assert path.read_text() == text


def line(index: int, **changed: object) -> str:
    path = [RECORD.run, *RECORD.measurements][index]
    return json.dumps({"kind": type(path).__name__, **dataclasses.asdict(path), **changed})


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "expected a run in its first line"),
        ([line(1)], "expected a run in its first line"),
        ([line(0), line(0)], "expected one run"),
        ([line(0), line(1), line(1)], "expected every case once"),
        ([line(0), line(1)[:-3]], "line 2"),
        ([line(0), "[]"], "line 2: expected an object whose kind is Run or Measurement"),
        ([line(0), line(1, kind="Other")], "line 2: expected an object whose kind"),
        ([line(0, schema=2)], "expected schema 1, got 2"),
        ([line(0), line(1, more=1)], "expected the fields"),
        ([line(0), line(1, status="fine")], "expected one of measured, "),
        ([line(0), line(1, tokens=1.5)], "line.tokens: expected int, got 1.5"),
        ([line(0), line(1, flops="many")], "line.flops: expected float"),
        ([line(0), line(1, figures={})], "expected figures if and only if it was measured"),
        ([line(0), line(1, errors={"o": "small"})], "line.errors.o: expected float"),
        ([line(0), line(1, parameters={"T": 1.5})], "line.parameters.T"),
        ([line(0), line(1, figures={"kernel ms": {"median": 1}})], "line.figures.kernel ms: expected the fields"),
    ],
)
def test_what_is_no_stored_run_is_refused(tmp_path: Path, lines: list[str], message: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(RecordError, match=message) as refused:
        records.read(path)
    assert str(path) in str(refused.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with pytest.raises(RecordError, match=r"run\.jsonl"):
        records.read(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(RecordError, match=r"run\.jsonl"):
        records.read(path)


def test_what_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    nan = Measurement("a", "a", "gka", "measured", figures={"kernel ms": Estimate(float("nan"), 0.0, 0.0, 1)})
    with pytest.raises(ValueError, match="JSON compliant"):
        records.write(Record(RECORD.run, (nan,)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_stored_runs_are_sound() -> None:
    """Those of this repository; each lies in its card's folder under its own name."""
    for path in sorted(records.RESULTS.glob("*/*.jsonl")):
        run = records.read(path).run
        assert (path.parent.name, path.name) == (records.folder_of(run.machine.gpu), records.file_name(run))
        assert "dirty" not in run.machine.commit
