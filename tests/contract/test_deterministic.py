"""``torch.use_deterministic_algorithms(True)``: nothing is refused, nothing warns, and runs agree bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import gka_ops
from gka_ops import GKAState
from tests.helpers.problems import Outputs, cotangents, evaluate, make_problem, run_gka, run_solve

pytestmark = pytest.mark.supports("deterministic algorithms")


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("run", [run_gka, run_solve], ids=["chunk_gka", "chunk_solve"])
@pytest.mark.parametrize("options", [{"ridge": "head", "state": True, "gate": True}, {"seq_lengths": [30, 0, 40]}])
def test_forward_and_backward(run: Callable[..., Outputs], options: dict[str, Any]) -> None:
    p = make_problem(**{"B": 2, "T": 70, "H": 4, "Hkv": 2, "D": 16, "dtype": torch.bfloat16, **options})
    upstream = cotangents(run(p, num_iter=4))
    first, second = (evaluate(lambda p: run(p, num_iter=4), p, upstream) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert torch.equal(value, b[name]), name


def test_decode() -> None:
    p = make_problem(B=2, T=1, H=2, D=16, dtype=torch.float32)
    results = []
    for _ in range(2):
        state = GKAState(torch.zeros(3, 2, 16, 16), torch.zeros(3, 2, 16, 16))
        output = gka_ops.recurrent_gka(
            p.q, p.k, p.v, p.log_decay, state=state, state_indices=torch.tensor([2, 0]), num_iter=4
        )
        results.append((output, *state))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
