"""Which configuration runs: the order of lookup, staleness, warnings, overrides, and replays of recorded calls."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gka_ops import autotune
from gka_ops.autotune import choice, table
from gka_ops.autotune.choice import StaleWarning, UntunedWarning
from gka_ops.autotune.config import chunk_config, recurrent_config
from gka_ops.autotune.device import Device
from gka_ops.autotune.key import Key
from tests.helpers.autotune import BACKWARD, CONSUMER, DECODE, FORWARD, H100, H200, entry, isolate, key_of

KEY = key_of()
CONFIG = chunk_config(128, 128, False)


class Folders:
    """A user's and a shipped folder of tables."""

    def __init__(self, user: Path, shipped: Path) -> None:
        self.user, self.shipped = user, shipped

    def add(self, key: Key, *, shipped: bool = False, device: Device = H100, **changed: Any) -> Path:
        path = (self.shipped if shipped else self.user) / table.file_name(device)
        assert table.add(path, device, {key: entry(key, **changed)})
        choice.reload()
        return path


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folders:
    return Folders(*isolate(monkeypatch, tmp_path))


@pytest.fixture
def silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def warps(key: Key = KEY, device: Device = H100) -> tuple[int | None, str]:
    found = choice.lookup(key, device)
    return found.parameters["num_warps"], found.origin


# ---------------------------------------------------------------------------------------------------------------- order
def test_without_tables_everything_is_as_before(silent: None) -> None:
    for device in (H100, H200):
        for problem in (FORWARD, BACKWARD, FORWARD._replace(dtype="fp32", C=32)):
            config = chunk_config(128, 128, problem.dtype == "fp32")
            assert choice.chosen(config, problem, device) == config
        assert choice.chosen(recurrent_config(128, 128, True), DECODE, device) == recurrent_config(128, 128, True)


def test_order(folders: Folders) -> None:
    near, far = (key_of(problem=FORWARD._replace(T=T)) for T in (16384, 65536))
    other_n = key_of(problem=FORWARD._replace(N=128))
    folders.add(key_of("state"), device=H200)
    with pytest.warns(UntunedWarning):
        assert warps() == (4, "heuristic")
    folders.add(KEY, device=H200, shipped=True, num_warps=2, num_stages=2)
    assert warps() == (2, "architecture")
    folders.add(other_n, num_warps=2)
    assert warps() == (2, "nearest")
    folders.add(far, shipped=True, num_warps=8)
    assert warps() == (8, "nearest"), "the same N at another T comes before another N"
    folders.add(near, shipped=True, num_warps=2)
    assert warps() == (2, "nearest")
    folders.add(near, num_warps=8)
    assert warps() == (8, "nearest"), "this user's comes first"
    folders.add(KEY, shipped=True, num_warps=2)
    assert warps() == (2, "exact"), "the shipped key itself comes before this user's nearest"
    path = folders.add(KEY, num_warps=8)
    assert warps() == (8, "exact")
    found = choice.lookup(KEY, H100)
    assert (found.file, found.found) == (path, KEY) and found.entry is not None


def test_another_architecture_never_counts(folders: Folders) -> None:
    folders.add(KEY, num_warps=8)
    with pytest.warns(UntunedWarning, match="RTX 4090"):
        assert warps(device=CONSUMER) == (4, "heuristic")


def test_an_entry_of_a_larger_card_must_fit(folders: Folders) -> None:
    smaller = dataclasses.replace(H200, name="smaller", shared_memory=101376)
    folders.add(key_of("state"), num_stages=4)
    with pytest.warns(UntunedWarning):
        found = choice.lookup(key_of("state"), smaller)
    assert found.origin == "heuristic" and found.parameters["num_stages"] == 2


def test_only_the_very_options_count(folders: Folders) -> None:
    folders.add(KEY, num_warps=8)
    for other in (FORWARD._replace(dtype="fp16"), FORWARD._replace(options=FORWARD.options | {"gqa"})):
        with pytest.warns(UntunedWarning):
            choice.lookup(key_of(problem=other), H100)
        choice._warned.clear()


