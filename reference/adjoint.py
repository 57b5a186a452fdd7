"""The closed-form backward of docs/math.md §4, eager and chunked, one public function a stage.

Stages are those of §4.3: A (parallel over chunks: adjoint solve and everything that needs only one chunk), B (reverse
scan over chunks), C (parallel: keys, values, decay), D (back to the operator's own inputs, §4.5). Shapes as in
:mod:`gka_ops.reference.chebyshev`: chunk tensors [B, H, L, C, ·] in the compute dtype, gradients of effective operands
until stage D. ``dY`` is dLoss/dY.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gka_ops.numerics import MIN_LOG_DECAY, NORM_EPS
from gka_ops.reference.chebyshev import (
    DEFAULT_CHUNK_SIZE,
    Chunked,
    ChunkTable,
    Inputs,
    chunk_operator,
    chunked,
    compute_dtype,
    l2norm,
    mix,
    raw_log_decay,
)

Carry = Literal["omega", "r"]


def _sym(z: Tensor) -> Tensor:
    return (z + z.mT) / 2


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Row-wise inner products over the last dimension."""
    return (x * y).sum(-1)


# ---------------------------------------------------------------------------------------------------------- stage A
class StageA(NamedTuple):
    """What one chunk yields by itself (docs/math.md §4.1, §4.3 A, §4.4); rows [B, H, L, C, ·].

    Attributes:
        m: the rows m_t that were read out [..., D].
        dm: gradient of m_t [..., D].
        dx: gradient of x_t [..., D], the right-hand side of the adjoint solve.
        y: A_t⁻¹ dx_t [..., D]; 0 in dead rows and with ``num_iter = 0``.
        dq: gradient of the effective query [..., D].
        d_alpha: [...].
        dr: gradient of the ridge scale r_t [...].
        db: gradient of the ridge offset b_t [...].
        mu: μ_t = r_t dλ_t / F_t, the part of dH_t along H_t [...].
        pi: π_t = ⟨G_t, H_t⟩ + ⟨E_t, U_t⟩ [...].
    """

    m: Tensor
    dm: Tensor
    dx: Tensor
    y: Tensor
    dq: Tensor
    d_alpha: Tensor
    dr: Tensor
    db: Tensor
    mu: Tensor
    pi: Tensor


def stage_a(
    chunks: Chunked, x: Tensor, fro: Tensor, d_output: Tensor, dx: Tensor | None, num_iter: int, scale: float
) -> StageA:
    """Kernel A: dm, the adjoint solve A_t y_t = dx_t, and the scalars of every token (docs/math.md §4.1–4.4).

    π = −y·q + b (y·x) + m·dm of §4.4 presumes A x = q. This takes −x·dx for −y·q, equal when both solves are exact, and
    so presumes A y = dx instead, which leaves π = (1 − α) q·dm − x·(incoming dx) + b (y·x). The adjoint solve makes
    more iterations than the forward, and its y is never rounded for storage, so that is more accurate: in a bf16
    problem that decays by 0.5 a token, x saved in fp16 costs dg 2e-4 instead of 1.3e-2.

    Args:
        chunks: operands, decays and states of the forward.
        x: x_t [B, H, L, C, D] of the forward (unused with ``num_iter = 0``).
        fro: F_t [B, H, L, C] of the forward (unused with ``num_iter = 0``).
        d_output: do_t [B, H, L, C, V].
        dx: incoming gradient of x_t [B, H, L, C, D] (``chunk_solve``), ``None`` for zero.
        num_iter: operator applications of the adjoint solve; 0: x = q, so G = 0 and α has no effect.
        scale: s.
    """
    operands, decays = chunks.operands, chunks.decays
    across = decays.gamma[..., None] * (d_output @ chunks.kv.starts.mT)
    dm = scale * (across + (decays.pair * (d_output @ operands.v.mT)) @ operands.k)
    incoming = torch.zeros_like(dm) if dx is None else dx

    if num_iter == 0:
        none = torch.zeros_like(operands.r)
        return StageA(
            m=operands.q,
            dm=dm,
            dx=incoming,
            y=torch.zeros_like(dm),
            dq=dm + incoming,
            d_alpha=none,
            dr=none,
            db=none,
            mu=none,
            pi=_dot(operands.q, dm),
        )

    alpha = operands.alpha[..., None]
    dx = alpha * dm + incoming
    operator = chunk_operator(operands, decays, chunks.kk.starts, fro)
    y = operator.solve(dx, num_iter)
    d_lambda = -_dot(y, x)
    regular = operator.norms.regular
    m = mix(operands.q, x, operands.alpha)
    return StageA(
        m=m,
        dm=dm,
        dx=dx,
        y=y,
        dq=(1.0 - alpha) * dm + y,
        d_alpha=_dot(dm, x - operands.q),
        dr=torch.where(regular, d_lambda * fro, 0.0),
        db=d_lambda,
        mu=torch.where(regular, operands.r * d_lambda / fro, 0.0),
        pi=(1.0 - operands.alpha) * _dot(operands.q, dm) - _dot(x, incoming) - operands.b * d_lambda,
    )


