"""Record and replay (``gka_ops.triton.launcher``) on a stand-in card."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton import knobs

from gka_ops.triton import launcher
from gka_ops.triton.launcher import launch, replays
from tests.helpers.card import kernel, log, stand_in


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    stand_in(monkeypatch)
    launcher.forget()
    yield
    launcher.forget()


class Operator:
    """Two launches with a buffer between them: (x·factor + count)·2 + count + y, and an output without elements."""

    def __init__(self, between: Callable[[Tensor], Any] = lambda buffer: None) -> None:
        self.calls, self.between = 0, between
        self.run = replays(lambda: self.configuration)(self.operator)
        self.configuration: Any = "one"

    def operator(self, x: Tensor, y: Tensor | None, factor: float, count: int) -> tuple[Tensor, Tensor]:
        self.calls += 1
        x = x.contiguous()
        buffer, output, empty = x.new_empty(2, *x.shape), torch.empty_like(x), x.new_empty(0)
        launch(kernel, (1,), x=x, y=buffer[1], factor=factor, count=count, N=x.numel())
        self.between(buffer)
        launch(kernel, (1,), x=buffer[1], y=output, factor=2.0, count=count, N=x.numel())
        if y is not None:
            launch(kernel, (1,), x=y, y=buffer[0], factor=1.0, count=0, N=x.numel())
        return output, empty

    def check(self, x: Tensor, factor: float = 3.0, count: int = 5, y: Tensor | None = None) -> bool:
        """One call; whether it was a replay."""
        before = self.calls
        output, empty = self.run(x, y, factor, count)
        assert torch.equal(output, (x * factor + count) * 2 + count)
        assert output.is_contiguous() and empty.shape == (0,) and not output._is_view()
        return self.calls == before


def numbers(*shape: int) -> Tensor:
    return torch.randint(-9, 9, shape).float()


def test_a_call_is_repeated_with_new_addresses() -> None:
    operator = Operator()
    assert [operator.check(numbers(4, 2, 8)) for _ in range(4)] == [False, True, True, True]
    assert [entry.replayed for entry in log] == [False] * 2 + [True] * 6
    assert len({entry.compiled for entry in log}) == 1
    first, second = (operator.run(numbers(4, 2, 8), None, 3.0, 5) for _ in range(2))
    storages = [t.untyped_storage().data_ptr() for t in (first[0], second[0])]
    assert storages[0] != storages[1]
    assert first[1] is not second[1]


@pytest.mark.supports("profiler and NVTX ranges")
def test_a_profiler_sees_the_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A range for every launch, of a first call as of a replay; and none is made where no profiler runs."""
    operator = Operator()
    for _ in range(3):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            operator.check(numbers(4, 2, 8))
        assert [event.name for event in profile.events()].count("gka::scale") == 2
    made: list[str] = []
    monkeypatch.setattr(launcher, "_RecordFunctionFast", made.append)
    assert operator.check(numbers(4, 2, 8)) and not operator.check(numbers(4, 2, 16)) and made == []


@pytest.mark.parametrize("other", [{"factor": 7.0}, {"count": 6}, {"count": 1}, {"count": 2**40}], ids=str)
def test_another_scalar_is_another_call(other: dict[str, Any]) -> None:
    operator, x = Operator(), numbers(4, 2, 8)
    operator.check(x)
    assert operator.check(x)
    assert [operator.check(x, **other) for _ in range(2)] == [False, True]
    assert operator.check(x)


def test_another_number_of_tokens_is_recorded_when_it_comes_again() -> None:
    operator = Operator()
    assert [operator.check(numbers(4, 2, 8)) for _ in range(2)] == [False, True]
    assert [operator.check(numbers(8, 2, 8)) for _ in range(3)] == [False, False, True]
    assert operator.check(numbers(4, 2, 8))


def test_another_dtype_is_another_call() -> None:
    operator = Operator()
    operator.check(numbers(4, 2, 8))
    operator.run(numbers(4, 2, 8).int(), None, 1.0, 0)
    assert operator.calls == 2


def test_addresses_off_16_bytes_are_never_replayed() -> None:
    """The kernel compiled for aligned pointers would read them with 16-byte loads."""
    operator, storage = Operator(), numbers(1025)
    aligned, off = storage[:1024].view(4, 2, 128), storage[1:].view(4, 2, 128)
    assert aligned.data_ptr() % 16 == 0 and off.data_ptr() % 16 != 0
    assert [operator.check(x) for x in (aligned, aligned, off, off, off, aligned)] == [
        False, True, False, False, False, True,
    ]  # fmt: skip
    assert len({entry.compiled for entry in log}) == 2


def test_strided_tensors_are_never_replayed() -> None:
    operator, x = Operator(), numbers(4, 2, 16)[..., ::2]
    operator.check(x.contiguous())
    assert [operator.check(x) for _ in range(3)] == [False] * 3
    assert operator.check(x.contiguous())


def test_one_tensor_for_two_arguments() -> None:
    """Recorded so, the arguments must not become one."""
    operator, x = Operator(), numbers(4, 2, 8)
    operator.check(x, y=x)
    other = numbers(4, 2, 8)
    assert operator.check(x, y=other)
    assert log[-1].addresses[0] == other.data_ptr() and log[-3].addresses[0] == x.data_ptr()
    assert operator.check(x, y=x)


