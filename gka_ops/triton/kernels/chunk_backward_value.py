"""Backward, stage C1: gradients of values, and of keys through U (MATH.md §4.2)."""

import triton
import triton.language as tl

from gka_ops.triton.primitives import (
    chunk_and_head,
    chunk_bounds,
    key_gradient,
    key_weight,
    load_log_decay,
    load_query,
    load_rows,
    load_scalars,
    load_solution,
    load_state,
    query_scores,
    row_norm,
    scale_rows,
    store_gate_gradients,
    store_rows,
    token_rows,
)


@triton.jit(do_not_specialize=["T"])
def chunk_backward_value_kernel(
    d_output,  # [tokens, H, V]
    q,  # [tokens, H, D]
    k,  # [tokens, Hkv, D]
    v,  # [tokens, Hkv, V]
    log_decay,  # [tokens, H] or None
    A_log,  # [H] or None
    dt_bias,  # [H] or None
    alpha,  # [tokens, H] or None
    beta,  # [tokens, H] or None
    x,  # [tokens, H, D]; read if SOLVE
    x_scale,  # [tokens, H] fp32 or None
    x_query,  # [tokens, H] fp32; read with x_scale
    kv,  # U_c [chunks, H, BLOCK_D, V_PAD]
    kv_units,  # [chunks, H, V_PAD / BLOCK_V] fp32
    dkv,  # Ξ⁺ [chunks, H, BLOCK_D, V_PAD]
    dkv_units,  # [chunks, H, V_PAD / BLOCK_V] fp32
    dv,  # out [tokens, H, V], per query head
    dk_u,  # out [tokens, H, D] fp32: the effective key's gradient through U, or None: none through H follows
    v_dv_u,  # out [tokens, H] fp32, with dk_u
    j_u,  # out [chunks, H] fp32: <Ξ⁺, U_end>, with dk_u
    pi,  # [tokens, H] fp32
    dk,  # out [tokens, H, D], per query head
    d_beta,  # out [tokens, H] or None
    d_log_decay,  # out [tokens, H] or None: of the raw projection when A_log is given
    d_A_log,  # out [chunks, H] fp32 partial sums, or None
    d_dt_bias,  # out [chunks, H] fp32 partial sums, or None
    cu_seqlens,
    chunk_offsets,
    chunk_sequence,
    scale,
    T,
    H,
    GROUP,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    V_PAD: tl.constexpr,
    C: tl.constexpr,
    SOLVE: tl.constexpr,
    QK_L2NORM: tl.constexpr,
    NORM_EPS: tl.constexpr,
    MIN_LOG_DECAY: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program does one chunk of one query head. With effective keys and values:

    dV = τ K Ξ⁺ + s (Mᵀ∘K Mixᵀ) dO,   dK through U = τ V Ξ⁺ᵀ + s (Mᵀ∘V dOᵀ) Mix
    """
    i_c, i_h = chunk_and_head(H)
    i_n, start, end = chunk_bounds(i_c, T, cu_seqlens, chunk_offsets, chunk_sequence, C)
    if i_n < 0:
        return
    i_state = i_c.to(tl.int64) * H + i_h
    o_c, o_d = tl.arange(0, C), tl.arange(0, BLOCK_D)
    m_t, o_row, o_kv = token_rows(start, end, i_h, H, GROUP, C)

    b_g = load_log_decay(log_decay, A_log, dt_bias, o_row, m_t, i_h, MIN_LOG_DECAY)
    b_c = tl.cumsum(b_g, axis=0)
    c_end = tl.sum(b_g, axis=0)
    tau, gamma_end = tl.exp(c_end - b_c), tl.exp(c_end)
    anticausal = o_c[:, None] <= o_c[None, :]
    b_mt = tl.exp(tl.where(anticausal, b_c[None, :] - b_c[:, None], float("-inf")))  # Mᵀ: [t, s] for s >= t
    b_beta = load_scalars(beta, o_row, m_t, 1.0)
    b_k, unit_k = scale_rows(load_rows(k, o_kv, m_t, o_d, D, BLOCK_D))
    kappa = key_weight(b_k, unit_k, b_beta, QK_L2NORM, NORM_EPS)
    b_k = b_k.to(OPERAND)

    b_dk = tl.zeros((C, BLOCK_D), tl.float32)  # of the effective key
    j_next = 0.0  # <Ξ⁺, U_end>
    v_dv = tl.zeros((C,), tl.float32)  # v·dv of the value that came in: β not yet applied
    b_km, b_kx, _ = query_scores(
        q, x, x_scale, x_query, b_k, o_row, m_t, o_d, D, BLOCK_D, SOLVE, QK_L2NORM, NORM_EPS, PRECISION
    )
    b_mix, weight_q, _ = load_query(q, o_row, m_t, o_d, D, BLOCK_D, QK_L2NORM, NORM_EPS)
    b_mix *= weight_q[:, None]
    if SOLVE:  # Mix = q + α (x − q), likewise its scores
        b_alpha = load_scalars(alpha, o_row, m_t, 1.0)
        b_x = load_solution(x, x_scale, x_query, b_mix, o_row, m_t, o_d, D, BLOCK_D)
        b_mix += b_alpha[:, None] * (b_x - b_mix)
        b_km += b_alpha[None, :] * (b_kx - b_km)
    b_km *= b_mt
    b_mix, unit_m = scale_rows(b_mix)
    b_mix = b_mix.to(OPERAND)
    b_vdo = tl.zeros((C, C), tl.float32)
    for i_v in range(V_PAD // BLOCK_V):
        o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
        b_do = load_rows(d_output, o_row, m_t, o_v, V, V_PAD)
        without = tl.max(tl.abs(b_do), axis=1) == 0
        b_do, unit_do = scale_rows(b_do)
        unit_do = tl.where(without, 0.0, unit_do)  # rows without a gradient must not set the unit of P's rows
        b_do = b_do.to(OPERAND)
        b_v, unit_v = scale_rows(load_rows(v, o_kv, m_t, o_v, V, V_PAD))
        b_v16 = b_v.to(OPERAND)
        i_unit = i_state * (V_PAD // BLOCK_V) + i_v
        b_xi, unit_xi = load_state(dkv, i_state, i_v, V_PAD, BLOCK_D, BLOCK_V), tl.load(dkv_units + i_unit)
        b_u, unit_u = load_state(kv, i_state, i_v, V_PAD, BLOCK_D, BLOCK_V), tl.load(kv_units + i_unit)
        xi_u = tl.sum(tl.sum(b_xi.to(tl.float32) * b_u.to(tl.float32), axis=1), axis=0)
        j_next += gamma_end * unit_xi * unit_u * xi_u
        b_vxi = tl.dot(b_v16, tl.trans(b_xi), input_precision=PRECISION)
        b_dk += b_vxi * (tau * unit_v * unit_xi)[:, None]
        b_vdo += tl.dot(b_v16, tl.trans(b_do), input_precision=PRECISION) * unit_v[:, None] * unit_do[None, :]
        b_dv = tl.dot(b_k, b_xi, input_precision=PRECISION) * (tau * kappa * unit_xi)[:, None]  # τ K Ξ⁺
        j_next += tl.sum(b_beta * unit_v * tl.sum(b_dv * b_v, axis=1), axis=0)
        b_p, unit_p = scale_rows(b_km * unit_do[None, :])
        b_dv += tl.dot(b_p.to(OPERAND), b_do, input_precision=PRECISION) * (scale * kappa * unit_p)[:, None]
        v_dv += unit_v * tl.sum(b_dv * b_v, axis=1)
        store_rows(dv, b_dv * b_beta[:, None], o_row, m_t, o_v, V, V_PAD)
    b_p, unit_p = scale_rows(b_vdo * b_mt * unit_m[None, :])
    b_dk += tl.dot(b_p.to(OPERAND), b_mix, input_precision=PRECISION) * (scale * unit_p)[:, None]
    b_dk *= b_beta[:, None]

    if dk_u is not None:
        store_rows(dk_u, b_dk, o_row, m_t, o_d, D, BLOCK_D)
        tl.store(v_dv_u + o_row, v_dv, mask=m_t)
        tl.store(j_u + i_state, j_next)
    else:
        k_dk = tl.zeros((C,), tl.float32)
        b_k = b_k.to(tl.float32)
        key_norm = row_norm(b_k, unit_k, NORM_EPS)
        store_gate_gradients(
            k_dk, v_dv, j_next, kappa, b_beta, key_norm, unit_k, b_g, d_beta, d_log_decay, d_A_log, d_dt_bias,
            log_decay, A_log, dt_bias, pi, o_row, m_t, i_h, i_state, QK_L2NORM, MIN_LOG_DECAY,
        )  # fmt: skip
        b_dk = key_gradient(b_dk, b_k, k_dk, v_dv, kappa, b_beta, key_norm, unit_k, QK_L2NORM, NORM_EPS)
        store_rows(dk, b_dk, o_row, m_t, o_d, D, BLOCK_D)
