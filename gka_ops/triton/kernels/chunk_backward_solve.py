"""Backward, stage A: the gradient of the read-out, the adjoint solve, and what follows token by token (MATH.md §4.1–4.2)."""

import triton
import triton.language as tl

from gka_ops.triton.primitives import (
    chebyshev,
    chunk_bounds,
    decay_matrix,
    key_weight,
    load_log_decay,
    load_query,
    load_ridge,
    load_rows,
    load_scalars,
    load_solution,
    load_square_state,
    load_state,
    normalise,
    normalise_rows_backward,
    operator_weights,
    scale_rows,
    store_rows,
)


@triton.jit(do_not_specialize=["T", "num_iter"])
def chunk_backward_solve_kernel(
    grad,  # dLoss/do [tokens, H, V], or dLoss/dx [tokens, H, D] when v is None
    q,  # [tokens, H, D]
    k,  # [tokens, Hkv, D]
    v,  # [tokens, Hkv, V], or None: solve only
    log_decay,  # [tokens, H] or None
    A_log,  # [H] or None
    dt_bias,  # [H] or None
    alpha,  # [tokens, H] or None
    beta,  # [tokens, H] or None
    ridge_scale_tensor,  # [H] or [tokens, H] or None
    ridge_offset_tensor,  # [H] or [tokens, H] or None
    x,  # [tokens, H, D]; read if SOLVE
    x_scale,  # [tokens, H] fp32 or None
    x_query,  # [tokens, H] fp32; read with x_scale
    fro,  # [tokens, H] fp32; read if SOLVE
    kk,  # H_c [chunks, H, BLOCK_D, BLOCK_D]; read if SOLVE
    kk_units,
    kv,  # U_c [chunks, H, BLOCK_D, V_PAD]; read if v is given
    kv_units,
    dq,  # out [tokens, H, D]
    y,  # out [tokens, H, D] row-scaled, operand dtype or fp32; written if SOLVE
    y_scale,  # out [tokens, H] fp32; written if SOLVE
    d_alpha,  # out [tokens, H] or None
    d_ridge_scale,  # out [tokens, H] fp32 or None
    d_ridge_offset,  # out [tokens, H] fp32 or None
    mu,  # out [tokens, H] fp32: μ_t = r_t dλ_t / F_t; written if SOLVE
    w_local,  # out [tokens, H] fp32: Σ_{s>=t in chunk} Γ_st² μ_s; written if SOLVE
    pi,  # out [tokens, H] fp32: <G_t, H_t> + <E_t, U_t>
    cu_seqlens,
    chunk_offsets,
    chunk_sequence,
    ridge_scale,
    ridge_offset,
    scale,
    num_iter,
    T,
    H,
    GROUP,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    V_PAD: tl.constexpr,
    C: tl.constexpr,
    SOLVE: tl.constexpr,
    SCALE_PER_TOKEN: tl.constexpr,
    OFFSET_PER_TOKEN: tl.constexpr,
    CONSTANT_DELTA: tl.constexpr,
    QK_L2NORM: tl.constexpr,
    NORM_EPS: tl.constexpr,
    FRO_MIN: tl.constexpr,
    MIN_LOG_DECAY: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program does one chunk of one query head."""
    i_c, i_h = tl.program_id(0), tl.program_id(1)
    i_n, start, end = chunk_bounds(i_c, T, cu_seqlens, chunk_offsets, chunk_sequence, C)
    if i_n < 0:
        return
    i_state = i_c.to(tl.int64) * H + i_h
    o_t, o_d = start + tl.arange(0, C), tl.arange(0, BLOCK_D)
    m_t = o_t < end
    o_row = o_t.to(tl.int64) * H + i_h
    o_kv = o_t.to(tl.int64) * (H // GROUP) + i_h // GROUP

    b_c = tl.cumsum(load_log_decay(log_decay, A_log, dt_bias, o_row, m_t, i_h, MIN_LOG_DECAY), axis=0)
    gamma = tl.exp(b_c)
    b_m = decay_matrix(b_c, C)
    b_beta = load_scalars(beta, o_row, m_t, 1.0)
    b_k32, unit_k = scale_rows(load_rows(k, o_kv, m_t, o_d, D, BLOCK_D))
    kappa = key_weight(b_k32, unit_k, b_beta, QK_L2NORM, NORM_EPS)
    b_k = b_k32.to(OPERAND)

    if v is not None:  # dm = s [γ dO Uᵀ + (M ∘ dO Vᵀ) K]
        b_dm = tl.zeros((C, BLOCK_D), tl.float32)
        b_s = tl.zeros((C, C), tl.float32)
        for i_v in range(V_PAD // BLOCK_V):
            o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
            b_do, unit_do = scale_rows(load_rows(grad, o_row, m_t, o_v, V, V_PAD))
            b_u, unit_u = load_state(kv, kv_units, i_state, i_v, V_PAD, BLOCK_D, BLOCK_V)
            b_v, unit_v = scale_rows(load_rows(v, o_kv, m_t, o_v, V, V_PAD))
            b_do = b_do.to(OPERAND)
            b_dm += tl.dot(b_do, tl.trans(b_u), input_precision=PRECISION) * (unit_do * unit_u)[:, None]
            b_dov = tl.dot(b_do, tl.trans(b_v.to(OPERAND)), input_precision=PRECISION)
            b_s += b_dov * unit_do[:, None] * unit_v[None, :]
        b_p, unit_p = scale_rows(b_s * b_m * (kappa * b_beta)[None, :])
        b_dm *= gamma[:, None]
        b_dm += tl.dot(b_p.to(OPERAND), b_k, input_precision=PRECISION) * unit_p[:, None]
        b_dx = b_dm * scale
    else:
        b_dx = load_rows(grad, o_row, m_t, o_d, D, BLOCK_D)

    b_q, weight_q, unit_q = load_query(q, o_row, m_t, o_d, D, BLOCK_D, QK_L2NORM, NORM_EPS)
    b_q *= weight_q[:, None]
    b_pi = tl.zeros((C,), tl.float32)
    b_dq = b_dx
    if SOLVE:
        b_x = load_solution(x, x_scale, x_query, b_q, o_row, m_t, o_d, D, BLOCK_D)
        if v is not None:
            b_alpha = load_scalars(alpha, o_row, m_t, 1.0)
            b_d_alpha = tl.sum(b_dx * (b_x - b_q), axis=1)
            if d_alpha is not None:
                tl.store(d_alpha + o_row, b_d_alpha.to(d_alpha.dtype.element_ty), mask=m_t)
            b_pi += tl.sum(b_dx * b_q, axis=1) + b_alpha * b_d_alpha  # m·dm
            b_dq = b_dx * (1 - b_alpha)[:, None]
            b_dx = b_dx * b_alpha[:, None]
        else:
            b_dq = tl.zeros((C, BLOCK_D), tl.float32)

        b_fro = load_scalars(fro, o_row, m_t, 0.0)
        b_ridge = load_ridge(ridge_scale_tensor, ridge_scale, o_row, m_t, i_h, SCALE_PER_TOKEN)
        b_offset = load_ridge(ridge_offset_tensor, ridge_offset, o_row, m_t, i_h, OFFSET_PER_TOKEN)
        inv_eta, weight_h = normalise(b_fro, b_ridge, b_offset, FRO_MIN)
        b_h, unit_h = load_square_state(kk, kk_units, i_state, BLOCK_D, BLOCK_N)
        phi, b_psi = operator_weights(weight_h, unit_h, kappa, gamma, b_m)
        if CONSTANT_DELTA:
            delta = ridge_scale / (1 + ridge_scale)
        else:
            delta = (1 - b_fro * weight_h)[:, None]
        b_dx, unit_dx = scale_rows(b_dx)
        b_y = chebyshev(b_dx, b_h, b_k, phi, b_psi, delta, num_iter, PRECISION) * (unit_dx * inv_eta)[:, None]

        b_dq += b_y
        b_d_lambda = -tl.sum(b_y * b_x, axis=1)
        b_pi -= tl.sum(b_y * b_q, axis=1) + b_offset * b_d_lambda
        vanishing = b_fro <= FRO_MIN
        b_mu = tl.where(vanishing, 0.0, b_ridge * b_d_lambda / tl.where(vanishing, 1.0, b_fro))
        tl.store(mu + o_row, b_mu, mask=m_t)
        tl.store(w_local + o_row, tl.sum(b_m * b_m * tl.where(m_t, b_mu, 0.0)[:, None], axis=0), mask=m_t)
        if d_ridge_scale is not None:
            tl.store(d_ridge_scale + o_row, b_d_lambda * b_fro, mask=m_t)
        if d_ridge_offset is not None:
            tl.store(d_ridge_offset + o_row, b_d_lambda, mask=m_t)
        b_y, unit_y = scale_rows(b_y)
        store_rows(y, b_y, o_row, m_t, o_d, D, BLOCK_D)
        tl.store(y_scale + o_row, unit_y, mask=m_t)
    elif v is not None:
        b_pi += tl.sum(b_dx * b_q, axis=1)
        if d_alpha is not None:
            tl.store(d_alpha + o_row, tl.zeros((C,), d_alpha.dtype.element_ty), mask=m_t)
    tl.store(pi + o_row, b_pi, mask=m_t)
    b_dq = normalise_rows_backward(b_dq, b_q * (1 / weight_q)[:, None], unit_q, QK_L2NORM, NORM_EPS)
    store_rows(dq, b_dq, o_row, m_t, o_d, D, BLOCK_D)
