"""Tuning with a bench that needs no card: what is tried, what is chosen, and what becomes of candidates that fail."""

from __future__ import annotations

import dataclasses
import functools
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gka_ops.autotune import choice, space, table, tuner
from gka_ops.autotune.worker import StartError, Worker, WorkerError
from tests.helpers.autotune import (
    BACKWARD,
    FORWARD,
    H100,
    FakeBench,
    forkserver,
    key_of,
    run_processes,
    share_among_ranks,
    without_card,
)

KEY = key_of()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(table, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("GKA_OPS_AUTOTUNE_DIR", str(tmp_path / "user"))
    monkeypatch.setattr(tuner, "_RUN_SECONDS", 0.5)
    forkserver()
    choice.use(None)
    yield tmp_path
    choice.reload()


def bench(folder: Path) -> Callable[[], FakeBench]:
    return functools.partial(FakeBench, folder / "log")


def asked(folder: Path) -> Counter[str]:
    return Counter(line.split()[0] for line in (folder / "log").read_text().splitlines())


def tune(folder: Path, **changed: Any) -> tuner.Result:
    given: dict[str, Any] = {"seconds": 60, "workers": 2, "method": "forkserver", "reach": True}
    (result,) = tuner.tune([KEY], H100, bench(folder), **{**given, **changed})
    return result


def test_the_fastest_that_is_right_wins(folder: Path) -> None:
    result = tune(folder)
    assert result.entry is not None
    assert result.entry.parameters == {"num_warps": 8, "num_stages": 2, "max_registers": 128}
    assert (result.entry.microseconds, result.entry.heuristic_microseconds) == (5.0, 14.0)
    failures = {tuple(o.parameters.values()): o.failure for o in result.outcomes if o.failure}
    assert failures.pop((2, 1, None)).startswith("check crashed: SIGSEGV in check (autotune.py:")
    assert (failures.pop((2, 1, 128)) or "").startswith("check hung")
    assert failures.pop((2, 1, 168)) == "wrong: output differs by 0.5"
    assert "illegal memory access" in (failures.pop((2, 2, None)) or "")
    assert len(failures) == 9 and all("out of shared memory" in (f or "") for f in failures.values())
    assert result.entry.candidates == 27 - 13
    assert all(not outcome.times for outcome in result.outcomes if outcome.failure)

    before = asked(folder)
    again = tune(folder)  # goes on where it was, and there is nothing left
    assert asked(folder) == before and again.entry == result.entry


def test_the_heuristic_stays_where_nothing_is_faster(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heuristic = dict(choice.heuristic(KEY, H100))
    base = tuner.Outcome(heuristic, checked=True, times=[10.0, 10.2, 10.1])
    other = tuner.Outcome({**heuristic, "num_warps": 8}, checked=True, times=[10.05, 10.05, 10.05])
    entry = tuner._winner(KEY, [other, base], heuristic)
    assert entry is not None and entry.parameters == heuristic
    other.times = [9.0, 9.0, 9.0]
    entry = tuner._winner(KEY, [other, base], heuristic)
    assert entry is not None and entry.parameters["num_warps"] == 8
    assert tuner._winner(KEY, [tuner.Outcome(heuristic)], heuristic) is None


def test_a_key_gets_what_time_others_leave(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = key_of(problem=FORWARD._replace(T=64))
    measured: list[Any] = []
    measure = tuner._measure

    def hasty(found: Any, key: Any, device: Any, runner: Any, deadline: float, log: Any) -> bool:
        measured.append(key)
        return measure(found, key, device, runner, 0.0 if len(measured) == 1 else deadline, log)

    monkeypatch.setattr(tuner, "_measure", hasty)
    results = tuner.tune([KEY, other], H100, bench(folder), seconds=60, workers=2, method="forkserver")
    assert measured == [KEY, other, KEY]
    assert [result.key for result in results] == [KEY, other]
    assert all(result.entry is not None for result in results)


def test_no_time_at_all_changes_nothing(folder: Path) -> None:
    result = tune(folder, seconds=-1)
    assert result.entry is None and not (folder / "log").exists()


def test_a_short_run_ends_with_an_entry_for_every_key(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner, "_COMPILING", 0.0)  # no key waits for more than its heuristic
    keys = [key_of(problem=FORWARD._replace(V=V)) for V in (64, 96, 128)]
    results = tuner.tune(keys, H100, bench(folder), seconds=60, workers=1, method="forkserver")
    assert all(result.entry is not None for result in results)
    compiled = [line for line in (folder / "log").read_text().splitlines() if line.startswith("compile")]
    heuristic = sorted(choice.heuristic(KEY, H100).items())
    assert compiled[:3] == [f"compile {heuristic}"] * 3


def test_a_card_that_is_not_there_is_no_fault_of_the_candidates(folder: Path) -> None:
    with pytest.raises(StartError, match="CUDA error: device busy"):
        tuner.tune([KEY], H100, without_card, seconds=60, workers=2, method="forkserver")
    assert tune(folder).entry is not None


def test_an_interrupted_run_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = Counter[str]()
    call = Worker.call

    def interrupted(self: Worker, method: str, *arguments: Any, seconds: float) -> Any:
        called[method] += 1
        if called["check"] == 3:
            raise KeyboardInterrupt
        return call(self, method, *arguments, seconds=seconds)

    monkeypatch.setattr(Worker, "call", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune(folder)
    monkeypatch.setattr(Worker, "call", call)
    result = tune(folder)
    assert result.entry is not None and result.entry.microseconds == 5.0
    counts = asked(folder)
    assert counts["compile"] == 27 and counts["check"] == 18


def test_progress_of_another_kernel_or_of_no_one_does_not_count(folder: Path) -> None:
    tune(folder)
    path = tuner.progress_file(KEY, H100)
    assert path is not None and len(tuner.outcomes(KEY, H100)) == 27
    content = json.loads(path.read_text())
    for outcome in content["outcomes"][:3]:
        outcome["parameters"]["num_warps"] = 1024
    content["outcomes"][3]["starts"] = 2
    path.write_text(json.dumps(content))
    found = tuner.outcomes(KEY, H100)
    assert len(found) == 24 and found[0].failure == "never came back"
    content["identity"]["fingerprint"] = "0"
    for text in (json.dumps(content), "{", "[]", "null", '{"identity": 3}', "[" * 10**5):
        path.write_text(text)
        assert tuner.outcomes(KEY, H100) == []


def test_tuning_fills_the_table(folder: Path) -> None:
    other = key_of(problem=FORWARD._replace(T=64))
    results = tuner.tune([KEY, other], H100, bench(folder), seconds=60, workers=2, method="forkserver")
    assert [result.key for result in results] == [KEY, other]
    for key in (KEY, other):
        found = choice.lookup(key, H100)
        assert found.origin == "exact" and found.parameters["num_warps"] == 8
        assert found.file == folder / "user" / table.file_name(H100)


def test_keys_of_the_same_code_share_their_builds(folder: Path) -> None:
    longer, backward = key_of(problem=FORWARD._replace(T=64)), key_of("backward_readout", problem=BACKWARD)
    tuner.tune([KEY, longer], H100, bench(folder), seconds=60, workers=2, method="forkserver")
    name = tuner._Builds._name
    parameters = choice.heuristic(KEY, H100)
    assert name(KEY, parameters) == name(longer, parameters) != name(KEY, {**parameters, "num_warps": 8})
    single, wide = (key_of("state", FORWARD._replace(N=N)) for N in (32, 64))
    assert name(single, {}) != name(wide, {}) == name(dataclasses.replace(wide, N=256), {}), "widths of its blocks"
    assert name(backward, parameters) != name(dataclasses.replace(backward, T=64), parameters), "slabs"
    assert asked(folder)["compile"] == len(space.candidates("readout", KEY, H100, parameters)[0])


def test_what_spills_far_more_than_the_heuristic_is_not_run() -> None:
    heuristic = dict(choice.heuristic(KEY, H100))
    found = [
        tuner.Outcome({**heuristic, "num_stages": stages}, resources={"spills": spills})
        for stages, spills in ((heuristic["num_stages"], 10), (2, 200), (3, 300))
    ]
    tuner._collect(found, KEY, heuristic, None, print)  # type: ignore[arg-type]  (nothing is to be compiled)
    assert [outcome.failure for outcome in found] == [None, None, "spills 300 registers a thread, the heuristic 10"]


def test_memory_that_ran_out_may_be_there_next_time(folder: Path) -> None:
    tune(folder)
    path = tuner.progress_file(KEY, H100)
    assert path is not None
    content = json.loads(path.read_text())
    content["outcomes"][0]["failure"] = "time failed: OutOfMemoryError: CUDA out of memory"
    path.write_text(json.dumps(content))
    assert tuner.outcomes(KEY, H100)[0].failure is None


def test_without_a_folder_what_is_found_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "user_folder", lambda: None)
    with pytest.warns(UserWarning, match="GKA_OPS_AUTOTUNE_DIR"):
        result = tune(folder)
    assert result.entry is not None and choice.lookup(KEY, H100).origin == "heuristic"


def test_by_default_what_is_near_the_heuristic_is_tried() -> None:
    heuristic = choice.heuristic(KEY, H100)
    near, _ = space.candidates("readout", KEY, H100, heuristic)
    everything, _ = space.candidates("readout", KEY, H100)
    assert near == [each for each in everything if space.steps("readout", each, heuristic) <= 2]
    assert heuristic in near and 1 < len(near) < len(everything)


def test_ranks_launch_what_rank_0_says(folder: Path) -> None:
    outcomes = run_processes(share_among_ranks, [(r, str(folder / "store"), str(folder)) for r in range(2)])
    assert [results for results, _ in outcomes] == [1, 0]
    assert outcomes[0][1] == outcomes[1][1]
    (tuned, origin, file), (other, _, _) = outcomes[1][1]
    assert tuned["num_warps"] == 8 and origin == "exact" and other["num_warps"] == 8
    assert file == str(folder / "0" / table.file_name(H100))
    assert not (folder / "log1").exists()


# --------------------------------------------------------------------------------------------------------- where it may
def test_never_while_something_is_captured_traced_or_differentiated(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    assert tuner.forbidden() is None

    class Tuned(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            found.append(tuner.forbidden())
            return grad

    found: list[str | None] = []
    Tuned.apply(torch.ones(1, requires_grad=True)).sum().backward()
    assert found == ["a backward pass is running"]
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert tuner.forbidden() == "torch.compile is tracing"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="a CUDA graph is being captured"):
        tuner.tune([KEY], H100, bench(folder))
    assert not (folder / "log").exists()


# -------------------------------------------------------------------------------------------------------------- workers
def test_a_worker_survives_what_its_process_does_not(folder: Path) -> None:
    ok, crashes = ({"num_warps": w, "num_stages": 1, "max_registers": None} for w in (4, 2))
    with Worker(bench(folder), "forkserver") as worker:
        assert worker.call("check", KEY, ok, seconds=30) is None
        for _ in range(2):
            with pytest.raises(WorkerError, match="crashed: SIGSEGV"):
                worker.call("check", KEY, crashes, seconds=30)
            assert worker.call("check", KEY, ok, seconds=30) is None
        with pytest.raises(WorkerError, match="AttributeError"):
            worker.call("nothing", seconds=30)


def test_a_worker_is_closed_while_another_thread_waits_for_it(folder: Path) -> None:
    fine, hangs = ({"num_warps": w, "num_stages": 1, "max_registers": 128} for w in (4, 2))
    worker = Worker(bench(folder), "forkserver")
    for _ in range(5):
        assert worker.call("check", KEY, fine, seconds=30) is None
        found: list[Exception] = []

        def wait(found: list[Exception] = found) -> None:
            try:
                worker.call("check", KEY, hangs, seconds=30)
            except Exception as error:
                found.append(error)

        thread = threading.Thread(target=wait)
        asked_before = asked(folder)["check"]
        thread.start()
        while asked(folder)["check"] == asked_before:
            thread.join(0.01)
        worker.close()
        thread.join(10)
        assert not thread.is_alive() and len(found) == 1


def test_the_likely_candidates_come_first() -> None:
    heuristic = choice.heuristic(KEY, H100)
    tried, _ = space.candidates("readout", KEY, H100)
    steps = [space.steps("readout", parameters, heuristic) for parameters in tried]
    assert steps.count(0) == 1 and tried[steps.index(0)] == heuristic
