"""Backward, stage B: gradients of the states at the end of every chunk, Ω⁺ and Ξ⁺ (MATH.md §4.2).

First what each chunk adds by itself, all chunks side by side; then one scan over them, in place.
"""

import triton
import triton.language as tl

from gka_ops.triton.primitives import (
    chunk_and_head,
    chunk_bounds,
    key_weight,
    largest_entry,
    load_log_decay,
    load_query,
    load_raw_rows,
    load_rows,
    load_scalars,
    pow2_floor,
    scale_rows,
    sequence_bounds,
    sequence_ends,
    state_unit,
    token_rows,
)


@triton.jit(do_not_specialize=["T", "slab_first", "slab_chunks"])
def chunk_backward_state_kernel(
    d_output,  # [tokens, H, V]; read if THROUGH_U
    q,  # [tokens, H, D]; read if THROUGH_U, and with x_scale
    k,  # [tokens, Hkv, D]; read if THROUGH_H
    x,  # [tokens, H, D], or None: m = q
    x_scale,  # [tokens, H] fp32 or None
    x_query,  # [tokens, H] fp32; read with x_scale
    y,  # [chunks, H, C, D] row-scaled; read if THROUGH_H
    y_scale,  # [tokens, H] fp32; read if THROUGH_H
    w_local,  # [tokens, H] fp32; read if THROUGH_H
    log_decay,  # [tokens, H] or None
    A_log,  # [H] or None
    dt_bias,  # [H] or None
    alpha,  # [tokens, H] or None
    beta,  # [tokens, H] or None
    dkk,  # out ΔΩ − w_0 H_c [chunks, H, BLOCK_D, BLOCK_D] operand dtype; written if THROUGH_H
    dkk_units,  # out [chunks, H] fp32
    dkv,  # out ΔΞ [chunks, H, BLOCK_D, V_PAD] operand dtype; written if THROUGH_U
    dkv_units,  # out [chunks, H, V_PAD / BLOCK_V] fp32
    decay,  # out [chunks, H] fp32: γ_C
    w_first,  # out [chunks, H] fp32: w_0; written if THROUGH_H
    cu_seqlens,
    chunk_offsets,
    chunk_sequence,
    slab_first,
    slab_chunks,
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
    THROUGH_H: tl.constexpr,
    THROUGH_U: tl.constexpr,
    QK_L2NORM: tl.constexpr,
    NORM_EPS: tl.constexpr,
    MIN_LOG_DECAY: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program does one chunk of one query head, BLOCK_N columns of ΔΩ or its share of ΔΞ:

    ΔΩ = w_0 H_c + Kᵀ diag(γ w) K − sym(Xᵀ diag(γ) Y),   ΔΞ = s Mixᵀ diag(γ) dO
    """
    i_c, i_h = chunk_and_head(H)
    i_col = tl.program_id(1)
    i_n, start, end = chunk_bounds(i_c, T, cu_seqlens, chunk_offsets, chunk_sequence, slab_first, slab_chunks, C)
    if i_n < 0:
        return
    i_state = i_c.to(tl.int64) * H + i_h
    o_c, o_d, o_n = tl.arange(0, C), tl.arange(0, BLOCK_D), i_col * BLOCK_N + tl.arange(0, BLOCK_N)
    m_t, o_row, o_kv = token_rows(start, end, i_h, H, GROUP, C)
    if THROUGH_H:
        y += i_state * C * D

    # Rows of x and Mix are of_q·q̂ + of_x·x̂ with scaled rows q̂, x̂, whose entries are below 2. The loads come first, so
    # that none waits for another; y, which nothing but the products needs, comes where registers are free again.
    if THROUGH_H:
        b_k = load_rows(k, o_kv, m_t, o_d, D, BLOCK_D)
        b_w = load_scalars(w_local, o_row, m_t, 0.0)
        b_beta = load_scalars(beta, o_row, m_t, 1.0)
        b_y_scale = load_scalars(y_scale, o_row, m_t, 0.0)
    if x is not None:
        b_x = load_rows(x, o_row, m_t, o_d, D, BLOCK_D)
        if x_scale is not None:
            of_x = load_scalars(x_scale, o_row, m_t, 0.0)
            of_q = load_scalars(x_query, o_row, m_t, 0.0)
    if THROUGH_H:
        b_k, unit_k = scale_rows(b_k)
        kappa = key_weight(b_k, unit_k, b_beta, QK_L2NORM, NORM_EPS)
        b_k = b_k.to(OPERAND)
    if THROUGH_U or x_scale is not None:
        b_q, weight_q, unit_q = load_query(q, o_row, m_t, o_d, D, BLOCK_D, QK_L2NORM, NORM_EPS)
    if x is not None:
        if x_scale is not None:
            of_q *= weight_q
        else:
            b_x, of_x = scale_rows(b_x)
            of_q = 0 * of_x

    b_c = tl.cumsum(load_log_decay(log_decay, A_log, dt_bias, o_row, m_t, i_h, MIN_LOG_DECAY), axis=0)
    gamma = tl.exp(b_c)
    p_one = i_state + 0 * o_c  # one token stores the chunk's scalar: no reduction
    tl.store(decay + p_one, gamma, mask=(o_c == C - 1) & (i_col == 0))
    if THROUGH_U:
        mix_q, bound_m = weight_q, weight_q
        if x is not None:  # Mix = (1 − α) q + α x
            b_alpha = load_scalars(alpha, o_row, m_t, 1.0)
            mix_q = (1 - b_alpha) * weight_q + b_alpha * of_q
            mix_x = b_alpha * of_x
            bound_m = tl.abs(mix_q) + mix_x
        unit_m = pow2_floor(2 * bound_m)
        b_mix = b_q * (mix_q / unit_m)[:, None]
        if x is not None:
            b_mix += b_x * (mix_x / unit_m)[:, None]
        b_mix = b_mix.to(OPERAND)
    if THROUGH_H:
        tl.store(w_first + p_one, gamma * gamma * b_w, mask=(o_c == 0) & (i_col == 0))
        weight_k = gamma * b_w * kappa * kappa
        weight_x = -0.5 * gamma * b_y_scale
        bound = 4 * tl.abs(weight_k) + 8 * tl.abs(weight_x) * (tl.abs(of_q) + of_x)
        unit, inverse = state_unit(tl.sum(bound, axis=0))
        tl.store(dkk_units + i_state, unit, mask=i_col == 0)
        weight_k *= inverse
        weight_x *= inverse
        b_wx = b_x * (of_x * weight_x)[:, None]
        if x_scale is not None:
            b_wx += b_q * (of_q * weight_x)[:, None]
        b_wx = b_wx.to(OPERAND)
        b_y = load_rows(y, o_c, m_t, o_d, D, BLOCK_D).to(OPERAND)
        if BLOCK_N == BLOCK_D:
            b_wkn = b_k.to(tl.float32) * weight_k[:, None]
            b_yn, b_wxn = b_y, b_wx
        else:
            b_wkn = load_rows(k, o_kv, m_t, o_n, D, BLOCK_D) * (weight_k / unit_k)[:, None]
            b_yn = load_rows(y, o_c, m_t, o_n, D, BLOCK_D).to(OPERAND)
            b_xn = load_rows(x, o_row, m_t, o_n, D, BLOCK_D)
            if x_scale is not None:
                b_wxn = b_xn * (of_x * weight_x)[:, None]
                b_wxn += load_rows(q, o_row, m_t, o_n, D, BLOCK_D) * (of_q * weight_x / unit_q)[:, None]
            else:
                b_wxn = b_xn * weight_x[:, None]
            b_wxn = b_wxn.to(OPERAND)
        b_omega = tl.dot(tl.trans(b_k), b_wkn.to(OPERAND), input_precision=PRECISION)
        b_omega = tl.dot(tl.trans(b_wx), b_yn, b_omega, input_precision=PRECISION)
        b_omega = tl.dot(tl.trans(b_y), b_wxn, b_omega, input_precision=PRECISION)
        tl.store(dkk + i_state * BLOCK_D * BLOCK_D + o_d[:, None] * BLOCK_D + o_n[None, :], b_omega.to(OPERAND))

    if THROUGH_U:  # dO is read a column block ahead
        weight = scale * gamma * unit_m
        o_v = i_col * BLOCK_V + tl.arange(0, BLOCK_V)
        b_do = load_raw_rows(d_output, o_row, m_t & (i_col < V_PAD // BLOCK_V), o_v, V, V_PAD)
        for i_v in range(i_col, V_PAD // BLOCK_V, BLOCK_D // BLOCK_N):
            i_next = i_v + BLOCK_D // BLOCK_N
            o_v, o_next = i_v * BLOCK_V + tl.arange(0, BLOCK_V), i_next * BLOCK_V + tl.arange(0, BLOCK_V)
            b_do_next = load_raw_rows(d_output, o_row, m_t & (i_next < V_PAD // BLOCK_V), o_next, V, V_PAD)
            b_do32 = b_do.to(tl.float32)
            unit, inverse = state_unit(2 * tl.sum(tl.abs(weight) * tl.max(tl.abs(b_do32), axis=1), axis=0))
            tl.store(dkv_units + i_state * (V_PAD // BLOCK_V) + i_v, unit)
            b_wdo = (b_do32 * (weight * inverse)[:, None]).to(OPERAND)
            b_xi = tl.trans(tl.dot(tl.trans(b_wdo), b_mix, input_precision=PRECISION))
            tl.store(dkv + i_state * BLOCK_D * V_PAD + o_d[:, None] * V_PAD + o_v[None, :], b_xi.to(OPERAND))
            b_do = b_do_next


@triton.jit
def load_increment(
    states, increment_units, decay, h, h_units, w_first, o_stored, i_state, i_r, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr, R_PAD: tl.constexpr,
):  # fmt: skip
    """ΔS of a chunk with its unit, H_c with its unit and w_0, and the chunk's decay; zeros for what is None."""
    gamma_end = tl.load(decay + i_state)
    o_chunk = i_state * BLOCK_D * R_PAD
    b_delta, unit_delta, b_h, unit_h, w_0 = 0.0, 0.0, 0.0, 0.0, 0.0
    i_unit = i_state * (R_PAD // BLOCK_R) + i_r
    if increment_units is not None:
        b_delta, unit_delta = tl.load(states + o_chunk + o_stored), tl.load(increment_units + i_unit)
    if h is not None:
        b_h, unit_h = tl.load(h + o_chunk + o_stored), tl.load(h_units + i_unit)
    if w_first is not None:
        w_0 = tl.load(w_first + i_state)
    return b_delta, unit_delta, b_h, unit_h, w_0, gamma_end


@triton.jit(do_not_specialize=["T", "slab_first", "slab_chunks"])
def chunk_backward_scan_kernel(
    states,  # in ΔS, out S⁺ [chunks, H, BLOCK_D, R_PAD]: of H (ΔΩ − w_0 H_c, Ω⁺) or of U (ΔΞ, Ξ⁺)
    units,  # out [chunks, H, R_PAD / BLOCK_R] fp32
    increment_units,  # [chunks, H, R_PAD / BLOCK_R] fp32, or None: the gradient comes from the final state alone
    decay,  # [chunks, H] fp32: γ_C
    h,  # H_c or U_c [chunks, H, BLOCK_D, R_PAD]; read with w_first or traces
    h_units,  # [chunks, H, R_PAD / BLOCK_R] fp32
    w_first,  # [chunks, H] fp32: w_0, with ΔΩ, or None
    traces,  # out [chunks, H, pieces] fp32: every piece's share of <S⁺, H_c>, or None
    d_final,  # [N, H, D, R] fp32 or None
    d_initial,  # out [N, H, D, R] fp32 or None
    d_end,  # [N or 1, H, D, R] fp32: gradient at the slab's end of sequences that go on, or None: all end here
    d_start,  # out [N or 1, H, D, R] fp32: gradient at its start of sequences that began before, or None
    cu_seqlens,
    chunk_offsets,
    slab_first,
    slab_chunks,
    T,
    H,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    R_PAD: tl.constexpr,
    C: tl.constexpr,
    SYMMETRIC: tl.constexpr,
):
    """One program walks one sequence and query head backwards with ROWS rows of a column block of the gradient S
    [BLOCK_D, R_PAD]; all pieces run side by side: S⁻ = γ_C S⁺ + ΔS.

    ΔS is what ``states`` holds in units of ``increment_units`` (nothing where they are None), plus w_0 H_c where
    ``w_first`` is given. S⁺ takes its place. The first S⁺ comes from the final state, or from the later slab
    (``d_end``); the last S⁻ belongs to the initial state, or to the earlier slab (``d_start``).
    """
    i_piece, i_nh = tl.program_id(0), tl.program_id(1)
    i_row, i_r = i_piece % (BLOCK_D // ROWS), i_piece // (BLOCK_D // ROWS)
    i_h = i_nh % H
    _, _, _, place, n_chunks = sequence_bounds(i_nh, T, H, cu_seqlens, chunk_offsets, slab_first, slab_chunks, C)
    begins, enters, ends, leaves, i_carry = sequence_ends(
        i_nh, T, H, cu_seqlens, chunk_offsets, slab_first, slab_chunks, C
    )
    o_d, o_r = i_row * ROWS + tl.arange(0, ROWS), i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_state = (o_d < D)[:, None] & (o_r < R)[None, :]
    p_state = o_d[:, None] * R + o_r[None, :]
    p_nh, p_carry = i_nh.to(tl.int64) * D * R, i_carry * D * R
    o_stored = o_d[:, None] * R_PAD + o_r[None, :]

    b_s = tl.zeros((ROWS, BLOCK_R), tl.float32)
    bound = 0.0
    if d_final is not None:
        if ends:
            b_s += tl.load(d_final + p_nh + p_state, mask=m_state, other=0.0)
            if SYMMETRIC:
                p_transposed = p_nh + o_r[None, :] * D + o_d[:, None]
                b_s = 0.5 * (b_s + tl.load(d_final + p_transposed, mask=m_state, other=0.0))
            bound = largest_entry(d_final + p_nh, R, tl.arange(0, BLOCK_D), D, BLOCK_D, 16, R_PAD // 16)
    if d_end is not None:
        if leaves:
            b_s += tl.load(d_end + p_carry + p_state, mask=m_state, other=0.0)
            bound = largest_entry(d_end + p_carry, R, tl.arange(0, BLOCK_D), D, BLOCK_D, 16, R_PAD // 16)

    # Three chunks ahead, through shared memory: a tile carried in registers is taken apart, and so waited for, in the
    # step that loads it. Without reading ahead the programs of a card fall into a rhythm in which memory runs at a
    # third of its rate.
    i_first = place.to(tl.int64) * H + i_h
    for i in tl.range(n_chunks, num_stages=4):
        i_state = i_first + (n_chunks - 1 - i) * H
        b_delta, unit_delta, b_h, unit_h, w_0, gamma_end = load_increment(
            states, increment_units, decay, h, h_units, w_first, o_stored, i_state, i_r, BLOCK_D, BLOCK_R, R_PAD
        )
        unit, inverse = state_unit(bound)
        tl.store(states + i_state * BLOCK_D * R_PAD + o_stored, (b_s * inverse).to(states.dtype.element_ty))
        tl.store(units + i_state * (R_PAD // BLOCK_R) + i_r, unit, mask=i_row == 0)
        if traces is not None:
            trace = tl.sum(tl.sum(b_s * b_h.to(tl.float32), axis=1), axis=0)
            tl.store(traces + i_state * tl.num_programs(0) + i_piece, unit_h * trace)
        b_s *= gamma_end
        bound *= gamma_end
        if increment_units is not None:  # stored entries are at most 8
            b_s += b_delta.to(tl.float32) * unit_delta
            bound += 8 * unit_delta
        if w_first is not None:
            b_s += b_h.to(tl.float32) * (w_0 * unit_h)
            bound += 8 * tl.abs(w_0 * unit_h)
    if d_initial is not None:
        tl.store(d_initial + p_nh + p_state, b_s, mask=m_state & begins)
    if d_start is not None:
        tl.store(d_start + p_carry + p_state, b_s, mask=m_state & enters)
