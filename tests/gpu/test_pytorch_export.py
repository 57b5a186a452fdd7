"""On a card: exported and packaged programs, and CUDA graphs of whole training steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import cudagraph_trees
from torch.utils import cpp_extension

import gka_ops
from tests.helpers import graphs, packaged
from tests.helpers.problems import Problem, make_problem, norm_error

pytestmark = pytest.mark.gpu

SIZES: dict[str, Any] = {
    "H": 4,
    "Hkv": 2,
    "D": 64,
    "V": 64,
    "qk_l2norm": True,
    "dtype": torch.bfloat16,
    "device": "cuda",
}
SHAPES: dict[str, dict[str, Any]] = {
    "dense": {"B": 2, "T": 200},
    "packed": {"seq_lengths": [130, 0, 70], "state": True},
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --------------------------------------------------------------------------------------------------- exported programs
@pytest.mark.supports("torch.export")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_export(dtype: torch.dtype) -> None:
    model = packaged.Model().to("cuda")
    B, T = torch.export.Dim("B", max=packaged.SLOTS - 1), torch.export.Dim("T")
    shapes: tuple[Any, ...] = (*[{0: B, 1: T}] * 4, None, None, {0: B})
    with torch.no_grad():
        first = packaged.inputs(*packaged.SIZES[0], "cuda", dtype)
        program = torch.export.export(model, first, dynamic_shapes=shapes).module()
        for size in packaged.SIZES:
            given, same = (packaged.inputs(*size, "cuda", dtype) for _ in range(2))
            actual, expected = (*program(*given), *given[4:6]), (*model(*same), *same[4:6])
            assert all(map(torch.equal, actual, expected)) and expected[-1].any()


@pytest.mark.supports("AOTInductor")
@pytest.mark.skipif(cpp_extension.CUDA_HOME is None, reason="AOTInductor needs the CUDA toolkit")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_package_runs_in_a_process_that_imports_the_operators(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = packaged.make(tmp_path, "cuda", dtype)
    printed = packaged.run(folder, "import gka_ops")
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout.split() == ["ran", str(len(packaged.SIZES)), "False"]
    without = packaged.run(folder, "")
    assert without.returncode != 0 and "gka::chunk_gka" in without.stderr.strip().splitlines()[-1]


# --------------------------------------------------------------------------------------------------------- CUDA graphs
def step_of(p: Problem) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """Outputs and gradients as a function of q, k and v, and these."""
    state = None if p.initial_kk is None or p.initial_kv is None else gka_ops.GKAState(p.initial_kk, p.initial_kv)

    def step(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        output = gka_ops.chunk_gka(
            q, k, v, p.log_decay, p.alpha, p.beta, qk_l2norm=True, initial_state=state, cu_seqlens=p.cu_seqlens
        ).output
        return output.detach(), *torch.autograd.grad(output.float().square().sum(), (q, k, v))

    return step, [t.clone().requires_grad_() for t in (p.q, p.k, p.v)]


@pytest.mark.supports("manual CUDA graph capture")
@pytest.mark.parametrize("shape", SHAPES)
def test_a_captured_training_step(shape: str) -> None:
    """One graph of forward and backward, with other numbers in its inputs."""
    step, leaves = step_of(make_problem(**SIZES, **SHAPES[shape]))
    graph, results = graphs.captured(lambda: step(*leaves))
    for seed in (1, 2):
        other = make_problem(**SIZES, **SHAPES[shape], seed=seed)
        with torch.no_grad():
            for leaf, value in zip(leaves, (other.q, other.k, other.v), strict=True):
                leaf.copy_(value)
        graph.replay()
        assert all(map(torch.equal, results, step(*leaves)))


@pytest.mark.supports("CUDA graphs of mode=reduce-overhead")
@pytest.mark.parametrize("shape", SHAPES)
def test_reduce_overhead(shape: str) -> None:
    p = make_problem(**SIZES, **SHAPES[shape])
    state = None if p.initial_kk is None or p.initial_kv is None else gka_ops.GKAState(p.initial_kk, p.initial_kv)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (
            2
            * gka_ops.chunk_gka(
                q, k, v, p.log_decay, p.alpha, p.beta, qk_l2norm=True, initial_state=state, cu_seqlens=p.cu_seqlens
            ).output
        )

    compiled = torch.compile(forward, mode="reduce-overhead", fullgraph=True)
    counters.clear()
    for seed in range(4):
        other = make_problem(**SIZES, **SHAPES[shape], seed=seed)
        results = []
        for function in (compiled, forward):
            torch.compiler.cudagraph_mark_step_begin()
            leaves = [t.clone().requires_grad_() for t in (other.q, other.k, other.v)]
            output = function(*leaves)
            gradients = torch.autograd.grad(output.float().square().sum(), leaves)
            results.append([t.detach().clone() for t in (output, *gradients)])
        assert torch.equal(results[0][0], results[1][0])
        # The same kernels run; only the pointwise work around them may round differently under Inductor.
        for actual, expected in zip(*results, strict=True):
            assert norm_error(actual, expected) <= 2 * torch.finfo(torch.bfloat16).eps
    assert counters["inductor"]["cudagraph_skips"] == 0
    manager = cudagraph_trees.get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    assert manager is not None and list(manager.get_roots())


@pytest.mark.supports("no allocation or synchronisation in a call")
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_waits_for_the_card_or_asks_it_for_memory(shape: str) -> None:
    step, leaves = step_of(make_problem(**SIZES, **SHAPES[shape]))
    for _ in range(3):
        step(*leaves)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["num_device_alloc"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            step(*leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["num_device_alloc"] == before
