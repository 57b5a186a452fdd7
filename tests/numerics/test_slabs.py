"""The backward in slabs (docs/adr/0007), under Triton's interpreter: slabs so small that short sequences have several."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from gka_ops.triton import slabs
from tests.conftest import HAS_CUDA
from tests.helpers import contract
from tests.helpers.problems import Evaluation, Problem, cotangents, evaluate, make_problem, norm_error, run_gka, run_solve

pytestmark = pytest.mark.skipif(HAS_CUDA, reason="on a machine with a card the kernels run on it: tests/gpu")

SMALL: dict[str, Any] = {"H": 2, "Hkv": 1, "D": 16, "V": 24, "qk_l2norm": True, "state": True}

SHAPES: dict[str, dict[str, Any]] = {
    "of_one_chunk": {"B": 2, "T": 150},
    "decay_gate": {"T": 130, "gate": True, "ridge": "token", "ridge_offset": 0.01},
    # Chunks 0 | 1 2 3 | 4 | (an empty one) | 5 6 | none: with slabs of one chunk, one sequence spans three.
    "packed": {"seq_lengths": (64, 150, 7, 0, 128, 0)},
}


@pytest.fixture
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "PROGRAMS", 1)
    monkeypatch.setattr(slabs, "LEAST_CHUNKS", 1)


def gradients(problem: Problem, run: Any = run_gka, num_iter: int = 30, **options: Any) -> Evaluation:
    with torch.no_grad():
        upstream = cotangents(run(problem, num_iter=1, impl="reference"))
    return evaluate(lambda p: run(p, num_iter=num_iter, impl="triton", **options), problem, upstream)


def assert_close(several: Evaluation, one: Evaluation, dtype: torch.dtype) -> None:
    """Forwards are the same; in the backward, a slab's first state starts from its own largest entry, not from a bound
    that was carried along, so that fp16 rounds in another unit: one rounding, which the solve may magnify by 1/r."""
    for name, value in one.outputs.items():
        assert torch.equal(several.outputs[name], value), name
    bar = torch.finfo(torch.float32).eps / 0.02 * 70 if dtype == torch.float32 else 2 * torch.finfo(torch.float16).eps
    for name, gradient in one.gradients.items():
        assert norm_error(several.gradients[name], gradient) <= bar, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.usefixtures("small_slabs")
def test_accuracy(name: str, dtype: torch.dtype) -> None:
    problem = make_problem(**{**SMALL, **SHAPES[name]}, dtype=dtype)
    contract.check(contract.measure(run_gka, problem, 30, "triton"), contract.bars_for(dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_several_slabs_equal_one(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(**{**SMALL, **SHAPES[name]}, dtype=dtype)
    one = gradients(problem)
    monkeypatch.setattr(slabs, "PROGRAMS", 1)
    monkeypatch.setattr(slabs, "LEAST_CHUNKS", 1)
    assert_close(gradients(problem), one, dtype)
