"""The closed-form backward against autograd through the specification, whole and stage by stage (docs/math.md §4)."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gka_ops.numerics import MIN_LOG_DECAY
from gka_ops.reference import adjoint, chebyshev
from tests.helpers.problems import (
    KEY_SETS,
    MEAN_DECAYS,
    Evaluation,
    Outputs,
    Problem,
    cotangents,
    evaluate,
    exact_gka,
    exact_solve,
    guaranteed_factor,
    make_problem,
    max_error,
    reference_inputs,
)

CONVERGED = 150
"""At ρ ≥ 0.02 the guaranteed factor of 150 applications is 1e-18: only rounding is left."""

ROUNDING = 1e-10
"""fp64 rounding (1e-16) times the condition of two solves (51² at ρ = 0.02), times the hundreds of terms of a sum."""

GRADIENTS = {  # field of adjoint.Gradients: field of Problem
    "dq": "q",
    "dk": "k",
    "dv": "v",
    "d_log_decay": "log_decay",
    "d_alpha": "alpha",
    "d_beta": "beta",
    "d_ridge_scale": "ridge_scale",
    "d_ridge_offset": "ridge_offset",
    "d_A_log": "A_log",
    "d_dt_bias": "dt_bias",
    "d_initial_kk": "initial_kk",
    "d_initial_kv": "initial_kv",
}


def closed_form(
    problem: Problem,
    upstream: Outputs,
    num_iter: int = CONVERGED,
    chunk_size: int = 16,
    carry: adjoint.Carry = "omega",
) -> Evaluation:
    """Forward and closed-form backward; ``upstream`` may hold gradients of output, x, final_kk and final_kv."""
    scale = problem.q.shape[-1] ** -0.5
    inputs = reference_inputs(problem)
    if "x" in upstream:
        inputs = inputs._replace(v=problem.v[..., :0], alpha=None, initial_kv=None)
    result = chebyshev.forward(inputs, num_iter, scale, chunk_size=chunk_size)
    gradients = adjoint.backward(
        inputs,
        result.x,
        result.fro,
        upstream.get("output", torch.zeros_like(result.output)),
        upstream.get("x"),
        upstream.get("final_kk"),
        upstream.get("final_kv"),
        num_iter,
        scale,
        chunk_size=chunk_size,
        carry=carry,
    )
    named = {GRADIENTS[field]: value for field, value in gradients._asdict().items() if value is not None}
    if "x" in upstream:
        del named["v"]
    return Evaluation(result._asdict(), named)


def assert_gradients(actual: Evaluation, expected: Evaluation, common_scale: bool = False) -> None:
    """Max-norm errors within ``ROUNDING`` of each gradient's own size; with ``common_scale``, of the largest one's."""
    largest = max((float(g.abs().max()) for g in expected.gradients.values() if g.numel()), default=0.0)
    for name, gradient in actual.gradients.items():
        reference = expected.gradients[name]
        assert gradient.shape == reference.shape, name
        if gradient.numel():
            scale = largest if common_scale else float(reference.abs().max())
            assert float((gradient - reference).abs().max()) <= ROUNDING * scale, name


# ------------------------------------------------------------------------------------------------------ whole backward
@pytest.mark.parametrize("qk_l2norm", [False, True])
@pytest.mark.parametrize("beta", [False, True])
@pytest.mark.parametrize("ridge", ["constant", "head", "token"])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("gate", [False, True])
def test_every_option(qk_l2norm: bool, beta: bool, ridge: str, state: bool, final: bool, gate: bool) -> None:
    """The grid of docs/math.md §4.6, with a tail, grouped heads and V ≠ D, carrying Ω and carrying R."""
    problem = make_problem(
        B=2, T=19, H=4, Hkv=2, D=5, V=3, mean_decay=0.1, qk_l2norm=qk_l2norm, beta=beta, ridge=ridge,
        ridge_offset=0.0 if ridge == "constant" else 0.2, state=state, gate=gate,
    )  # fmt: skip
    outputs = exact_gka(problem)
    upstream = cotangents(outputs if final else {"output": outputs["output"]})
    expected = evaluate(exact_gka, problem, upstream)
    for chunk_size, carry in ((8, "omega"), (64, "r") if ridge == "head" else (8, "r")):
        assert_gradients(closed_form(problem, upstream, chunk_size=chunk_size, carry=carry), expected)  # type: ignore[arg-type]


OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "B": st.integers(1, 2),
    "Hkv": st.integers(1, 2),
    "T": st.integers(0, 30),
    "D": st.integers(1, 8),
    "V": st.integers(1, 8),
    "keys": st.sampled_from(KEY_SETS),
    "mean_decay": st.sampled_from([*MEAN_DECAYS, 60.0]),
    "alpha": st.booleans(),
    "beta": st.booleans(),
    "min_beta": st.sampled_from([None, 1e-2]),
    "ridge": st.sampled_from(["constant", "head", "token"]),
    "ridge_offset": st.sampled_from([0.0, 0.3]),
    "gate": st.booleans(),
    "dt_bias": st.booleans(),
    "state": st.booleans(),
    "qk_l2norm": st.booleans(),
    "seed": st.integers(0, 10**6),
}


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    options=st.fixed_dictionaries(OPTIONS),
    group=st.integers(1, 3),
    cuts=st.none() | st.lists(st.integers(0, 15), min_size=1, max_size=4),
    chunk_size=st.sampled_from([4, 8, 16, 64]),
    carry=st.sampled_from(["omega", "r"]),
    solve_only=st.booleans(),
    num_iter=st.sampled_from([0, CONVERGED]),
    final=st.booleans(),
)
def test_any_shape(
    options: dict[str, Any],
    group: int,
    cuts: list[int] | None,
    chunk_size: int,
    carry: adjoint.Carry,
    solve_only: bool,
    num_iter: int,
    final: bool,
) -> None:
    problem = make_problem(**options, H=options["Hkv"] * group, seq_lengths=cuts)

    def specification(p: Problem) -> Outputs:
        return exact_solve(p, num_iter) if solve_only else exact_gka(p, num_iter)

    outputs = specification(problem)
    main = "x" if solve_only else "output"
    upstream = cotangents(outputs if final else {main: outputs[main]})
    expected = evaluate(specification, problem, upstream)
    # Some gradients vanish identically in corners (dq with normalised q of D = 1, dg of the first token, ...).
    assert_gradients(closed_form(problem, upstream, num_iter, chunk_size, carry), expected, common_scale=True)


@pytest.mark.parametrize("name", ["final_kk", "final_kv"])
def test_gradient_of_one_final_state_alone(name: str) -> None:
    problem = make_problem(B=2, T=21, H=2, D=5, V=3, state=True, mean_decay=0.1)
    upstream = cotangents({name: exact_gka(problem)[name]})
    assert_gradients(closed_form(problem, upstream), evaluate(exact_gka, problem, upstream))


def test_chunk_size_does_not_matter_when_truncated() -> None:
    """With a truncated solve dg may depend on where its sum restarts, by the order of the truncation; no other may."""
    problem = make_problem(T=70, D=8, state=True)
    upstream = cotangents(exact_gka(problem))
    reference = closed_form(problem, upstream, 12, 64)
    for chunk_size in (4, 16):
        actual = closed_form(problem, upstream, 12, chunk_size)
        for name, gradient in actual.gradients.items():
            tolerance = 5 * guaranteed_factor(0.02, 12) if name == "log_decay" else ROUNDING
            assert max_error(gradient, reference.gradients[name]) < tolerance, name


# ---------------------------------------------------------------------------------------------------------- each stage
@pytest.fixture(scope="module")
def staged() -> dict[str, Any]:
    """A problem without any preparation of its inputs, its stages, and the token-level quantities of docs/math.md §4.1.

    Token tensors are [T, ...] of the only batch row and head; ``at`` picks those of a chunk tensor.
    """
    T, D, V, C = 21, 5, 3, 8
    p = make_problem(T=T, H=1, D=D, V=V, mean_decay=0.2, beta=False, ridge="token", ridge_offset=0.3, state=True)
    upstream = cotangents(exact_gka(p))
    chunks = chebyshev.chunked(reference_inputs(p), C)
    result = chebyshev.forward(reference_inputs(p), CONVERGED, 0.7, chunk_size=C)
    table = chunks.table
    x, fro, do = (table.to_chunks(t) for t in (result.x, result.fro, upstream["output"]))
    a = adjoint.stage_a(chunks, x, fro, do, None, CONVERGED, 0.7)
    final = upstream["final_kk"], upstream["final_kv"]
    omega = adjoint.stage_b(chunks, x, do, a, *final, 0.7, "omega")
    residual = adjoint.stage_b(chunks, x, do, a, *final, 0.7, "r")

    def at(t: Tensor) -> Tensor:
        return table.to_tokens(t)[0, :, 0]

    assert p.log_decay is not None
    assert p.alpha is not None
    assert p.initial_kk is not None
    assert p.initial_kv is not None
    assert isinstance(p.ridge_scale, Tensor)
    assert isinstance(p.ridge_offset, Tensor)
    q, k, v, g, alpha = p.q[0, :, 0], p.k[0, :, 0], p.v[0, :, 0], p.log_decay[0, :, 0], p.alpha[0, :, 0]
    r, b, d_output = p.ridge_scale[0, :, 0], p.ridge_offset[0, :, 0], upstream["output"][0, :, 0]
    tokens: dict[str, list[Tensor]] = {
        name: [] for name in ("H", "U", "dm", "x", "y", "m", "mu", "G", "E", "Omega", "Xi")
    }
    h, u = p.initial_kk[0, 0], p.initial_kv[0, 0]
    for t in range(T):
        h = g[t].exp() * h + torch.outer(k[t], k[t])
        u = g[t].exp() * u + torch.outer(k[t], v[t])
        system = h + (r[t] * h.norm() + b[t]) * torch.eye(D, dtype=torch.float64)
        x_t, dm = torch.linalg.solve(system, q[t]), 0.7 * u @ d_output[t]
        y_t, m = torch.linalg.solve(system, alpha[t] * dm), q[t] + alpha[t] * (x_t - q[t])
        mu = -r[t] * (y_t @ x_t) / h.norm()
        G = mu * h - (torch.outer(x_t, y_t) + torch.outer(y_t, x_t)) / 2
        values = (h, u, dm, x_t, y_t, m, mu, G, 0.7 * torch.outer(m, d_output[t]))
        for name, value in zip(tokens, values, strict=False):
            tokens[name].append(value)
    omega_t, xi_t = (final[0][0, 0] + final[0][0, 0].mT) / 2, final[1][0, 0]
    for t in reversed(range(T)):
        decay = g[t + 1].exp() if t + 1 < T else 1.0
        omega_t, xi_t = tokens["G"][t] + decay * omega_t, tokens["E"][t] + decay * xi_t
        tokens["Omega"].insert(0, omega_t)
        tokens["Xi"].insert(0, xi_t)
    truth = {name: torch.stack(values) for name, values in tokens.items()} | {"q": q, "k": k, "v": v, "g": g, "b": b}
    return {
        "chunks": chunks, "x": x, "do": do, "a": a, "omega": omega, "r": residual, "at": at, "truth": truth,
        "d_output": d_output, "final": final,
    }  # fmt: skip


def rows_dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).flatten(1).sum(-1)


def test_stage_a(staged: dict[str, Any]) -> None:
    a, at, truth = staged["a"], staged["at"], staged["truth"]
    dot = rows_dot(truth["y"], truth["x"])
    fro = truth["H"].flatten(1).norm(dim=-1)
    alpha = at(staged["chunks"].operands.alpha)
    expected = {
        "m": truth["m"],
        "dm": truth["dm"],
        "dx": alpha[:, None] * truth["dm"],
        "y": truth["y"],
        "dq": (1 - alpha[:, None]) * truth["dm"] + truth["y"],
        "d_alpha": rows_dot(truth["dm"], truth["x"] - truth["q"]),
        "dr": -dot * fro,
        "db": -dot,
        "mu": truth["mu"],
        "pi": rows_dot(truth["G"], truth["H"]) + rows_dot(truth["E"], truth["U"]),
    }
    assert set(expected) == set(a._fields)
    for name, value in expected.items():
        assert max_error(at(getattr(a, name)), value) < ROUNDING, name


@pytest.mark.parametrize("carry", ["omega", "r"])
def test_stage_b(staged: dict[str, Any], carry: str) -> None:
    b, truth, kk = staged[carry], staged["truth"], staged["chunks"].kk
    incoming = b.kk[0, 0] + b.w[0, 0, :, None, None] * kk.ends[0, 0]
    assert max_error(b.kk, b.kk.mT) < ROUNDING
    for chunk, first in enumerate((8, 16)):  # what reaches chunk 0 and 1 from the first token after them
        decay = truth["g"][first].exp()
        assert max_error(incoming[chunk], decay * truth["Omega"][first]) < ROUNDING
        assert max_error(b.kv[0, 0, chunk], decay * truth["Xi"][first]) < ROUNDING
    assert max_error(incoming[2], (staged["final"][0] + staged["final"][0].mT)[0, 0] / 2) < ROUNDING
    assert max_error(b.kv[0, 0, 2], staged["final"][1][0, 0]) < ROUNDING
    decay = truth["g"][0].exp()
    assert max_error(b.d_initial_kk[0, 0], decay * truth["Omega"][0]) < ROUNDING
    assert max_error(b.d_initial_kv[0, 0], decay * truth["Xi"][0]) < ROUNDING
    assert carry == "r" or not b.w.any()


@pytest.mark.parametrize("carry", ["omega", "r"])
def test_stage_c(staged: dict[str, Any], carry: str) -> None:
    at, truth = staged["at"], staged["truth"]
    c = adjoint.stage_c(staged["chunks"], staged["x"], staged["do"], staged["a"], staged[carry], 0.7)
    k, v = truth["k"], truth["v"]
    omega_k = torch.einsum("tde,te->td", truth["Omega"], k)
    xi_v = torch.einsum("tdv,tv->td", truth["Xi"], v)
    own_h, own_u = k[:, :, None] * k[:, None, :], k[:, :, None] * v[:, None, :]
    expected = {
        "dk": 2 * omega_k + xi_v,
        "dv": torch.einsum("tdv,td->tv", truth["Xi"], k),
        "kappa": rows_dot(k, omega_k) + rows_dot(k, xi_v),
        "dg": rows_dot(truth["Omega"], truth["H"] - own_h) + rows_dot(truth["Xi"], truth["U"] - own_u),
    }
    assert set(expected) == set(c._fields)
    for name, value in expected.items():
        assert max_error(at(getattr(c, name)), value) < ROUNDING, name


def test_chunk_w() -> None:
    g = -torch.rand(2, 3, 4, 9, dtype=torch.float64)
    mu, w = torch.randn_like(g), torch.zeros_like(g)
    for t in reversed(range(9)):
        w[..., t] = mu[..., t] + (torch.exp(2 * g[..., t + 1]) * w[..., t + 1] if t < 8 else 0)
    assert max_error(adjoint.chunk_w(mu, chebyshev.chunk_decays(g).pair), w) < ROUNDING


@pytest.mark.parametrize("length", [1.0, 1e-9])
def test_l2norm_backward(length: float) -> None:
    x = (length * torch.randn(7, 4, dtype=torch.float64)).requires_grad_()
    gradient = torch.randn_like(x)
    (expected,) = torch.autograd.grad(chebyshev.l2norm(x), x, gradient)
    assert max_error(adjoint.l2norm_backward(x.detach(), gradient), expected) < ROUNDING
    zero = adjoint.l2norm_backward(torch.zeros_like(x), gradient)
    assert max_error(zero, gradient / 1e-6) < ROUNDING


@pytest.mark.parametrize("biased", [False, True])
def test_gate_backward(biased: bool) -> None:
    """Projections from −60 to 1e5: softplus is exact in its tails, and the clamp passes nothing."""
    a = torch.linspace(-60, 60, 24, dtype=torch.float64).reshape(1, 12, 2)
    a[0, -1] = 1e5
    leaves = [a.requires_grad_(), torch.tensor([0.3, 1.5]).double().requires_grad_()]
    if biased:
        leaves.append(torch.tensor([0.1, -0.2]).double().requires_grad_())
    g = chebyshev.raw_log_decay(a, leaves[1], leaves[2] if biased else None, torch.float64)
    expected = torch.autograd.grad(torch.where(g > MIN_LOG_DECAY, g, MIN_LOG_DECAY), leaves, torch.ones_like(g))
    detached = [leaf.detach() for leaf in leaves]
    actual = adjoint.gate_backward(detached[0], detached[1], detached[2] if biased else None, torch.ones_like(g))
    for value, reference in zip(actual, expected, strict=False):
        assert value is not None
        assert max_error(value, reference) < ROUNDING
    assert not actual.log_decay[0, -1].any()


# ---------------------------------------------------------------------------------------------- identities, edge cases
@pytest.mark.parametrize("keys", KEY_SETS)
def test_free_identities(keys: str) -> None:
    """Zero initial states: dg_1 = 0; with b = 0, α = 1, no final-state gradient also Σ β dβ = 0 (docs/math.md §4.4)."""
    problem = make_problem(B=2, T=50, H=2, D=8, V=5, keys=keys, alpha=False, qk_l2norm=True)
    gradients = closed_form(problem, cotangents({"output": exact_gka(problem)["output"]})).gradients
    assert problem.beta is not None
    assert gradients["log_decay"][:, 0].abs().max() < ROUNDING * gradients["log_decay"].abs().max()
    terms = problem.beta * gradients["beta"]
    assert terms.sum(1).abs().max() < ROUNDING * terms.abs().sum(1).max()


@pytest.mark.parametrize("ridge_offset", [0.0, 0.5])
@pytest.mark.parametrize("carry", ["omega", "r"])
def test_leading_zero_keys(ridge_offset: float, carry: adjoint.Carry) -> None:
    """Dead rows (b = 0) have no gradient; flat rows (b > 0) have that of q/b; the rest is untouched."""
    problem = make_problem(B=2, T=40, D=6, V=4, mean_decay=0.1, ridge="token", ridge_offset=ridge_offset)
    k = problem.k.clone()
    k[:, :21] = 0
    problem = dataclasses.replace(problem, k=k)
    upstream = cotangents(exact_gka(problem))
    expected = evaluate(exact_gka, problem, upstream)
    assert_gradients(closed_form(problem, upstream, chunk_size=8, carry=carry), expected)
    upstream = cotangents({"x": problem.q})
    actual = closed_form(problem, upstream, chunk_size=8, carry=carry)
    assert_gradients(actual, evaluate(exact_solve, problem, upstream))
    assert bool(actual.gradients["q"][:, :21].any()) == (ridge_offset > 0)


def test_flat_rows_reach_the_initial_state() -> None:
    problem = make_problem(T=10, D=4, ridge_offset=0.5, state=True)
    assert problem.initial_kk is not None
    problem = dataclasses.replace(
        problem, k=torch.zeros_like(problem.k), initial_kk=torch.zeros_like(problem.initial_kk)
    )
    upstream = cotangents({"output": problem.v})
    assert_gradients(closed_form(problem, upstream), evaluate(exact_gka, problem, upstream))


@pytest.mark.parametrize("gate", [False, True])
def test_no_gradient_at_or_below_the_clamp(gate: bool) -> None:
    problem = make_problem(B=2, T=20, D=5, mean_decay=0.1, gate=gate, state=True)
    assert problem.log_decay is not None
    log_decay = problem.log_decay.clone()
    log_decay[:, 7] = 1e5 if gate else -1e4
    log_decay[:, 12] = 1e5 if gate else MIN_LOG_DECAY
    problem = dataclasses.replace(problem, log_decay=log_decay)
    upstream = cotangents(exact_gka(problem))
    actual = closed_form(problem, upstream, chunk_size=8)
    assert_gradients(actual, evaluate(exact_gka, problem, upstream))
    assert not actual.gradients["log_decay"][:, [7, 12]].any()


@pytest.mark.parametrize("what", ["q", "beta", "T=1"])
def test_degenerate_inputs(what: str) -> None:
    problem = make_problem(B=2, T=1 if what == "T=1" else 20, D=5, V=3, mean_decay=0.1, state=True)
    if what != "T=1":
        problem = problem.map(lambda name, t: torch.zeros_like(t) if name == what else t)
    upstream = cotangents(exact_gka(problem))
    assert_gradients(closed_form(problem, upstream), evaluate(exact_gka, problem, upstream))


# ---------------------------------------------------------------------------------------------------- truncated solves
@pytest.mark.parametrize("keys", KEY_SETS)
@pytest.mark.parametrize("n", [20, 30])
def test_truncated_gradients(keys: str, n: int) -> None:
    """Truncation of both solves, measured as in docs/math.md §4.6: dk and dg within 5 times the guaranteed factor, all
    others within 2.5 times (unit q and k, zero initial states, max-norm)."""
    for D in (16, 32):
        problem = make_problem(T=96, H=2, D=D, keys=keys, ridge="token", ridge_scale=0.02)
        upstream = cotangents({"output": exact_gka(problem)["output"]})
        actual, expected = closed_form(problem, upstream, n), evaluate(exact_gka, problem, upstream)
        for name, gradient in actual.gradients.items():
            sensitivity = 5.0 if name in ("k", "log_decay") else 2.5
            assert max_error(gradient, expected.gradients[name]) < sensitivity * guaranteed_factor(0.02, n), (name, D)