@pytest.mark.parametrize(
    "work", [lambda buffer: buffer.add_(0), lambda buffer: buffer.sum(), lambda buffer: buffer.clone()]
)
def test_other_work_is_never_replayed_and_keeps_its_order(work: Callable[[Tensor], Any]) -> None:
    seen = []

    def between(buffer: Tensor) -> None:
        work(buffer)
        seen.append(len(log))

    operator = Operator(between)
    assert [operator.check(numbers(4, 2, 8)) for _ in range(3)] == [False] * 3
    assert seen == [1, 3, 5]  # the first launch had been made


def test_views_of_buffers_and_of_outputs() -> None:
    def operator(x: Tensor) -> Tensor:
        output = x.new_empty(2, *x.shape)
        launch(kernel, (1,), x=x, y=output[0], factor=2.0, count=0, N=x.numel())
        launch(kernel, (1,), x=output[0], y=output[1], factor=3.0, count=0, N=x.numel())
        return output

    run = replays(lambda: None)(operator)
    for _ in range(3):
        x = numbers(4, 2, 8)
        assert torch.equal(run(x), torch.stack([2 * x, 6 * x]))
    assert log[-1].replayed


def test_a_call_that_returns_an_argument_or_a_view_is_never_replayed() -> None:
    x = numbers(4, 2, 8)
    for result in (lambda x, y: (x, y), lambda x, y: (y, y[0]), lambda x, y: (y, y)):
        calls = []

        def operator(x: Tensor, result: Any = result, calls: list[int] = calls) -> Any:
            calls.append(0)
            y = x.new_empty(x.shape)
            launch(kernel, (1,), x=x, y=y, factor=2.0, count=0, N=x.numel())
            return result(x, y)

        run = replays(lambda: None)(operator)
        for _ in range(3):
            assert torch.equal(run(x)[0].view(-1)[:4], result(x, 2 * x)[0].view(-1)[:4])
        assert len(calls) == 3


def test_another_configuration_is_another_call() -> None:
    operator, x = Operator(), numbers(4, 2, 8)
    operator.check(x)
    assert operator.check(x)
    operator.configuration = "two"
    assert not operator.check(x)


def test_launch_hooks_hear_of_replays() -> None:
    operator, x, heard = Operator(), numbers(4, 2, 8), []
    operator.check(x)
    assert operator.check(x)

    def hook(metadata: Any) -> None:
        heard.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(hook)
    try:
        assert operator.check(x)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert operator.check(x)
    assert heard == ["scale", "scale"]


def test_recorded_in_inference_mode_and_replayed_for_training() -> None:
    operator = Operator()
    with torch.inference_mode():
        operator.check(numbers(4, 2, 8))
        assert operator.check(numbers(4, 2, 8))
    assert operator.check(numbers(4, 2, 8))
    assert not any(t.is_inference() for t in operator.run(numbers(4, 2, 8), None, 3.0, 5))


def test_plans_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_MAX_PLANS", 4)
    operator, x = Operator(), numbers(4, 2, 8)
    for count in range(2, 12):
        operator.check(x, count=count)
    assert len(launcher._plans) == 4
    assert operator.check(x, count=11)
    assert not operator.check(x, count=2)


def test_large_calls_are_not_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_MAX_BYTES", 256)
    operator = Operator()
    assert [operator.check(numbers(4, 2, 8)) for _ in range(3)] == [False] * 3


def test_a_large_recorded_call_frees_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    alive = []

    def operator(x: Tensor) -> Tensor:
        for _ in range(3):
            buffer = x.new_empty(x.shape)
            alive.append(weakref.ref(buffer))
            launch(kernel, (1,), x=x, y=buffer, factor=1.0, count=1, N=x.numel())
            x = buffer
        assert [reference() is not None for reference in alive[-3:]] == [not small, not small, True]
        return x

    small = False
    replays(lambda: None)(operator)(numbers(4, 2, 8))  # compiles: what waits is held
    monkeypatch.setattr(launcher, "_MAX_BYTES", 0)
    small = True
    run = replays(lambda: None)(operator)
    for _ in range(3):
        x = numbers(4, 2, 8)
        assert torch.equal(run(x), x + 3)


def test_threads() -> None:
    operator, failures = Operator(), []

    def work() -> None:
        try:
            for i in range(40):
                operator.check(numbers(4 << i % 2, 2, 8), count=2 + i % 3)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_first_call_does_not_import_dynamo() -> None:
    """PyTorch would, for a dispatch mode's sake: as long as all else of a first call whose kernels are in the cache."""
    code = """
        import sys
        import pytest
        import torch
        from tests.contract.test_launcher import Operator, numbers
        from tests.helpers.card import stand_in

        stand_in(pytest.MonkeyPatch())
        operator, x = Operator(), numbers(2, 8)
        assert [operator.check(x) for _ in range(2)] == [False, True]
        assert "torch._dynamo" not in sys.modules
        import torch._dynamo

        assert [operator.check(x, factor) for factor in (4.0, 4.0)] == [False, True]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)


def test_where_dynamo_is_loaded_it_is_kept_from_the_recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    monkeypatch.setitem(sys.modules, "torch._dynamo", torch)
    with launcher._recording(device) as recorder:
        assert type(recorder) is launcher._Recorder
    monkeypatch.delitem(sys.modules, "torch._dynamo")
    with launcher._recording(device) as recorder:
        assert type(recorder) is launcher._UntracedRecorder
