"""Backward, stage C2: gradients of keys through H, and of β and the log decay (MATH.md §4.2, 4.4, 4.5)."""

import triton
import triton.language as tl

from gka_ops.triton.primitives import (
    chunk_and_head,
    chunk_bounds,
    decay_between,
    decayed_max,
    keys_times_state,
    load_log_decay,
    load_scalars,
    load_state,
    load_tile,
    pinned,
    query_weight,
    row_norm,
    scale_rows,
    score_unit,
    split_solution,
    store_gate_gradients,
    store_tile,
    sum_of_pieces,
    token_rows_of_chunk,
)


@triton.jit(do_not_specialize=["T", "slab_first", "slab_chunks"])
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
    y,  # [chunks, H, C, D] row-scaled, operand dtype or fp32; read if SOLVE
    y_scale,  # [tokens, H] fp32; read if SOLVE
    w_local,  # [tokens, H] fp32; read if SOLVE
    kk,  # H_c [chunks, H, BLOCK_D, BLOCK_D]
    kk_units,  # [chunks, H] fp32
    dkk,  # Ω⁺ [chunks, H, BLOCK_D, BLOCK_D]
    dkk_units,  # [chunks, H] fp32
    dk_u,  # [tokens, H, ROW_U] operand dtype, row-scaled, in the place of dk: the effective key's gradient through
    # U, over β, in the first D of ROW_U columns; or None
    dk_u_units,  # [tokens, H] fp32, with dk_u
    m_u,  # [tokens, H] fp32: v·dv / β², with dk_u
    j_u,  # [chunks, H] fp32: <Ξ⁺, U_end>, with dk_u
    traces,  # [chunks, H, PIECES] fp32: <Ω⁺, H_c> in pieces, or None
    pi,  # [tokens, H] fp32
    dk,  # out [tokens, H, D], per query head
    d_beta,  # out [tokens, H] or None
    d_log_decay,  # out [tokens, H] or None: of the raw projection when A_log is given
    d_A_log,  # out [chunks, H] fp32 partial sums, or None
    d_dt_bias,  # out [chunks, H] fp32 partial sums, or None
    cu_seqlens,
    chunk_offsets,
    chunk_sequence,
    slab_first,
    slab_chunks,
    T,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROW_U: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    C: tl.constexpr,
    SOLVE: tl.constexpr,
    QK_L2NORM: tl.constexpr,
    NORM_EPS: tl.constexpr,
    MIN_LOG_DECAY: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program does one chunk of one query head. Through H, with effective keys β ν k̂:

    dK = 2τ K Ω⁺ + 2wγ K H_c + 2 (W∘K Kᵀ) K − (Mᵀ∘K Xᵀ) Y − (Mᵀ∘K Yᵀ) X

    X is never formed: its rows are sums of q̂ and ŵ (:func:`split_solution`), and so are the products with it. dK is
    taken over β, and what β and the gate need of it is m = (k·dk + v·dv) / 2β².
    """
    i_c, i_h = chunk_and_head(H)
    i_n, start, end = chunk_bounds(i_c, T, cu_seqlens, chunk_offsets, chunk_sequence, slab_first, slab_chunks, C)
    if i_n < 0:
        return
    i_state = i_c.to(tl.int64) * H + i_h
    o_c, o_d = tl.arange(0, C), tl.arange(0, BLOCK_D)
    m_t, o_row, o_r = token_rows_of_chunk(start, end, i_h, H, C)
    first = start.to(tl.int64) * H + i_h
    first_kv = start.to(tl.int64) * (H // GROUP) + i_h // GROUP

    # Everything that the products with the states need is under way before anything waits.
    unit_r, unit_h = tl.load(dkk_units + i_state), tl.load(kk_units + i_state)
    b_g = load_log_decay(log_decay, A_log, dt_bias, o_row, m_t, i_h, MIN_LOG_DECAY)
    b_beta = load_scalars(beta, o_row, m_t, 1.0)
    if SOLVE:
        b_wt, b_ys = load_scalars(w_local, o_row, m_t, 0.0), load_scalars(y_scale, o_row, m_t, 0.0)
    b_k = load_tile(k + first_kv * D, o_r, o_d, H // GROUP * D, D, BLOCK_D)
    if BLOCK_S == BLOCK_D:
        b_r = load_state(dkk, i_state, 0, BLOCK_D, BLOCK_D, BLOCK_D)
        if SOLVE:
            b_h = load_state(kk, i_state, 0, BLOCK_D, BLOCK_D, BLOCK_D)
    b_k, unit_k = scale_rows(b_k.to(tl.float32))
    b_c = tl.cumsum(b_g, axis=0)
    c_end = tl.sum(b_g, axis=0)
    gamma, tau = tl.exp(b_c), tl.exp(c_end - b_c)
    anticausal = o_c[:, None] <= o_c[None, :]
    b_beta = pinned(b_beta)
    key_norm, length = pinned(row_norm(b_k, unit_k, NORM_EPS)), pinned(unit_k)
    nu = tl.where(m_t, pinned(query_weight(b_k, unit_k, QK_L2NORM, NORM_EPS)), 0.0)
    b_k = b_k.to(OPERAND)

    weight_r = 2 * tau * unit_r
    if BLOCK_S == BLOCK_D:
        b_dk = tl.dot(b_k, b_r, input_precision=PRECISION)
        if SOLVE:
            b_kh = tl.dot(b_k, b_h, input_precision=PRECISION)
        b_dk *= weight_r[:, None]
    else:
        b_dk = weight_r[:, None] * keys_times_state(
            b_k, k + first_kv * D, unit_k, dkk, i_state, o_r, H // GROUP * D, D, BLOCK_D, BLOCK_S, PRECISION
        )
    m_r = 0.5 * nu * nu * tl.sum(b_dk * b_k.to(tl.float32), axis=1)
    b_m = m_r
    j_next = tl.sum(b_beta * b_beta * m_r, axis=0)  # J⁺ = <Ω⁺, H_end> + <Ξ⁺, U_end>
    if SOLVE:
        b_wt, b_ys = pinned(b_wt), pinned(b_ys)
        weight_h = 2 * b_wt * gamma * unit_h
        if BLOCK_S < BLOCK_D:
            b_kh = keys_times_state(
                b_k, k + first_kv * D, unit_k, kk, i_state, o_r, H // GROUP * D, D, BLOCK_D, BLOCK_S, PRECISION
            )
        b_m += 0.5 * nu * nu * weight_h * tl.sum(b_kh * b_k.to(tl.float32), axis=1)
        b_dk += b_kh * weight_h[:, None]

        b_q = load_tile(q + first * D, o_r, o_d, H * D, D, BLOCK_D)
        b_x = load_tile(x + first * D, o_r, o_d, H * D, D, BLOCK_D)
        b_y = load_tile(y + i_state * C * D, o_r, o_d, D, D, BLOCK_D)
        b_q, unit_q = scale_rows(b_q.to(tl.float32))
        weight_q = pinned(query_weight(b_q, unit_q, QK_L2NORM, NORM_EPS))
        b_w, along, across = split_solution(b_x, x_scale, x_query, b_q, weight_q, o_row, m_t)
        b_w = b_w.to(OPERAND)
        b_q = b_q.to(OPERAND)
        kappa_2 = 2 * b_beta * b_beta * nu * nu
        later = tl.maximum(b_ys * (tl.abs(along) + tl.abs(across)), tl.abs(b_wt) * kappa_2)
        bound = tl.maximum(decayed_max(b_c, later, True), tl.abs(b_wt) * decayed_max(-b_c, kappa_2, False))
        # What falls 2^-40 below the products with the states does not show; dK in this unit stays finite.
        bound = tl.maximum(bound, 2.0**-40 * (tl.abs(weight_r) + tl.abs(weight_h)))
        unit = pinned(score_unit(bound, BLOCK_D))
        b_dk *= (1 / unit)[:, None]

        # A weight of columns takes 16 registers, one of rows two: as few as will do, one product after the other.
        b_gram = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION)
        b_decay = decay_between(b_c) * (1 / unit)[:, None]
        b_w_t = tl.where(anticausal, (b_wt * kappa_2)[None, :], b_wt[:, None] * kappa_2[None, :])
        b_pk = b_gram * b_decay * b_w_t  # W∘K Kᵀ
        b_pairs = tl.sum(b_pk * b_gram, axis=1) * 0.5
        b_dk = tl.dot(b_pk.to(OPERAND), b_k, b_dk, input_precision=PRECISION)
        b_e = tl.where(anticausal, -b_decay, 0.0)  # −Mᵀ
        along, across = pinned(along * b_ys), pinned(across * b_ys)  # with the units of Y's rows
        b_kx = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * along[None, :]
        b_kx += tl.dot(b_k, tl.trans(b_w), input_precision=PRECISION) * across[None, :]
        b_kx *= b_e
        b_y_hi = b_y.to(OPERAND)
        b_dk = tl.dot(b_kx.to(OPERAND), b_y_hi, b_dk, input_precision=PRECISION)
        b_ky = tl.dot(b_k, tl.trans(b_y_hi), input_precision=PRECISION)
        if y.dtype.element_ty != OPERAND:  # the scores need all of y. Added: as the sum of one product it went wrong on
            b_y_lo = (b_y - b_y_hi.to(tl.float32)).to(OPERAND)  # a Hopper card with four warps, differently in each run
            b_ky += tl.dot(b_k, tl.trans(b_y_lo), input_precision=PRECISION)
        b_pairs += tl.sum(b_kx * b_ky, axis=1)
        b_m += nu * nu * unit * b_pairs
        b_ky *= b_e
        b_dk = tl.dot((b_ky * along[None, :]).to(OPERAND), b_q, b_dk, input_precision=PRECISION)
        b_dk = tl.dot((b_ky * across[None, :]).to(OPERAND), b_w, b_dk, input_precision=PRECISION)
        b_dk *= unit[:, None]

    m_v = tl.zeros((C,), tl.float32)
    if dk_u is not None:
        b_dk_u = load_tile(dk_u + first * ROW_U, o_r, o_d, H * ROW_U, D, BLOCK_D)
        weight_u = pinned(load_scalars(dk_u_units, o_row, m_t, 0.0))
        m_v += pinned(load_scalars(m_u, o_row, m_t, 0.0))
        j_next += tl.load(j_u + i_state)
    if traces is not None:
        j_next += tl.exp(c_end) * sum_of_pieces(traces, i_state, PIECES)
    b_dk *= nu[:, None]
    weight = b_beta * b_beta
    if QK_L2NORM:  # MATH.md §4.5, with k·dk from the sums above
        radial = tl.where(key_norm > NORM_EPS / length, 2 * b_m + m_v, 0.0)  # at or below ε the norm is constant
        b_dk -= b_k.to(tl.float32) * (nu * radial)[:, None]
        weight /= key_norm * length
    store_gate_gradients(
        b_m + m_v, load_scalars(pi, o_row, m_t, 0.0), j_next, b_beta, b_g, d_beta, d_log_decay, d_A_log, d_dt_bias,
        log_decay, A_log, dt_bias, o_row, m_t, i_h, i_state, MIN_LOG_DECAY,
    )  # fmt: skip
    if dk_u is not None:
        b_dk += b_dk_u.to(tl.float32) * weight_u[:, None]
        if ROW_U != D:  # rows of dk and of dk_u share places, but not element by element
            tl.debug_barrier()
    o_r = pinned(o_r)  # so that addresses are formed anew rather than kept from the first loads
    store_tile(dk + first * D, b_dk * weight[:, None], o_r, m_t, o_d, H * D, D, BLOCK_D)
