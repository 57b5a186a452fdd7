"""Replayed calls on the card against calls that are not: bit for bit, whatever changed between them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import gka_ops
from gka_ops import ops
from tests.helpers.problems import (
    Problem,
    cotangents,
    evaluate,
    gate_of,
    make_problem,
    norm_error,
    run_gka,
    state_of,
)

pytestmark = pytest.mark.gpu

SIZES: dict[str, Any] = {"B": 2, "H": 4, "D": 64, "V": 64, "dtype": torch.bfloat16, "qk_l2norm": True, "device": "cuda"}


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    from gka_ops.triton import launcher

    launcher.forget()
    yield
    launcher.forget()


def replayed() -> int:
    from gka_ops.triton import launcher

    return sum(isinstance(plan, launcher._Plan) for plan in launcher._plans.values())


def ordinary(run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    from gka_ops.triton import launcher

    with monkeypatch.context() as context:
        context.setattr(ops, "watched", lambda: True)
        context.setattr(launcher, "_replayable", lambda tensor: False)
        return run()


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the operators that are called, as long as the test runs."""
    names: list[str] = []
    backend = ops._backend

    def named(op: str, *args: Any) -> Any:
        names.append(op)
        return backend(op, *args)

    monkeypatch.setattr(ops, "_backend", named)
    return names


