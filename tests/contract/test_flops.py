"""``torch.utils.flop_counter`` counts what docs/math.md §6 says, with the iterations that a call makes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.fx import GraphModule
from torch.utils.flop_counter import FlopCounterMode

import gka_ops
from gka_ops import GKAState
from gka_ops.flops import CHUNK, backward_flops, forward_flops
from gka_ops.numerics import backward_iterations, iterations_for
from tests.helpers.problems import Problem, make_problem

pytestmark = pytest.mark.supports("FLOP counter")

B, T, H, D, V = 2, 70, 4, 16, 48
ROWS = B * T * H
C = CHUNK


def problem(**options: Any) -> Problem:
    return make_problem(B=B, T=T, H=H, Hkv=2, D=D, V=V, dtype=torch.float32, **options).requiring_grad()


def count(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def gka(p: Problem, num_iter: Any, **options: Any) -> Tensor:
    result = gka_ops.chunk_gka(p.q, p.k, p.v, p.log_decay, p.alpha, p.beta, num_iter=num_iter, **options)
    return result.output if result.final_state is None else result.output.sum() + result.final_state.kk.sum()


def solve(p: Problem, num_iter: Any, **options: Any) -> Tensor:
    result = gka_ops.chunk_solve(p.q, p.k, p.log_decay, p.beta, num_iter=num_iter, **options)
    return result.x if result.final_state is None else result.x.sum() + result.final_state.sum()


# ---------------------------------------------------------------------------------------------- the formulas themselves
def products(n: int, values: bool, backward: bool) -> None:
    """The products of one chunk, docs/math.md §2, §3.2 and §4.2, on tensors of their shapes."""
    rows = lambda columns: torch.empty(C, columns, device="meta")  # noqa: E731
    k, x, y, v, do = rows(D), rows(D), rows(D), rows(V), rows(V)
    h, u, pairs = torch.empty(D, D, device="meta"), torch.empty(D, V, device="meta"), rows(C)

    def step() -> None:
        x @ h, (x @ k.mT) @ k

    for _ in range(n):
        step()
    if not backward:
        if n:
            k.mT @ k, k @ h, k @ k.mT  # H at the end; ‖H_t‖_F
        if values:
            k.mT @ v, x @ u, (x @ k.mT) @ v  # U at the end; the read-out
        return
    if n:
        k.mT @ k, x.mT @ y  # ΔH
        k @ h, k @ h, (k @ x.mT) @ y, (k @ y.mT) @ x, (k @ k.mT) @ k  # dK through Ω⁺, the pairs, H_c and W
    if values:
        do @ u.mT, (do @ v.mT) @ k  # dXm
        x.mT @ do  # ΔU
        v @ u.mT, (v @ do.mT) @ x, k @ u, (k @ x.mT) @ do  # dK and dV through Ξ⁺ and the pairs
    assert pairs.shape == (C, C)


@pytest.mark.parametrize("values", [True, False], ids=["chunk_gka", "chunk_solve"])
@pytest.mark.parametrize("n", [0, 1, 7])
def test_formulas_count_the_products_of_a_chunk(n: int, values: bool) -> None:
    width = V if values else 0
    assert C * forward_flops(D, width, n) == count(lambda: products(n, values, backward=False))
    assert C * backward_flops(D, width, n) == count(lambda: products(n, values, backward=True))


# ------------------------------------------------------------------------------------------------------------ operators
STEP = 2 * D * D + 4 * C * D


def test_forward_and_backward() -> None:
    p, n = problem(), 5
    forward = n * STEP + 4 * D * D + 4 * D * V + 4 * C * D + 2 * C * V
    backward = backward_iterations(n) * STEP + 8 * D * D + 8 * D * V + 18 * C * D + 6 * C * V
    assert count(lambda: gka(p, n)) == ROWS * forward
    assert count(lambda: gka(p, n).sum().backward()) == ROWS * (forward + backward)


def test_the_solve_alone() -> None:
    p, n = problem(), 5
    forward = n * STEP + 4 * D * D + 2 * C * D
    backward = backward_iterations(n) * STEP + 8 * D * D + 12 * C * D
    assert count(lambda: solve(p, n)) == ROWS * forward
    assert count(lambda: solve(p, n).sum().backward()) == ROWS * (forward + backward)


def test_without_a_solve() -> None:
    p = problem()
    forward, backward = 4 * D * V + 2 * C * D + 2 * C * V, 8 * D * V + 6 * C * D + 6 * C * V
    assert count(lambda: gka(p, 0)) == ROWS * forward
    assert count(lambda: gka(p, 0).sum().backward()) == ROWS * (forward + backward)
    assert count(lambda: solve(p, 0).sum().backward()) == 0
    final = 2 * D * D
    assert count(lambda: gka(p, 0, output_final_state=True)) == ROWS * (forward + final)
    assert count(lambda: gka(p, 0, output_final_state=True).sum().backward()) == ROWS * (forward + backward + 2 * final)
    assert count(lambda: solve(p, 0, output_final_state=True).sum().backward()) == ROWS * 2 * final


def test_auto_counts_the_iterations_that_it_makes() -> None:
    p = problem()
    for tol in (1e-2, 1e-3):
        n = iterations_for(gka_ops.numerics.DEFAULT_RIDGE, tol)
        assert count(lambda tol=tol: gka(p, "auto", tol=tol)) == ROWS * forward_flops(D, V, n)


@pytest.mark.parametrize("n", [0, 5])
def test_decode(n: int) -> None:
    p = problem(state=True)
    assert p.initial_kk is not None and p.initial_kv is not None
    state = GKAState(p.initial_kk.detach().clone(), p.initial_kv.detach().clone())
    solving = 2 * n * D * D + 2 * D * D if n else 0

    @torch.no_grad()
    def run() -> None:
        gka_ops.recurrent_gka(p.q, p.k, p.v, p.log_decay, p.alpha, p.beta, state=state, num_iter=n)

    assert count(run) == ROWS * (solving + 3 * D * (D + V) + 2 * D * V)


def test_compiled() -> None:
    """The graphs of a compiled call contain as much; PyTorch runs compiled functions eagerly under a counter."""
    p, n = problem(), 5
    counted: list[int] = []

    def compiler(graph: GraphModule, _: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with FlopCounterMode(display=False) as counter:
                outputs = graph(*args)
            counted.append(counter.get_total_flops())
            return outputs

        return make_boxed_func(run)

    torch._dynamo.reset()
    compiled = torch.compile(lambda: gka(p, n), backend=aot_autograd(fw_compiler=compiler), fullgraph=True)
    compiled().sum().backward()
    forward, backward = forward_flops(D, V, n), backward_flops(D, V, backward_iterations(n))
    assert counted == [ROWS * forward, ROWS * backward]
    eager = torch.compile(lambda: gka(p, n), backend="aot_eager")
    assert count(lambda: eager().sum().backward()) == sum(counted)


def test_by_keyword_and_packed() -> None:
    p = make_problem(seq_lengths=[30, 0, 40], H=2, D=D, V=V, dtype=torch.float32)
    assert count(lambda: gka(p, 3, cu_seqlens=p.cu_seqlens)) == 70 * 2 * forward_flops(D, V, 3)
    schema = torch.ops.gka.chunk_solve.default._schema
    values = (p.q, p.k, None, None, None, None, None, None, None, None, 0.02, 0.0, 3, False, False, "", "reference")
    named = {argument.name: value for argument, value in zip(schema.arguments, values, strict=True)}
    assert count(lambda: torch.ops.gka.chunk_solve(**named)) == 70 * 2 * forward_flops(D, 0, 3)


@pytest.mark.parametrize("first", ["gka_ops", "torch.utils.flop_counter"])
def test_formulas_are_there_in_either_order_of_imports(first: str) -> None:
    """And importing the package alone does not import the counter, which imports Triton."""
    code = f"""
import sys, torch
before = set(sys.modules)
import {first}
print("torch.utils.flop_counter" in sys.modules)
import gka_ops
from torch.utils.flop_counter import flop_registry
print(sum(key in flop_registry for key in (torch.ops.gka.chunk_gka, torch.ops.gka.recurrent_gka)))
print(any(type(finder).__module__ == "gka_ops.flops" for finder in sys.meta_path))
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert printed == [str(first != "gka_ops"), "2", "False"]
