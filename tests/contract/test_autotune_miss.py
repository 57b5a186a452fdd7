"""Tuning on a miss: when a call tunes, what it does with what was found, and that it never fails for it."""

from __future__ import annotations

import subprocess
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gka_ops import autotune
from gka_ops.autotune import choice, miss, table
from gka_ops.autotune.config import chunk_config, recurrent_config
from gka_ops.autotune.key import Key
from gka_ops.autotune.miss import MissWarning
from tests.helpers.autotune import A100, BACKWARD, DECODE, FORWARD, H100, entry, isolate, key_of

CONFIG = chunk_config(128, 128, False)
KERNELS = ("state", "solve_hopper", "readout")
ORDINAL_OF = miss._ordinal
Runs = list[tuple[tuple[str, ...], float]]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    user, _ = isolate(monkeypatch, tmp_path)
    monkeypatch.setattr(miss, "_ordinal", lambda device: 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield user


@pytest.fixture
def runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """What was tuned: in the place of another process, eight warps are found to be best for everything."""
    found: Runs = []

    def run(keys: Sequence[Key], ordinal: int, seconds: float) -> None:
        found.append((tuple(key.kernel for key in keys), seconds))
        for key in keys:
            warps = 4 if key.kernel == "solve_hopper" else 8
            assert table.add(folder / table.file_name(H100), H100, {key: entry(key, num_warps=warps)})

    monkeypatch.setattr(miss, "_run", run)
    return found


def readout_warps(**given: Any) -> int:
    return choice.chosen(CONFIG, FORWARD, H100, **given).readout.num_warps


def test_off_by_default(runs: Runs) -> None:
    assert readout_warps() == 4 and not runs


def test_a_call_tunes_what_no_table_knows_once(runs: Runs) -> None:
    autotune.enable(seconds=20)
    assert readout_warps() == 8 and runs == [(KERNELS, 20)]
    assert readout_warps() == 8
    choice.reload()
    assert readout_warps() == 8 and len(runs) == 1
    decode = recurrent_config(128, 128, True)
    assert choice.chosen(decode, DECODE, H100).kernel.num_warps == 8
    assert runs[1:] == [(("recurrent",), 20)]
    autotune.disable()
    with pytest.warns(choice.UntunedWarning):
        choice.chosen(chunk_config(64, 64, False), FORWARD._replace(D=64, V=64), H100)
    assert len(runs) == 2


@pytest.mark.filterwarnings("ignore::gka_ops.autotune.choice.UntunedWarning")
def test_only_what_is_missing(runs: Runs, folder: Path) -> None:
    table.add(folder / table.file_name(H100), H100, {key_of(): entry(key_of(), num_warps=8)})
    near, stale = key_of("state", FORWARD._replace(T=64)), key_of("solve_hopper")
    table.add(folder / table.file_name(H100), H100, {near: entry(near), stale: entry(stale, fingerprint="0")})
    choice.reload()
    autotune.enable()
    assert readout_warps() == 8
    assert [kernels for kernels, _ in runs] == [("state", "solve_hopper")]


def test_the_environment_variable_and_a_block(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    with autotune.enable():
        assert autotune.mode() == "tune"
    assert autotune.mode() == "cached" and readout_warps() == 4
    monkeypatch.setenv("GKA_OPS_AUTOTUNE", "tune")
    choice.reload()
    assert readout_warps() == 8
    autotune.disable()
    assert autotune.mode() == "cached"
    with pytest.raises(ValueError, match="at least one second"):
        autotune.enable(seconds=0)


def test_a_recorded_launch_depends_on_it(runs: Runs) -> None:
    before = choice.state()
    with autotune.enable():
        assert choice.state() != before
        during = choice.state()
        readout_warps()
        assert choice.state() != during, "what was found is used, also where the call was recorded"


# ------------------------------------------------------------------------------------------------------------- not here
def test_not_in_a_training_step_but_afterwards(runs: Runs) -> None:
    autotune.enable()
    assert readout_warps(training=True) == 4 and not runs
    assert readout_warps() == 8


@pytest.mark.parametrize(
    ("holder", "function", "value"),
    [
        (torch.compiler, "is_compiling", True),
        (torch._C, "_current_graph_task_id", 3),
        (torch.cuda, "is_current_stream_capturing", True),
    ],
)
def test_not_in_a_trace_a_backward_or_a_capture(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, holder: Any, function: str, value: Any
) -> None:
    autotune.enable()
    with monkeypatch.context() as inside:
        inside.setattr(torch.cuda, "is_available", lambda: True)
        inside.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        inside.setattr(holder, function, lambda: value)
        assert readout_warps() == 4
        choice.chosen(CONFIG, BACKWARD, H100, training=True)
    assert not runs
    assert readout_warps() == 8


def test_not_in_a_distributed_job(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    autotune.enable()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(MissWarning, match=r"autotune\.tune on all of them.*share_tables"):
        assert readout_warps() == 4
    assert choice.chosen(recurrent_config(128, 128, True), DECODE, H100).kernel.num_warps == 4, "one warning"
    assert not runs


def test_not_where_tables_were_given(runs: Runs) -> None:
    autotune.enable()
    choice.adopt([])
    assert readout_warps() == 4 and not runs


def test_not_without_a_folder(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    autotune.enable()
    monkeypatch.setattr(table, "user_folder", lambda: None)
    with pytest.warns(MissWarning, match="GKA_OPS_AUTOTUNE_DIR"):
        assert readout_warps() == 4
    assert not runs


def test_launches_say_whether_they_train(monkeypatch: pytest.MonkeyPatch) -> None:
    from gka_ops.triton import launch

    seen: list[bool] = []

    def chosen(config: Any, problem: Any, device: Any, *, training: bool = False) -> Any:
        seen.append(training)
        return config

    monkeypatch.setattr(choice, "chosen", chosen)
    monkeypatch.setattr(launch, "launch", lambda kernel, grid, /, **given: None)
    q, k, v = (torch.randn(1, 70, 2, 64) for _ in range(3))
    state = torch.zeros(1, 2, 64, 64)
    tensors = (None,) * 8
    for save_x in (False, True):
        launch.chunk_gka(q, k, v, *tensors, None, None, 0.02, 0.0, 5, 1.0, True, False, save_x, "")
    launch.chunk_solve(q, k, *tensors, 0.02, 0.0, 5, True, False, "")
    step = (x[:, :1] for x in (q, k, v))
    launch.recurrent_gka(*step, *tensors[:7], state, state.clone(), None, 0.02, 0.0, 5, 1.0, True, "")
    assert seen == [False, True, True, False]


# ------------------------------------------------------------------------------------------------------------- failures
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), subprocess.TimeoutExpired("tune", 3), OSError("no")])
def test_a_failure_warns_once_and_the_heuristic_runs(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def run(*_: object) -> None:
        raise error

    monkeypatch.setattr(miss, "_run", run)
    autotune.enable()
    with pytest.warns(MissWarning, match=type(error).__name__):
        assert readout_warps() == 4
    assert choice.chosen(recurrent_config(128, 128, True), DECODE, H100).kernel.num_warps == 4


def test_threads_tune_one_after_the_other_and_not_twice(runs: Runs) -> None:
    autotune.enable()
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(readout_warps())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [8] * 4 and len(runs) == 1


def test_the_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the command line, and what it says is in the warning; here there is no card for it."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda ordinal: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("GKA_OPS_AUTOTUNE", "tune")
    with pytest.warns(MissWarning, match="expected a CUDA card here"):
        assert readout_warps() == 4


def test_the_card_is_the_current_one_if_it_is_such_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [H100, H100, A100]
    monkeypatch.setattr(miss, "current", cards.__getitem__)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    for ordinal, expected in ((0, 0), (1, 1), (2, 0)):
        monkeypatch.setattr(torch.cuda, "current_device", lambda ordinal=ordinal: ordinal)
        assert ORDINAL_OF(H100) == expected
