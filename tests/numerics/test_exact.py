"""The specification itself, against the equations of docs/math.md §1 written out in other ways, and its policies."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from gka_ops.numerics import FRO_MIN, MIN_LOG_DECAY, NORM_EPS
from gka_ops.reference import exact
from tests.helpers.problems import (
    KEY_SETS,
    Problem,
    cotangents,
    evaluate,
    exact_gka,
    exact_solve,
    make_problem,
    max_error,
)

ROUNDING = 1e-11
"""fp64 rounding (1e-16) times the condition (1+ρ)/ρ = 51 of the solves, times the few hundred operations of a sum."""


def states_by_sums(p: Problem) -> tuple[Tensor, Tensor]:
    """H_t and U_t of every token as Σ_s ω_ts k̂_s k̂_sᵀ with ω_ts = β_s² e^{g_{s+1}+...+g_t}, from zero states."""
    B, T, H, _ = p.q.shape
    heads = [h // (H // p.k.shape[2]) for h in range(H)]
    k, v = p.k[:, :, heads], p.v[:, :, heads]
    if p.qk_l2norm:
        k = k / k.norm(dim=-1, keepdim=True)
    g = torch.zeros(B, T, H, dtype=torch.float64) if p.log_decay is None else p.log_decay
    beta = torch.ones(B, T, H, dtype=torch.float64) if p.beta is None else p.beta
    kk = torch.zeros(B, T, H, k.shape[-1], k.shape[-1], dtype=torch.float64)
    kv = torch.zeros(B, T, H, k.shape[-1], v.shape[-1], dtype=torch.float64)
    for t in range(T):
        for s in range(t + 1):
            weight = beta[:, s] ** 2 * torch.exp(g[:, s + 1 : t + 1].sum(1))
            kk[:, t] += torch.einsum("bh,bhd,bhe->bhde", weight, k[:, s], k[:, s])
            kv[:, t] += torch.einsum("bh,bhd,bhv->bhdv", weight, k[:, s], v[:, s])
    return kk, kv


@pytest.mark.parametrize("keys", KEY_SETS)
@pytest.mark.parametrize("qk_l2norm", [False, True])
def test_matches_the_definition(keys: str, qk_l2norm: bool) -> None:
    p = make_problem(B=2, T=9, H=4, Hkv=2, D=5, V=3, keys=keys, mean_decay=0.3, qk_l2norm=qk_l2norm, ridge="token")
    assert isinstance(p.ridge_scale, Tensor)
    assert p.alpha is not None
    kk, kv = states_by_sums(p)
    q = p.q / p.q.norm(dim=-1, keepdim=True) if qk_l2norm else p.q
    lam = p.ridge_scale * kk.square().sum((-2, -1)).sqrt() + p.ridge_offset
    system = kk + lam[..., None, None] * torch.eye(5, dtype=torch.float64)
    x = torch.einsum("bthde,bthe->bthd", torch.linalg.inv(system), q)
    m = (1 - p.alpha[..., None]) * q + p.alpha[..., None] * x
    output = 0.7 * torch.einsum("bthd,bthdv->bthv", m, kv)

    gka, solve = exact_gka(p, scale=0.7), exact_solve(p)
    assert max_error(gka["output"], output) < ROUNDING
    assert max_error(gka["final_kk"], kk[:, -1]) < ROUNDING
    assert max_error(gka["final_kv"], kv[:, -1]) < ROUNDING
    assert max_error(solve["x"], x) < ROUNDING
    assert torch.equal(solve["final_kk"], gka["final_kk"])


def test_is_the_ridge_regression() -> None:
    """o_t = s Φ_tᵀ q_t where Φ_t minimises Σ_s ω_ts ‖v_s − Φᵀ k̂_s‖² + λ_t ‖Φ‖² (docs/math.md §1, items 1–2)."""
    p = make_problem(T=7, H=1, D=4, V=3, mean_decay=0.2, alpha=False)
    kk, kv = states_by_sums(p)
    lam = 0.02 * kk[0, -1, 0].norm()
    assert p.log_decay is not None
    assert p.beta is not None
    weights = p.beta[0, :, 0] ** 2 * torch.exp(p.log_decay[0, :, 0].flip(0).cumsum(0).flip(0) - p.log_decay[0, :, 0])
    rows = torch.cat([weights.sqrt()[:, None] * p.k[0, :, 0], lam.sqrt() * torch.eye(4, dtype=torch.float64)])
    targets = torch.cat([weights.sqrt()[:, None] * p.v[0, :, 0], torch.zeros(4, 3, dtype=torch.float64)])
    phi = torch.linalg.lstsq(rows, targets).solution
    assert max_error(exact_gka(p, scale=1.0)["output"][0, -1, 0], phi.mT @ p.q[0, -1, 0]) < ROUNDING
    assert max_error(kv[0, -1, 0], (kk[0, -1, 0] + lam * torch.eye(4, dtype=torch.float64)) @ phi) < ROUNDING


@pytest.mark.parametrize("factor", [4.0, 3.7, 1e-3])
def test_homogeneity(factor: float) -> None:
    """b = 0: x has degree −2 in k; with α = 1 and zero states, (k, v) → (c k, c v) leaves o as it is (§1, item 10)."""
    p = make_problem(T=12, D=6, alpha=False)
    scaled = dataclasses.replace(p, k=factor * p.k, v=factor * p.v)
    assert max_error(exact_solve(scaled)["x"] * factor**2, exact_solve(p)["x"]) < ROUNDING
    assert max_error(exact_gka(scaled)["output"], exact_gka(p)["output"]) < ROUNDING


def test_num_iter_zero_is_gated_linear_attention() -> None:
    p = make_problem(B=2, T=8, H=4, Hkv=2, D=5, V=3, mean_decay=0.3, state=False)
    _, kv = states_by_sums(p)
    result = exact_gka(p, num_iter=0)
    assert max_error(result["output"], 5**-0.5 * torch.einsum("bthd,bthdv->bthv", p.q, kv)) < ROUNDING
    assert torch.equal(exact_solve(p, num_iter=0)["x"], p.q)
    assert torch.equal(result["final_kk"], exact_gka(p)["final_kk"])


def test_gate() -> None:
    p = make_problem(T=6, gate=True, mean_decay=0.1)
    assert p.log_decay is not None
    assert p.A_log is not None
    assert p.dt_bias is not None
    g = -p.A_log.exp() * torch.nn.functional.softplus(p.log_decay + p.dt_bias, threshold=1000)
    direct = dataclasses.replace(p, log_decay=g, A_log=None, dt_bias=None)
    assert max_error(exact_gka(p)["output"], exact_gka(direct)["output"]) < ROUNDING
    without_bias = dataclasses.replace(p, dt_bias=None)
    zero_bias = dataclasses.replace(p, dt_bias=torch.zeros_like(p.dt_bias))
    assert torch.equal(exact_gka(without_bias)["output"], exact_gka(zero_bias)["output"])


@pytest.mark.parametrize("ridge", ["head", "token"])
def test_ridge_shapes(ridge: str) -> None:
    p = make_problem(B=2, T=5, H=3, ridge=ridge, ridge_offset=0.1)
    assert isinstance(p.ridge_scale, Tensor)
    assert isinstance(p.ridge_offset, Tensor)
    dense = dataclasses.replace(
        p, ridge_scale=p.ridge_scale.expand(2, 5, 3).clone(), ridge_offset=p.ridge_offset.expand(2, 5, 3).clone()
    )
    assert torch.equal(exact_gka(p)["output"], exact_gka(dense)["output"])


def test_packed_sequences_are_independent() -> None:
    lengths = [4, 0, 1, 7]
    p = make_problem(seq_lengths=lengths, H=4, Hkv=2, D=5, V=3, state=True, ridge="token", ridge_offset=0.1)
    assert p.initial_kk is not None
    assert p.initial_kv is not None
    packed, start = exact_gka(p), 0
    for n, length in enumerate(lengths):
        alone = dataclasses.replace(
            p.tokens(start, start + length), initial_kk=p.initial_kk[n : n + 1], initial_kv=p.initial_kv[n : n + 1]
        )
        result = exact_gka(alone)
        assert torch.equal(result["output"], packed["output"][:, start : start + length])
        assert torch.equal(result["final_kk"][0], packed["final_kk"][n])
        assert torch.equal(result["final_kv"][0], packed["final_kv"][n])
        start += length
    assert torch.equal(packed["final_kk"][1], p.initial_kk[1])


def test_recurrent_continues_the_sequence() -> None:
    p = make_problem(B=3, T=8, H=4, Hkv=2, D=5, V=3, state=True, gate=True, ridge="token", ridge_offset=0.1)
    assert p.initial_kk is not None
    assert p.initial_kv is not None
    assert p.A_log is not None
    assert p.alpha is not None
    assert p.beta is not None
    assert p.log_decay is not None
    assert isinstance(p.ridge_scale, Tensor)
    assert isinstance(p.ridge_offset, Tensor)
    whole = exact_gka(p)
    pool = torch.zeros(5, *p.initial_kk.shape[1:], dtype=torch.float64), torch.zeros(5, 4, 5, 3, dtype=torch.float64)
    slots = torch.tensor([3, -1, 0])
    pool[0][[3, 0]], pool[1][[3, 0]] = p.initial_kk[[0, 2]], p.initial_kv[[0, 2]]
    for t in range(8):
        now = slice(t, t + 1)
        output, pool = exact.recurrent_gka(
            p.q[:, now], p.k[:, now], p.v[:, now], p.log_decay[:, now], p.alpha[:, now], p.beta[:, now],
            state=pool, state_indices=slots, ridge=(p.ridge_scale[:, now], p.ridge_offset[:, now]),
            gate=(p.A_log, p.dt_bias),
        )  # fmt: skip
        assert torch.equal(output[[0, 2], 0], whole["output"][[0, 2], t])
        assert not output[1].any()
    assert torch.equal(pool[0][[3, 0]], whole["final_kk"][[0, 2]])
    assert torch.equal(pool[1][[3, 0]], whole["final_kv"][[0, 2]])
    assert not pool[0][[1, 2, 4]].any()


# ------------------------------------------------------------------------------------------------- policies, §1 and §2
def test_dead_rows_give_zero_with_zero_gradient() -> None:
    p = make_problem(T=5, H=1, D=4)
    p = dataclasses.replace(p, k=torch.cat([torch.zeros(1, 3, 1, 4, dtype=torch.float64), p.k[:, 3:]], 1))
    result = evaluate(exact_solve, p, cotangents({"x": p.q}))
    assert not result.outputs["x"][:, :3].any()
    assert result.outputs["x"][:, 3:].any()
    assert not result.gradients["q"][:, :3].any()
    assert all(bool(gradient.isfinite().all()) for gradient in result.gradients.values())


def test_flat_rows_divide_by_the_offset() -> None:
    """F_t ≤ F_min, b > 0: x = q/b, the gradient into H is that of (H + b I)⁻¹ q, and none goes into r."""
    p = make_problem(T=3, H=1, D=4, alpha=False, ridge="token", ridge_offset=0.5)
    kk = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    p = dataclasses.replace(p, k=torch.zeros_like(p.k), initial_kk=kk, initial_kv=torch.zeros_like(kk))
    upstream = cotangents({"x": p.q})
    result = evaluate(exact_solve, p, upstream)
    assert isinstance(p.ridge_offset, Tensor)
    assert max_error(result.outputs["x"], p.q / p.ridge_offset[..., None]) < ROUNDING
    assert not result.gradients["ridge_scale"].any()
    y = upstream["x"] / p.ridge_offset[..., None]
    assert p.log_decay is not None
    assert max_error(result.gradients["ridge_offset"], -(y * result.outputs["x"]).sum(-1)) < ROUNDING
    decay = p.log_decay.cumsum(1).exp()[..., None, None]
    expected = -(decay * y[..., :, None] * result.outputs["x"][..., None, :]).sum(1)
    assert max_error(result.gradients["initial_kk"], (expected + expected.mT) / 2) < ROUNDING


def test_a_row_is_dead_or_flat_at_the_threshold() -> None:
    q = torch.ones(1, 1, 1, 2, dtype=torch.float64)
    k = torch.tensor([math.sqrt(FRO_MIN) / 2, 0.0], dtype=torch.float64).reshape(1, 1, 1, 2)  # F = F_min / 4
    for offset, expected in ((0.5 * FRO_MIN, 0.0), (FRO_MIN, 1 / FRO_MIN)):
        x, _ = exact.chunk_solve(q, k, ridge=(0.02, offset))
        assert torch.equal(x, torch.full_like(q, expected))


@pytest.mark.parametrize("value", [MIN_LOG_DECAY, -1e4, -math.inf])
def test_log_decays_are_clamped_without_gradient(value: float) -> None:
    p = make_problem(T=6, H=1, D=4)
    assert p.log_decay is not None
    g = p.log_decay.clone()
    g[:, 3] = value
    result = evaluate(exact_gka, dataclasses.replace(p, log_decay=g), cotangents({"output": p.v}))
    g[:, 3] = MIN_LOG_DECAY
    assert torch.equal(result.outputs["output"], exact_gka(dataclasses.replace(p, log_decay=g))["output"])
    assert not result.gradients["log_decay"][:, 3].any()
    assert result.gradients["log_decay"][:, 4:].all()


def test_normalisation_of_short_vectors() -> None:
    p = make_problem(T=4, H=1, D=4, qk_l2norm=True)
    q = p.q.clone()
    q[:, 1] *= 1e-9
    q[:, 2] = 0
    x = exact_solve(dataclasses.replace(p, q=q))["x"]
    scaled = exact_solve(
        dataclasses.replace(p, q=q / NORM_EPS, qk_l2norm=False, k=p.k / p.k.norm(dim=-1, keepdim=True))
    )
    assert max_error(x[:, 1], scaled["x"][:, 1]) < ROUNDING
    assert not x[:, 2].any()


def test_empty_sequence_passes_the_state() -> None:
    p = make_problem(T=0, state=True, D=4, V=3)
    result = exact_gka(p)
    assert result["output"].shape == (1, 0, 2, 3)
    assert p.initial_kk is not None
    assert p.initial_kv is not None
    assert torch.equal(result["final_kk"], p.initial_kk)
    assert torch.equal(result["final_kv"], p.initial_kv)


@pytest.mark.parametrize("keys", ["random", "repeated"])
def test_gradients_agree_with_finite_differences(keys: str) -> None:
    p = make_problem(
        T=4, H=2, Hkv=1, D=3, V=2, keys=keys, qk_l2norm=True, gate=True, ridge="head", ridge_offset=0.1, state=True
    ).requiring_grad()
    names, tensors = zip(*p.leaves().items(), strict=True)

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(exact_gka(p.replace(dict(zip(names, values, strict=True)))).values())

    assert torch.autograd.gradcheck(run, tensors)
