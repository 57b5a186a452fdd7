"""Backward, stage C1: gradients of values, and of keys through U (MATH.md §4.2)."""

import triton
import triton.language as tl

from gka_ops.triton.primitives import (
    chunk_and_head,
    chunk_bounds,
    decay_between,
    dot_onto,
    load_log_decay,
    load_scalars,
    load_state,
    load_tile,
    normalise_rows_backward,
    pinned,
    pow2_floor,
    pow2_inverse,
    query_weight,
    scale_rows,
    split_solution,
    store_gate_gradients,
    store_tile,
    sum_of_pieces,
    token_rows_of_chunk,
)


@triton.jit(do_not_specialize=["T", "slab_first", "slab_chunks"])
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
    dkv,  # Ξ⁺ [chunks, H, BLOCK_D, V_PAD]
    dkv_units,  # [chunks, H, V_PAD / BLOCK_V] fp32
    dv,  # out [tokens, H, V], per query head
    dk_u,  # out [tokens, H, ROW_U] operand dtype, row-scaled, in the place of dk: the effective key's gradient through
    # U, over β, in the first D of ROW_U columns; or None: none through H follows
    dk_u_units,  # out [tokens, H] fp32, with dk_u
    m_u,  # out [tokens, H] fp32: v·dv / β², with dk_u
    j_u,  # out [chunks, H] fp32: <Ξ⁺, U_end>, with dk_u
    traces,  # [chunks, H, PIECES] fp32: <Ξ⁺, U_c> in pieces, or None: J⁺ is not wanted
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
    scale,
    T,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    V_PAD: tl.constexpr,
    ROW_U: tl.constexpr,
    PIECES: tl.constexpr,
    C: tl.constexpr,
    SOLVE: tl.constexpr,
    QK_L2NORM: tl.constexpr,
    NORM_EPS: tl.constexpr,
    MIN_LOG_DECAY: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program does one chunk of one query head. With effective keys and values, the key's being β ν k̂:

    dV = τ K Ξ⁺ + s (Mᵀ∘K Mixᵀ) dO,   dK through U = τ V Ξ⁺ᵀ + s (Mᵀ∘V dOᵀ) Mix

    Mix is never formed: its rows are sums of q̂ and ŵ (:func:`split_solution`), and so are the products with it.
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

    # Loads first, so that none waits for another.
    b_g = load_log_decay(log_decay, A_log, dt_bias, o_row, m_t, i_h, MIN_LOG_DECAY)
    b_beta = load_scalars(beta, o_row, m_t, 1.0)
    b_k = load_tile(k + first_kv * D, o_r, o_d, H // GROUP * D, D, BLOCK_D)
    b_q = load_tile(q + first * D, o_r, o_d, H * D, D, BLOCK_D)
    if SOLVE:
        b_alpha = load_scalars(alpha, o_row, m_t, 1.0)
        b_x = load_tile(x + first * D, o_r, o_d, H * D, D, BLOCK_D)
    b_c = tl.cumsum(b_g, axis=0)
    c_end = tl.sum(b_g, axis=0)
    tau = tl.exp(c_end - b_c)
    anticausal = o_c[:, None] <= o_c[None, :]
    b_beta = pinned(b_beta)
    b_k, unit_k = scale_rows(b_k.to(tl.float32))
    nu = tl.where(m_t, pinned(query_weight(b_k, unit_k, QK_L2NORM, NORM_EPS)), 0.0)
    b_k = b_k.to(OPERAND)
    b_q, unit_q = scale_rows(b_q.to(tl.float32))
    weight_q = pinned(query_weight(b_q, unit_q, QK_L2NORM, NORM_EPS))
    mix_q = weight_q
    if SOLVE:  # Mix = (1 − α) q + α x
        b_w, along, across = split_solution(b_x, x_scale, x_query, b_q, weight_q, o_row, m_t)
        b_w = b_w.to(OPERAND)
        b_alpha = pinned(b_alpha)
        mix_q, mix_w = (1 - b_alpha) * weight_q + b_alpha * along, tl.where(m_t, b_alpha * across, 0.0)
    mix_q = tl.where(m_t, mix_q, 0.0)
    b_q = b_q.to(OPERAND)
    b_km = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * mix_q[None, :]
    if SOLVE:
        b_km += tl.dot(b_k, tl.trans(b_w), input_precision=PRECISION) * mix_w[None, :]
    b_km *= tl.where(anticausal, scale * decay_between(b_c), 0.0)  # s Mᵀ∘K Mixᵀ, Mᵀ: [t, s] for s >= t

    b_vdo = tl.zeros((C, C), tl.float32)
    b_dk = tl.zeros((C, BLOCK_D), tl.float32)
    unit_v = tl.full((C,), 2.0**-126, tl.float32)  # of rows of dK: grows with the largest entry of V so far
    for i_v in range(V_PAD // BLOCK_V):
        o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
        b_xi = load_state(dkv, i_state, i_v, V_PAD, BLOCK_D, BLOCK_V)
        b_v = load_tile(v + first_kv * V, o_r, o_v, H // GROUP * V, V, V_PAD)
        b_do = load_tile(d_output + first * V, o_r, o_v, H * V, V, V_PAD)
        unit_xi = tl.load(dkv_units + i_state * (V_PAD // BLOCK_V) + i_v)
        b_vdo = tl.dot(b_v, tl.trans(b_do), b_vdo, input_precision=PRECISION)  # as they came in: exact, of any range
        b_dv = tl.dot(b_k, b_xi, input_precision=PRECISION) * (tau * unit_xi)[:, None]
        b_dv = dot_onto(b_dv, b_km, b_do, PRECISION) * (b_beta * b_beta * nu)[:, None]
        store_tile(dv + first * V, b_dv, o_r, m_t, o_v, H * V, V, V_PAD)
        b_vxi = b_v.to(tl.float32) * unit_xi
        larger = tl.maximum(unit_v, pow2_floor(tl.max(tl.abs(b_vxi), axis=1)))
        b_dk *= pinned(unit_v * pow2_inverse(larger))[:, None]
        b_vxi = (b_vxi * pow2_inverse(larger)[:, None]).to(OPERAND)
        b_dk = tl.dot(b_vxi, tl.trans(b_xi), b_dk, input_precision=PRECISION)
        unit_v = larger
    b_m = nu * tl.sum(b_km * b_vdo, axis=1)
    b_dk *= (tau * pinned(unit_v))[:, None]
    m_next = nu * tl.sum(b_dk * b_k.to(tl.float32), axis=1)
    b_m += m_next
    j_next = tl.sum(b_beta * b_beta * m_next, axis=0)
    if traces is not None:  # J⁺'s part through U
        j_next += tl.exp(c_end) * sum_of_pieces(traces, i_state, PIECES)

    mix_q = pinned(mix_q)  # anew, as is Mᵀ: their columns would not fit the registers next to the loop
    bound = tl.abs(mix_q)
    if SOLVE:
        mix_w = pinned(mix_w)
        bound = tl.maximum(bound, tl.abs(mix_w))
    b_vdo *= tl.where(anticausal, decay_between(pinned(b_c)), 0.0)
    unit = pow2_floor(tl.max(tl.abs(b_vdo) * bound[None, :], axis=1))
    b_vdo *= (1 / unit)[:, None]
    b_pq = (b_vdo * mix_q[None, :]).to(OPERAND)
    if SOLVE:
        b_pw = (b_vdo * mix_w[None, :]).to(OPERAND)
    b_dm = tl.dot(b_pq, b_q, input_precision=PRECISION)
    if SOLVE:
        b_dm = tl.dot(b_pw, b_w, b_dm, input_precision=PRECISION)
    b_dk += b_dm * (scale * unit)[:, None]

    if dk_u is not None:
        b_dk, unit = scale_rows(b_dk)
        o_r = pinned(o_r)  # so that addresses are formed anew rather than kept from the first loads
        store_tile(dk_u + first * ROW_U, b_dk, o_r, m_t, o_d, H * ROW_U, D, BLOCK_D)
        tl.store(dk_u_units + o_row, unit, mask=m_t)
        tl.store(m_u + o_row, b_m, mask=m_t)
        tl.store(j_u + i_state, j_next)
    else:
        store_gate_gradients(
            b_m, load_scalars(pi, o_row, m_t, 0.0), j_next, b_beta, b_g, d_beta, d_log_decay, d_A_log, d_dt_bias,
            log_decay, A_log, dt_bias, o_row, m_t, i_h, i_state, MIN_LOG_DECAY,
        )  # fmt: skip
        b_dk = normalise_rows_backward(b_dk, b_k.to(tl.float32), unit_k, QK_L2NORM, NORM_EPS)
        store_tile(dk + first * D, b_dk * (b_beta * b_beta)[:, None], o_r, m_t, o_d, H * D, D, BLOCK_D)
