"""The operators on the CPU, through the public functions: gradients, dtypes, layouts, states, decode, hard inputs."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import gka_ops
from gka_ops.numerics import DEFAULT_TOL, backward_iterations, iterations_for
from gka_ops.reference import adjoint, backend, chebyshev
from tests.helpers import contract
from tests.helpers.problems import (
    KEY_SETS,
    Evaluation,
    Outputs,
    Problem,
    cotangents,
    evaluate,
    exact_gka,
    exact_solve,
    gate_of,
    guaranteed_factor,
    make_problem,
    max_error,
    norm_error,
    reference_inputs,
    relative_error,
    ridge_of,
    run_gka,
    run_solve,
    token_errors,
    unit_roundoff,
)

CONVERGED = 150
"""At ρ ≥ 0.02 the guaranteed factor of 150 applications is 1e-18: only rounding is left."""

ROUNDING = 1e-10
"""fp64 rounding (1e-16) times the condition of two solves (51² at ρ = 0.02), times the hundreds of terms of a sum."""

FULL: dict[str, Any] = {
    "H": 4,
    "Hkv": 2,
    "D": 5,
    "V": 3,
    "qk_l2norm": True,
    "gate": True,
    "ridge": "token",
    "ridge_offset": 0.1,
    "state": True,
}
"""A problem with every optional input."""


# ----------------------------------------------------------------------------------------------------------- gradients
@pytest.mark.parametrize("solve_only", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"mean_decay": None, "alpha": False, "beta": False},
        {"mean_decay": 0.3, "H": 2, "Hkv": 1, "ridge": "head"},
        {"mean_decay": 0.3, "gate": True, "qk_l2norm": True, "ridge": "token", "ridge_offset": 0.1, "state": True},
    ],
    ids=["plain", "gates", "full"],
)
def test_gradcheck(options: dict[str, Any], solve_only: bool) -> None:
    """Finite differences of the operator itself, converged at r ≥ 0.5; H_0 moves along symmetric directions only."""
    problem = make_problem(T=4, **({"H": 1, "D": 3, "V": 2, "ridge_scale": 0.5} | options)).requiring_grad()
    leaves = problem.leaves()
    if solve_only:
        leaves = {name: leaf for name, leaf in leaves.items() if name not in ("v", "alpha", "initial_kv")}

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        moved = dict(zip(leaves, values, strict=True))
        if "initial_kk" in moved:
            moved["initial_kk"] = (moved["initial_kk"] + moved["initial_kk"].mT) / 2
        p = problem.replace(moved)
        return tuple((run_solve if solve_only else run_gka)(p, num_iter=30).values())

    assert torch.autograd.gradcheck(run, tuple(leaves.values()))


@pytest.mark.parametrize("magnitude", [2.0**-14, 2.0**14])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_magnitudes_of_inputs(dtype: torch.dtype, magnitude: float) -> None:
    problem = make_problem(T=70, H=2, Hkv=1, D=16, V=24, alpha=False, dtype=dtype)
    contract.check_scaling(problem, magnitude, "reference")


@pytest.mark.parametrize("names", [("output",), ("final_kk",), ("final_kv",), ("output", "final_kk", "final_kv")])
def test_gradients_of_some_outputs(names: tuple[str, ...]) -> None:
    problem = make_problem(B=2, T=70, mean_decay=0.05, **FULL)
    upstream = {name: value for name, value in cotangents(exact_gka(problem)).items() if name in names}
    actual = evaluate(lambda p: run_gka(p, num_iter=CONVERGED), problem, upstream)
    expected = evaluate(exact_gka, problem, upstream)
    for name, value in expected.gradients.items():
        assert max_error(actual.gradients[name], value) < ROUNDING, name


@pytest.mark.parametrize("names", [("x",), ("final_kk",), ("x", "final_kk")])
def test_gradients_of_some_solve_outputs(names: tuple[str, ...]) -> None:
    problem = make_problem(B=2, T=70, mean_decay=0.05, **FULL)
    upstream = {name: value for name, value in cotangents(exact_solve(problem)).items() if name in names}
    actual = evaluate(lambda p: run_solve(p, num_iter=CONVERGED), problem, upstream)
    expected = evaluate(exact_solve, problem, upstream)
    for name, value in expected.gradients.items():
        assert max_error(actual.gradients[name], value) < ROUNDING, name


def test_num_iter_zero() -> None:
    problem = make_problem(B=2, T=70, mean_decay=0.05, **FULL)
    upstream = cotangents(exact_gka(problem))
    actual = evaluate(lambda p: run_gka(p, num_iter=0), problem, upstream)
    expected = evaluate(lambda p: exact_gka(p, num_iter=0), problem, upstream)
    for name, value in expected.gradients.items():
        assert max_error(actual.gradients[name], value) < ROUNDING, name
    for name, value in expected.outputs.items():
        assert max_error(actual.outputs[name], value) < ROUNDING, name
    assert not actual.gradients["alpha"].any()


def test_initial_state_gradient_is_symmetric() -> None:
    problem = make_problem(T=70, D=4, V=3, state=True).requiring_grad()
    upstream = cotangents(exact_gka(problem))  # not symmetric in final_kk
    outputs = run_gka(problem)
    assert problem.initial_kk is not None
    (gradient,) = torch.autograd.grad(list(outputs.values()), problem.initial_kk, list(upstream.values()))
    assert max_error(gradient, gradient.mT) < ROUNDING


@pytest.mark.parametrize(("run", "name"), [(run_gka, "output"), (run_solve, "x")], ids=["gka", "solve"])
def test_functional_gradient(run: Callable[..., Outputs], name: str) -> None:
    problem = make_problem(T=20, D=4, V=3)
    upstream = cotangents({name: problem.v if name == "output" else problem.q})

    def loss(q: Tensor) -> Tensor:
        return (run(problem.replace({"q": q}), num_iter=20)[name] * upstream[name]).sum()

    expected = evaluate(lambda p: run(p, num_iter=20), problem, upstream).gradients["q"]
    assert max_error(torch.func.grad(loss)(problem.q), expected) < ROUNDING


@pytest.mark.parametrize(("run", "name"), [(run_gka, "output"), (run_solve, "x")], ids=["gka", "solve"])
def test_forward_mode_raises(run: Callable[..., Outputs], name: str) -> None:
    """An error, never a silent zero tangent."""
    problem = make_problem(T=20, D=4, V=3)

    def loss(q: Tensor) -> Tensor:
        return run(problem.replace({"q": q}), num_iter=20)[name].sum()

    for transform in (
        lambda: torch.func.jvp(loss, (problem.q,), (problem.q,)),
        lambda: torch.func.jacfwd(loss)(problem.q),
    ):
        with pytest.raises(NotImplementedError, match="forward mode"):
            transform()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode"):
        loss(forward_ad.make_dual(problem.q, problem.q))  # type: ignore[no-untyped-call]


def test_without_saved_x_the_backward_solves_again() -> None:
    p = make_problem(B=2, T=70, D=5, V=3).map(lambda _, t: t.float())
    tensors = (p.q, p.k, p.v, p.log_decay, p.alpha, p.beta, *[None] * 7)
    scalars = (0.02, 0.0, 60, 0.5, False)
    forward = torch.ops.gka.chunk_gka(*tensors, *scalars, False, True, "", "reference")
    inputs = (cotangents({"output": forward[0]})["output"], None, None, *tensors)
    empty = [torch.empty(0)] * 6
    scalars = (0.02, 0.0, backward_iterations(60), 0.5, False)
    first = torch.ops.gka.chunk_gka_backward(*inputs, *forward[3:], *scalars, "", "reference")
    again = torch.ops.gka.chunk_gka_backward(*inputs, *empty, *scalars, "", "reference")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


# ----------------------------------------------------------------------------------------------- shapes, dtypes, memory
def operator_calls(dtype: torch.dtype, num_iter: int, bare: bool) -> list[tuple[str, tuple[Any, ...]]]:
    """Arguments of one call of each operator, with every optional input or with none."""
    options: dict[str, Any] = {"H": 4, "Hkv": 2, "D": 5, "V": 3, "alpha": False, "beta": False, "mean_decay": None}
    p = make_problem(B=2, T=70, dtype=dtype, **(options if bare else FULL | {"mean_decay": 0.05}))
    ridge = (None, None) if bare else (p.ridge_scale, p.ridge_offset)
    gates, states = (*ridge, p.A_log, p.dt_bias), (p.initial_kk, p.initial_kv)
    scalars, save = (0.02, 0.1, num_iter), not bare
    solve = (p.q, p.k, p.log_decay, p.beta, *gates, p.initial_kk, None)
    gka = (p.q, p.k, p.v, p.log_decay, p.alpha, p.beta, *gates, *states, None)
    x, final_kk, fro = torch.ops.gka.chunk_solve(*solve, *scalars, False, True, "", "reference")
    output, *rest = torch.ops.gka.chunk_gka(*gka, *scalars, 0.5, False, True, save, "", "reference")
    final, residuals = rest[:2], rest[2:]
    finals: tuple[Tensor | None, ...] = (None, None) if bare else tuple(torch.randn_like(t) for t in final)
    pool = tuple(torch.zeros_like(t) for t in final)
    recurrent = (
        p.q,
        p.k,
        p.v,
        p.log_decay,
        p.alpha,
        p.beta,
        *gates,
        *pool,
        None,
        *scalars,
        0.5,
        False,
        "",
        "reference",
    )
    return [
        ("chunk_solve", (*solve, *scalars, False, not bare, "", "reference")),
        ("chunk_solve_backward", (x, None if bare else final_kk, *solve, x, fro, *scalars, False, "", "reference")),
        ("chunk_gka", (*gka, *scalars, 0.5, False, not bare, save, "", "reference")),
        ("chunk_gka_backward", (output, *finals, *gka, *residuals, *scalars, 0.5, False, "", "reference")),
        ("recurrent_gka", recurrent),
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_iter", [0, 3])
@pytest.mark.parametrize("bare", [False, True])
def test_outputs_are_those_of_the_fakes(dtype: torch.dtype, num_iter: int, bare: bool) -> None:
    """Shapes, dtypes and strides as declared; fresh memory that no input or other output shares."""
    for name, arguments in operator_calls(dtype, num_iter, bare):
        operator = getattr(torch.ops.gka, name)
        result = operator(*arguments)
        with FakeTensorMode() as mode:
            fake = operator(*[mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments])
        actual, expected = (r if isinstance(r, tuple | list) else (r,) for r in (result, fake))
        for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert (a.shape, a.dtype, a.stride()) == (e.shape, e.dtype, e.stride()), (name, index)
            assert a.is_contiguous(), (name, index)
        tensors = [t for t in (*arguments, *actual) if isinstance(t, Tensor) and t.numel()]
        fresh = {t.untyped_storage().data_ptr() for t in actual if t.numel()}
        others = {t.untyped_storage().data_ptr() for t in arguments if isinstance(t, Tensor) and t.numel()}
        assert not fresh & others, name
        assert len(fresh) == sum(t.numel() > 0 for t in actual), name
        assert all(bool(t.isfinite().all()) for t in tensors), name


@pytest.mark.parametrize("lengths", [None, [0, 0]])
def test_no_tokens(lengths: list[int] | None) -> None:
    """T = 0: states pass through as fresh tensors, and so do their gradients."""
    problem = make_problem(T=0, **FULL, seq_lengths=lengths)
    upstream = cotangents(exact_gka(problem))
    actual = evaluate(run_gka, problem, upstream)
    assert problem.initial_kk is not None
    assert problem.initial_kv is not None
    assert torch.equal(actual.outputs["final_kk"], problem.initial_kk)
    assert torch.equal(actual.outputs["final_kv"], problem.initial_kv)
    assert torch.equal(actual.gradients["initial_kv"], upstream["final_kv"])
    symmetric = (upstream["final_kk"] + upstream["final_kk"].mT) / 2
    assert torch.equal(actual.gradients["initial_kk"], symmetric)
    assert not actual.gradients["ridge_scale"].any()
    final = run_gka(problem)["final_kk"]
    assert final.untyped_storage().data_ptr() != problem.initial_kk.untyped_storage().data_ptr()


@pytest.mark.parametrize("operator", ["chunk_solve", "chunk_gka", "recurrent_gka"])
@pytest.mark.parametrize("bare", [False, True])
def test_opcheck(operator: str, bare: bool) -> None:
    """Schema, autograd registration, fakes, AOT dispatch with symbolic shapes; also for inputs that need gradients."""
    arguments = dict(operator_calls(torch.float32, 3, bare))[operator]
    for grad in (False, True) if operator != "recurrent_gka" else (False,):
        prepared = [
            a.detach().clone().requires_grad_(grad) if isinstance(a, Tensor) and a.is_floating_point() else a
            for a in arguments
        ]
        torch.library.opcheck(getattr(torch.ops.gka, operator).default, tuple(prepared))


def test_non_contiguous_inputs() -> None:
    problem = make_problem(B=2, T=20, **FULL)
    strided = problem.map(lambda _, t: torch.stack([t, t + 1], dim=-1)[..., 0])
    assert not strided.q.is_contiguous()
    upstream = cotangents(exact_gka(problem))
    actual, expected = evaluate(run_gka, strided, upstream), evaluate(run_gka, problem, upstream)
    for name, value in (expected.outputs | expected.gradients).items():
        assert torch.equal((actual.outputs | actual.gradients)[name], value), name


def test_saved_rows() -> None:
    """x = x_query q + x_scale x̂, with ‖x̂‖ in [1, 2) and an fp16 rounding error of the part of x that is not along q."""
    generator = torch.Generator().manual_seed(0)
    size = torch.tensor([1e-30, 1e-8, 1.0, 3e4, 1e20, 0.0], dtype=torch.float64)[:, None, None]
    q, across = torch.randn(2, 1, 6, 1, 40, dtype=torch.float64, generator=generator)
    across = across - (across * q).sum(-1, keepdim=True) / q.square().sum(-1, keepdim=True) * q
    x = size * (across + 1e3 * q)
    rows, scale, along = backend.pack_rows(x, q)
    assert rows.dtype == torch.float16
    assert (torch.frexp(scale).mantissa == 0.5).all()
    norms = rows[:, :5].float().norm(dim=-1)
    assert ((norms > 1 - 1e-3) & (norms < 2 + 1e-3)).all()
    assert max_error(along, 1e3 * size[None, ..., 0]) < ROUNDING
    error = (backend.unpack_rows(rows, scale, along, q) - x).norm(dim=-1)
    assert (error <= unit_roundoff(torch.float16) * (size * across).norm(dim=-1) + ROUNDING * x.norm(dim=-1)).all()
    empty = torch.empty(0)
    assert torch.equal(backend.unpack_rows(x, empty, empty, q), x)
    nothing = torch.zeros_like(q)
    packed = backend.pack_rows(x, nothing)
    assert not packed[2].any()
    assert (token_errors(backend.unpack_rows(*packed, nothing), x) <= unit_roundoff(torch.float16)).all()


# ------------------------------------------------------------------------------------------------------ rounding errors
# NOTE [Error model of the CPU operators]
# The operators compute in fp32 (u = 2^-24) whatever the input dtype, on inputs that are already rounded. Their distance
# from the exact solve of these inputs is bounded, by the triangle inequality, by the sum of
#   1. what the same algorithm does in exact arithmetic: truncation after n (backward n + 4) applications, and x saved
#      in fp16 rows for 16-bit inputs. Measured by running that algorithm in fp64 (`algorithm`), itself checked against
#      the specification elsewhere; never taken from the operator under test.
#   2. fp32 rounding: what relative errors ε = λ √m u of every intermediate (operands, decays, states, norms, operator,
#      x, and the results of stages A, B and C) do to the result, measured as the largest change over three fp64 runs
#      with such noise. ε is the probabilistic bound on m accumulated roundings, exceeded with probability
#      2 exp(−λ²/2) (Higham and Mary, 2019); m adds up the lengths of the sums behind a result (C, D, T/C chunks,
#      n applications), and λ = 4.
#   3. rounding the result to its dtype: its unit roundoff.
LAMBDA = 4.0


def noisy(value: Any, noise: float, generator: torch.Generator) -> Any:
    """Every floating-point tensor in a nested tuple times 1 + noise · (N(0, 1) + N(0, 1)).

    One normal variable is drawn for each element, the other for the whole tensor: where the ridge is constant, the
    solver's coefficients are the same numbers in all rows, and so are their rounding errors.
    """
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value
        own, common = (torch.randn(shape, dtype=value.dtype, generator=generator) for shape in (value.shape, ()))
        return value * (1 + noise * (own + common))
    if isinstance(value, chebyshev.ChunkTable) or not isinstance(value, tuple):
        return value
    return type(value)(*(noisy(part, noise, generator) for part in value))


def algorithm(
    problem: Problem, upstream: Outputs, n: int, packed: bool, noise: float = 0.0, seed: int = 0
) -> dict[str, Tensor]:
    """The CPU algorithm in fp64, x saved as the operator saves it, with noise on every intermediate if asked for.

    Returns:
        Outputs and gradients, by the names of :func:`results_of`.
    """
    generator = torch.Generator().manual_seed(seed)

    def spoil(value: Any) -> Any:
        return noisy(value, noise, generator) if noise else value

    scale = problem.q.shape[-1] ** -0.5
    inputs = reference_inputs(problem)
    chunks = spoil(chebyshev.chunked(inputs))
    table, operands = chunks.table, chunks.operands
    fro = spoil(chebyshev.frobenius_norms(operands.k, chunks.kk.starts, chunks.decays))
    operator = spoil(chebyshev.chunk_operator(operands, chunks.decays, chunks.kk.starts, fro))
    x = spoil(operator.solve(operands.q, n))
    m = chebyshev.mix(operands.q, x, operands.alpha)
    output = table.to_tokens(chebyshev.read_out(m, operands, chunks.decays, chunks.kv.starts, scale))
    outputs = {"output": output, "final_kk": chunks.kk.final, "final_kv": chunks.kv.final}

    saved = x
    if packed:
        saved = backend.unpack_rows(*backend.pack_rows(x, operands.q), operands.q)
    do = table.to_chunks(upstream["output"].double())
    a = spoil(adjoint.stage_a(chunks, saved, fro, do, None, backward_iterations(n), scale))
    final = upstream["final_kk"].double(), upstream["final_kv"].double()
    b = spoil(adjoint.stage_b(chunks, saved, do, a, *final, scale))
    c = spoil(adjoint.stage_c(chunks, saved, do, a, b, scale))
    gradients = adjoint.stage_d(inputs, table, a, b, c)
    return outputs | {field: value for field, value in gradients._asdict().items() if value is not None}


def results_of(evaluation: Evaluation) -> dict[str, Tensor]:
    """Outputs by their names, gradients by those of ``adjoint.Gradients``."""
    short = ("q", "k", "v")
    named = {f"d{name}" if name in short else f"d_{name}": value for name, value in evaluation.gradients.items()}
    return evaluation.outputs | named


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("keys", "mean_decay"), [*itertools.product(KEY_SETS, [0.01]), ("random", 0.5), ("silu", None)]
)
def test_low_precision(dtype: torch.dtype, keys: str, mean_decay: float | None) -> None:
    problem = make_problem(
        T=200, H=2, Hkv=1, D=16, V=8, keys=keys, mean_decay=mean_decay, gate=mean_decay is not None, qk_l2norm=True,
        ridge="head", ridge_offset=0.0, state=True, min_beta=1e-3, dtype=dtype,
    )  # fmt: skip
    n = iterations_for(0.02)
    upstream = cotangents(run_gka(problem, num_iter=n))
    actual = results_of(evaluate(lambda p: run_gka(p, num_iter=n), problem, upstream))
    double, packed = problem.double(), dtype != torch.float32
    expected = results_of(evaluate(exact_gka, double, {name: value.double() for name, value in upstream.items()}))
    steps = chebyshev.DEFAULT_CHUNK_SIZE + 16 + math.ceil(200 / chebyshev.DEFAULT_CHUNK_SIZE) + n
    noise = LAMBDA * math.sqrt(steps) * unit_roundoff(torch.float32)
    ideal = algorithm(double, upstream, n, packed)
    noisy_runs = [algorithm(double, upstream, n, packed, noise, seed) for seed in range(3)]
    for name, result in actual.items():
        rounding = max(norm_error(run[name], ideal[name]) for run in noisy_runs) + unit_roundoff(result.dtype)
        tolerance = norm_error(ideal[name], expected[name]) + rounding
        assert norm_error(result, expected[name]) <= tolerance, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keys", KEY_SETS)
def test_x_in_low_precision(dtype: torch.dtype, keys: str) -> None:
    """x of every token: truncation is at most the guaranteed factor, rounding the condition (1+ρ)/ρ times λ √m u."""
    for mean_decay in (None, 0.5, 0.01):
        problem = make_problem(T=200, D=16, keys=keys, mean_decay=mean_decay, min_beta=1e-3, dtype=dtype)
        expected = exact_solve(problem.double())["x"]
        for n in (10, iterations_for(0.02), CONVERGED):
            x = run_solve(problem, num_iter=n)["x"]
            assert x.dtype == torch.float32
            steps = chebyshev.DEFAULT_CHUNK_SIZE + 16 + math.ceil(200 / chebyshev.DEFAULT_CHUNK_SIZE) + n
            rounding = 1.02 / 0.02 * LAMBDA * math.sqrt(steps) * unit_roundoff(torch.float32)
            error = relative_error(x, expected)
            assert error.max <= guaranteed_factor(0.02, n) + rounding, (mean_decay, n, error)


def test_default_iterations_keep_the_default_tolerance() -> None:
    problem = make_problem(T=100, D=16)
    assert relative_error(run_solve(problem)["x"], exact_solve(problem)["x"]).max <= DEFAULT_TOL
    tight = run_solve(problem, tol=1e-6)["x"]
    assert 1e-12 < relative_error(tight, exact_solve(problem)["x"]).max <= 1e-6


# ------------------------------------------------------------------------------------------- sequences and their states
def with_state(problem: Problem, outputs: Outputs) -> Problem:
    return dataclasses.replace(problem, initial_kk=outputs["final_kk"], initial_kv=outputs["final_kv"])


@settings(max_examples=10, deadline=None, derandomize=True)
@given(cuts=st.lists(st.integers(0, 150), max_size=3), seed=st.integers(0, 1000))
def test_any_cut_of_the_sequence_equals_the_whole(cuts: list[int], seed: int) -> None:
    """Also its gradients: autograd chains the calls through their states (50 applications at r ≥ 0.2 are converged)."""
    problem = make_problem(B=2, T=150, mean_decay=0.02, seed=seed, ridge_scale=0.2, **FULL)
    bounds = sorted({0, 150, *cuts})

    def split(p: Problem) -> Outputs:
        pieces: list[Tensor] = []
        outputs: Outputs = {}
        for start, end in itertools.pairwise(bounds):
            piece = p.tokens(start, end)
            outputs = run_gka(with_state(piece, outputs) if outputs else piece, num_iter=50)
            pieces.append(outputs["output"])
        return outputs | {"output": torch.cat(pieces, 1)}

    upstream = cotangents(run_gka(problem))
    actual = evaluate(split, problem, upstream)
    expected = evaluate(lambda p: run_gka(p, num_iter=50), problem, upstream)
    for name, value in (expected.outputs | expected.gradients).items():
        assert max_error((actual.outputs | actual.gradients)[name], value) < ROUNDING, name


@pytest.mark.parametrize("lengths", [[70, 0, 1, 64, 0, 65], [0, 3], [3, 0], [0]])
@pytest.mark.parametrize("state", [False, True])
def test_packed_sequences_equal_separate_ones(lengths: list[int], state: bool) -> None:
    problem = make_problem(seq_lengths=lengths, mean_decay=0.05, **FULL | {"state": state})
    upstream = cotangents(run_gka(problem))

    def run(p: Problem) -> Outputs:
        return run_gka(p, num_iter=20)

    packed, start = evaluate(run, problem, upstream), 0
    for n, length in enumerate(lengths):
        alone = problem.tokens(start, start + length)
        if problem.initial_kk is not None and problem.initial_kv is not None:
            alone = with_state(
                alone, {"final_kk": problem.initial_kk[n : n + 1], "final_kv": problem.initial_kv[n : n + 1]}
            )
        piece = {"output": upstream["output"][:, start : start + length]}
        piece |= {name: upstream[name][n : n + 1] for name in ("final_kk", "final_kv")}
        separate = evaluate(run, alone, piece)
        largest = max(float(g.abs().max()) for g in separate.gradients.values() if g.numel())
        assert max_error(packed.outputs["output"][:, start : start + length], separate.outputs["output"]) < ROUNDING
        for name in ("final_kk", "final_kv"):
            assert max_error(packed.outputs[name][n : n + 1], separate.outputs[name]) < ROUNDING
        for name, value in separate.gradients.items():
            whole = packed.gradients[name]
            if whole.ndim < 3 or not value.numel():
                continue
            own = whole[n : n + 1] if name.startswith("initial") else whole[:, start : start + length]
            assert float((own - value).abs().max()) < ROUNDING * largest, name  # dg of a first token is 0
        start += length


def test_batch_rows_equal_separate_calls() -> None:
    problem = make_problem(B=3, T=70, mean_decay=0.05, **FULL)
    whole = run_gka(problem)
    for row in range(3):
        one = problem.map(lambda name, t: t[row : row + 1] if t.ndim >= 3 else t)  # noqa: B023
        for name, value in run_gka(one).items():
            assert max_error(whole[name][row : row + 1], value) < ROUNDING


# --------------------------------------------------------------------------------------------------------------- decode
def decode(problem: Problem, state: gka_ops.GKAState, **options: Any) -> Tensor:
    p = problem
    return gka_ops.recurrent_gka(
        p.q, p.k, p.v, p.log_decay, p.alpha, p.beta,
        state=state, ridge=ridge_of(p), qk_l2norm=p.qk_l2norm, gate=gate_of(p), **options,
    )  # fmt: skip


@pytest.mark.parametrize("num_iter", [0, 1, 22])
@pytest.mark.parametrize("step", [1, 3])
def test_decode_equals_chunked(num_iter: int, step: int) -> None:
    problem = make_problem(B=2, T=72, mean_decay=0.05, **FULL)
    assert problem.initial_kk is not None
    assert problem.initial_kv is not None
    expected = run_gka(problem, num_iter=num_iter)
    state = gka_ops.GKAState(problem.initial_kk.clone(), problem.initial_kv.clone())
    pieces = [decode(problem.tokens(t, t + step), state, num_iter=num_iter) for t in range(0, 72, step)]
    assert max_error(torch.cat(pieces, 1), expected["output"]) < ROUNDING
    assert max_error(state.kk, expected["final_kk"]) < ROUNDING
    assert max_error(state.kv, expected["final_kv"]) < ROUNDING


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_decode_in_slots_of_a_pool(dtype: torch.dtype, index_dtype: torch.dtype) -> None:
    problem = make_problem(B=4, T=3, mean_decay=0.05, dtype=dtype, **FULL)
    assert problem.initial_kk is not None
    assert problem.initial_kv is not None
    own = gka_ops.GKAState(problem.initial_kk.clone(), problem.initial_kv.clone())
    expected = decode(problem, own)
    slots = torch.tensor([5, -1, 0, 2], dtype=index_dtype)
    used = slots[[0, 2, 3]].long()
    pool = gka_ops.GKAState(torch.full((7, 4, 5, 5), 9.0).to(own.kk), torch.full((7, 4, 5, 3), 9.0).to(own.kv))
    pool.kk[used], pool.kv[used] = problem.initial_kk[[0, 2, 3]], problem.initial_kv[[0, 2, 3]]
    output = decode(problem, pool, state_indices=slots)
    assert output.dtype == dtype
    assert torch.equal(output[[0, 2, 3]], expected[[0, 2, 3]])
    assert not output[1].any()
    for part, whole in zip(pool, own, strict=True):
        assert torch.equal(part[used], whole[[0, 2, 3]])
        assert (part[[1, 3, 4, 6]] == 9).all()


def test_decode_of_padding_alone() -> None:
    problem = make_problem(B=2, T=1, **FULL)
    pool = gka_ops.GKAState(torch.ones(3, 4, 5, 5).double(), torch.ones(3, 4, 5, 3).double())
    assert not decode(problem, pool, state_indices=torch.tensor([-1, -1])).any()
    assert (pool.kk == 1).all()
    assert (pool.kv == 1).all()


def test_decode_refuses_gradients() -> None:
    problem = make_problem(B=2, T=1, **FULL).requiring_grad()
    state = gka_ops.GKAState(torch.zeros(2, 4, 5, 5).double(), torch.zeros(2, 4, 5, 3).double())
    with pytest.raises(RuntimeError, match="decode is not differentiable"):
        decode(problem, state)
    p = problem
    with pytest.raises(RuntimeError, match="decode is not differentiable"):
        torch.ops.gka.recurrent_gka(p.q, p.k, p.v, *[None] * 7, *state, None, 0.02, 0.0, 3, 1.0, False, "", "reference")
    with torch.no_grad():
        decode(problem, state)
    assert not state.kk.requires_grad


# ---------------------------------------------------------------------------------------------------------- hard inputs
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ridge_offset", [0.0, 0.5])
def test_zero_keys(dtype: torch.dtype, ridge_offset: float) -> None:
    """No key at all: x is 0, or q/b; outputs and gradients are finite, and U stays 0."""
    problem = make_problem(T=70, D=8, ridge_offset=ridge_offset, qk_l2norm=True, dtype=dtype)
    problem = dataclasses.replace(problem, k=torch.zeros_like(problem.k))
    x = run_solve(problem)["x"]
    unit = chebyshev.l2norm(problem.q.to(x.dtype))
    assert torch.equal(x, unit / ridge_offset if ridge_offset else torch.zeros_like(x))
    result = evaluate(run_gka, problem, cotangents(run_gka(problem)))
    assert not result.outputs["output"].any()
    assert all(bool(gradient.isfinite().all()) for gradient in result.gradients.values())


@pytest.mark.parametrize("name", ["beta", "q", "v"])
def test_zero_inputs(name: str) -> None:
    problem = make_problem(B=2, T=70, D=8, V=5, mean_decay=0.05, state=True)
    problem = problem.map(lambda field, t: torch.zeros_like(t) if field == name else t)
    upstream = cotangents(exact_gka(problem))
    actual = evaluate(lambda p: run_gka(p, num_iter=CONVERGED), problem, upstream)
    expected = evaluate(exact_gka, problem, upstream)
    for field, value in (expected.outputs | expected.gradients).items():
        assert max_error((actual.outputs | actual.gradients)[field], value) < ROUNDING, field


def test_no_decay_for_a_hundred_thousand_tokens() -> None:
    """Rounding of a state that is added to once a chunk, 1563 times: m = T/C + C + D + n in the bound on x."""
    T, n = 100_000, 8
    problem = make_problem(T=T, H=1, D=4, V=4, mean_decay=None, dtype=torch.float32)
    double = run_solve(problem.double(), num_iter=n)
    single = run_solve(problem, num_iter=n)
    steps = T / chebyshev.DEFAULT_CHUNK_SIZE + chebyshev.DEFAULT_CHUNK_SIZE + 4 + n
    rounding = LAMBDA * math.sqrt(steps) * unit_roundoff(torch.float32)
    assert norm_error(single["final_kk"], double["final_kk"]) < rounding
    assert relative_error(single["x"], double["x"]).max < 1.02 / 0.02 * rounding
    result = evaluate(lambda p: run_gka(p, num_iter=n), problem, {"output": problem.v})
    assert all(bool(gradient.isfinite().all()) for gradient in result.gradients.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("value", [-1e4, -120.0, -math.inf])
def test_log_decay_far_below_the_clamp(value: float, dtype: torch.dtype) -> None:
    """Every third token forgets all: right, finite, and without a gradient of its own."""
    problem = make_problem(T=130, D=8, V=4, mean_decay=0.05, dtype=dtype)
    assert problem.log_decay is not None
    g = problem.log_decay.clone()
    g[:, ::3] = value
    problem = dataclasses.replace(problem, log_decay=g)
    upstream = cotangents(run_gka(problem))
    actual = evaluate(lambda p: run_gka(p, num_iter=CONVERGED), problem, upstream)
    expected = evaluate(exact_gka, problem.double(), {name: t.double() for name, t in upstream.items()})
    # fp64: as everywhere. fp32: the same with its own unit roundoff, 2^29 times larger.
    tolerance = ROUNDING if dtype == torch.float64 else 51**2 * LAMBDA * math.sqrt(64 + 8 + 3) * 2.0**-24
    for name, result in (expected.outputs | expected.gradients).items():
        assert max_error((actual.outputs | actual.gradients)[name], result) < tolerance, name
    assert not actual.gradients["log_decay"][:, ::3].any()


def test_a_nan_stays_in_its_sequence_and_head() -> None:
    problem = make_problem(B=2, T=200, H=4, Hkv=4, D=5, V=3, mean_decay=0.05, qk_l2norm=True)
    k = problem.k.clone()
    k[0, 100, 1] = torch.nan
    clean, spoilt = run_gka(problem), run_gka(dataclasses.replace(problem, k=k))
    touched = spoilt["output"].isnan().any(-1)
    assert touched[0, 100:, 1].all()
    assert not touched[0, :64, 1].any()
    untouched = ~touched
    untouched[0, 64:, 1] = False
    assert untouched.sum() == touched.numel() - 136
    assert torch.equal(clean["output"][untouched], spoilt["output"][untouched])


def test_debug_mode_reads_values() -> None:
    problem = make_problem(T=10, D=4)
    with gka_ops.debug_mode(), pytest.raises(ValueError, match="finite values in k"):
        run_gka(dataclasses.replace(problem, k=problem.k * torch.nan))


@pytest.mark.parametrize("factor", [2.0, 3.7])
def test_scaling_keys_and_values_changes_nothing(factor: float) -> None:
    """b = 0, α = 1, zero state: (k, v) → (c k, c v) leaves o as it is (docs/math.md §1, item 10)."""
    problem = make_problem(T=100, D=8, V=4, alpha=False)
    scaled = dataclasses.replace(problem, k=factor * problem.k, v=factor * problem.v)
    assert max_error(run_gka(scaled)["output"], run_gka(problem)["output"]) < ROUNDING
