"""Replayed calls on the card against calls that are not: bit for bit, whatever changed between them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import gka_ops
from tests.helpers.problems import Problem, cotangents, evaluate, make_problem, norm_error, run_gka

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
        context.setattr(launcher, "_replayable", lambda tensor: False)
        return run()


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
