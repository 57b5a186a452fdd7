"""The backward in slabs (docs/adr/0007), interpreted: slabs so small that short sequences have several."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from gka_ops.numerics import backward_iterations
from gka_ops.triton import slabs
from tests.conftest import HAS_CUDA
from tests.helpers import contract
from tests.helpers.problems import (
    Evaluation,
    Outputs,
    Problem,
    cotangents,
    evaluate,
    make_problem,
    norm_error,
    run_gka,
    run_solve,
)

interpreted = pytest.mark.skipif(HAS_CUDA, reason="on a machine with a card the kernels run on it: tests/gpu")

SMALL: dict[str, Any] = {"H": 1, "D": 16, "V": 24, "qk_l2norm": True, "state": True}

SHAPES: dict[str, dict[str, Any]] = {
    "batch": {"B": 2, "T": 150},
    "decay_gate": {"T": 130, "H": 2, "Hkv": 1, "gate": True, "ridge": "token", "ridge_offset": 0.01},
    # In slabs of one chunk: 0, then 1 2 3 of one sequence, 4, an empty one at 5 with 5 6 of the next, and nothing.
    "packed": {"seq_lengths": (64, 150, 7, 0, 128, 0)},
}


def cut_small(monkeypatch: pytest.MonkeyPatch, chunks: int = 1) -> None:
    monkeypatch.setattr(slabs, "PROGRAMS", 1)
    monkeypatch.setattr(slabs, "LEAST_CHUNKS", chunks)


def gradients(problem: Problem, num_iter: int = 3, run: Callable[..., Outputs] = run_gka) -> Evaluation:
    with torch.no_grad():
        upstream = cotangents(run(problem, num_iter=num_iter, impl="reference"))
    return evaluate(lambda p: run(p, num_iter=num_iter, impl="triton"), problem, upstream)


def assert_close(several: Evaluation, one: Evaluation, dtype: torch.dtype) -> None:
    """The forward is the same. In the backward the first state of a slab takes its unit from its largest entry, not
    from a bound that was carried along: fp16 may round it otherwise."""
    for name, value in one.outputs.items():
        assert torch.equal(several.outputs[name], value), name
    bar = 150 * torch.finfo(torch.float32).eps if dtype == torch.float32 else 2 * torch.finfo(torch.float16).eps
    for name, gradient in one.gradients.items():
        assert norm_error(several.gradients[name], gradient) <= bar, name


@interpreted
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("batch", torch.float16), ("packed", torch.float16), ("packed", torch.float32)],
    ids=str,
)
def test_accuracy(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch)
    problem = make_problem(**{**SMALL, **SHAPES[name]}, dtype=dtype)
    contract.check(contract.measure(run_gka, problem, 30, "triton"), contract.bars_for(dtype), dtype)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("name", SHAPES)
def test_several_slabs_equal_one(name: str, chunks: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(**{**SMALL, **SHAPES[name]}, dtype=dtype)
    one = gradients(problem)
    cut_small(monkeypatch, chunks)
    assert_close(gradients(problem), one, dtype)


@interpreted
@pytest.mark.parametrize("run", [run_gka, run_solve], ids=["gated linear attention", "solve alone"])
def test_without_values_or_solve(run: Callable[..., Outputs], monkeypatch: pytest.MonkeyPatch) -> None:
    """A solve alone saves no states, so that its backward forms those between slabs itself."""
    problem = make_problem(**{**SMALL, "seq_lengths": (70, 0, 130)}, dtype=torch.float32)
    num_iter = 0 if run is run_gka else 3
    one = gradients(problem, num_iter, run)
    cut_small(monkeypatch)
    assert_close(gradients(problem, num_iter, run), one, torch.float32)


@interpreted
@pytest.mark.parametrize("chunk", [16, 32])
def test_chunks_of_other_sizes(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of slabs is known without the size of a chunk; so is, at most, that of a packed batch."""
    from gka_ops.triton import launch

    chosen = launch.chunk_config
    monkeypatch.setattr(launch, "chunk_config", lambda *key: dataclasses.replace(chosen(*key), chunk=chunk))
    problem = make_problem(**{**SMALL, "seq_lengths": (1, 70, 0, 40)}, dtype=torch.float32)
    one = gradients(problem)
    cut_small(monkeypatch)
    assert_close(gradients(problem), one, torch.float32)


