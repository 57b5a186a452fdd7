"""Conjugate gradients (docs/math.md §3.1) converge, fast on usual spectra, and stop too early if a residual decides."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from gka_ops.numerics import iterations_for
from gka_ops.reference.conjugate_gradient import conjugate_gradient, solve

RIDGE = 0.02
KEY_SETS = ("random", "clustered", "low_rank", "repeated", "silu")


class System(NamedTuple):
    """H_t [T, D, D] after every token, queries [T, D], and the exact x [T, D], all fp64."""

    kk: Tensor
    q: Tensor
    exact: Tensor


def exact_solution(kk: Tensor, q: Tensor, ridge: float = RIDGE) -> Tensor:
    shift = ridge * torch.linalg.matrix_norm(kk)[:, None, None] * torch.eye(kk.shape[-1], dtype=kk.dtype)
    return torch.linalg.solve(kk + shift, q)


def system(key_set: str, decay: float, T: int = 192, D: int = 64) -> System:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    k, q = normal(T, D), normal(T, D)
    if key_set == "clustered":
        k = normal(8, D)[torch.randint(8, (T,), generator=generator)] + 0.3 * k
    elif key_set == "low_rank":
        k = normal(T, 4) @ normal(4, D)
    elif key_set == "repeated":
        k = k[:1].expand(T, D)
    elif key_set == "silu":
        k, q = torch.nn.functional.silu(k), torch.nn.functional.silu(q)
    k, q = (torch.nn.functional.normalize(x, dim=-1) for x in (k, q))
    kk, states = torch.zeros(D, D, dtype=torch.float64), []
    for row in k:
        kk = math.exp(-decay) * kk + torch.outer(row, row)
        states.append(kk)
    return System(torch.stack(states), q, exact_solution(torch.stack(states), q))


def row_errors(x: Tensor, exact: Tensor) -> Tensor:
    return (x - exact).norm(dim=-1) / exact.norm(dim=-1)


def chebyshev(kk: Tensor, q: Tensor, n: int, ridge: float = RIDGE) -> Tensor:
    """n operator applications of the increment form of docs/math.md §3.1, written out once more, in fp64."""
    fro = torch.linalg.matrix_norm(kk)[:, None]
    theta, half, nu = ridge + 0.5, 0.5, 1 / (ridge + 0.5)
    increment, residual = nu * q, q
    z = increment
    for _ in range(n):
        residual = residual - ((kk @ increment.unsqueeze(-1)).squeeze(-1) / fro + ridge * increment)
        following = 1 / (2 * theta - half**2 * nu)
        increment = half**2 * nu * following * increment + 2 * following * residual
        nu = following
        z = z + increment
    return z / fro


@pytest.mark.parametrize("key_set", KEY_SETS)
def test_converges_to_the_exact_solve_in_fp64(key_set: str) -> None:
    kk, q, exact = system(key_set, decay=0.01)
    result = solve(kk, q, RIDGE, num_iter=60, dtype=torch.float64)
    assert row_errors(result.solution, exact).max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("decay", [0.0, 0.01, 0.5])
@pytest.mark.parametrize("key_set", KEY_SETS)
def test_fourteen_iterations_reach_3e_3(key_set: str, decay: float, dtype: torch.dtype) -> None:
    kk, q, exact = system(key_set, decay)
    result = solve(kk, q, RIDGE, num_iter=14, dtype=dtype)
    assert result.solution.dtype == dtype
    assert row_errors(result.solution.double(), exact).max() < 3e-3


def test_needs_fewer_iterations_than_chebyshev_on_a_usual_spectrum() -> None:
    kk, q, exact = system("random", decay=0.01)
    adaptive = row_errors(solve(kk, q, RIDGE, num_iter=14, dtype=torch.float64).solution, exact)
    a_priori = row_errors(chebyshev(kk, q, 14), exact)
    assert adaptive.quantile(0.99) < 0.2 * a_priori.quantile(0.99)


def query_near_the_only_key(off: float, D: int = 16) -> System:
    """The first token of a sequence: H = k kᵀ, and a query along k but for a component ``off`` orthogonal to it.

    One CG step removes the residual along k, at eigenvalue 1. What is left of the residual, about ``off``, is small,
    but it belongs to eigenvalue 0 of H, where (H + λI)^{-1} amplifies it 1/ρ times.
    """
    kk = torch.zeros(1, D, D, dtype=torch.float64)
    kk[0, 0, 0] = 1
    q = torch.zeros(1, D, dtype=torch.float64)
    q[0, 0], q[0, 1] = 1, off
    return System(kk, q, exact_solution(kk, q))


def test_early_exit_on_the_residual_leaves_a_large_error_where_chebyshev_keeps_its_bound() -> None:
    tol = 2e-3
    kk, q, exact = query_near_the_only_key(off=1.9e-3)
    early = solve(kk, q, RIDGE, num_iter=100, residual_tol=tol, dtype=torch.float64)
    true_residual = kk @ early.solution[0] + RIDGE * early.solution[0] - q
    assert true_residual.norm() / q.norm() <= tol  # it kept its promise ...
    assert early.iterations.tolist() == [1]
    assert row_errors(early.solution, exact).max() > 40 * tol  # ... which was about something else
    assert row_errors(chebyshev(kk, q, iterations_for(RIDGE, tol)), exact).max() <= tol


def test_early_exit_error_is_bounded_by_the_condition_number() -> None:
    """The error is at most (1+ρ)/ρ times the residual: a test of it must be that much stricter to mean the same."""
    tol = 2e-3
    for kk, q, exact in (query_near_the_only_key(1.9e-3), system("random", 0.01), system("silu", 0.0)):
        result = solve(kk, q, RIDGE, num_iter=100, residual_tol=tol, dtype=torch.float64)
        assert result.residual.max() <= tol
        assert row_errors(result.solution, exact).max() <= tol * (1 + RIDGE) / RIDGE


@pytest.mark.parametrize("key_set", KEY_SETS)
@pytest.mark.parametrize("ridge", [0.01, 0.02, 0.1])
def test_a_priori_count_bounds_the_error_for_any_keys(key_set: str, ridge: float) -> None:
    kk, q, _ = system(key_set, decay=0.01)
    x = chebyshev(kk, q, iterations_for(ridge, 2e-3), ridge)
    assert row_errors(x, exact_solution(kk, q, ridge)).max() <= 2e-3


def test_rows_stop_on_their_own() -> None:
    """A row that is done keeps its solution while others go on, and uses no more iterations than alone."""
    kk, q, _ = system("random", decay=0.01)
    rows = slice(0, 100, 11)
    together = solve(kk[rows], q[rows], RIDGE, num_iter=50, residual_tol=1e-6, dtype=torch.float64)
    assert together.iterations.unique().numel() > 1
    for i, row in enumerate(range(0, 100, 11)):
        alone = solve(kk[row], q[row], RIDGE, num_iter=50, residual_tol=1e-6, dtype=torch.float64)
        assert alone.iterations == together.iterations[i]
        torch.testing.assert_close(alone.solution, together.solution[i], rtol=1e-10, atol=0)


def test_takes_a_function_or_matrices() -> None:
    kk, q, _ = system("random", decay=0.5, T=8, D=16)
    matrices = kk + torch.eye(16, dtype=torch.float64)
    explicit = conjugate_gradient(matrices, q, num_iter=30)
    applied = conjugate_gradient(lambda rows: torch.einsum("tij,tj->ti", matrices, rows), q, num_iter=30)
    torch.testing.assert_close(explicit.solution, torch.linalg.solve(matrices, q), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(explicit.solution, applied.solution, rtol=1e-12, atol=1e-14)


def test_ridge_parts_may_differ_by_row() -> None:
    kk, q, _ = system("random", decay=0.1, T=12, D=16)
    scale, offset = torch.linspace(0.02, 0.3, 12, dtype=torch.float64), torch.linspace(0, 2, 12, dtype=torch.float64)
    result = solve(kk, q, scale, offset, num_iter=60, dtype=torch.float64)
    ridge = scale * torch.linalg.matrix_norm(kk) + offset
    exact = torch.linalg.solve(kk + ridge[:, None, None] * torch.eye(16, dtype=torch.float64), q)
    assert row_errors(result.solution, exact).max() < 1e-12


def test_dead_rows_and_zero_right_hand_sides_give_zero() -> None:
    kk = torch.zeros(3, 4, 4)
    kk[1] = torch.eye(4)
    q = torch.ones(3, 4)
    q[1] = 0
    result = solve(kk, q, RIDGE, torch.tensor([0.0, 0.0, 0.5]), num_iter=5, dtype=torch.float32)
    torch.testing.assert_close(result.solution, torch.stack([torch.zeros(4), torch.zeros(4), torch.full((4,), 2.0)]))
    assert result.iterations.tolist() == [0, 0, 1]
    assert result.residual.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_iter": -1}, "num_iter >= 0, got -1"),
        ({"num_iter": 1, "residual_tol": -1.0}, "residual_tol >= 0 or None, got -1"),
    ],
)
def test_refuses_senseless_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conjugate_gradient(torch.eye(2), torch.ones(2), **options)  # type: ignore[arg-type]