# ---------------------------------------------------------------------------------------------------------- stage B
class StageB(NamedTuple):
    """What reaches every chunk from later ones (docs/math.md §4.2).

    Attributes:
        kk: Ω⁺, or R⁺ where the scan carried R [B, H, L, D, D]; symmetric.
        kv: Ξ⁺ [B, H, L, D, V].
        w: w⁺ [B, H, L]; the gradient of the chunk-end H is ``kk + w · H_end``. Zero where the scan carried Ω.
        d_initial_kk: dH_0 [N, H, D, D], the symmetric gradient, fresh.
        d_initial_kv: dU_0 [N, H, D, V], fresh.
    """

    kk: Tensor
    kv: Tensor
    w: Tensor
    d_initial_kk: Tensor
    d_initial_kv: Tensor


def chunk_w(mu: Tensor, pair: Tensor) -> Tensor:
    """Chunk-local w_t = Σ_{s≥t} Γ_st² μ_s [B, H, L, C] (docs/math.md §4.2)."""
    return (pair.square().mT @ mu[..., None])[..., 0]


def _scan(increments: Tensor, total: Tensor, final: Tensor, table: ChunkTable) -> tuple[Tensor, Tensor]:
    """Z⁻ = γ_C Z⁺ + increment in reverse over the chunks of every sequence.

    Args:
        increments: [B, H, L, ...].
        total: the factor of each chunk [B, H, L, ...], broadcastable.
        final: the gradients at the sequence ends [N, H, ...].
        table: which chunks belong to which sequence.

    Returns:
        Z⁺ of every chunk [B, H, L, ...] and what leaves each sequence at its start [N, H, ...], both fresh.
    """
    B = increments.shape[0]
    incoming, leaving = torch.empty_like(increments), []
    for state, (first, last) in zip(final.split(B) if B else [final], table.spans, strict=True):
        for i in reversed(range(first, last)):
            incoming[:, :, i] = state
            state = total[:, :, i] * state + increments[:, :, i]
        leaving.append(state)
    return incoming, torch.cat(leaving)


