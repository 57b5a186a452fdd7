"""``gka-autotune``: what it prints and its exit codes, for cards that are not here."""

from __future__ import annotations

import functools
import json
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gka_ops import autotune
from gka_ops.autotune import choice, cli, screen, shapes, table, tuner
from gka_ops.autotune.report import Rows
from gka_ops.autotune.worker import StartError, WorkerError
from tests.helpers.autotune import FORWARD, H100, H200, FakeBench, entry, forkserver, isolate, key_of

KEY = key_of()
OTHER = key_of(problem=FORWARD._replace(T=64))
SHAPE = "B2,T1000,H32,D128,V128,bf16"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tuner, "_RUN_SECONDS", 0.5)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    user, _ = isolate(monkeypatch, tmp_path)
    return user


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> tuple[int, str, str]:
        choice.reload()
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H100 with a bench that needs none."""
    monkeypatch.setattr(cli, "_card", lambda name, ordinal=0: H100)


def add(folder: Path, key: Any = KEY, device: Any = H100, **changed: Any) -> Path:
    path = folder / table.file_name(device)
    assert table.add(path, device, {key: entry(key, **changed)})
    return path


def test_the_command_is_installed() -> None:
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    assert project["scripts"]["gka-autotune"] == f"{cli.__name__}:{cli.main.__name__}"


# ---------------------------------------------------------------------------------------------------------------- usage
@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("polish",),
        ("explain", "readout"),
        ("explain", str(KEY).replace("readout", "matmul")),
        ("explain", str(KEY).replace("forward", "backward")),
        ("tune", "--time-budget", "0"),
        ("merge", "out.json"),
    ],
)
def test_a_command_line_that_is_not_understood(arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2


@pytest.mark.parametrize("shape", ["large", "no-such-model.json"])
def test_shapes_that_are_not_understood(shape: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["tune", "--shapes", shape])
    assert exit_.value.code == 2


@pytest.mark.parametrize("command", [("show",), ("tune",), ("verify",), ("export", "x.json")])
def test_no_card(run: Run, command: tuple[object, ...]) -> None:
    code, _, errors = run(*command)
    assert code == 3 and "expected a CUDA card" in errors


def test_a_card_that_no_table_is_for(run: Run, folder: Path) -> None:
    add(folder)
    code, _, errors = run("show", "--card", "RTX")
    assert code == 3 and H100.name in errors


# ----------------------------------------------------------------------------------------------------------------- show
def test_show(run: Run, folder: Path) -> None:
    path = add(folder, num_warps=8)
    code, output, _ = run("show", "--card", "h100")
    assert code == 0
    title, _, header, _, row = output.splitlines()
    assert title == f"{H100.name}, tables: cached"
    assert header.split() == ["key", "parameters", "time,", "gain", "origin", "file"]
    assert row.split()[0] == str(KEY) and "num_warps=8" in row and "10.0 µs, 1.20x" in row
    assert row.split()[-2:] == ["exact", str(path)]


@pytest.mark.filterwarnings("ignore::gka_ops.autotune.choice.UntunedWarning")
def test_show_a_shape(run: Run, folder: Path) -> None:
    add(folder)
    code, output, _ = run("show", "--card", "h100", "--shapes", SHAPE, "--key", OTHER)
    assert code == 0
    shown = {line.split()[0] for line in output.splitlines()[4:]}
    assert shown == {str(key) for key in (OTHER, *autotune.keys_of([autotune.Shape.parse(SHAPE)], H100))}
    assert "nearest" in output and "heuristic" in output


def test_show_without_an_entry(run: Run, card: None) -> None:
    code, output, _ = run("show")
    assert code == 1 and "no table has an entry" in output


@pytest.mark.filterwarnings("ignore::gka_ops.autotune.choice.StaleWarning")
def test_show_says_that_an_entry_is_stale(run: Run, folder: Path) -> None:
    add(folder, triton="3.0.0")
    code, output, _ = run("show", "--card", "h100")
    assert code == 0 and "heuristic, stale entries skipped" in output


# -------------------------------------------------------------------------------------------------------------- explain
def test_explain(run: Run, folder: Path, card: None) -> None:
    forkserver()
    make = functools.partial(FakeBench, folder.parent / "log")
    tuner.tune([KEY], H100, make, seconds=60, workers=1, method="forkserver", reach=True)
    code, output, _ = run("explain", KEY, "--top", 2)
    assert code == 0
    assert "14 candidates timed, 13 failed, 0 not tried to the end, 0 combinations left out" in output
    lines = output.splitlines()
    first = lines.index(next(line for line in lines if line.startswith("µs"))) + 2
    assert lines[first].split()[:4] == ["5.0", "128", "0", "1024"] and "num_warps=8" in lines[first]
    assert lines[first + 2] == ""
    assert "check crashed: SIGSEGV" in output and "output differs by 0.5" in output
    found = autotune.explain(KEY, H100)
    assert str(found).startswith("\n".join(lines[: first - 2])), "the Python API says the same"
    assert len(str(found).splitlines()) == len(lines) + 8, "ten candidates there"
    assert [outcome.microseconds for outcome in found.timed[:3]] == [5.0, 6.0, 6.0]
    assert found.choice.origin == "exact" and len(found.failed) == 13


def test_explain_what_was_left_out(run: Run, card: None) -> None:
    key = key_of("backward_key", FORWARD._replace(when="backward", D=32, V=64))
    code, output, _ = run("explain", key)
    assert code == 1
    (row,) = (line for line in output.splitlines() if "NOTE [Hopper miscompile]" in line)
    counted = sum("Hopper miscompile" in pruned.reason for pruned in autotune.explain(key, H100).pruned)
    assert int(row.split()[0]) == counted > 1


# ----------------------------------------------------------------------------------------------------- export and merge
@pytest.mark.filterwarnings("ignore::gka_ops.autotune.choice.StaleWarning")
def test_export(run: Run, folder: Path, tmp_path: Path) -> None:
    add(folder, num_warps=8)
    add(folder, OTHER, fingerprint="0")
    target = tmp_path / "new" / "table.json"
    code, output, _ = run("export", target, "--card", "h100")
    assert code == 0 and "1 entries" in output
    found = table.read(target)
    assert found is not None and found.device == H100 and found.entries.keys() == {KEY}
    (folder / table.file_name(H100)).unlink()
    add(folder.parent / "shipped")
    code, _, errors = run("export", target, "--card", "h100")
    assert code == 1 and "nothing to export" in errors


def test_merge(run: Run, tmp_path: Path) -> None:
    first = add(tmp_path / "a", num_warps=8, tuned="2026-01-02")
    second = add(tmp_path / "b", num_warps=2, tuned="2026-01-03")
    add(tmp_path / "b", OTHER)
    third = add(tmp_path / "c", num_warps=4, tuned="2026-01-04", triton="3.0.0")
    target = tmp_path / "merged.json"
    code, output, _ = run("merge", target, third, first, second)
    assert code == 0 and "2 entries" in output
    found = table.read(target)
    assert found is not None and found.entries.keys() == {KEY, OTHER}
    assert found.entries[KEY].parameters["num_warps"] == 2, "the newest that is not stale"


def test_merge_keeps_what_the_file_holds(run: Run, tmp_path: Path) -> None:
    target = add(tmp_path / "target", num_warps=8, tuned="2026-01-02")
    newer = add(tmp_path / "newer", OTHER)
    code, output, _ = run("merge", target, newer)
    found = table.read(target)
    assert code == 0 and "2 entries" in output
    assert found is not None and found.entries.keys() == {KEY, OTHER}
    target.write_text("mine")
    with pytest.warns(table.TableWarning):
        code, _, errors = run("merge", target, newer)
    assert code == 1 and "no table" in errors and target.read_text() == "mine"


def test_merge_refuses(run: Run, tmp_path: Path) -> None:
    first, other = add(tmp_path / "a"), add(tmp_path / "b", device=H200)
    target = tmp_path / "merged.json"
    code, _, errors = run("merge", target, first, other)
    assert code == 1 and "tables of one card" in errors
    code, _, errors = run("merge", target, first, tmp_path / "none.json")
    assert code == 1 and "no table" in errors
    other.write_text("{")
    with pytest.warns(table.TableWarning):
        code, _, errors = run("merge", target, first, other)
    assert code == 1 and not target.exists()


# ------------------------------------------------------------------------------------------------------ tune and verify
class Tuned:
    """Stands for ``tuner.tune``: all keys get an entry at once. Remembers what it was given."""

    def __init__(self) -> None:
        self.keys: list[Any] = []
        self.given: dict[str, Any] = {}

    def __call__(self, keys: Any, device: Any, make: Any, **given: Any) -> list[tuner.Result]:
        self.keys, self.given = list(keys), given
        for done in range(100):
            given["progress"]("compile", done + 1, 100, f"candidate {done}")
        given["log"]("one candidate")
        return [tuner.Result(key, entry(key), []) for key in self.keys]


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> Tuned:
    found = Tuned()
    monkeypatch.setattr(cli, "_bench", lambda: None)
    monkeypatch.setattr(tuner, "tune", found)
    return found


def test_tune(run: Run, folder: Path, card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    forkserver()
    monkeypatch.setattr(cli, "_bench", lambda: functools.partial(FakeBench, folder.parent / "log"))
    monkeypatch.setattr(tuner, "tune", functools.partial(tuner.tune, method="forkserver"))
    code, output, _ = run("tune", "--key", KEY, "--workers", 1, "--time-budget", 60)
    assert code == 0 and output.splitlines()[-1].startswith(f"{KEY}  heuristic  num_warps=8 num_stages=2")
    content = json.loads((folder / table.file_name(H100)).read_text())
    assert content["entries"][str(KEY)]["parameters"]["num_warps"] == 8


def test_what_is_tuned(run: Run, card: None, tuned: Tuned, tmp_path: Path) -> None:
    assert run("tune")[0] == 0
    assert tuned.keys == autotune.keys_of(shapes.DEFAULT, H100)
    assert (tuned.given["seconds"], tuned.given["workers"], tuned.given["path"], tuned.given["reach"]) == (
        450, None, None, False,
    )  # fmt: skip
    into, options = tmp_path / "table.json", ("--reach", "--time-budget", 9, "--workers", 3)
    assert run("tune", "--key", OTHER, "--shapes", SHAPE, "--shapes", SHAPE, "--into", into, *options)[0] == 0
    assert tuned.keys == [OTHER, *autotune.keys_of([autotune.Shape.parse(SHAPE)], H100)]
    assert (tuned.given["seconds"], tuned.given["workers"], tuned.given["path"], tuned.given["reach"]) == (
        9, 3, into, True,
    )  # fmt: skip


def test_nothing_that_works(run: Run, card: None, monkeypatch: pytest.MonkeyPatch, tuned: Tuned) -> None:
    monkeypatch.setattr(tuner, "tune", lambda *_, **__: [tuner.Result(KEY, None, [])])
    code, output, _ = run("tune", "--key", KEY)
    assert code == 1 and "nothing that works" in output


def test_no_worker_that_starts(run: Run, card: None, monkeypatch: pytest.MonkeyPatch, tuned: Tuned) -> None:
    def tune(*_: Any, **__: Any) -> None:
        raise StartError("the start of a worker took more than 180 s")

    monkeypatch.setattr(tuner, "tune", tune)
    assert run("tune") == (1, "", "nothing more can be compiled or run: the start of a worker took more than 180 s\n")


def test_tune_without_a_folder(run: Run, card: None, monkeypatch: pytest.MonkeyPatch, tuned: Tuned) -> None:
    monkeypatch.setattr(table, "user_folder", lambda: None)
    code, _, errors = run("tune", "--key", KEY)
    assert code == 1 and "GKA_OPS_AUTOTUNE_DIR" in errors and "--into FILE" in errors and not tuned.keys
    assert run("tune", "--key", KEY, "--into", "here.json")[0] == 0


def test_tune_says_beforehand_that_nothing_could_be_kept(
    run: Run, card: None, monkeypatch: pytest.MonkeyPatch, tuned: Tuned
) -> None:
    monkeypatch.setitem(sys.modules, "filelock", None)
    code, _, errors = run("tune", "--key", KEY, "--into", "here.json")
    assert code == 1 and "filelock" in errors and not tuned.keys


def test_progress_in_plain_text(run: Run, card: None, tuned: Tuned) -> None:
    _, output, _ = run("tune", "--key", KEY)
    lines = [line for line in output.splitlines() if line.startswith("compile ")]
    assert len(lines) == 11 and lines[-1] == "compile 100/100: candidate 99"
    assert "one candidate" not in output
    assert "one candidate" in run("tune", "--key", KEY, "--verbose")[1]


def test_a_terminal_gets_bars_and_drawn_tables(
    run: Run, card: None, tuned: Tuned, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    drawn = Console(record=True, markup=False, width=300, force_terminal=True)
    monkeypatch.setattr(screen, "console", lambda: drawn)
    assert run("tune", "--key", KEY)[0] == 0
    text = drawn.export_text()
    assert "100/100" in text and "candidate 99" in text
    assert str(KEY) in text and "┃" in text


def test_plain_text_without_a_terminal_or_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    assert screen.console() is None
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert screen.console() is not None
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert screen.console() is None


def test_columns_of_plain_text() -> None:
    assert str(Rows(("a", "b"), [("long", "1"), ("x", "")])) == "a     b\n----  -\nlong  1\nx"


def test_verify(run: Run, folder: Path, card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Checks:
        def __init__(self, make: Any) -> None:
            pass

        def __enter__(self) -> Checks:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def call(self, method: str, key: Any, parameters: Any, *, seconds: float) -> str | None:
            assert method == "check"
            if parameters["num_warps"] == 2:
                raise WorkerError("hung: no answer within 300 s")
            return "wrong: output differs" if parameters["num_warps"] == 8 else None

    monkeypatch.setattr(cli, "Worker", Checks)
    monkeypatch.setattr(cli, "_bench", lambda: None)
    add(folder)
    code, output, _ = run("verify")
    assert code == 0 and "right" in output
    for changed, verdict in (
        ({"num_warps": 8}, "wrong: output differs"),
        ({"num_warps": 2}, "hung"),
        ({"triton": "3.0.0"}, "tuned with Triton 3.0.0"),
    ):
        add(folder, OTHER, **changed)
        code, output, _ = run("verify")
        assert code == 1 and verdict in output
