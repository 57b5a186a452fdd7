"""Backward, stage C: gradients of keys, values, β and log decay of one chunk (MATH.md §4.2, 4.4, 4.5)."""

import triton
import triton.language as tl

from gka_ops.triton.primitives import (
    chunk_bounds,
    decay_matrix,
    dot_transposed_split,
    key_weight,
    load_log_decay,
    load_query,
    load_rows,
    load_scalars,
    load_solution,
    load_square_state,
    load_state,
    normalise_rows_backward,
    scale_rows,
    sigmoid,
    split_along_query,
    store_rows,
)


@triton.jit(do_not_specialize=["T"])
def chunk_backward_gradient_kernel(
    q,  # [tokens, H, D]
    k,  # [tokens, Hkv, D]
    v,  # [tokens, Hkv, V], or None: solve only
    d_output,  # [tokens, H, V], or None: solve only
    log_decay,  # [tokens, H] or None
    A_log,  # [H] or None
    dt_bias,  # [H] or None
    alpha,  # [tokens, H] or None
    beta,  # [tokens, H] or None
    x,  # [tokens, H, D]; read if SOLVE
    x_scale,  # [tokens, H] fp32 or None
    x_query,  # [tokens, H] fp32; read with x_scale
    fro,  # [tokens, H] fp32; read if SOLVE
    y,  # [tokens, H, D] row-scaled, operand dtype or fp32; read if SOLVE
    y_scale,  # [tokens, H] fp32; read if SOLVE
    w_local,  # [tokens, H] fp32; read if SOLVE
    pi,  # [tokens, H] fp32
    kk,  # H_c, read with dkk
    kk_units,
    kv,  # U_c, read with v
    kv_units,
    dkk,  # R⁺ [chunks, H, BLOCK_D, BLOCK_D], or None: no gradient of H
    dkk_units,
    w_next,  # [chunks, H] fp32
    dkv,  # Ξ⁺ [chunks, H, BLOCK_D, V_PAD]; read with v
    dkv_units,
    dk,  # out [tokens, H, D], per query head
    dv,  # out [tokens, H, V], per query head
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
    BLOCK_N: tl.constexpr,
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
    """One program does one chunk of one query head. With effective keys κ_t k̂_t and values β_t v_t:

    dK = 2τ K R⁺ − (Mᵀ∘K Xᵀ) Y − (Mᵀ∘K Yᵀ) X + 2wγ K H_c + 2 (W∘K Kᵀ) K + τ V Ξ⁺ᵀ + s (Mᵀ∘V dOᵀ) Mix
    dV = τ K Ξ⁺ + s (Mᵀ∘K Mixᵀ) dO,   dg_t = J⁺ + Σ_{s>=t} (π_s − (k_s·dk_s + v_s·dv_s)/2)
    """
    i_c, i_h = tl.program_id(0), tl.program_id(1)
    i_n, start, end = chunk_bounds(i_c, T, cu_seqlens, chunk_offsets, chunk_sequence, C)
    if i_n < 0:
        return
    i_state = i_c.to(tl.int64) * H + i_h
    o_c, o_d = tl.arange(0, C), tl.arange(0, BLOCK_D)
    o_t = start + o_c
    m_t = o_t < end
    o_row = o_t.to(tl.int64) * H + i_h
    o_kv = o_t.to(tl.int64) * (H // GROUP) + i_h // GROUP

    b_g = load_log_decay(log_decay, A_log, dt_bias, o_row, m_t, i_h, MIN_LOG_DECAY)
    b_c = tl.cumsum(b_g, axis=0)
    c_end = tl.sum(b_g, axis=0)
    gamma, tau, gamma_end = tl.exp(b_c), tl.exp(c_end - b_c), tl.exp(c_end)
    anticausal = o_c[:, None] <= o_c[None, :]
    b_mt = tl.exp(tl.where(anticausal, b_c[None, :] - b_c[:, None], float("-inf")))  # Mᵀ: [t, s] for s >= t
    b_beta = load_scalars(beta, o_row, m_t, 1.0)
    b_k32, unit_k = scale_rows(load_rows(k, o_kv, m_t, o_d, D, BLOCK_D))
    kappa = key_weight(b_k32, unit_k, b_beta, QK_L2NORM, NORM_EPS)
    b_k = b_k32.to(OPERAND)

    b_dk = tl.zeros((C, BLOCK_D), tl.float32)  # of the effective key; the factor κ_t follows after the part through H
    k_dk = tl.zeros((C,), tl.float32)  # k̂·dk of that part from fp32 scores: x is too large off the keys to round first
    j_next = 0.0  # J⁺ = <Ω⁺, H_end> + <Ξ⁺, U_end>

    # K Xᵀ and K Mixᵀ from K Qᵀ and K Wᵀ, where x = c q + w
    b_q, weight_q, _ = load_query(q, o_row, m_t, o_d, D, BLOCK_D, QK_L2NORM, NORM_EPS)
    b_km = tl.dot(b_k, tl.trans(b_q.to(OPERAND)), input_precision=PRECISION) * weight_q[None, :]
    b_q *= weight_q[:, None]
    b_mix, b_x, b_kx = b_q, b_q, b_km
    if SOLVE:
        b_x = load_solution(x, x_scale, x_query, b_q, o_row, m_t, o_d, D, BLOCK_D)
        b_w, c = split_along_query(b_x, b_q)
        b_w, unit_w = scale_rows(b_w)
        b_kw = tl.dot(b_k, tl.trans(b_w.to(OPERAND)), input_precision=PRECISION) * unit_w[None, :]
        b_kx = b_km * c[None, :] + b_kw
        b_alpha = load_scalars(alpha, o_row, m_t, 1.0)
        b_mix = b_q + b_alpha[:, None] * (b_x - b_q)
        b_km += b_alpha[None, :] * (b_kx - b_km)
    if dkk is not None:
        b_r, unit_r = load_square_state(dkk, dkk_units, i_state, BLOCK_D, BLOCK_N)
        b_kr = tl.dot(b_k, b_r, input_precision=PRECISION) * unit_r
        b_dk += 2 * tau[:, None] * b_kr
        k_r_k = tl.sum(b_kr * b_k32, axis=1)
        k_dk += 2 * tau * k_r_k
        j_next += tl.sum(tau * kappa * kappa * k_r_k, axis=0)
        b_h, unit_h = load_square_state(kk, kk_units, i_state, BLOCK_D, BLOCK_N)
        r_h = tl.sum(tl.sum(b_r.to(tl.float32) * b_h.to(tl.float32), axis=1), axis=0)
        j_next += gamma_end * unit_r * unit_h * r_h
        if SOLVE:
            b_w_next = tl.load(w_next + i_state)
            f_end = tl.load(fro + (tl.minimum(start + C, end) - 1).to(tl.int64) * H + i_h)
            j_next += b_w_next * f_end * f_end
            b_w = load_scalars(w_local, o_row, m_t, 0.0) + tau * tau * b_w_next
            b_kh = tl.dot(b_k, b_h, input_precision=PRECISION) * (2 * b_w * gamma * unit_h)[:, None]
            b_dk += b_kh
            k_dk += tl.sum(b_kh * b_k32, axis=1)
            b_weight = decay_matrix(b_c, C) * b_w[:, None] + b_mt * b_w[None, :]
            b_weight = tl.where(o_c[:, None] == o_c[None, :], b_w[:, None], b_weight)
            b_gram = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION)
            b_p = b_gram * b_weight * (kappa * kappa)[None, :]
            k_dk += 2 * tl.sum(b_p * b_gram, axis=1)
            b_p, unit_p = scale_rows(b_p)
            b_dk += tl.dot(b_p.to(OPERAND), b_k, input_precision=PRECISION) * (2 * unit_p)[:, None]

            b_y = load_rows(y, o_row, m_t, o_d, D, BLOCK_D)
            b_weight = b_mt * load_scalars(y_scale, o_row, m_t, 0.0)[None, :]
            if y.dtype.element_ty == OPERAND:
                b_ky = tl.dot(b_k, tl.trans(b_y.to(OPERAND)), input_precision=PRECISION) * b_weight
            else:
                b_ky = dot_transposed_split(b_k, b_y, PRECISION) * b_weight
            k_dk -= 2 * tl.sum(b_kx * b_ky, axis=1)
            b_p, unit_p = scale_rows(b_kx * b_weight)
            b_dk -= tl.dot(b_p.to(OPERAND), b_y.to(OPERAND), input_precision=PRECISION) * unit_p[:, None]
            b_x, unit_x = scale_rows(b_x)
            b_p, unit_p = scale_rows(b_ky * unit_x[None, :])
            b_dk -= tl.dot(b_p.to(OPERAND), b_x.to(OPERAND), input_precision=PRECISION) * unit_p[:, None]
        b_dk *= kappa[:, None]

    v_dv = tl.zeros((C,), tl.float32)
    if v is not None:
        b_mix, unit_m = scale_rows(b_mix)
        b_mix = b_mix.to(OPERAND)
        b_km *= b_mt
        b_vdo = tl.zeros((C, C), tl.float32)
        b_vxi = tl.zeros((C, BLOCK_D), tl.float32)
        for i_v in range(V_PAD // BLOCK_V):
            o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
            b_do, unit_do = scale_rows(load_rows(d_output, o_row, m_t, o_v, V, V_PAD))
            b_do = b_do.to(OPERAND)
            b_v, unit_v = scale_rows(load_rows(v, o_kv, m_t, o_v, V, V_PAD))
            b_v16 = b_v.to(OPERAND)
            b_xi, unit_xi = load_state(dkv, dkv_units, i_state, i_v, V_PAD, BLOCK_D, BLOCK_V)
            b_u, unit_u = load_state(kv, kv_units, i_state, i_v, V_PAD, BLOCK_D, BLOCK_V)

            b_vxi += tl.dot(b_v16, tl.trans(b_xi), input_precision=PRECISION) * (unit_v * unit_xi)[:, None]
            b_vdo += tl.dot(b_v16, tl.trans(b_do), input_precision=PRECISION) * unit_v[:, None] * unit_do[None, :]
            b_dv = tl.dot(b_k, b_xi, input_precision=PRECISION) * (tau * kappa * unit_xi)[:, None]  # τ K Ξ⁺
            j_next += tl.sum(b_beta * unit_v * tl.sum(b_dv * b_v, axis=1), axis=0)
            xi_u = tl.sum(tl.sum(b_xi.to(tl.float32) * b_u.to(tl.float32), axis=1), axis=0)
            j_next += gamma_end * unit_xi * unit_u * xi_u
            b_p, unit_p = scale_rows(b_km * unit_do[None, :])
            b_dv += tl.dot(b_p.to(OPERAND), b_do, input_precision=PRECISION) * (scale * kappa * unit_p)[:, None]
            v_dv += unit_v * tl.sum(b_dv * b_v, axis=1)  # v_in·dv_e: β not yet applied
            store_rows(dv, b_dv * b_beta[:, None], o_row, m_t, o_v, V, V_PAD)
        b_p, unit_p = scale_rows(b_vdo * b_mt * unit_m[None, :])
        b_vdo_mix = tl.dot(b_p.to(OPERAND), b_mix, input_precision=PRECISION) * (scale * unit_p)[:, None]
        b_dk += b_beta[:, None] * (tau[:, None] * b_vxi + b_vdo_mix)

    # β scales key and value alike: β dβ = k·dk + v·dv, where the parts of k·dk and v·dv through U are equal
    if d_beta is not None:
        weight_k = key_weight(b_k32, unit_k, tl.where(m_t, 1.0, 1.0), QK_L2NORM, NORM_EPS)
        tl.store(d_beta + o_row, (weight_k * kappa * k_dk + 2 * v_dv).to(d_beta.dtype.element_ty), mask=m_t)
    if d_log_decay is not None:
        b_pi = load_scalars(pi, o_row, m_t, 0.0)
        b_kappa = tl.where(m_t, 0.5 * kappa * kappa * k_dk + b_beta * v_dv, 0.0)
        b_dg = j_next + tl.cumsum(b_pi - b_kappa, axis=0, reverse=True)
        b_dg = tl.where(m_t & (b_g > MIN_LOG_DECAY), b_dg, 0.0)
        if A_log is not None:
            b_a = load_scalars(log_decay, o_row, m_t, 0.0)
            if dt_bias is not None:
                b_a += tl.load(dt_bias + i_h).to(tl.float32)
            tl.store(d_A_log + i_state, tl.sum(b_dg * b_g, axis=0))
            b_dg *= -tl.exp(tl.load(A_log + i_h).to(tl.float32)) * sigmoid(b_a)
            if d_dt_bias is not None:
                tl.store(d_dt_bias + i_state, tl.sum(b_dg, axis=0))
        tl.store(d_log_decay + o_row, b_dg.to(d_log_decay.dtype.element_ty), mask=m_t)
    b_dk = normalise_rows_backward(b_dk * b_beta[:, None], b_k32, unit_k, QK_L2NORM, NORM_EPS)
    store_rows(dk, b_dk, o_row, m_t, o_d, D, BLOCK_D)
