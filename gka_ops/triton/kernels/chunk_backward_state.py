"""Backward, stage B: reverse state pass, R⁺ or Ξ⁺ at the end of every chunk (MATH.md §4.2, H-free version)."""

import triton
import triton.language as tl

from gka_ops.triton.primitives import (
    key_weight,
    largest_entry,
    load_log_decay,
    load_query,
    load_rows,
    load_scalars,
    load_solution,
    scale_rows,
    scale_tile,
    sequence_bounds,
    state_unit,
    token_rows,
)


@triton.jit(do_not_specialize=["T"])
def chunk_backward_state_kk_kernel(
    q,  # [tokens, H, D]; read with x_scale
    k,  # [tokens, Hkv, D]
    x,  # [tokens, H, D], or None: no solve, the gradient of H comes from its final value alone
    x_scale,  # [tokens, H] fp32 or None
    x_query,  # [tokens, H] fp32; read with x_scale
    y,  # [tokens, H, D] row-scaled
    y_scale,  # [tokens, H] fp32
    mu,  # [tokens, H] fp32
    w_local,  # [tokens, H] fp32
    log_decay,
    A_log,
    dt_bias,
    beta,
    initial,  # H_0 [N, H, D, D] fp32 or None; read with d_initial
    d_final,  # [N, H, D, D] fp32 or None
    states,  # out R⁺ [chunks, H, BLOCK_D, BLOCK_D] operand dtype
    units,  # out [chunks, H] fp32
    w_next,  # out [chunks, H] fp32: w⁺, so that Ω⁺ = R⁺ + w⁺ H_end
    d_initial,  # out [N, H, D, D] fp32 or None
    cu_seqlens,
    chunk_offsets,
    T,
    H,
    GROUP,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    C: tl.constexpr,
    QK_L2NORM: tl.constexpr,
    NORM_EPS: tl.constexpr,
    MIN_LOG_DECAY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program walks one sequence and query head backwards, holding one column block of R.

    R⁻ = γ_C R⁺ + Kᵀ diag(γ w) K − sym(Xᵀ diag(γ) Y),   w⁻ = Σ γ_s² μ_s + γ_C² w⁺
    """
    i_col, i_nh = tl.program_id(0), tl.program_id(1)
    i_n, i_h = i_nh // H, i_nh % H
    start, end, first_chunk, n_chunks = sequence_bounds(i_n, T, cu_seqlens, chunk_offsets, C)
    o_d, o_col = tl.arange(0, BLOCK_D), i_col * BLOCK_N + tl.arange(0, BLOCK_N)
    m_state = (o_d < D)[:, None] & (o_col < D)[None, :]
    p_nh = i_nh.to(tl.int64) * D * D
    p_state = p_nh + o_d[:, None] * D + o_col[None, :]
    p_stored = o_d[:, None] * BLOCK_D + o_col[None, :]

    b_r = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    b_w_next = 0.0
    bound = 0.0
    if d_final is not None:  # sym(dH_T)
        p_transposed = p_nh + o_col[None, :] * D + o_d[:, None]
        b_r += 0.5 * tl.load(d_final + p_state, mask=m_state, other=0.0)
        b_r += 0.5 * tl.load(d_final + p_transposed, mask=m_state, other=0.0)
        bound = largest_entry(d_final + p_nh, D, o_d, D, BLOCK_D, BLOCK_N, BLOCK_D // BLOCK_N)
    for i in range(n_chunks):
        i_c = n_chunks - 1 - i
        i_state = (first_chunk + i_c).to(tl.int64) * H + i_h
        unit, inverse = state_unit(bound)
        tl.store(states + i_state * BLOCK_D * BLOCK_D + p_stored, (b_r * inverse).to(states.dtype.element_ty))
        tl.store(units + i_state, unit, mask=i_col == 0)
        tl.store(w_next + i_state, b_w_next, mask=i_col == 0)

        m_t, o_row, o_kv = token_rows(start + i_c * C, end, i_h, H, GROUP, C)
        b_g = load_log_decay(log_decay, A_log, dt_bias, o_row, m_t, i_h, MIN_LOG_DECAY)
        c_end = tl.sum(b_g, axis=0)
        b_r *= tl.exp(c_end)
        bound *= tl.exp(c_end)
        if x is not None:
            b_c = tl.cumsum(b_g, axis=0)
            gamma, tau = tl.exp(b_c), tl.exp(c_end - b_c)
            b_w = load_scalars(w_local, o_row, m_t, 0.0) + tau * tau * b_w_next
            b_k, unit_k = scale_rows(load_rows(k, o_kv, m_t, o_d, D, BLOCK_D))
            kappa = key_weight(b_k, unit_k, load_scalars(beta, o_row, m_t, 1.0), QK_L2NORM, NORM_EPS)
            b_col = load_rows(k, o_kv, m_t, o_col, D, BLOCK_D)
            b_right, unit = scale_tile(b_col * (gamma * b_w * kappa * kappa / unit_k)[:, None])
            bound += 4 * tl.sum(gamma * tl.abs(b_w) * kappa * kappa, axis=0)  # scaled entries are below 2
            b_r += unit * tl.dot(
                tl.trans(b_k.to(states.dtype.element_ty)),
                b_right.to(states.dtype.element_ty),
                input_precision=PRECISION,
            )
            b_q, b_q_col = b_k, b_col  # unused where x is stored as it is
            if x_scale is not None:
                b_q, weight_q, unit_q = load_query(q, o_row, m_t, o_d, D, BLOCK_D, QK_L2NORM, NORM_EPS)
                b_q *= weight_q[:, None]
                b_q_col = load_rows(q, o_row, m_t, o_col, D, BLOCK_D) * (weight_q / unit_q)[:, None]
            b_x, unit_x = scale_rows(load_solution(x, x_scale, x_query, b_q, o_row, m_t, o_d, D, BLOCK_D))
            weight = -0.5 * gamma * load_scalars(y_scale, o_row, m_t, 0.0)
            b_col = load_rows(y, o_row, m_t, o_col, D, BLOCK_D)
            b_right, unit = scale_tile(b_col * (weight * unit_x)[:, None])
            bound += 8 * tl.sum(tl.abs(weight) * unit_x, axis=0)
            b_r += unit * tl.dot(
                tl.trans(b_x.to(states.dtype.element_ty)),
                b_right.to(states.dtype.element_ty),
                input_precision=PRECISION,
            )
            b_y = load_rows(y, o_row, m_t, o_d, D, BLOCK_D)
            b_col = load_solution(x, x_scale, x_query, b_q_col, o_row, m_t, o_col, D, BLOCK_D)
            b_right, unit = scale_tile(b_col * weight[:, None])
            b_r += unit * tl.dot(
                tl.trans(b_y.to(states.dtype.element_ty)),
                b_right.to(states.dtype.element_ty),
                input_precision=PRECISION,
            )
            b_mu = load_scalars(mu, o_row, m_t, 0.0)
            b_w_next = tl.sum(gamma * gamma * b_mu, axis=0) + tl.exp(2 * c_end) * b_w_next
    if d_initial is not None:  # dH_0 = Ω at the sequence's start = R + w H_0
        if x is not None:
            b_r += b_w_next * tl.load(initial + p_state, mask=m_state, other=0.0)
        tl.store(d_initial + p_state, b_r, mask=m_state)


@triton.jit(do_not_specialize=["T"])
def chunk_backward_state_kv_kernel(
    q,  # [tokens, H, D]
    x,  # [tokens, H, D], or None: m = q
    x_scale,  # [tokens, H] fp32 or None
    x_query,  # [tokens, H] fp32; read with x_scale
    d_output,  # [tokens, H, V]
    log_decay,
    A_log,
    dt_bias,
    alpha,
    d_final,  # [N, H, D, V] fp32 or None
    states,  # out Ξ⁺ [chunks, H, BLOCK_D, V_PAD] operand dtype
    units,  # out [chunks, H, V_PAD / BLOCK_V] fp32
    d_initial,  # out [N, H, D, V] fp32 or None
    cu_seqlens,
    chunk_offsets,
    scale,
    T,
    H,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    V_PAD: tl.constexpr,
    C: tl.constexpr,
    QK_L2NORM: tl.constexpr,
    NORM_EPS: tl.constexpr,
    MIN_LOG_DECAY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program walks one sequence and query head backwards, one column block: Ξ⁻ = γ_C Ξ⁺ + s Mᵀ diag(γ) dO."""
    i_v, i_nh = tl.program_id(0), tl.program_id(1)
    i_n, i_h = i_nh // H, i_nh % H
    start, end, first_chunk, n_chunks = sequence_bounds(i_n, T, cu_seqlens, chunk_offsets, C)
    o_d, o_v = tl.arange(0, BLOCK_D), i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_state = (o_d < D)[:, None] & (o_v < V)[None, :]
    p_state = i_nh.to(tl.int64) * D * V + o_d[:, None] * V + o_v[None, :]
    p_stored = o_d[:, None] * V_PAD + o_v[None, :]

    b_xi = tl.zeros((BLOCK_D, BLOCK_V), tl.float32)
    bound = 0.0
    if d_final is not None:
        b_xi += tl.load(d_final + p_state, mask=m_state, other=0.0)
        bound = largest_entry(d_final + i_nh.to(tl.int64) * D * V, V, o_d, D, BLOCK_D, BLOCK_V, V_PAD // BLOCK_V)
    for i in range(n_chunks):
        i_c = n_chunks - 1 - i
        i_state = (first_chunk + i_c).to(tl.int64) * H + i_h
        unit, inverse = state_unit(bound)
        tl.store(states + i_state * BLOCK_D * V_PAD + p_stored, (b_xi * inverse).to(states.dtype.element_ty))
        tl.store(units + i_state * (V_PAD // BLOCK_V) + i_v, unit)

        m_t, o_row, _ = token_rows(start + i_c * C, end, i_h, H, 1, C)
        b_g = load_log_decay(log_decay, A_log, dt_bias, o_row, m_t, i_h, MIN_LOG_DECAY)
        gamma = tl.exp(tl.cumsum(b_g, axis=0))
        b_mix, weight_q, _ = load_query(q, o_row, m_t, o_d, D, BLOCK_D, QK_L2NORM, NORM_EPS)
        b_mix *= weight_q[:, None]
        if x is not None:  # m = q + α (x − q)
            b_x = load_solution(x, x_scale, x_query, b_mix, o_row, m_t, o_d, D, BLOCK_D)
            b_mix += load_scalars(alpha, o_row, m_t, 1.0)[:, None] * (b_x - b_mix)
        b_mix, unit_m = scale_rows(b_mix)
        b_do = load_rows(d_output, o_row, m_t, o_v, V, V_PAD)
        b_do, unit = scale_tile(b_do * (scale * gamma * unit_m)[:, None])
        b_update = tl.dot(
            tl.trans(b_mix.to(states.dtype.element_ty)), b_do.to(states.dtype.element_ty), input_precision=PRECISION
        )
        gamma_end = tl.exp(tl.sum(b_g, axis=0))
        b_xi = b_xi * gamma_end + unit * b_update
        bound = bound * gamma_end + 4 * C * unit
    if d_initial is not None:
        tl.store(d_initial + p_state, b_xi, mask=m_state)
