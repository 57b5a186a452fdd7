"""Forward of one chunk: norms, Chebyshev solve, α mix and read-out in one kernel (MATH.md §2–3)."""

import triton
import triton.language as tl

from gka_ops.triton.primitives import (
    chebyshev,
    chunk_and_head,
    chunk_bounds,
    decay_matrix,
    dot_split,
    formed_anew,
    frobenius_norm,
    key_weight,
    load_log_decay,
    load_query,
    load_ridge,
    load_rows,
    load_scalars,
    load_state,
    normalise,
    operator_weights,
    scale_rows,
    split_along_query,
    state_inner_product,
    store_rows,
    token_rows,
)


@triton.jit(do_not_specialize=["T", "num_iter"])
def chunk_forward_kernel(
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
    kk,  # H_c [chunks, H, BLOCK_D, BLOCK_D] operand dtype; read if SOLVE
    kk_units,  # [chunks, H] fp32
    kv,  # U_c [chunks, H, BLOCK_D, V_PAD] operand dtype; read if v is given
    kv_units,  # [chunks, H, V_PAD / BLOCK_V] fp32
    output,  # out [tokens, H, V], or None: solve only
    x,  # out [tokens, H, D] or None
    x_scale,  # out [tokens, H] fp32, or None: x is stored as it is
    x_query,  # out [tokens, H] fp32: x = x_query·q + x_scale·x̂; written with x_scale
    fro,  # out ‖H_t‖_F [tokens, H] fp32 or None
    cu_seqlens,  # [N + 1] or None
    chunk_offsets,  # [N] or None
    chunk_sequence,  # [chunks] sequence of each chunk, -1 for unused, or None
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
    BLOCK_V: tl.constexpr,
    V_PAD: tl.constexpr,
    C: tl.constexpr,
    SOLVE: tl.constexpr,
    SCALE_PER_TOKEN: tl.constexpr,
    OFFSET_PER_TOKEN: tl.constexpr,
    CONSTANT_DELTA: tl.constexpr,  # the ridge is one float ratio: every Chebyshev coefficient is a scalar
    QK_L2NORM: tl.constexpr,
    NORM_EPS: tl.constexpr,
    FRO_MIN: tl.constexpr,
    MIN_LOG_DECAY: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program does one chunk of one query head."""
    i_c, i_h = chunk_and_head(H)
    i_n, start, end = chunk_bounds(i_c, T, cu_seqlens, chunk_offsets, chunk_sequence, C)
    if i_n < 0:
        return
    i_state = i_c.to(tl.int64) * H + i_h
    o_d = tl.arange(0, BLOCK_D)
    m_t, o_row, o_kv = token_rows(start, end, i_h, H, GROUP, C)

    b_c = tl.cumsum(load_log_decay(log_decay, A_log, dt_bias, o_row, m_t, i_h, MIN_LOG_DECAY), axis=0)
    gamma = tl.exp(b_c)
    b_m = decay_matrix(b_c, C)
    b_beta = load_scalars(beta, o_row, m_t, 1.0)
    b_k32, unit_k = scale_rows(load_rows(k, o_kv, m_t, o_d, D, BLOCK_D))
    kappa = key_weight(b_k32, unit_k, b_beta, QK_L2NORM, NORM_EPS)
    b_k = b_k32.to(OPERAND)
    b_q, weight_q, _ = load_query(q, o_row, m_t, o_d, D, BLOCK_D, QK_L2NORM, NORM_EPS)

    b_x = b_q * weight_q[:, None]  # num_iter = 0: x = q
    if SOLVE:
        b_h, unit_h = load_state(kk, i_state, 0, BLOCK_D, BLOCK_D, BLOCK_D), tl.load(kk_units + i_state)
        h_square = state_inner_product(kk, kk, i_state, BLOCK_D)
        b_fro = frobenius_norm(b_k, kappa, b_h, h_square, unit_h, gamma, b_m, C, PRECISION)
        b_ridge = load_ridge(ridge_scale_tensor, ridge_scale, o_row, m_t, i_h, SCALE_PER_TOKEN)
        b_offset = load_ridge(ridge_offset_tensor, ridge_offset, o_row, m_t, i_h, OFFSET_PER_TOKEN)
        inv_eta, weight_h = normalise(b_fro, b_ridge, b_offset, FRO_MIN)
        phi, b_psi = operator_weights(weight_h, unit_h, kappa, gamma, b_m)
        if CONSTANT_DELTA:
            delta = ridge_scale / (1 + ridge_scale)
        else:
            delta = (1 - b_fro * weight_h)[:, None]
        b_z = chebyshev(b_q, b_h, b_k, phi, b_psi, delta, num_iter, PRECISION)
        b_x = b_z * (weight_q * inv_eta)[:, None]
        start = formed_anew(start, num_iter)
        m_t, o_row, o_kv = token_rows(start, end, i_h, H, GROUP, C)
        if fro is not None:
            tl.store(fro + o_row, b_fro, mask=m_t)
        if x_scale is None:
            if x is not None:
                store_rows(x, b_x, o_row, m_t, o_d, D, BLOCK_D)
            if v is not None:
                b_q, weight_q, _ = load_query(q, o_row, m_t, o_d, D, BLOCK_D, QK_L2NORM, NORM_EPS)
                b_q *= weight_q[:, None]
                b_x = b_q + load_scalars(alpha, o_row, m_t, 1.0)[:, None] * (b_x - b_q)  # m = q + α (x − q)
        else:  # x = c q + w, and m = (1 − α + α c) q + α w
            b_q, weight_q, _ = load_query(q, o_row, m_t, o_d, D, BLOCK_D, QK_L2NORM, NORM_EPS)
            b_x, c = split_along_query(b_x, b_q * weight_q[:, None])
            b_x, unit_w = scale_rows(b_x)
            store_rows(x, b_x, o_row, m_t, o_d, D, BLOCK_D)
            tl.store(x_scale + o_row, unit_w, mask=m_t)
            tl.store(x_query + o_row, c, mask=m_t)
            if v is not None:
                b_alpha = load_scalars(alpha, o_row, m_t, 1.0)
                b_q, weight_q, _ = load_query(q, o_row, m_t, o_d, D, BLOCK_D, QK_L2NORM, NORM_EPS)
                b_x *= (b_alpha * unit_w)[:, None]
                b_x += b_q * (weight_q * (1 - b_alpha + b_alpha * c))[:, None]
    elif x is not None:
        store_rows(x, b_x, o_row, m_t, o_d, D, BLOCK_D)

    if v is not None:
        b_x, unit_m = scale_rows(b_x)
        b_s = dot_split(b_x, tl.trans(b_k), PRECISION)
        b_c = tl.cumsum(load_log_decay(log_decay, A_log, dt_bias, o_row, m_t, i_h, MIN_LOG_DECAY), axis=0)
        gamma = tl.exp(b_c)
        b_s *= decay_matrix(b_c, C) * (kappa * b_beta)[None, :]
        for i_v in range(V_PAD // BLOCK_V):
            o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
            b_u = load_state(kv, i_state, i_v, V_PAD, BLOCK_D, BLOCK_V)
            unit_u = tl.load(kv_units + i_state * (V_PAD // BLOCK_V) + i_v)
            b_v, unit_v = scale_rows(load_rows(v, o_kv, m_t, o_v, V, V_PAD))
            b_p, unit_p = scale_rows(b_s * unit_v[None, :])
            b_o = dot_split(b_x, b_u, PRECISION) * (gamma * unit_u)[:, None]
            b_o += tl.dot(b_p.to(OPERAND), b_v.to(OPERAND), input_precision=PRECISION) * unit_p[:, None]
            store_rows(output, b_o * (scale * unit_m)[:, None], o_row, m_t, o_v, V, V_PAD)