def stage_b(
    chunks: Chunked,
    x: Tensor,
    d_output: Tensor,
    a: StageA,
    d_final_kk: Tensor | None,
    d_final_kv: Tensor | None,
    scale: float,
    carry: Carry = "omega",
) -> StageB:
    """The reverse scan over chunks, of Ω and Ξ or of R and Ξ (docs/math.md §4.2, kernel B of §4.3).

    Args:
        chunks: operands, decays and states of the forward.
        x: x_t [B, H, L, C, D].
        d_output: do_t [B, H, L, C, V].
        a: stage A.
        d_final_kk: dH_T [N, H, D, D], ``None`` for zero; its symmetric part counts.
        d_final_kv: dU_T [N, H, D, V], ``None`` for zero.
        scale: s.
        carry: ``"omega"`` restarts w in every chunk and needs Hc; ``"r"`` carries w over the whole sequence and needs H
            only at its start.
    """
    table, operands, decays, kk, kv = chunks
    gamma, total = decays.gamma[..., None], decays.total
    if d_final_kk is None:
        d_final_kk = torch.zeros_like(kk.final)
    if d_final_kv is None:
        d_final_kv = torch.zeros_like(kv.final)

    w = chunk_w(a.mu, decays.pair)
    w_0 = _dot(decays.gamma.square(), a.mu)
    w_plus, w_minus = torch.zeros_like(w_0), None
    if carry == "r":
        w_plus, w_minus = _scan(w_0, total.square(), kk.final.new_zeros(kk.final.shape[:2]), table)
        w = w + decays.tau.square() * w_plus[..., None]

    d_kk = operands.k.mT @ (gamma * w[..., None] * operands.k) - _sym(x.mT @ (gamma * a.y))
    d_kv = scale * (a.m.mT @ (gamma * d_output))
    if carry == "omega":
        d_kk = d_kk + w_0[..., None, None] * kk.starts

    factor = total[..., None, None]
    kk_plus, d_initial_kk = _scan(d_kk, factor, _sym(d_final_kk.to(d_kk.dtype)), table)
    kv_plus, d_initial_kv = _scan(d_kv, factor, d_final_kv.to(d_kv.dtype), table)
    if w_minus is not None:
        d_initial_kk = d_initial_kk + w_minus[..., None, None] * _sequence_starts(chunks)
    return StageB(kk_plus, kv_plus, w_plus, d_initial_kk, d_initial_kv)


def _sequence_starts(chunks: Chunked) -> Tensor:
    """H_0 of every sequence [N, H, D, D]; zero for an empty one, which has no w."""
    starts = chunks.kk.starts
    nothing = torch.zeros_like(chunks.kk.final[: starts.shape[0]])
    return torch.cat([starts[:, :, first] if first < last else nothing for first, last in chunks.table.spans])


# ---------------------------------------------------------------------------------------------------------- stage C
class StageC(NamedTuple):
    """Gradients of the effective keys and values, and of the log decay; rows [B, H, L, C, ·].

    Attributes:
        dk: gradient of the effective key [..., D].
        dv: gradient of the effective value [..., V].
        kappa: κ_t = k_tᵀ Ω_t k_t + k_tᵀ Ξ_t v_t [...].
        dg: gradient of g_t [...].
    """

    dk: Tensor
    dv: Tensor
    kappa: Tensor
    dg: Tensor


def stage_c(chunks: Chunked, x: Tensor, d_output: Tensor, a: StageA, b: StageB, scale: float) -> StageC:
    """Kernel C: dk, dv, κ and dg of every token from its chunk and Ω⁺ (or R⁺), Ξ⁺ (docs/math.md §4.2, §4.4)."""
    _, operands, decays, kk, kv = chunks
    k, v, gamma, pair = operands.k, operands.v, decays.gamma[..., None], decays.pair
    tau, later = decays.tau[..., None], decays.pair.mT

    w = chunk_w(a.mu, pair) + decays.tau.square() * b.w[..., None]
    lower = pair * w[..., None]
    symmetric = lower + lower.tril(-1).mT

    dk = (
        2 * tau * (k @ b.kk)
        - (later * (k @ x.mT)) @ a.y
        - (later * (k @ a.y.mT)) @ x
        + 2 * gamma * w[..., None] * (k @ kk.starts)
        + 2 * (symmetric * (k @ k.mT)) @ k
        + tau * (v @ b.kv.mT)
        + scale * (later * (v @ d_output.mT)) @ a.m
    )
    dv = tau * (k @ b.kv) + scale * (later * (k @ a.m.mT)) @ d_output

    kappa = (_dot(k, dk) + _dot(v, dv)) / 2
    boundary = (b.kk * kk.ends).sum((-2, -1)) + b.w * kk.ends.square().sum((-2, -1)) + (b.kv * kv.ends).sum((-2, -1))
    dg = boundary[..., None] + (a.pi - kappa).flip(-1).cumsum(-1).flip(-1)
    return StageC(dk, dv, kappa, dg)


