"""Forward state pass: H_c or U_c at the start of every chunk, and after the last token (MATH.md §2, "states")."""

import triton
import triton.language as tl

from gka_ops.triton.primitives import (
    key_weight,
    largest_entry,
    load_log_decay,
    load_rows,
    load_scalars,
    scale_rows,
    scale_tile,
    sequence_bounds,
    state_unit,
    token_rows,
)


@triton.jit
def walk_sequence(
    k, r, log_decay, A_log, dt_bias, beta, initial, states, units, final, cu_seqlens, chunk_offsets, T, H, GROUP, i_r,
    i_nh, D: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, R_PAD: tl.constexpr,
    C: tl.constexpr, RIGHT_IS_KEY: tl.constexpr, QK_L2NORM: tl.constexpr, NORM_EPS: tl.constexpr,
    MIN_LOG_DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Column block ``i_r`` of the state S [BLOCK_D, R_PAD] of keys and right-hand rows r: S' = γ_C S + Kᵀ diag(τ) R."""
    i_n, i_h = i_nh // H, i_nh % H
    start, end, first_chunk, n_chunks = sequence_bounds(i_n, T, cu_seqlens, chunk_offsets, C)
    o_d, o_r = tl.arange(0, BLOCK_D), i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_state = (o_d < D)[:, None] & (o_r < R)[None, :]
    p_state = i_nh.to(tl.int64) * D * R + o_d[:, None] * R + o_r[None, :]
    p_stored = o_d[:, None] * R_PAD + o_r[None, :]

    b_state = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
    bound = 0.0
    if initial is not None:
        b_state += tl.load(initial + p_state, mask=m_state, other=0.0)
        bound = largest_entry(initial + i_nh.to(tl.int64) * D * R, R, o_d, D, BLOCK_D, BLOCK_R, R_PAD // BLOCK_R)
    for i_c in range(n_chunks):
        i_state = (first_chunk + i_c).to(tl.int64) * H + i_h
        unit, inverse = state_unit(bound)
        tl.store(states + i_state * BLOCK_D * R_PAD + p_stored, (b_state * inverse).to(states.dtype.element_ty))
        if RIGHT_IS_KEY:
            tl.store(units + i_state, unit, mask=i_r == 0)
        else:
            tl.store(units + i_state * (R_PAD // BLOCK_R) + i_r, unit)

        m_t, o_row, o_kv = token_rows(start + i_c * C, end, i_h, H, GROUP, C)
        b_g = load_log_decay(log_decay, A_log, dt_bias, o_row, m_t, i_h, MIN_LOG_DECAY)
        c_end = tl.sum(b_g, axis=0)
        b_tau = tl.exp(c_end - tl.cumsum(b_g, axis=0))
        b_beta = load_scalars(beta, o_row, m_t, 1.0)
        b_k, unit_k = scale_rows(load_rows(k, o_kv, m_t, o_d, D, BLOCK_D))
        kappa = key_weight(b_k, unit_k, b_beta, QK_L2NORM, NORM_EPS)
        b_r = load_rows(r, o_kv, m_t, o_r, R, R_PAD)
        if RIGHT_IS_KEY:
            weight = b_tau * kappa * kappa / unit_k
        else:
            weight = b_tau * kappa * b_beta
        b_r, unit_r = scale_tile(b_r * weight[:, None])
        if RIGHT_IS_KEY:  # scaled entries are below 2, so those of k̂ k̂ᵀ below 4; every column block must find the same
            bound_update = 4 * tl.sum(b_tau * kappa * kappa, axis=0)
        else:
            bound_update = 4 * C * unit_r
        b_update = tl.dot(
            tl.trans(b_k.to(states.dtype.element_ty)), b_r.to(states.dtype.element_ty), input_precision=PRECISION
        )
        gamma_end = tl.exp(c_end)
        b_state = b_state * gamma_end + b_update * unit_r
        bound = bound * gamma_end + bound_update
    if final is not None:
        tl.store(final + p_state, b_state, mask=m_state)


@triton.jit(do_not_specialize=["T"])
def chunk_state_kernel(
    k,  # [tokens, Hkv, D]
    v,  # [tokens, Hkv, V]; read if KV_BLOCKS
    log_decay,  # [tokens, H] or None
    A_log,  # [H] or None
    dt_bias,  # [H] or None
    beta,  # [tokens, H] or None
    initial_kk,  # [N, H, D, D] fp32 or None
    initial_kv,  # [N, H, D, V] fp32 or None
    kk,  # out H_c [chunks, H, BLOCK_D, BLOCK_D] operand dtype; written if KK_BLOCKS
    kk_units,  # out [chunks, H] fp32
    kv,  # out U_c [chunks, H, BLOCK_D, V_PAD] operand dtype; written if KV_BLOCKS
    kv_units,  # out [chunks, H, V_PAD / BLOCK_V] fp32
    final_kk,  # out [N, H, D, D] fp32 or None
    final_kv,  # out [N, H, D, V] fp32 or None
    cu_seqlens,  # [N + 1] or None
    chunk_offsets,  # [N] first chunk of each sequence, or None
    T,
    H,
    GROUP,  # query heads per key/value head
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    V_PAD: tl.constexpr,
    KK_BLOCKS: tl.constexpr,  # column blocks of H: BLOCK_D / BLOCK_N, or 0 to leave H out
    KV_BLOCKS: tl.constexpr,  # column blocks of U: V_PAD / BLOCK_V, or 0 to leave U out
    C: tl.constexpr,
    QK_L2NORM: tl.constexpr,
    NORM_EPS: tl.constexpr,
    MIN_LOG_DECAY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program walks one sequence and query head with one column block of H or of U; all blocks run side by side."""
    i_col, i_nh = tl.program_id(0), tl.program_id(1)
    if KK_BLOCKS > 0:
        if i_col < KK_BLOCKS:
            walk_sequence(
                k, k, log_decay, A_log, dt_bias, beta, initial_kk, kk, kk_units, final_kk, cu_seqlens, chunk_offsets, T,
                H, GROUP, i_col, i_nh, D, D, BLOCK_D, BLOCK_N, BLOCK_D, C, True, QK_L2NORM, NORM_EPS, MIN_LOG_DECAY,
                PRECISION,
            )  # fmt: skip
    if KV_BLOCKS > 0:
        if i_col >= KK_BLOCKS:
            walk_sequence(
                k, v, log_decay, A_log, dt_bias, beta, initial_kv, kv, kv_units, final_kv, cu_seqlens, chunk_offsets, T,
                H, GROUP, i_col - KK_BLOCKS, i_nh, D, V, BLOCK_D, BLOCK_V, V_PAD, C, False, QK_L2NORM, NORM_EPS,
                MIN_LOG_DECAY, PRECISION,
            )  # fmt: skip