@interpreted
def test_states_between_slabs_are_formed_anew_where_none_were_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch)
    p = make_problem(**{**SMALL, "T": 200}, dtype=torch.float16)
    tensors = (p.q, p.k, p.v, p.log_decay, p.alpha, p.beta, *[None] * 4, p.initial_kk, p.initial_kv, None)
    scalars = (0.02, 0.0, 3, 0.5, True)
    output, _, _, *saved = torch.ops.gka.chunk_gka(*tensors, *scalars, False, True, "", "triton")
    assert [tuple(boundary.shape) for boundary in saved[-2:]] == [(4 * 16, 16), (4 * 16, 24)]
    upstream = (cotangents({"output": output})["output"], None, None)
    none = torch.empty(0)

    scalars = (0.02, 0.0, backward_iterations(3), 0.5, True)

    def backward(*residuals: Tensor) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = torch.ops.gka.chunk_gka_backward(
            *upstream, *tensors, *residuals, *scalars, "", "triton"
        )
        return result

    expected = backward(*saved)
    for residuals in ((*saved[:-2], none, none), (none,) * 6):
        assert all(map(torch.equal, backward(*residuals), expected))


@interpreted
@pytest.mark.parametrize(
    ("num_iter", "sizes"),
    [(2, ({"B": 2, "T": 60}, {"B": 3, "T": 70})), (0, ({"B": 3, "T": 70}, {"B": 2, "T": 60})),
     (1, ({"seq_lengths": (20, 30, 9)}, {"seq_lengths": (64, 70, 0, 20)}))],
    ids=["one slab first", "two slabs first", "packed"],
)  # fmt: skip
def test_one_graph_for_one_slab_and_for_several(
    num_iter: int, sizes: tuple[dict[str, Any], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_small(monkeypatch, 4 if "seq_lengths" in sizes[0] else 1)
    torch._dynamo.reset()
    compiled = torch.compile(run_gka, backend="aot_eager", fullgraph=True, dynamic=True)
    for i, size in enumerate(sizes):
        problem = make_problem(**{**SMALL, "state": False, **size}, dtype=torch.float32)
        expected = gradients(problem, num_iter)
        upstream = cotangents(expected.outputs)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            actual = evaluate(partial(compiled, num_iter=num_iter, impl="triton"), problem, upstream)
        assert all(torch.equal(actual.outputs[name], output) for name, output in expected.outputs.items())
        assert all(torch.equal(actual.gradients[name], d) for name, d in expected.gradients.items())


@interpreted
def test_nothing_is_left_unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer starts as NaN; none may reach a gradient."""
    from gka_ops.triton import launch

    empty_like = torch.empty_like
    cut_small(monkeypatch)
    monkeypatch.setattr(
        launch._Problem, "new", lambda self, *shape, dtype=torch.float32: torch.full(shape, float("nan"), dtype=dtype)
    )
    monkeypatch.setattr(launch.torch, "empty_like", lambda t, **kwargs: empty_like(t, **kwargs).fill_(float("nan")))
    problem = make_problem(**{**SMALL, **SHAPES["packed"], "gate": True}, dtype=torch.float32)
    for name, gradient in gradients(problem).gradients.items():
        assert gradient.isfinite().all(), name


@interpreted
@pytest.mark.parametrize("num_iter", [0, 3])
def test_buffers_in_one_place_do_not_meet(num_iter: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers of their own, which start as NaN, give the same gradients."""
    from gka_ops.triton import launch

    def apart(self: launch._Problem, *wanted: tuple[tuple[int, ...], torch.dtype] | None) -> list[torch.Tensor | None]:
        return [None if buffer is None else torch.full(buffer[0], float("nan"), dtype=buffer[1]) for buffer in wanted]

    cut_small(monkeypatch)
    problem = make_problem(**{**SMALL, **SHAPES["packed"], "gate": True}, dtype=torch.float32)
    expected = gradients(problem, num_iter).gradients
    monkeypatch.setattr(launch._Problem, "in_one_place", apart)
    for name, gradient in gradients(problem, num_iter).gradients.items():
        assert torch.equal(gradient, expected[name]), name


def test_the_number_of_slabs() -> None:
    assert slabs.slab_count(2, 8192, 32) == 2
    assert slabs.slab_count(2, 8192, 32, solve=False) == 1
    assert slabs.slab_count(1, 131072, 32) == 16
    assert slabs.slab_count(2, 4096, 32) == 1
    assert slabs.slab_count(256, 2048, 32) == 2  # slabs are never shorter than LEAST_CHUNKS
    assert slabs.slab_count(0, 8, 2) == slabs.slab_count(1, 0, 2, 3) == 1
    assert slabs.slab_count(1, 16384, 32, sequences=16) == 2  # the chunks of a packed batch are counted upwards
    assert slabs.slab_count(1, 16384, 32, sequences=17) == 3


@pytest.mark.parametrize(("chunk", "T", "N"), list(itertools.product((16, 32), (1, 63, 1000, 9000), (1, 2, 40))))
def test_smaller_chunks_make_no_more_slabs(chunk: int, T: int, N: int) -> None:
    count = slabs.slab_count(1, T, 512, N)
    in_slab = slabs.LEAST_CHUNKS * slabs.TOKENS // chunk
    assert -(-(T // chunk + N) // in_slab) <= count
