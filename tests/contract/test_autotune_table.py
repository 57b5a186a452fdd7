"""Files of launch configurations: whatever is in them, reading does not raise, and processes lose nothing."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gka_ops.autotune import choice, table
from gka_ops.autotune.table import Table, TableWarning
from tests.helpers.autotune import CONSUMER, FORWARD, H100, entry, key_of, run_processes, write_and_read

KEY = key_of()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / table.file_name(H100)
    assert table.add(file, H100, {KEY: entry(KEY, num_warps=8)})
    return file


def edited(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    changed = change(content)
    path.write_text(json.dumps(content if changed is None else changed))


def ignored(path: Path, match: str = "is ignored") -> None:
    with pytest.warns(TableWarning, match=match):
        assert table.read(path) is None


def test_what_is_written_is_read(path: Path) -> None:
    found = table.read(path)
    assert found == Table(H100, {KEY: entry(KEY, num_warps=8)})
    assert os.stat(path).st_mode & 0o777 == 0o644
    assert [p.name for p in path.parent.iterdir() if not p.name.endswith(".lock")] == [path.name]


def test_no_file_is_no_table(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert table.read(tmp_path / "none.json") is None
        assert table.read(tmp_path / "no folder" / "none.json") is None


# ------------------------------------------------------------------------------------------------------------ bad files
@pytest.mark.parametrize("length", [0, 1, 20, 100, 300])
def test_a_truncated_file(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])
    ignored(path)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04\x95pickle",
        b"\xff\xfe\x00\x00",
        b"null",
        b"[]",
        b"3",
        b'"schema"',
        b"{}",
        b'{"schema": 1}',
        b'{"schema": 1, "device": {}, "entries": {}}',
        b'{"schema": 1, "device": 3, "entries": {}}',
        b'{"schema": true, "device": {}, "entries": {}}',
        b'{"schema": 1' + b"0" * 5000 + b"}",
        b"[" * 10**5,
        b'{"a":' * 10**5,
    ],
    ids=lambda content: str(content[:24]),
)
def test_no_table(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    ignored(path)


def test_a_newer_schema(path: Path) -> None:
    edited(path, lambda content: content.update(schema=table.SCHEMA + 1))
    ignored(path, "expected schema")


@pytest.mark.parametrize(
    "device",
    [
        {"name": "x" * 1000},
        {"name": "evil\u001b[2J"},
        {"name": 3},
        {"capability": [9]},
        {"capability": "90"},
        {"capability": [9, 10**9]},
        {"multiprocessors": -1},
        {"shared_memory": 1e300},
        {"shared_memory": 2**60},
    ],
)
def test_an_impossible_card(path: Path, device: dict[str, Any]) -> None:
    edited(path, lambda content: content["device"].update(device))
    ignored(path)


def test_a_folder_a_pipe_and_a_device(tmp_path: Path) -> None:
    folder, pipe, device = (tmp_path / name for name in ("folder.json", "pipe.json", "device.json"))
    folder.mkdir()
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    for path in (folder, pipe, device):
        ignored(path)


def test_a_link_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    ignored(tmp_path / "a")


def test_a_huge_file(path: Path) -> None:
    with path.open("ab") as file:
        file.truncate(table._MOST_BYTES + 1)
    ignored(path, "larger than")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file(path: Path) -> None:
    path.chmod(0)
    ignored(path)


@pytest.mark.parametrize(
    "fields",
    [
        {"parameters": {"num_warps": 1024, "num_stages": 1, "max_registers": None}},
        {"parameters": {"num_warps": 8, "num_stages": 10**12, "max_registers": None}},
        {"parameters": {"num_warps": 8, "num_stages": 1, "max_registers": "__import__('os')"}},
        {"parameters": {"num_warps": 8}},
        {"parameters": []},
        {"microseconds": -1},
        {"microseconds": "fast"},
        {"microseconds": 10**400},
        {"candidates": 1.5},
        {"triton": "3" * 10**4},
        {"fingerprint": None},
        {"tuned": "\n"},
    ],
)
def test_a_hostile_entry_is_left_out(path: Path, fields: dict[str, Any]) -> None:
    other = key_of(problem=FORWARD._replace(T=1024))
    assert table.add(path, H100, {other: entry(other)})
    edited(path, lambda content: content["entries"][str(KEY)].update(fields))
    with pytest.warns(TableWarning, match="1 entries are ignored"):
        found = table.read(path)
    assert found is not None and found.entries.keys() == {other}


def test_no_number_is_a_time(path: Path) -> None:
    path.write_text(path.read_text().replace('"microseconds": 10.0', '"microseconds": NaN'))
    ignored(path, "NaN")


def test_an_entry_that_does_not_fit_its_card(tmp_path: Path) -> None:
    key = key_of("state")
    path = tmp_path / "table.json"
    table.add(path, CONSUMER, {key: entry(key, num_stages=3)})
    with pytest.warns(TableWarning, match="shared memory"):
        assert table.read(path) == Table(CONSUMER)


# -------------------------------------------------------------------------------------------------------------- writing
def test_entries_of_another_version_stay(path: Path) -> None:
    edited(path, lambda content: content["entries"].update({"kernel_of_tomorrow/forward": {"parameters": 3}}))
    assert table.add(path, H100, {KEY: entry(KEY, num_warps=4)})
    content = json.loads(path.read_text())["entries"]
    assert content["kernel_of_tomorrow/forward"] == {"parameters": 3}
    assert content[str(KEY)]["parameters"]["num_warps"] == 4


def test_what_is_no_table_is_kept_beside_it(path: Path) -> None:
    path.write_text("precious")
    with pytest.warns(TableWarning, match="is ignored"):
        assert table.add(path, H100, {KEY: entry(KEY)})
    assert path.with_name(path.name + ".unreadable").read_text() == "precious"
    found = table.read(path)
    assert found is not None and found.entries.keys() == {KEY}


def test_a_failed_write_leaves_what_was_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.warns(TableWarning, match="no space left"):
        assert not table.add(path, H100, {KEY: entry(KEY, num_warps=4)})
    assert path.read_bytes() == before
    assert not [p for p in path.parent.iterdir() if p.name.startswith(".")]


def test_a_home_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")
    with pytest.warns(TableWarning, match="could not be written"):
        assert not table.add(tmp_path / "home" / "cache" / "table.json", H100, {KEY: entry(KEY)})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_home(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.warns(TableWarning, match="could not be written"):
            assert not table.add(tmp_path / "cache" / "table.json", H100, {KEY: entry(KEY)})
    finally:
        tmp_path.chmod(0o700)


def test_a_lock_that_nobody_gives_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_LOCK_SECONDS", 0.05)
    with table._locked(path), pytest.warns(TableWarning, match="could not be written"):
        assert not table.add(path, H100, {KEY: entry(KEY)})


def test_processes_that_write_and_read_at_once_lose_nothing(tmp_path: Path) -> None:
    path, processes, rounds = tmp_path / "folder" / "table.json", 8, 5
    outcomes = run_processes(write_and_read, [(path, number, rounds) for number in range(processes)])
    assert outcomes == [rounds] * processes
    found = table.read(path)
    assert found is not None and len(found.entries) == processes * rounds


def test_without_platformdirs_and_filelock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is shipped is read all the same, and there is a user's folder where the variable names one."""
    for module in ("platformdirs", "filelock"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delenv("GKA_OPS_AUTOTUNE_DIR", raising=False)
    assert table.user_folder() is None
    found = table.read(path)
    assert found is not None and found.entries.keys() == {KEY}
    monkeypatch.setattr(choice, "_settings", choice._Settings("cached"))
    monkeypatch.setattr(table, "SHIPPED", path.parent)
    assert choice.lookup(KEY, H100).origin == "exact"
    with pytest.warns(TableWarning, match=r"could not be written.*filelock"):
        assert not table.add(path, H100, {KEY: entry(KEY)})
    monkeypatch.setenv("GKA_OPS_AUTOTUNE_DIR", str(path.parent))
    assert table.user_folder() == path.parent


def test_folder_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GKA_OPS_AUTOTUNE_DIR", str(tmp_path))
    assert table.user_folder() == tmp_path
    monkeypatch.delenv("GKA_OPS_AUTOTUNE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = table.user_folder()
    assert folder is not None and folder.is_relative_to(tmp_path) and "gka-ops" in folder.parts