@pytest.mark.parametrize(
    "options",
    [{}, {"Hkv": 2}, {"state": True}, {"gate": True}, {"ridge": "token"}, {"seq_lengths": (70, 0, 30), "B": 1}],
    ids=str,
)
def test_outputs_and_gradients(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(problem: Problem, upstream: dict[str, torch.Tensor]) -> Any:
        return evaluate(lambda p: run_gka(p, num_iter=30, impl="triton"), problem, upstream)

    for T in (100, 101, 100, 64, 100, 101, 101):  # recorded, new, replayed, ...
        problem = make_problem(**{**SIZES, "T": T, **options})
        upstream = cotangents(run_gka(problem, num_iter=30))
        expected = ordinary(lambda p=problem, u=upstream: run(p, u), monkeypatch)
        actual = run(problem, upstream)
        for kind in ("outputs", "gradients"):
            for name, value in getattr(actual, kind).items():
                assert torch.equal(value, getattr(expected, kind)[name]), (kind, name, T)
    assert "seq_lengths" in options or replayed() > 0


def test_misaligned_inputs_and_other_scalars(monkeypatch: pytest.MonkeyPatch) -> None:
    p = make_problem(**SIZES, T=100)
    storage = torch.empty(p.q.numel() + 1, dtype=p.q.dtype, device="cuda")
    off = storage[1:].view(p.q.shape).copy_(p.q)
    strided = p.q.transpose(1, 2).contiguous().transpose(1, 2)

    def run(q: torch.Tensor, **options: Any) -> torch.Tensor:
        with torch.no_grad():
            return gka_ops.chunk_gka(q, p.k, p.v, p.log_decay, p.alpha, p.beta, qk_l2norm=True, **options).output

    for options in ({}, {"ridge": 0.05}, {"scale": 2.0}, {"num_iter": 1}, {"num_iter": 0}, {}):
        expected = ordinary(lambda o=options: run(p.q, **o), monkeypatch)
        for q in (p.q, p.q, off, p.q, strided, off, p.q):
            actual = run(q, **options)
            if q is off:  # another layout, perhaps, and so other sums
                assert norm_error(actual, expected) <= torch.finfo(torch.bfloat16).eps, options
            else:
                assert torch.equal(actual, expected), options
    assert replayed() >= 5


@pytest.mark.parametrize("Hkv", [4, 2])
def test_decode(Hkv: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> list[torch.Tensor]:
        state = gka_ops.GKAState(*(torch.zeros(2, 4, 64, 64, device="cuda") for _ in range(2)))
        outputs = []
        for step in range(6):
            p = make_problem(**{**SIZES, "T": 1, "Hkv": Hkv, "seed": step})
            outputs.append(gka_ops.recurrent_gka(p.q, p.k, p.v, p.log_decay, p.alpha, p.beta, state=state))
        return [*outputs, *state]

    expected = ordinary(run, monkeypatch)
    for value, wanted in zip(run(), expected, strict=True):
        assert torch.equal(value, wanted)
    assert replayed() == 1


@pytest.mark.supports("manual CUDA graph capture")
def test_capture_of_a_replay() -> None:
    p = make_problem(**SIZES, T=100)

    def run() -> torch.Tensor:
        with torch.no_grad():
            return gka_ops.chunk_gka(p.q, p.k, p.v, p.log_decay, p.alpha, p.beta).output

    run()
    expected = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.supports("multi-stream and multi-thread")
def test_streams_and_threads() -> None:
    p = make_problem(**SIZES, T=100)

    def run() -> torch.Tensor:
        return gka_ops.chunk_gka(p.q, p.k, p.v, p.log_decay, p.alpha, p.beta).output

    expected = run()
    torch.cuda.synchronize()
    failures: list[str] = []

    def work() -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                if not torch.equal(run(), expected):
                    failures.append("differs")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# -------------------------------------------------------------------------------------------- beside the dispatcher
@pytest.mark.parametrize("output_final_state", [False, True])
@pytest.mark.parametrize("num_iter", [0, 30])
@pytest.mark.parametrize(
    "options",
    [{}, {"Hkv": 2}, {"state": True}, {"gate": True}, {"ridge": "token"}, {"ridge": "head", "state": True}],
    ids=str,
)
def test_forward_beside_the_dispatcher(
    options: dict[str, Any], num_iter: int, output_final_state: bool, dispatched: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def run(p: Problem) -> list[torch.Tensor]:
        with torch.no_grad():
            output, state = gka_ops.chunk_gka(
                p.q, p.k, p.v, p.log_decay, p.alpha, p.beta, ridge=gka_ops.Ridge(p.ridge_scale, p.ridge_offset),
                gate=gate_of(p), num_iter=num_iter, qk_l2norm=True, initial_state=state_of(p),
                output_final_state=output_final_state,
            )  # fmt: skip
        return [output, *(state or ())]

    for seed in range(4):
        p = make_problem(**{**SIZES, "T": 100, "seed": seed, **options})
        expected = ordinary(lambda p=p: run(p), monkeypatch)
        dispatched.clear()
        actual = run(p)
        assert len(dispatched) == (seed == 0)
        for value, wanted in zip(actual, expected, strict=True):
            assert value.dtype == wanted.dtype and value.stride() == wanted.stride() and torch.equal(value, wanted)


@pytest.mark.parametrize("pool", [False, True])
def test_decode_beside_the_dispatcher(pool: bool, dispatched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> list[torch.Tensor]:
        state = gka_ops.GKAState(*(torch.zeros(4 if pool else 2, 4, 64, 64, device="cuda") for _ in range(2)))
        indices = {"state_indices": torch.tensor([3, 0], device="cuda")} if pool else {}
        outputs = []
        for step in range(6):
            p = make_problem(**{**SIZES, "T": 1, "seed": step})
            versions = [part._version for part in state]
            outputs.append(gka_ops.recurrent_gka(p.q, p.k, p.v, p.log_decay, p.alpha, p.beta, state=state, **indices))
            assert [part._version for part in state] == [version + 1 for version in versions]
        return [*outputs, *state]

    expected = ordinary(run, monkeypatch)
    dispatched.clear()
    actual = run()
    assert dispatched == ["recurrent_gka"]
    for value, wanted in zip(actual, expected, strict=True):
        assert torch.equal(value, wanted)


@pytest.mark.supports("manual CUDA graph capture")
def test_capture_beside_the_dispatcher(dispatched: list[str]) -> None:
    p = make_problem(**{**SIZES, "T": 1})
    state = gka_ops.GKAState(*(torch.zeros(2, 4, 64, 64, device="cuda") for _ in range(2)))

    def run() -> torch.Tensor:
        return gka_ops.recurrent_gka(p.q, p.k, p.v, p.log_decay, p.alpha, p.beta, state=state)

    expected = []
    for _ in range(4):
        expected.append(run())
    states = [part.clone() for part in state]
    for part in state:
        part.zero_()
    dispatched.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    assert not dispatched
    for wanted in expected:
        graph.replay()
        assert torch.equal(captured, wanted)
    for part, wanted in zip(state, states, strict=True):
        assert torch.equal(part, wanted)


@pytest.mark.supports("multi-stream and multi-thread")
def test_side_streams_beside_the_dispatcher(dispatched: list[str]) -> None:
    """The launch waits for what its own stream does, and its output belongs to that stream."""
    p = make_problem(**SIZES, T=100)

    def run(q: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return gka_ops.chunk_gka(q, p.k, p.v, p.log_decay, p.alpha, p.beta).output

    expected = run(p.q)
    torch.cuda.synchronize()
    dispatched.clear()
    for _ in range(3):
        stream, q = torch.cuda.Stream(), torch.zeros_like(p.q)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            q.copy_(p.q)
            output = run(q)
        stream.synchronize()
        assert torch.equal(output, expected)
    assert not dispatched


def test_inference_mode_beside_the_dispatcher(dispatched: list[str]) -> None:
    p = make_problem(**SIZES, T=100)

    def run() -> torch.Tensor:
        return gka_ops.chunk_gka(p.q, p.k, p.v, p.log_decay, p.alpha, p.beta).output

    expected = run()
    for context in (torch.inference_mode, lambda: torch.autocast("cuda", p.q.dtype), torch.no_grad):
        with context():
            run()
            dispatched.clear()
            output = run()
        assert not dispatched
        assert output.is_inference() == (context is torch.inference_mode)
        assert torch.equal(output, expected)


@pytest.mark.supports("profiler and NVTX ranges")
def test_profilers_see_operators_that_are_known(dispatched: list[str]) -> None:
    p = make_problem(**SIZES, T=100)

    def run() -> torch.Tensor:
        return gka_ops.chunk_gka(p.q, p.k, p.v, p.log_decay, p.alpha, p.beta).output

    run()
    dispatched.clear()
    run()
    assert not dispatched
    with torch.profiler.profile() as profile:
        run()
    assert "gka::chunk_gka" in {event.key for event in profile.key_averages()}
    with torch.autograd.profiler.emit_nvtx():
        run()
    assert dispatched == ["chunk_gka"] * 2
    run()
    assert len(dispatched) == 2


@pytest.mark.supports("profiler and NVTX ranges")
def test_a_profiler_sees_the_stages() -> None:
    """Of a first call, of a recorded and of a replayed one: the operator, and a range for each of its launches."""
    problem = make_problem(**SIZES, T=200).requiring_grad()
    for _ in range(4):
        with torch.profiler.profile() as profile:
            run_gka(problem, num_iter=20)["output"].float().sum().backward()
        names = {event.name for event in profile.events()}
        assert {"gka::chunk_gka", "gka::chunk_gka_backward", "gka::chunk_state", "gka::chunk_readout"} <= names
        assert any(name.startswith("gka::chunk_solve") for name in names)
        assert any(name.startswith("gka::chunk_backward_key") for name in names)
