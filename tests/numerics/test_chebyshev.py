"""The chunked forward and the Chebyshev solver against the specification, in fp64 (docs/math.md §2–3)."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gka_ops
from gka_ops.numerics import FRO_MIN, backward_iterations
from gka_ops.reference import chebyshev
from tests.helpers.problems import (
    KEY_SETS,
    MEAN_DECAYS,
    Outputs,
    Problem,
    exact_gka,
    exact_solve,
    guaranteed_factor,
    make_keys,
    make_problem,
    max_error,
    reference_inputs,
    token_errors,
)

CONVERGED = 150
"""At ρ ≥ 0.02 the guaranteed factor of 150 applications is 1e-18: only rounding is left."""

ROUNDING = 1e-11
"""fp64 rounding (1e-16) times the condition (1+ρ)/ρ = 51 of the solves, times the few hundred operations of a sum."""


def chunked_gka(
    problem: Problem, num_iter: int = CONVERGED, chunk_size: int = 16, form: chebyshev.Form = "increment"
) -> Outputs:
    result = chebyshev.forward(
        reference_inputs(problem), num_iter, problem.q.shape[-1] ** -0.5, chunk_size=chunk_size, form=form
    )
    return result._asdict()


# ------------------------------------------------------------------------------------------------------- whole forward
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 2),
    Hkv=st.integers(1, 2),
    group=st.integers(1, 3),
    T=st.integers(0, 40),
    D=st.integers(1, 9),
    V=st.integers(1, 9),
    chunk_size=st.sampled_from([4, 8, 16, 64]),
    keys=st.sampled_from(KEY_SETS),
    mean_decay=st.sampled_from([*MEAN_DECAYS, 60.0]),
    alpha=st.booleans(),
    beta=st.booleans(),
    min_beta=st.sampled_from([None, 1e-3]),
    ridge=st.sampled_from(["constant", "head", "token"]),
    ridge_offset=st.sampled_from([0.0, 0.3]),
    gate=st.booleans(),
    dt_bias=st.booleans(),
    state=st.booleans(),
    qk_l2norm=st.booleans(),
    cuts=st.none() | st.lists(st.integers(0, 20), min_size=1, max_size=4),
    form=st.sampled_from(["increment", "three_term"]),
    seed=st.integers(0, 10**6),
)
def test_forward_is_the_specification(
    B: int, Hkv: int, group: int, chunk_size: int, cuts: list[int] | None, form: chebyshev.Form, **options: object
) -> None:
    options |= {"B": B, "Hkv": Hkv, "H": Hkv * group, "seq_lengths": cuts}
    problem = make_problem(**options)  # type: ignore[arg-type]
    actual, expected = chunked_gka(problem, chunk_size=chunk_size, form=form), exact_gka(problem)
    expected |= {"x": exact_solve(problem)["x"]}
    for name, value in expected.items():
        assert actual[name].shape == value.shape
        assert max_error(actual[name], value) < ROUNDING, name


@pytest.mark.parametrize("keys", KEY_SETS)
@pytest.mark.parametrize("mean_decay", [None, 1.0, 0.01])
def test_chunk_size_does_not_matter(keys: str, mean_decay: float | None) -> None:
    problem = make_problem(B=2, T=70, H=2, D=8, V=5, keys=keys, mean_decay=mean_decay, state=True)
    reference = chunked_gka(problem, 20, chunk_size=64)
    for chunk_size in (1, 4, 16, 100):
        for name, value in chunked_gka(problem, 20, chunk_size=chunk_size).items():
            assert max_error(value, reference[name]) < ROUNDING, (name, chunk_size)


@pytest.mark.parametrize("chunk_size", [4, 16, 64])
@pytest.mark.parametrize("keys", KEY_SETS)
def test_frobenius_norms(keys: str, chunk_size: int) -> None:
    """F of the chunk formula against the norm of each H_t, over magnitudes of 1e-12 to 1e16 (no square leaves fp64)."""
    problem = make_problem(T=50, H=2, D=6, keys=keys, mean_decay=0.2, min_beta=1e-6)
    for factor in (1.0, 1e8):
        p = dataclasses.replace(problem, k=factor * problem.k)
        assert p.log_decay is not None
        assert p.beta is not None
        h, norms = torch.zeros(1, 2, 6, 6, dtype=torch.float64), []
        for t in range(50):
            k = p.beta[:, t, :, None] * p.k[:, t]
            h = p.log_decay[:, t].exp()[..., None, None] * h + k[..., :, None] * k[..., None, :]
            norms.append(torch.linalg.matrix_norm(h))
        assert (chunked_gka(p, 1, chunk_size)["fro"] / torch.stack(norms, 1) - 1).abs().max() < 1e-13


def test_norms_do_not_overflow_in_fp32() -> None:
    """‖k‖² = 1e24: every square in F² would overflow fp32."""
    problem = make_problem(T=40, D=8, mean_decay=0.1)
    expected = chunked_gka(problem, 30)
    large = problem.map(lambda name, t: (1e12 * t if name == "k" else t).float())
    actual = chunked_gka(large, 30)
    assert max_error(actual["fro"].double() / 1e24, expected["fro"]) < 1e-5
    assert max_error(actual["x"].double() * 1e24, expected["x"]) < 1e-4
    assert chebyshev.frobenius_norm(torch.full((2, 2), 1e30)).item() == pytest.approx(2e30)


def test_num_iter_zero() -> None:
    problem = make_problem(B=2, T=37, H=4, Hkv=2, D=8, V=5, state=True, gate=True, qk_l2norm=True)
    actual, expected = chunked_gka(problem, 0), exact_gka(problem, num_iter=0)
    for name, value in expected.items():
        assert max_error(actual[name], value) < ROUNDING, name
    assert max_error(actual["x"], exact_solve(problem, num_iter=0)["x"]) < ROUNDING


# -------------------------------------------------------------------------------------------------------------- solver
def spectrum_problem(eigenvalues: Tensor, rho: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, q, z): B = Q diag((eigenvalues + ρ)/(1+ρ)) Qᵀ, 64 random right-hand sides, and exact solutions."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(*[eigenvalues.numel()] * 2, dtype=torch.float64, generator=generator))
    values = (eigenvalues + rho) / (1 + rho)
    q = torch.randn(64, eigenvalues.numel(), dtype=torch.float64, generator=generator)
    return basis * values @ basis.mT, q, q @ (basis / values) @ basis.mT


SPECTRA = {
    "flat": torch.full((12,), 12**-0.5, dtype=torch.float64),
    "rank_one": torch.eye(12, dtype=torch.float64)[0],
    "decaying": 0.5 ** torch.arange(12, dtype=torch.float64),
    "half_null": torch.cat([torch.zeros(6), torch.full((6,), 6**-0.5)]).double(),
    "filled": torch.linspace(0, 1, 12, dtype=torch.float64),
}


@pytest.mark.parametrize("rho", [0.01, 0.02, 0.1, 1.0])
@pytest.mark.parametrize("name", SPECTRA)
def test_solution_and_residual_obey_the_guarantee(name: str, rho: float) -> None:
    matrix, q, z = spectrum_problem(SPECTRA[name], rho, seed=3)
    delta = torch.full((64, 1), rho / (1 + rho), dtype=torch.float64)
    for n in (1, 2, 5, 10, 20, 30, 60):
        bound = guaranteed_factor(rho, n) + 1e-13
        iterate = chebyshev.chebyshev(lambda rows: rows @ matrix, q, delta, n)
        assert token_errors(iterate, z).max() <= bound
        assert ((q - iterate @ matrix).norm(dim=-1) / q.norm(dim=-1)).max() <= bound
        other = chebyshev.chebyshev(lambda rows: rows @ matrix, q, delta, n, form="three_term")
        assert max_error(other, iterate) < ROUNDING


def test_the_guarantee_is_attained() -> None:
    """A query along the only key sits at the end of the spectrum, where the polynomial takes its largest value."""
    matrix, _, _ = spectrum_problem(SPECTRA["rank_one"], 0.02, seed=4)
    values, basis = torch.linalg.eigh(matrix)
    q = basis[:, -1:].mT
    for n in (5, 10, 20, 30):
        iterate = chebyshev.chebyshev(lambda rows: rows @ matrix, q, torch.full((1, 1), 0.02 / 1.02).double(), n)
        error = token_errors(iterate, q / values[-1]).item()
        assert error == pytest.approx(guaranteed_factor(0.02, n), rel=1e-6)


def test_delta_one_is_the_identity() -> None:
    """F = 0 needs no branch: δ = 1 gives h = 0, ν = 1 and z = q exactly (docs/math.md §3.1)."""
    q = torch.randn(5, 3, dtype=torch.float64)
    for form in ("increment", "three_term"):
        for n in (1, 7):
            z = chebyshev.chebyshev(lambda rows: rows, q, torch.ones(5, 1, dtype=torch.float64), n, form)
            assert torch.equal(z, q)


@pytest.mark.parametrize("n", [5, 10, 20, 30])
@pytest.mark.parametrize("keys", KEY_SETS)
def test_truncation_error_is_below_the_guarantee(keys: str, n: int) -> None:
    """Every token of every problem, each against the bound of its own ρ_t = r_t + b_t/F_t."""
    for mean_decay in MEAN_DECAYS:
        for ridge in ("constant", "token"):
            problem = make_problem(
                T=65, H=2, D=12, keys=keys, mean_decay=mean_decay, min_beta=1e-3, ridge=ridge, state=ridge == "token"
            )
            actual = chunked_gka(problem, n)
            rho = problem.ridge_scale + problem.ridge_offset / actual["fro"]
            bound = 1 / torch.cosh((n + 1) * torch.acosh(1 + 2 * rho))
            assert (token_errors(actual["x"], exact_solve(problem)["x"]) <= bound + 1e-12).all(), (mean_decay, ridge)


# docs/math.md §3.1: n for tol = 1e-2, 3e-3, 1e-3, 1e-4, 1e-6, and the guaranteed factor at n = 10, 15, 20, 26, 30.
TABLE = {
    0.01: ((26, 32, 38, 49, 72), (2.2e-1, 8.2e-2, 3.0e-2, 9.1e-3, 4.1e-3)),
    0.02: ((18, 23, 26, 35, 51), (9.0e-2, 2.2e-2, 5.4e-3, 9.9e-4, 3.2e-4)),
    0.05: ((11, 14, 17, 22, 32), (1.5e-2, 1.7e-3, 1.8e-4, 1.3e-5, 2.1e-6)),
    0.10: ((8, 10, 12, 15, 23), (2.1e-3, 9.5e-5, 4.2e-6, 1.0e-7, 8.4e-9)),
}


@pytest.mark.parametrize("rho", TABLE)
def test_iterations_for(rho: float) -> None:
    counts, factors = TABLE[rho]
    for tol, n in zip((1e-2, 3e-3, 1e-3, 1e-4, 1e-6), counts, strict=True):
        assert gka_ops.iterations_for(rho, tol) == n
        assert guaranteed_factor(rho, n) <= tol < guaranteed_factor(rho, n - 1)
    for n, factor in zip((10, 15, 20, 26, 30), factors, strict=True):
        assert f"{guaranteed_factor(rho, n):.1e}" == f"{factor:.1e}"


@given(rho=st.floats(1e-4, 10.0), tol=st.floats(1e-8, 0.5))
@settings(deadline=None, derandomize=True)
def test_iterations_for_is_the_smallest_count(rho: float, tol: float) -> None:
    try:
        n = gka_ops.iterations_for(rho, tol)
    except ValueError:
        assert guaranteed_factor(rho, 1000) > tol
        return
    assert guaranteed_factor(rho, n) <= tol * (1 + 1e-9)
    assert n == 1 or guaranteed_factor(rho, n - 1) > tol * (1 - 1e-9)


@pytest.mark.parametrize(
    ("ridge", "tol"), [(0.0, 1e-3), (-1.0, 1e-3), (math.inf, 1e-3), (0.02, 0.0), (0.02, 1.0), (1e-9, 1e-6)]
)
def test_iterations_for_refuses(ridge: float, tol: float) -> None:
    with pytest.raises(ValueError, match="iterations_for"):
        gka_ops.iterations_for(ridge, tol)


def test_backward_iterations() -> None:
    assert backward_iterations(0) == 0
    assert backward_iterations(22) == 26


# ---------------------------------------------------------------------------------------------------------- edge cases
@pytest.mark.parametrize("ridge_offset", [0.0, 0.5])
def test_leading_zero_keys(ridge_offset: float) -> None:
    """Dead rows (b = 0) and flat rows (b > 0), within a chunk and over whole chunks, then ordinary rows."""
    problem = make_problem(B=2, T=40, D=6, mean_decay=0.1, ridge_offset=ridge_offset)
    k = problem.k.clone()
    k[:, :21] = 0
    problem = dataclasses.replace(problem, k=k)
    actual, expected = chunked_gka(problem, chunk_size=8), exact_gka(problem)
    assert max_error(actual["x"], exact_solve(problem)["x"]) < ROUNDING
    assert max_error(actual["output"], expected["output"]) < ROUNDING
    if ridge_offset:
        assert torch.equal(actual["x"][:, :21], problem.q[:, :21] / ridge_offset)
    else:
        assert not actual["x"][:, :21].any()


def test_a_row_is_dead_or_flat_at_the_threshold() -> None:
    q = torch.ones(1, 1, 1, 2, dtype=torch.float64)
    k = torch.tensor([math.sqrt(FRO_MIN) / 2, 0.0], dtype=torch.float64).reshape(1, 1, 1, 2)  # F = F_min / 4
    for offset, expected in ((0.5 * FRO_MIN, 0.0), (FRO_MIN, 1 / FRO_MIN)):
        x = chunked_gka(Problem(q, k, k, ridge_offset=offset), 5)["x"]
        assert torch.equal(x, torch.full_like(q, expected))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_resets_at_the_clamp(dtype: torch.dtype) -> None:
    """Many tokens at or far below the clamp: each starts anew, and what follows does not lose digits to c = −4000."""
    problem = make_problem(T=64, D=6, mean_decay=0.1)
    assert problem.log_decay is not None
    g = problem.log_decay.clone()
    g[:, 1:64:2] = torch.tensor([-1e4, -math.inf, -120.0, -500.0], dtype=torch.float64).repeat(8)[:, None]
    problem = dataclasses.replace(problem, log_decay=g).map(lambda _, t: t.to(dtype))
    actual, expected = chunked_gka(problem, chunk_size=64), exact_gka(problem.double())
    tolerance = ROUNDING * (1 if dtype == torch.float64 else 2**29)  # the ratio of the unit roundoffs
    assert max_error(actual["output"], expected["output"]) < tolerance


def test_decays_keep_their_digits_after_resets() -> None:
    """e^x of an x rounded to fp32 is right to (|x| + 2) u, also where the sums that x is a difference of are −4000."""
    g = -torch.rand(1, 1, 1, 64)
    g[..., ::2] = -120.0
    single, double = chebyshev.chunk_decays(g), chebyshev.chunk_decays(g.double())
    for name, exact in double._asdict().items():
        error = (getattr(single, name).double() - exact).abs()
        assert (error <= (exact.clamp(min=1e-30).log().abs() + 2) * 2.0**-24 * exact + 1e-38).all(), name


def test_keys_with_extreme_weights() -> None:
    problem = make_problem(T=60, D=8, min_beta=1e-6, mean_decay=0.05)
    assert max_error(chunked_gka(problem)["output"], exact_gka(problem)["output"]) < ROUNDING


def test_zero_query() -> None:
    problem = make_problem(T=20, D=6)
    assert not chunked_gka(dataclasses.replace(problem, q=torch.zeros_like(problem.q)))["output"].any()


# ---------------------------------------------------------------------------------------------------- decode and layout
def test_dense_solve_is_the_chunked_solve() -> None:
    generator = torch.Generator().manual_seed(0)
    k = make_keys("silu", 3, 20, 2, 6, generator)
    h = torch.einsum("bthd,bthe->bhde", k, k)
    q = torch.randn(3, 2, 6, dtype=torch.float64, generator=generator)
    r, b = torch.full((3, 2), 0.02, dtype=torch.float64), torch.full((3, 2), 0.1, dtype=torch.float64)
    problem = Problem(q[:, None], torch.zeros(3, 1, 2, 6).double(), q[:, None], ridge_offset=0.1, initial_kk=h)
    for n in (1, 7, 30):
        assert max_error(chebyshev.dense_solve(h, q, r, b, n), chunked_gka(problem, n)["x"][:, 0]) < ROUNDING


def test_chunk_table() -> None:
    table = chebyshev.chunk_table(7, torch.tensor([0, 3, 3, 7]), 2, torch.device("cpu"))
    assert table.slots.tolist() == [0, 1, 2, 7, 3, 4, 5, 6]
    assert table.positions.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert table.spans == [(0, 2), (2, 2), (2, 4)]
    x = torch.arange(1.0, 15.0).reshape(1, 7, 2)
    chunks = table.to_chunks(x)
    assert chunks.shape == (1, 2, 4, 2)
    assert chunks[0, 0].tolist() == [[1, 3], [5, 0], [7, 9], [11, 13]]
    assert torch.equal(table.to_tokens(chunks), x)
