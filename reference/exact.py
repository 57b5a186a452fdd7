"""The specification: Gated KalmaNet token by token in fp64 with a direct solve (docs/math.md §1, §2 edge cases).

Differentiable by plain autograd in every floating-point argument: its gradients are the specification of the backward.
Keyword arguments are named as in ``gka_ops.api``, with plain tuples: ``ridge = (scale, offset)`` of floats or tensors
[H] or [B, T, H], ``gate = (A_log, dt_bias or None)``, states ``(kk, kv)``. Any ``num_iter`` but 0 means the exact
solve. Results are fp64. The gradient of an initial ``kk`` is autograd's; the operators return its symmetric part.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from gka_ops.numerics import FRO_MIN, MIN_LOG_DECAY, NORM_EPS

Ridge: TypeAlias = tuple[float | Tensor, float | Tensor]
Gate: TypeAlias = tuple[Tensor, Tensor | None]
State: TypeAlias = tuple[Tensor, Tensor]


def _fp64(value: float | Tensor | None, default: float, q: Tensor) -> Tensor:
    """[B, T, H] in fp64."""
    if value is None:
        value = default
    return torch.as_tensor(value, dtype=torch.float64, device=q.device).expand(q.shape[:3])


def _unit(x: Tensor) -> Tensor:
    # As x / max(‖x‖, ε), with finite derivatives of every order at x = 0.
    short = torch.linalg.vector_norm(x, dim=-1, keepdim=True) <= NORM_EPS
    norm = torch.linalg.vector_norm(torch.where(short, 1.0, x), dim=-1, keepdim=True)
    return x / torch.where(short, NORM_EPS, norm)


def _solve(h: Tensor, q: Tensor, r: Tensor, b: Tensor) -> Tensor:
    """x = (H + (r ‖H‖_F + b) I)⁻¹ q for h [..., D, D], q [..., D], with the policies for F near 0."""
    # The derivatives of the norm at H = 0 are taken as zero, those of second order too (autograd's would be NaN).
    nothing = (h == 0).all(-1).all(-1)
    fro = torch.where(nothing, 0.0, torch.linalg.matrix_norm(torch.where(nothing[..., None, None], 1.0, h)))
    lam = r * fro + b
    dead = fro + lam <= FRO_MIN
    flat = ~dead & (fro <= FRO_MIN) & (b > 0)
    # A flat row has x = q/b and the gradient of (H + b I)⁻¹ q at H = 0.
    h = torch.where(flat[..., None, None], h - h.detach(), h)
    lam = torch.where(flat, b, lam)
    eye = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    system = torch.where(dead[..., None, None], eye, h + lam[..., None, None] * eye)
    return torch.where(dead[..., None], 0.0, torch.linalg.solve(system, q[..., None])[..., 0])


def _log_decay(log_decay: Tensor | None, gate: Gate | None, q: Tensor) -> Tensor:
    g = _fp64(log_decay, 0.0, q)
    if gate is not None:
        A_log, dt_bias = gate
        a = g if dt_bias is None else g + dt_bias.to(torch.float64)
        g = -A_log.to(torch.float64).exp() * torch.logaddexp(a, torch.zeros_like(a))
    return torch.where(g <= MIN_LOG_DECAY, MIN_LOG_DECAY, g)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    ridge: Ridge,
    num_iter: int | str,
    scale: float,
    qk_l2norm: bool,
    gate: Gate | None,
    state: State | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, State]:
    """(x [B, T, H, D], output [B, T, H, V], final state)."""
    B, T, H, D = q.shape
    group, V = H // k.shape[2], v.shape[-1]
    g, alpha, beta = _log_decay(log_decay, gate, q), _fp64(alpha, 1.0, q), _fp64(beta, 1.0, q)
    r, b = _fp64(ridge[0], 0.0, q), _fp64(ridge[1], 0.0, q)
    q, k, v = q.to(torch.float64), k.to(torch.float64), v.to(torch.float64)
    if qk_l2norm:
        q, k = _unit(q), _unit(k)
    k = beta[..., None] * k.repeat_interleave(group, dim=2)
    v = beta[..., None] * v.repeat_interleave(group, dim=2)

    bounds = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
    sequences = len(bounds) - 1
    if state is None:
        state = q.new_zeros(B * sequences, H, D, D), q.new_zeros(B * sequences, H, D, V)
    xs, outputs, finals_kk, finals_kv = [q.new_empty(B, 0, H, D)], [q.new_empty(B, 0, H, V)], [], []
    for n in range(sequences):
        kk, kv = (part[n * B : (n + 1) * B].to(torch.float64) for part in state)
        for t in range(bounds[n], bounds[n + 1]):
            decay = g[:, t, :, None, None].exp()
            kk = decay * kk + k[:, t, :, :, None] * k[:, t, :, None, :]
            kv = decay * kv + k[:, t, :, :, None] * v[:, t, :, None, :]
            x = m = q[:, t]
            if num_iter != 0:
                x = _solve(kk, q[:, t], r[:, t], b[:, t])
                m = (1.0 - alpha[:, t, :, None]) * q[:, t] + alpha[:, t, :, None] * x
            xs.append(x[:, None])
            outputs.append(scale * torch.einsum("bhd,bhdv->bhv", m, kv)[:, None])
        finals_kk.append(kk)
        finals_kv.append(kv)
    return torch.cat(xs, 1), torch.cat(outputs, 1), (torch.cat(finals_kk), torch.cat(finals_kv))


def chunk_gka(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    ridge: Ridge = (0.02, 0.0),
    num_iter: int | str = "auto",
    scale: float | None = None,
    qk_l2norm: bool = False,
    gate: Gate | None = None,
    initial_state: State | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, State]:
    """(output [B, T, H, V], (H [N, H, D, D], U [N, H, D, V]) after each sequence), fp64."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    _, output, final = _run(
        q, k, v, log_decay, alpha, beta, ridge, num_iter, scale, qk_l2norm, gate, initial_state, cu_seqlens
    )
    return output, final


