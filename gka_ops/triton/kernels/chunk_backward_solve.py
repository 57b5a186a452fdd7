"""Backward, stage A2: the adjoint solve y = A⁻¹ dx, and what follows from it token by token (MATH.md §4.1)."""

import triton
import triton.language as tl

from gka_ops.triton.primitives import (
    as_sums,
    chebyshev,
    chunk_and_head,
    chunk_bounds,
    decay_matrix,
    decayed_squares_from,
    effective_query,
    formed_anew,
    key_weight,
    linearised,
    load_log_decay,
    load_ridge,
    load_scalars,
    load_solution,
    load_tile,
    normalise,
    normalise_rows_backward,
    operator_weights,
    scale_rows,
    state_operand,
    store_tile,
    token_rows_of_chunk,
)


@triton.jit
def load_upstream(
    dx, first_dm, first, o_r, o_d, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    THROUGH_READOUT: tl.constexpr,
):  # fmt: skip
    """Rows of dMix, which stage A1 left chunk by chunk, or of dLoss/dx."""
    if THROUGH_READOUT:
        return load_tile(dx + first_dm * D, o_r, o_d, D, D, BLOCK_D)
    else:
        return load_tile(dx + first * D, o_r, o_d, H * D, D, BLOCK_D)


@triton.jit(do_not_specialize=["T", "slab_first", "slab_chunks", "num_iter"])
def chunk_backward_solve_kernel(
    dx,  # fp32: dMix [chunks, H, C, D], or dLoss/dx [tokens, H, D] unless THROUGH_READOUT
    q,  # [tokens, H, D]
    k,  # [tokens, Hkv, D]
    log_decay,  # [tokens, H] or None
    A_log,  # [H] or None
    dt_bias,  # [H] or None
    alpha,  # [tokens, H] or None
    beta,  # [tokens, H] or None
    ridge_scale_tensor,  # [H] or [tokens, H] or None
    ridge_offset_tensor,  # [H] or [tokens, H] or None
    x,  # [tokens, H, D]
    x_scale,  # [tokens, H] fp32 or None
    x_query,  # [tokens, H] fp32; read with x_scale
    fro,  # [tokens, H] fp32
    kk,  # H_c [chunks, H, BLOCK_D, BLOCK_D]
    kk_units,  # [chunks, H] fp32
    dq,  # out [tokens, H, D]
    y,  # out [chunks, H, C, D] row-scaled, operand dtype or fp32
    y_scale,  # out [tokens, H] fp32; 0 for a zero row, which no bound of stage B then counts
    d_ridge_scale,  # out [tokens, H] fp32 or None
    d_ridge_offset,  # out [tokens, H] fp32 or None
    w_local,  # out [tokens, H] fp32: Σ_{s>=t in chunk} Γ_st² μ_s, μ_t = r_t dλ_t / F_t
    pi,  # in ((1 − α) q·dm; read if THROUGH_READOUT) and out [tokens, H] fp32: <G_t, H_t> + <E_t, U_t>
    cu_seqlens,
    chunk_offsets,
    chunk_sequence,
    slab_first,
    slab_chunks,
    ridge_scale,
    ridge_offset,
    num_iter,
    T,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    C: tl.constexpr,
    THROUGH_READOUT: tl.constexpr,
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
    """One program does one chunk of one query head: y from dx = α dMix; dq = (1 − α) dMix + y; dλ = −y·x.

    π = (1 − α) q·dMix − x·(incoming dx) + b (y·x), which takes A y = dx for granted rather than A x = q: x was
    stored rounded.
    """
    i_c, i_h = chunk_and_head(H)
    i_n, start, end = chunk_bounds(i_c, T, cu_seqlens, chunk_offsets, chunk_sequence, slab_first, slab_chunks, C)
    if i_n < 0:
        return
    i_state = i_c.to(tl.int64) * H + i_h
    o_d = tl.arange(0, BLOCK_D)
    m_t, o_row, o_r = token_rows_of_chunk(start, end, i_h, H, C)
    first = start.to(tl.int64) * H + i_h
    first_kv = start.to(tl.int64) * (H // GROUP) + i_h // GROUP

    # Everything that is read travels at once, before anything waits for it; after the solve likewise.
    b_g = load_log_decay(log_decay, A_log, dt_bias, o_row, m_t, i_h, MIN_LOG_DECAY)
    b_beta = load_scalars(beta, o_row, m_t, 1.0)
    b_fro = load_scalars(fro, o_row, m_t, 0.0)
    b_k = load_tile(k + first_kv * D, o_r, o_d, H // GROUP * D, D, BLOCK_D)
    h, unit_h = state_operand(kk, i_state, BLOCK_D, BLOCK_S), tl.load(kk_units + i_state)
    b_dx = load_upstream(dx, i_state * C, first, o_r, o_d, H, D, BLOCK_D, THROUGH_READOUT)

    b_c = tl.cumsum(b_g, axis=0)
    b_k, unit_k = scale_rows(as_sums(b_k.to(tl.float32), OPERAND))
    kappa = tl.where(m_t, key_weight(b_k, unit_k, b_beta, QK_L2NORM, NORM_EPS), 0.0)
    b_ridge = load_ridge(ridge_scale_tensor, ridge_scale, o_row, m_t, i_h, SCALE_PER_TOKEN)
    b_offset = load_ridge(ridge_offset_tensor, ridge_offset, o_row, m_t, i_h, OFFSET_PER_TOKEN)
    b_ridge, b_offset = linearised(b_fro, b_ridge, b_offset)
    inv_eta, weight_h = normalise(b_fro, b_ridge, b_offset, FRO_MIN, CONSTANT_DELTA)
    b_k = b_k.to(OPERAND)
    # Adding nothing of a product's makes Ψ a tile of the tensor cores' layout, where a thread has two rows, not 32.
    b_m = decay_matrix(b_c, C) + 0.0 * tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION)
    phi, b_psi = operator_weights(weight_h, unit_h, kappa, tl.exp(b_c), b_m)
    if CONSTANT_DELTA:
        delta = ridge_scale / (1 + ridge_scale)
    else:
        delta = (1 - b_fro * weight_h)[:, None]
    b_dx, weight_y = scale_rows(as_sums(b_dx.to(tl.float32), OPERAND))
    b_z = chebyshev(b_dx, h, b_k, phi, b_psi, delta, num_iter, BLOCK_S, PRECISION)
    weight_y *= inv_eta  # y = weight_y z

    start = formed_anew(start, num_iter)
    m_t, o_row, o_r = token_rows_of_chunk(start, end, i_h, H, C)
    first = start.to(tl.int64) * H + i_h
    first_y = formed_anew(i_state, num_iter) * C
    b_q = load_tile(q + first * D, o_r, o_d, H * D, D, BLOCK_D)
    b_x = load_tile(x + first * D, o_r, o_d, H * D, D, BLOCK_D)
    b_dx = load_upstream(dx, first_y, first, o_r, o_d, H, D, BLOCK_D, THROUGH_READOUT)
    b_alpha = load_scalars(alpha, o_row, m_t, 1.0)
    if THROUGH_READOUT:  # dx = α dMix
        weight_y *= b_alpha
    b_scaled, unit_y = scale_rows(b_z)
    store_tile(y + first_y * D, b_scaled, o_r, m_t, o_d, D, D, BLOCK_D)
    tl.store(y_scale + o_row, unit_y * weight_y, mask=m_t)

    b_q, weight_q, unit_q = effective_query(as_sums(b_q.to(tl.float32), OPERAND), QK_L2NORM, NORM_EPS)
    y_x = tl.sum(b_z * b_x.to(tl.float32), axis=1)
    if x_scale is not None:
        y_x *= load_scalars(x_scale, o_row, m_t, 0.0)
        y_x += load_scalars(x_query, o_row, m_t, 0.0) * weight_q * tl.sum(b_z * b_q, axis=1)
    b_d_lambda = -weight_y * y_x
    b_pi = -b_offset * b_d_lambda
    b_dx = b_dx.to(tl.float32)
    b_y = b_z * weight_y[:, None]
    if THROUGH_READOUT:
        b_pi += load_scalars(pi, o_row, m_t, 0.0)
        b_y += b_dx * (1 - b_alpha)[:, None]
    else:
        b_x = load_solution(x, x_scale, x_query, b_q * weight_q[:, None], o_row, m_t, o_d, D, BLOCK_D)
        b_pi -= tl.sum(b_dx * b_x, axis=1)
    tl.store(pi + o_row, b_pi, mask=m_t)
    b_dq = normalise_rows_backward(b_y, b_q, unit_q, QK_L2NORM, NORM_EPS)
    store_tile(dq + first * D, b_dq, o_r, m_t, o_d, H * D, D, BLOCK_D)

    vanishing = b_fro <= FRO_MIN
    b_mu = tl.where(vanishing, 0.0, b_ridge * b_d_lambda / tl.where(vanishing, 1.0, b_fro))
    b_c = tl.cumsum(load_log_decay(log_decay, A_log, dt_bias, o_row, m_t, i_h, MIN_LOG_DECAY), axis=0)
    tl.store(w_local + o_row, decayed_squares_from(b_c, tl.where(m_t, b_mu, 0.0), C), mask=m_t)
    if d_ridge_scale is not None:
        tl.store(d_ridge_scale + o_row, b_d_lambda * b_fro, mask=m_t)
    if d_ridge_offset is not None:
        tl.store(d_ridge_offset + o_row, b_d_lambda, mask=m_t)