def test_a_repeated_lookup_reads_no_file(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    folders.add(KEY, num_warps=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntunedWarning)
        first, config = choice.lookup(KEY, H100), choice.chosen(CONFIG, FORWARD, H100)
    for name in ("open", "stat", "scandir", "listdir"):
        monkeypatch.setattr(os, name, lambda *_, **__: pytest.fail("no file may be touched"))
    assert choice.lookup(KEY, H100) is first and choice.chosen(CONFIG, FORWARD, H100) is config


def test_a_configuration_that_someone_made_is_left_alone(folders: Folders, silent: None) -> None:
    folders.add(KEY, num_warps=8)
    own = dataclasses.replace(CONFIG, chunk=32)
    assert choice.chosen(own, FORWARD, H100) is own


def test_the_configuration_of_a_call(folders: Folders) -> None:
    for kernel in ("state", "readout"):
        folders.add(key_of(kernel), num_warps=4 if kernel == "state" else 8)
    with pytest.warns(UntunedWarning, match="solve_hopper"):
        config = choice.chosen(CONFIG, FORWARD, H100)
    assert config.readout.num_warps == 8 and config.state.num_warps == 4
    changed = {"readout": config.readout, "state": config.state}
    assert dataclasses.replace(CONFIG, **changed) == config


# ------------------------------------------------------------------------------------------------------------- warnings
def test_one_warning_a_kernel_says_where_and_how(folders: Folders) -> None:
    folders.add(key_of("state"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for T in (64, 512, 8192):
            choice.lookup(key_of(problem=FORWARD._replace(T=T)), H100)
    (warning,) = caught
    assert warning.category is UntunedWarning
    message = str(warning.message)
    assert str(folders.user / table.file_name(H100)) in message and str(folders.shipped) in message
    key = key_of(problem=FORWARD._replace(T=64))
    assert f"gka-autotune tune --key {key}" in message


@pytest.mark.parametrize("changed", [{"triton": "3.5.0"}, {"fingerprint": "0" * 16}])
def test_a_stale_entry_is_skipped_and_reported_once(folders: Folders, changed: dict[str, str]) -> None:
    folders.add(KEY, num_warps=8, **changed)
    with pytest.warns(StaleWarning, match=r"skipped.*gka-autotune tune --key"):
        assert warps() == (4, "heuristic")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choice.reload()
        assert warps() == (4, "heuristic")
    assert len(choice.lookup(KEY, H100).stale) == 1
    folders.add(key_of(problem=FORWARD._replace(T=16384)), num_warps=2)
    assert warps() == (2, "nearest"), "the next one is taken"


def test_an_unreadable_table_is_no_reason_to_fail(folders: Folders) -> None:
    path = folders.add(KEY, num_warps=8)
    path.write_text("{")
    choice.reload()
    with pytest.warns(table.TableWarning):
        assert warps() == (4, "heuristic")


# ---------------------------------------------------------------------------------------------------------------- modes
def test_shipped_tables_alone(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    folders.add(KEY, num_warps=8)
    folders.add(KEY, shipped=True, num_warps=2)
    assert warps() == (8, "exact")
    monkeypatch.setenv("GKA_OPS_AUTOTUNE", "shipped")  # read when it is needed
    assert warps() == (2, "exact")
    autotune.use("cached")
    assert warps() == (8, "exact")
    monkeypatch.delenv("GKA_OPS_AUTOTUNE")
    autotune.use("shipped")
    assert warps() == (2, "exact")


@pytest.mark.filterwarnings("ignore::gka_ops.autotune.choice.UntunedWarning")
def test_deterministic_mode_does_not_depend_on_what_was_tuned_here(folders: Folders) -> None:
    """Nor on what was asked for before: calls that are known choose anew."""
    from gka_ops.triton import launch

    folders.add(KEY, num_warps=8)
    folders.add(KEY, shipped=True, num_warps=2)

    def of_a_call() -> int:
        return choice.chosen(CONFIG, FORWARD, H100).readout.num_warps

    before = launch._configuration()
    assert (warps(), of_a_call()) == ((8, "exact"), 8)
    torch.use_deterministic_algorithms(True)
    try:
        assert choice.mode() == "shipped" and launch._configuration() is not before
        assert (warps(), of_a_call()) == ((2, "exact"), 2)
    finally:
        torch.use_deterministic_algorithms(False)
    assert (warps(), of_a_call()) == ((8, "exact"), 8) and launch._configuration() is before


def test_unknown_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="expected one of"):
        autotune.use("fast")  # type: ignore[arg-type]
    monkeypatch.setenv("GKA_OPS_AUTOTUNE", "fast")
    with pytest.warns(UserWarning, match="GKA_OPS_AUTOTUNE"):
        assert choice.mode() == "shipped"


# ------------------------------------------------------------------------------------------------------------ overrides
def test_override(folders: Folders, silent: None) -> None:
    assert choice.chosen(CONFIG, FORWARD, None) is CONFIG
    with autotune.override("readout", num_warps=8):
        with autotune.override("state", block_state=64), autotune.override("readout", num_stages=2):
            config = choice.chosen(CONFIG, FORWARD, None)
            assert (config.readout.num_warps, config.readout.num_stages, config.block_state) == (8, 2, 64)
        config = choice.chosen(CONFIG, FORWARD, H100)
        assert (config.readout.num_warps, config.readout.num_stages, config.block_state) == (8, 1, 128)
        recurrent = recurrent_config(128, 128, True)
        assert choice.chosen(recurrent, DECODE, H100) == recurrent
    assert choice.chosen(CONFIG, FORWARD, None) is CONFIG
    with autotune.override("recurrent", num_warps=8, chains=4):
        found = choice.chosen(recurrent, DECODE, H100)
        assert (found.kernel.num_warps, found.chains, found.width) == (8, 4, 2)


def test_override_comes_before_tables_and_may_be_excluded(folders: Folders) -> None:
    problem = BACKWARD._replace(D=32, V=64)
    config = chunk_config(32, 64, False)
    with autotune.override("backward_key", num_warps=4):
        assert choice.chosen(config, problem, H100).backward_key.num_warps == 4


@pytest.mark.parametrize(
    ("kernel", "parameters"),
    [("matmul", {}), ("readout", {"warps": 4}), ("readout", {"num_warps": 1024}), ("readout", {"num_warps": True})],
)
def test_override_refuses_what_is_no_parameter(kernel: str, parameters: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected"), autotune.override(kernel, **parameters):
        pass


def test_overrides_belong_to_a_thread_and_to_a_task(folders: Folders) -> None:
    seen: list[object] = []
    with autotune.override("readout", num_warps=8):
        thread = threading.Thread(target=lambda: seen.append(choice.state()[1]))
        thread.start()
        thread.join()
    assert seen == [()]

    async def task(num_warps: int, started: asyncio.Barrier) -> int:
        with autotune.override("readout", num_warps=num_warps):
            await started.wait()
            return choice.chosen(CONFIG, FORWARD, None).readout.num_warps

    async def tasks() -> list[int]:
        started = asyncio.Barrier(2)
        return await asyncio.gather(task(2, started), task(8, started))

    assert asyncio.run(tasks()) == [2, 8]


def test_threads_of_autograd_are_told() -> None:
    """What a backward pass in another thread sees: PyTorch hands over the thread-local objects, not the context."""
    with autotune.override("readout", num_warps=8):
        forced = choice.state()[1]
        assert torch._C._get_obj_in_tls(choice._IN_BACKWARD) == forced
    assert torch._C._get_obj_in_tls(choice._IN_BACKWARD) == ()

    class Seen(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            token = choice._overrides.set(())  # as it is in another thread
            seen.append(choice.state()[1])
            choice._overrides.reset(token)
            return grad

    seen: list[object] = []
    y = Seen.apply(torch.ones(1, requires_grad=True)).sum()
    with autotune.override("readout", num_warps=8):
        y.backward()
    assert seen == [forced]


def test_references_are_counted() -> None:
    """PyTorch 2.11 gives references back that it never took: what is forced would be freed while it is in use."""
    value = (object(),)
    before = sys.getrefcount(value)
    for _ in range(5):
        choice._stash("gka_ops_test", value)
        assert sys.getrefcount(value) > before
        torch._C._get_obj_in_tls("gka_ops_test")
    choice._stash("gka_ops_test", None)
    assert sys.getrefcount(value) == before


def test_an_override_ends_with_an_error() -> None:
    with pytest.raises(KeyError), autotune.override("readout", num_warps=8):
        raise KeyError
    assert torch._C._get_obj_in_tls(choice._IN_BACKWARD) == () == choice.state()[1]


# -------------------------------------------------------------------------------------------------------------- replays
def test_what_recorded_launches_depend_on(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    from gka_ops.triton import launch

    before = launch._configuration()
    assert launch._configuration() is before
    assert not isinstance(before, tuple), "Recall keeps no call with one"
    with autotune.override("readout", num_warps=8):
        forced = launch._configuration()
        assert forced is not before
    with autotune.override("readout", num_warps=8):
        assert launch._configuration() is forced
    assert launch._configuration() is before
    choice.reload()
    assert launch._configuration() is not before
    before = launch._configuration()
    monkeypatch.setattr(launch, "chunk_config", lambda *key: CONFIG)
    assert launch._configuration() is not before


def test_overrides_reach_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    from gka_ops.triton import launch

    launched: dict[str, dict[str, Any]] = {}
    monkeypatch.setattr(launch, "launch", lambda kernel, grid, /, **given: launched.update({kernel.fn.__name__: given}))
    q, k, v = (torch.randn(1, 70, 2, 64) for _ in range(3))
    state = torch.zeros(1, 2, 64, 64)
    tensors = (None,) * 8
    with (
        autotune.override("readout", num_warps=2),
        autotune.override("state", block_state=32),
        autotune.override("recurrent", chains=4),
    ):
        launch.chunk_gka(q, k, v, *tensors, None, None, 0.02, 0.0, 5, 1.0, True, False, False, "")
        step = (x[:, :1] for x in (q, k, v))
        launch.recurrent_gka(*step, *tensors[:7], state, state.clone(), None, 0.02, 0.0, 5, 1.0, True, "")
    assert launched["chunk_readout_kernel"]["num_warps"] == 2
    assert launched["chunk_state_kernel"]["BLOCK_N"] == 32
    assert launched["recurrent_kernel"]["CHAINS"] == 4