# ---------------------------------------------------------------------------------------------------------- stage D
class Gradients(NamedTuple):
    """Gradients of the operator's inputs, each of its input's shape and dtype, fresh; ``None`` for an absent input."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    d_log_decay: Tensor | None
    d_alpha: Tensor | None
    d_beta: Tensor | None
    d_ridge_scale: Tensor | None
    d_ridge_offset: Tensor | None
    d_A_log: Tensor | None
    d_dt_bias: Tensor | None
    d_initial_kk: Tensor | None
    d_initial_kv: Tensor | None


def l2norm_backward(x: Tensor, d_normalised: Tensor) -> Tensor:
    """Gradient of x from that of x̂ = x / max(‖x‖, ε) over the last dimension (docs/math.md §4.5)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    unit = l2norm(x)
    radial = torch.where(norm > NORM_EPS, _dot(unit, d_normalised)[..., None], 0.0)
    return (d_normalised - unit * radial) / norm.clamp(min=NORM_EPS)


class GateGradients(NamedTuple):
    """Gradients of ``log_decay`` [B, T, H], ``A_log`` [H] and ``dt_bias`` [H]; the last two ``None`` without a gate."""

    log_decay: Tensor
    A_log: Tensor | None
    dt_bias: Tensor | None


def gate_backward(log_decay: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, dg: Tensor) -> GateGradients:
    """Back through the clamp at ``MIN_LOG_DECAY`` (no gradient at or below) and the decay gate (docs/math.md §4.5)."""
    g = raw_log_decay(log_decay, A_log, dt_bias, dg.dtype)
    clamped = g <= MIN_LOG_DECAY
    dg = dg.masked_fill(clamped, 0.0)
    if A_log is None:
        return GateGradients(dg, None, None)
    biased = log_decay.to(dg.dtype) + (0.0 if dt_bias is None else dt_bias.to(dg.dtype))
    da = (-dg * A_log.to(dg.dtype).exp() * biased.sigmoid()).masked_fill(clamped, 0.0)
    return GateGradients(da, (dg * g).masked_fill(clamped, 0.0).sum((0, 1)), da.sum((0, 1)))


def _ridge_part(part: float | Tensor, gradient: Tensor) -> Tensor | None:
    """The per-token gradient [B, T, H], summed to the shape of its tensor; ``None`` for a float."""
    if not isinstance(part, Tensor):
        return None
    return gradient if part.ndim == 3 else gradient.sum((0, 1))


