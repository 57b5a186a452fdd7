"""Backward, stage C2: gradients of keys through H, and of β and the log decay (MATH.md §4.2, 4.4, 4.5)."""

import triton
import triton.language as tl

from gka_ops.triton.primitives import (
    chunk_and_head,
    chunk_bounds,
    decay_matrix,
    dot_transposed_split,
    key_gradient,
    key_weight,
    load_log_decay,
    load_query,
    load_rows,
    load_scalars,
    load_solution,
    load_state,
    pow2_floor,
    query_scores,
    row_norm,
    scale_rows,
    store_gate_gradients,
    store_rows,
    token_rows,
)


@triton.jit(do_not_specialize=["T"])
def chunk_backward_key_kernel(
    q,  # [tokens, H, D]
    k,  # [tokens, Hkv, D]
    log_decay,  # [tokens, H] or None
    A_log,  # [H] or None
    dt_bias,  # [H] or None
    beta,  # [tokens, H] or None
    x,  # [tokens, H, D]; read if SOLVE
    x_scale,  # [tokens, H] fp32 or None
    x_query,  # [tokens, H] fp32; read with x_scale
    y,  # [tokens, H, D] row-scaled, operand dtype or fp32; read if SOLVE
    y_scale,  # [tokens, H] fp32; read if SOLVE
    w_local,  # [tokens, H] fp32; read if SOLVE
    kk,  # H_c [chunks, H, BLOCK_D, BLOCK_D]
    kk_units,  # [chunks, H] fp32
    dkk,  # Ω⁺ [chunks, H, BLOCK_D, BLOCK_D]
    dkk_units,  # [chunks, H] fp32
    dk_u,  # [tokens, H, D] fp32: the part of the effective key's gradient through U, or None
    v_dv_u,  # [tokens, H] fp32: v·dv, with dk_u
    j_u,  # [chunks, H] fp32: <Ξ⁺, U_end>, with dk_u
    pi,  # [tokens, H] fp32
    dk,  # out [tokens, H, D], per query head
    d_beta,  # out [tokens, H] or None
    d_log_decay,  # out [tokens, H] or None: of the raw projection when A_log is given
    d_A_log,  # out [chunks, H] fp32 partial sums, or None
    d_dt_bias,  # out [chunks, H] fp32 partial sums, or None
    cu_seqlens,
    chunk_offsets,
    chunk_sequence,
    T,
    H,
    GROUP,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    C: tl.constexpr,
    SOLVE: tl.constexpr,
    QK_L2NORM: tl.constexpr,
    NORM_EPS: tl.constexpr,
    MIN_LOG_DECAY: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program does one chunk of one query head. Through H, with effective keys:

    dK = 2τ K Ω⁺ + 2wγ K H_c + 2 (W∘K Kᵀ) K − (Mᵀ∘K Xᵀ) Y − (Mᵀ∘K Yᵀ) X
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
    gamma, tau, gamma_end = tl.exp(b_c), tl.exp(c_end - b_c), tl.exp(c_end)
    anticausal = o_c[:, None] <= o_c[None, :]
    b_mt = tl.exp(tl.where(anticausal, b_c[None, :] - b_c[:, None], float("-inf")))  # Mᵀ: [t, s] for s >= t
    b_beta = load_scalars(beta, o_row, m_t, 1.0)
    b_k, unit_k = scale_rows(load_rows(k, o_kv, m_t, o_d, D, BLOCK_D))
    kappa = key_weight(b_k, unit_k, b_beta, QK_L2NORM, NORM_EPS)
    key_norm = row_norm(b_k, unit_k, NORM_EPS)
    b_k = b_k.to(OPERAND)

    unit_r, unit_h = tl.load(dkk_units + i_state), tl.load(kk_units + i_state)
    weight_r = 2 * tau * unit_r
    weight_h = gamma * 0.0
    k_dk = tl.zeros((C,), tl.float32)  # k̂·dk, over κ, from fp32 scores: x is too large off the keys to round it first
    j_next = 0.0  # J⁺ = <Ω⁺, H_end> + <Ξ⁺, U_end>
    if SOLVE:
        b_w = load_scalars(w_local, o_row, m_t, 0.0)
        weight_h = 2 * b_w * gamma * unit_h

        b_weight = decay_matrix(b_c, C) * b_w[:, None] + b_mt * b_w[None, :]
        b_weight = tl.where(o_c[:, None] == o_c[None, :], b_w[:, None], b_weight)
        b_gram = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION)
        b_p = b_gram * b_weight * (2 * kappa * kappa)[None, :]
        k_dk += tl.sum(b_p * b_gram, axis=1)
        b_p, unit_pk = scale_rows(b_p)
        b_pk = b_p.to(OPERAND)

        b_y = load_rows(y, o_row, m_t, o_d, D, BLOCK_D)
        b_weight = b_mt * load_scalars(y_scale, o_row, m_t, 0.0)[None, :]
        if y.dtype.element_ty == OPERAND:
            b_ky = tl.dot(b_k, tl.trans(b_y.to(OPERAND)), input_precision=PRECISION) * b_weight
        else:
            b_ky = dot_transposed_split(b_k, b_y, PRECISION) * b_weight
        _, b_kx, bound_x = query_scores(
            q, x, x_scale, x_query, b_k, o_row, m_t, o_d, D, BLOCK_D, True, QK_L2NORM, NORM_EPS, PRECISION
        )
        k_dk -= 2 * tl.sum(b_kx * b_ky, axis=1)
        b_p, unit_py = scale_rows(b_kx * b_weight)
        b_py = b_p.to(OPERAND)
        unit_x = pow2_floor(bound_x)
        b_p, unit_px = scale_rows(b_ky * unit_x[None, :])
        b_px = b_p.to(OPERAND)
        _, weight_q, unit_q = load_query(q, o_row, m_t, o_d, D, BLOCK_D, QK_L2NORM, NORM_EPS)
        weight_q /= unit_q

    # What the scalars need of the states, column block by column block; then, with them, the gradient likewise.
    k_r_k = tl.zeros((C,), tl.float32)
    r_h = 0.0
    for i_d in range(BLOCK_D // BLOCK_N):
        o_n = i_d * BLOCK_N + tl.arange(0, BLOCK_N)
        b_r = load_state(dkk, i_state, i_d, BLOCK_D, BLOCK_D, BLOCK_N)
        b_h = load_state(kk, i_state, i_d, BLOCK_D, BLOCK_D, BLOCK_N)
        r_h += tl.sum(tl.sum(b_r.to(tl.float32) * b_h.to(tl.float32), axis=1), axis=0)
        b_kn = load_rows(k, o_kv, m_t, o_n, D, BLOCK_D) * (1 / unit_k)[:, None]
        k_r_k += tl.sum(tl.dot(b_k, b_r, input_precision=PRECISION) * b_kn, axis=1)
        if SOLVE:
            k_dk += weight_h * tl.sum(tl.dot(b_k, b_h, input_precision=PRECISION) * b_kn, axis=1)
    k_r_k *= weight_r
    k_dk += k_r_k
    j_next += gamma_end * unit_r * unit_h * r_h + 0.5 * tl.sum(kappa * kappa * k_r_k, axis=0)
    v_dv = tl.zeros((C,), tl.float32)
    if dk_u is not None:
        v_dv += load_scalars(v_dv_u, o_row, m_t, 0.0)
        j_next += tl.load(j_u + i_state)
    store_gate_gradients(
        k_dk, v_dv, j_next, kappa, b_beta, key_norm, unit_k, b_g, d_beta, d_log_decay, d_A_log, d_dt_bias, log_decay,
        A_log, dt_bias, pi, o_row, m_t, i_h, i_state, QK_L2NORM, MIN_LOG_DECAY,
    )  # fmt: skip
    for i_d in range(BLOCK_D // BLOCK_N):
        o_n = i_d * BLOCK_N + tl.arange(0, BLOCK_N)
        b_r = load_state(dkk, i_state, i_d, BLOCK_D, BLOCK_D, BLOCK_N)
        b_dk = tl.dot(b_k, b_r, input_precision=PRECISION) * weight_r[:, None]
        b_kn = load_rows(k, o_kv, m_t, o_n, D, BLOCK_D) * (1 / unit_k)[:, None]
        if SOLVE:
            b_h = load_state(kk, i_state, i_d, BLOCK_D, BLOCK_D, BLOCK_N)
            b_dk += tl.dot(b_k, b_h, input_precision=PRECISION) * weight_h[:, None]
            b_dk += tl.dot(b_pk, b_kn.to(OPERAND), input_precision=PRECISION) * unit_pk[:, None]
            b_yn = load_rows(y, o_row, m_t, o_n, D, BLOCK_D)
            b_dk -= tl.dot(b_py, b_yn.to(OPERAND), input_precision=PRECISION) * unit_py[:, None]
            b_qn = load_rows(q, o_row, m_t, o_n, D, BLOCK_D) * weight_q[:, None]
            b_xn = load_solution(x, x_scale, x_query, b_qn, o_row, m_t, o_n, D, BLOCK_D) * (1 / unit_x)[:, None]
            b_dk -= tl.dot(b_px, b_xn.to(OPERAND), input_precision=PRECISION) * unit_px[:, None]
        b_dk *= kappa[:, None]
        if dk_u is not None:
            b_dk += load_rows(dk_u, o_row, m_t, o_n, D, BLOCK_D)
        b_dk = key_gradient(b_dk, b_kn, k_dk, v_dv, kappa, b_beta, key_norm, unit_k, QK_L2NORM, NORM_EPS)
        store_rows(dk, b_dk, o_row, m_t, o_n, D, BLOCK_D)
