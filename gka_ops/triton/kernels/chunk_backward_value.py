"""Backward, stage C1: gradients of values, and of keys through U (MATH.md §4.2)."""

import triton
import triton.language as tl

from gka_ops.triton.primitives import (
    chunk_and_head,
    chunk_bounds,
    decay_between,
    diagonal_sum,
    load_log_decay,
    load_scalars,
    load_state,
    load_tile,
    normalise_rows_backward,
    pinned,
    pow2_floor,
    query_weight,
    scale_rows,
    split_solution,
    store_gate_gradients,
    store_tile,
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
    kv,  # U_c [chunks, H, BLOCK_D, V_PAD]
    kv_units,  # [chunks, H, V_PAD / BLOCK_V] fp32
    dkv,  # Ξ⁺ [chunks, H, BLOCK_D, V_PAD]
    dkv_units,  # [chunks, H, V_PAD / BLOCK_V] fp32
    dv,  # out [tokens, H, V], per query head
    dk_u,  # out [chunks, H, C, D] fp32: the effective key's gradient through U, over β; or None: none through H follows
    m_u,  # out [tokens, H] fp32: v·dv / β², with dk_u
    j_u,  # out [chunks, H] fp32: <Ξ⁺, U_end>, with dk_u
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

    b_g = load_log_decay(log_decay, A_log, dt_bias, o_row, m_t, i_h, MIN_LOG_DECAY)
    b_c = tl.cumsum(b_g, axis=0)
    c_end = tl.sum(b_g, axis=0)
    tau, gamma_end = tl.exp(c_end - b_c), tl.exp(c_end)
    anticausal = o_c[:, None] <= o_c[None, :]
    b_beta = pinned(load_scalars(beta, o_row, m_t, 1.0))
    b_k, unit_k = scale_rows(load_tile(k + first_kv * D, o_r, o_d, H // GROUP * D, D, BLOCK_D).to(tl.float32))
    nu = tl.where(m_t, pinned(query_weight(b_k, unit_k, QK_L2NORM, NORM_EPS)), 0.0)
    b_k = b_k.to(OPERAND)
    b_q, unit_q = scale_rows(load_tile(q + first * D, o_r, o_d, H * D, D, BLOCK_D).to(tl.float32))
    weight_q = pinned(query_weight(b_q, unit_q, QK_L2NORM, NORM_EPS))
    mix_q = weight_q
    b_km = tl.dot(b_k, tl.trans(b_q.to(OPERAND)), input_precision=PRECISION)
    if SOLVE:  # Mix = q + α (x − q)
        b_w, along, across = split_solution(
            load_tile(x + first * D, o_r, o_d, H * D, D, BLOCK_D), x_scale, x_query, b_q, weight_q, o_row, m_t
        )
        b_w = b_w.to(OPERAND)
        b_alpha = pinned(load_scalars(alpha, o_row, m_t, 1.0))
        mix_q, mix_w = weight_q + b_alpha * (along - weight_q), b_alpha * across
        b_kw = tl.dot(b_k, tl.trans(b_w), input_precision=PRECISION)
        b_km = b_km * mix_q[None, :] + b_kw * mix_w[None, :]
    else:
        b_km *= mix_q[None, :]
    b_q = b_q.to(OPERAND)
    b_mt = tl.where(anticausal, decay_between(b_c), 0.0)  # Mᵀ: [t, s] for s >= t
    b_km *= b_mt

    b_vdo = tl.zeros((C, C), tl.float32)
    for i_v in range(V_PAD // BLOCK_V):
        o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
        b_xi = load_state(dkv, i_state, i_v, V_PAD, BLOCK_D, BLOCK_V)
        unit_xi = tl.load(dkv_units + i_state * (V_PAD // BLOCK_V) + i_v)
        b_v, unit_v = scale_rows(load_tile(v + first_kv * V, o_r, o_v, H // GROUP * V, V, V_PAD).to(tl.float32))
        b_do, unit_do = scale_rows(load_tile(d_output + first * V, o_r, o_v, H * V, V, V_PAD).to(tl.float32))
        b_do, unit_do = b_do.to(OPERAND), tl.where(m_t, pinned(unit_do), 0.0)
        b_s = tl.dot(b_v.to(OPERAND), tl.trans(b_do), input_precision=PRECISION)
        b_vdo += b_s * pinned(unit_v)[:, None] * unit_do[None, :]
        b_p, unit_p = scale_rows(b_km * unit_do[None, :])
        b_dv = tl.dot(b_p.to(OPERAND), b_do, input_precision=PRECISION) * (scale * unit_p)[:, None]
        b_dv += tl.dot(b_k, b_xi, input_precision=PRECISION) * (tau * unit_xi)[:, None]
        b_dv *= (b_beta * b_beta * nu)[:, None]
        store_tile(dv + first * V, b_dv, o_r, m_t, o_v, H * V, V, V_PAD)
    b_m = scale * nu * tl.sum(b_km * b_vdo, axis=1)
    b_vdo *= b_mt
    bound = tl.abs(mix_q)
    if SOLVE:
        bound = tl.maximum(bound, tl.abs(mix_w))
    unit = pow2_floor(tl.max(tl.abs(b_vdo) * bound[None, :], axis=1))
    b_vdo *= (1 / unit)[:, None]
    b_pq = (b_vdo * mix_q[None, :]).to(OPERAND)
    if SOLVE:
        b_pw = (b_vdo * mix_w[None, :]).to(OPERAND)

    # V is read again rather than let dK live through the first loop: that would not fit the registers.
    b_dk = tl.zeros((C, BLOCK_D), tl.float32)
    j_next = 0.0  # <Ξ⁺, U_end>
    for i_v in range(V_PAD // BLOCK_V):
        o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
        i_unit = i_state * (V_PAD // BLOCK_V) + i_v
        b_xi, unit_xi = load_state(dkv, i_state, i_v, V_PAD, BLOCK_D, BLOCK_V), tl.load(dkv_units + i_unit)
        b_u, unit_u = load_state(kv, i_state, i_v, V_PAD, BLOCK_D, BLOCK_V), tl.load(kv_units + i_unit)
        b_xiu = tl.dot(tl.trans(b_xi), b_u, input_precision=PRECISION)
        j_next += unit_xi * unit_u * diagonal_sum(b_xiu, BLOCK_V)
        b_v, unit_v = scale_rows(load_tile(v + first_kv * V, o_r, o_v, H // GROUP * V, V, V_PAD).to(tl.float32))
        b_vxi = tl.dot(b_v.to(OPERAND), tl.trans(b_xi), input_precision=PRECISION)
        b_dk += b_vxi * (tau * pinned(unit_v) * unit_xi)[:, None]
    m_next = nu * tl.sum(b_dk * b_k.to(tl.float32), axis=1)
    b_m += m_next
    j_next = gamma_end * j_next + tl.sum(b_beta * b_beta * m_next, axis=0)
    b_dm = tl.dot(b_pq, b_q, input_precision=PRECISION)
    if SOLVE:
        b_dm = tl.dot(b_pw, b_w, b_dm, input_precision=PRECISION)
    b_dk += b_dm * (scale * unit)[:, None]

    if dk_u is not None:
        store_tile(dk_u + i_state * C * D, b_dk, o_r, m_t, o_d, D, D, BLOCK_D)
        tl.store(m_u + o_row, b_m, mask=m_t)
        tl.store(j_u + i_state, j_next)
    else:
        store_gate_gradients(
            b_m, j_next, b_beta, b_g, d_beta, d_log_decay, d_A_log, d_dt_bias, log_decay, A_log, dt_bias, pi, o_row,
            m_t, i_h, i_state, MIN_LOG_DECAY,
        )  # fmt: skip
        b_dk = normalise_rows_backward(b_dk, b_k.to(tl.float32), unit_k, QK_L2NORM, NORM_EPS)
        store_tile(dk + first * D, b_dk * (b_beta * b_beta)[:, None], o_r, m_t, o_d, H * D, D, BLOCK_D)