def _group_sum(x: Tensor, heads: int) -> Tensor:
    """[B, T, H, ·] summed over the query heads of each of ``heads`` key/value heads."""
    return x.unflatten(2, (heads, x.shape[2] // heads)).sum(3)


def stage_d(inputs: Inputs, table: ChunkTable, a: StageA, b: StageB, c: StageC) -> Gradients:
    """From gradients of effective operands to those of the operator's inputs (docs/math.md §4.5)."""
    dtype = compute_dtype(inputs.q.dtype)
    heads = inputs.k.shape[2]
    group = inputs.q.shape[2] // heads
    q, k, v = inputs.q.to(dtype), inputs.k.to(dtype), inputs.v.to(dtype)
    dq, dk, dv = table.to_tokens(a.dq), table.to_tokens(c.dk), table.to_tokens(c.dv)

    d_beta = None
    if inputs.beta is not None:
        unit = l2norm(k) if inputs.qk_l2norm else k
        d_beta = _dot(unit.repeat_interleave(group, dim=2), dk) + _dot(v.repeat_interleave(group, dim=2), dv)
        beta = inputs.beta.to(dtype)[..., None]
        dk, dv = beta * dk, beta * dv
    dk, dv = _group_sum(dk, heads), _group_sum(dv, heads)
    if inputs.qk_l2norm:
        dq, dk = l2norm_backward(q, dq), l2norm_backward(k, dk)

    gate = GateGradients(table.to_tokens(c.dg), None, None)
    if inputs.log_decay is not None:
        gate = gate_backward(inputs.log_decay, inputs.A_log, inputs.dt_bias, gate.log_decay)

    def cast(gradient: Tensor | None, like: float | Tensor | None) -> Tensor | None:
        return gradient.to(like.dtype).contiguous() if gradient is not None and isinstance(like, Tensor) else None

    return Gradients(
        dq=dq.to(inputs.q.dtype),
        dk=dk.to(inputs.k.dtype),
        dv=dv.to(inputs.v.dtype),
        d_log_decay=cast(gate.log_decay, inputs.log_decay),
        d_alpha=cast(table.to_tokens(a.d_alpha), inputs.alpha),
        d_beta=cast(d_beta, inputs.beta),
        d_ridge_scale=cast(_ridge_part(inputs.ridge_scale, table.to_tokens(a.dr)), inputs.ridge_scale),
        d_ridge_offset=cast(_ridge_part(inputs.ridge_offset, table.to_tokens(a.db)), inputs.ridge_offset),
        d_A_log=cast(gate.A_log, inputs.A_log),
        d_dt_bias=cast(gate.dt_bias, inputs.dt_bias),
        d_initial_kk=cast(b.d_initial_kk, inputs.initial_kk),
        d_initial_kv=cast(b.d_initial_kv, inputs.initial_kv),
    )


# --------------------------------------------------------------------------------------------------------- backward
def backward(
    inputs: Inputs,
    x: Tensor,
    fro: Tensor,
    d_output: Tensor,
    dx: Tensor | None,
    d_final_kk: Tensor | None,
    d_final_kv: Tensor | None,
    num_iter: int,
    scale: float = 1.0,
    *,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    carry: Carry = "omega",
) -> Gradients:
    """The whole backward: stages A to D (docs/math.md §4).

    Args:
        inputs: the operator's tensors.
        x: x_t [B, T, H, D] of the forward; ignored with ``num_iter = 0``.
        fro: F_t [B, T, H] of the forward; ignored with ``num_iter = 0``.
        d_output: do_t [B, T, H, V].
        dx: incoming gradient of x_t [B, T, H, D], or ``None``.
        d_final_kk: dH_T [N, H, D, D], or ``None``.
        d_final_kv: dU_T [N, H, D, V], or ``None``.
        num_iter: operator applications of the adjoint solve.
        scale: s of the read-out.
        chunk_size: C; changes the result only by rounding.
        carry: what stage B scans.
    """
    chunks = chunked(inputs, chunk_size)
    table, operands = chunks.table, chunks.operands
    dtype = operands.q.dtype
    do_rows = table.to_chunks(d_output.to(dtype))
    dx_rows = None if dx is None else table.to_chunks(dx.to(dtype))
    x_rows, fro_rows = operands.q, torch.zeros_like(operands.r)
    if num_iter > 0:
        x_rows, fro_rows = table.to_chunks(x.to(dtype)), table.to_chunks(fro.to(dtype))

    a = stage_a(chunks, x_rows, fro_rows, do_rows, dx_rows, num_iter, scale)
    b = stage_b(chunks, x_rows, do_rows, a, d_final_kk, d_final_kv, scale, carry)
    c = stage_c(chunks, x_rows, do_rows, a, b, scale)
    return stage_d(inputs, table, a, b, c)
