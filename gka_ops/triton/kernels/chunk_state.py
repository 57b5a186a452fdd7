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
)


@triton.jit(do_not_specialize=["T"])
def chunk_state_kernel(
    k,  # [tokens, Hkv, D]
    r,  # [tokens, Hkv, R] right-hand rows: k itself for H, v for U
    log_decay,  # [tokens, H] or None
    A_log,  # [H] or None
    dt_bias,  # [H] or None
    beta,  # [tokens, H] or None
    initial,  # [N, H, D, R] fp32 or None
    states,  # out [chunks, H, BLOCK_D, R_PAD] operand dtype
    units,  # out [chunks, H] (RIGHT_IS_KEY) or [chunks, H, R_PAD / BLOCK_R] fp32
    final,  # out [N, H, D, R] fp32 or None
    cu_seqlens,  # [N + 1] or None
    chunk_offsets,  # [N] first chunk of each sequence, or None
    T,
    H,
    GROUP,  # query heads per key/value head
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    R_PAD: tl.constexpr,
    C: tl.constexpr,
    RIGHT_IS_KEY: tl.constexpr,
    QK_L2NORM: tl.constexpr,
    NORM_EPS: tl.constexpr,
    MIN_LOG_DECAY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program walks one sequence and query head, holding one column block of the state: S' = γ_C S + Kᵀ diag(τ) R."""
    i_r, i_nh = tl.program_id(0), tl.program_id(1)
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

        o_t = start + i_c * C + tl.arange(0, C)
        m_t = o_t < end
        o_row = o_t.to(tl.int64) * H + i_h
        o_kv = o_t.to(tl.int64) * (H // GROUP) + i_h // GROUP
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
