"""The bench's calls and its accuracy check, in Triton's interpreter. It compiles and times on a card only."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gka_ops.autotune import choice, space
from gka_ops.autotune.key import Problem
from tests.helpers.autotune import H100

HAS_CUDA = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(HAS_CUDA, reason="needs Triton's interpreter, chosen where there is no card")
SMALL = Problem("forward", "fp16", 16, 16, 64, 256, 2, frozenset({"beta", "decay", "l2norm", "solve"}))


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    from gka_ops.autotune import measure
    from gka_ops.triton import launcher

    monkeypatch.setattr(launcher, "_replayable", launcher._replayable)  # put back what the bench replaces
    return measure.Bench("cpu")


@pytest.mark.parametrize("when", ["forward", "backward", "decode"])
@pytest.mark.parametrize(
    "options",
    [
        {"solve"},
        {"alpha", "beta", "gate", "gqa", "l2norm", "ridge_head", "ridge_token", "solve", "varlen"},
        {"decay", "ridge_offset"},
    ],
    ids=["plain", "all", "unsolved"],
)
def test_every_kernel_is_launched_by_the_call_of_its_key(bench: Any, when: str, options: set[str]) -> None:
    if when == "decode":
        options = options - {"varlen"}
    problem = SMALL._replace(when=when, C=1 if when == "decode" else 64, T=2, options=frozenset(options))
    config = choice.heuristic_config("recurrent" if when == "decode" else "state", "fp16", 16, 16, 2)
    for kernel in space.kernels_of(problem, config, None):
        key = space.KERNELS[kernel].key(problem)
        parameters = choice.heuristic(key, H100)
        for _, _, arguments in bench._launches(key, parameters):
            assert arguments["num_warps"] == parameters["num_warps"]
            assert (arguments.get("cu_seqlens") is not None) == ("varlen" in key.options)


def test_a_backward_is_cut_as_that_of_all_tokens_is(bench: Any) -> None:
    """States are carried between slabs, and the kernels compiled for it."""
    problem = SMALL._replace(when="backward", T=2**16, N=64)
    for kernel, launches in (("state", 2), ("backward_scan", 4)):  # of two slabs, the scans of H and of U
        key = space.KERNELS[kernel].key(problem)
        assert len(bench._launches(key, choice.heuristic(key, H100))) == launches


def test_the_time_is_the_mean_of_all_launches_of_a_call(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scans of H and of U differ; those of slabs are alike, and measured once."""
    from gka_ops.autotune import measure
    from gka_ops.triton import slabs

    measured = []

    def microseconds(kernel: Any, grid: Any, arguments: dict[str, Any]) -> float:
        measured.append(arguments["SYMMETRIC"])
        return 10.0 if arguments["SYMMETRIC"] else 1.0

    monkeypatch.setattr(measure, "_microseconds", microseconds)
    key = space.KERNELS["backward_scan"].key(SMALL._replace(when="backward", T=256))
    parameters = choice.heuristic(key, H100)
    assert bench.time(key, parameters) == 5.5 and sorted(measured) == [False, True]
    monkeypatch.setattr(slabs, "PROGRAMS", 1)
    monkeypatch.setattr(slabs, "LEAST_CHUNKS", 1)
    measured.clear()
    assert bench.time(key, parameters) == 5.5  # of four slabs
    assert sorted(measured) == [False, True]


def test_a_candidate_that_is_right(bench: Any) -> None:
    key = space.KERNELS["readout"].key(SMALL)
    parameters = choice.heuristic(key, H100)
    assert bench.check(key, parameters) is None


def test_a_candidate_that_is_wrong(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from gka_ops.autotune import measure

    key = space.KERNELS["recurrent"].key(SMALL._replace(when="decode", C=1, T=1))
    parameters = choice.heuristic(key, H100)
    assert bench.check(key, parameters) is None
    ordinary = measure._results

    def disturbed(*args: Any) -> dict[str, torch.Tensor]:
        found = ordinary(*args)
        found["kk"][..., 0] += 1e-3
        return found

    monkeypatch.setattr(measure, "_results", disturbed)
    found = bench.check(key, parameters)
    assert found is not None and found.startswith("wrong: kk differs by")
    monkeypatch.setattr(measure, "_results", lambda *args: {n: t * float("nan") for n, t in ordinary(*args).items()})
    assert "output differs by nan" in (bench.check(key, parameters) or "")