def chunk_solve(
    q: Tensor,
    k: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    ridge: Ridge = (0.02, 0.0),
    num_iter: int | str = "auto",
    qk_l2norm: bool = False,
    gate: Gate | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(x [B, T, H, D], H [N, H, D, D] after each sequence), fp64."""
    v = k.new_empty(*k.shape[:3], 0)
    state = None if initial_state is None else (initial_state, initial_state[..., :0])
    x, _, final = _run(q, k, v, log_decay, None, beta, ridge, num_iter, 1.0, qk_l2norm, gate, state, cu_seqlens)
    return x, final[0]


def recurrent_gka(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    state: State,
    state_indices: Tensor | None = None,
    ridge: Ridge = (0.02, 0.0),
    num_iter: int | str = "auto",
    scale: float | None = None,
    qk_l2norm: bool = False,
    gate: Gate | None = None,
) -> tuple[Tensor, State]:
    """Functional decode: (output [B, T, H, V], the new pool (kk, kv)), fp64; rows of negative index give 0."""
    slots = list(range(q.shape[0])) if state_indices is None else state_indices.tolist()
    rows = [row for row, slot in enumerate(slots) if slot >= 0]
    used = [slots[row] for row in rows]
    kk, kv = state[0].to(torch.float64), state[1].to(torch.float64)

    def pick(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[rows]

    parts = tuple(part[rows] if isinstance(part, Tensor) and part.ndim == 3 else part for part in ridge)
    output, final = chunk_gka(
        q[rows],
        k[rows],
        v[rows],
        pick(log_decay),
        pick(alpha),
        pick(beta),
        ridge=(parts[0], parts[1]),
        num_iter=num_iter,
        scale=scale,
        qk_l2norm=qk_l2norm,
        gate=gate,
        initial_state=(kk[used], kv[used]),
    )
    whole = output.new_zeros(*q.shape[:3], v.shape[-1])
    whole[rows] = output
    kk, kv = kk.clone(), kv.clone()
    kk[used], kv[used] = final
    return whole, (kk, kv)
