"""Backward, stage A1: gradient of the read-out, dMix, and what follows from it token by token (MATH.md §4.1–4.2)."""

import triton
import triton.language as tl

from gka_ops.triton.primitives import (
    chunk_and_head,
    chunk_bounds,
    decay_matrix,
    dot_onto,
    key_operand,
    load_log_decay,
    load_scalars,
    load_state,
    load_tile,
    normalise_rows_backward,
    pinned,
    query_weight,
    scale_rows,
    store_tile,
    token_rows_of_chunk,
)


@triton.jit(do_not_specialize=["T", "slab_first", "slab_chunks"])
def chunk_backward_readout_kernel(
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
    dm,  # out [chunks, H, C, D] fp32, if SOLVE: rounding it off the keys' span would come back 1/ρ times as large
    dq,  # out [tokens, H, D]; written unless SOLVE
    d_alpha,  # out [tokens, H] or None
    pi,  # out [tokens, H] fp32: (1 − α) q·dm, or q·dm unless SOLVE
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
    """One program does one chunk of one query head: dMix = s [diag(γ) dO U_cᵀ + (M ∘ dO Vᵀ) K]."""
    i_c, i_h = chunk_and_head(H, FROM_LAST=True)
    i_n, start, end = chunk_bounds(i_c, T, cu_seqlens, chunk_offsets, chunk_sequence, slab_first, slab_chunks, C)
    if i_n < 0:
        return
    i_state = i_c.to(tl.int64) * H + i_h
    o_d = tl.arange(0, BLOCK_D)
    m_t, o_row, o_r = token_rows_of_chunk(start, end, i_h, H, C)
    first = start.to(tl.int64) * H + i_h
    first_kv = start.to(tl.int64) * (H // GROUP) + i_h // GROUP
    b_k = load_tile(k + first_kv * D, o_r, o_d, H // GROUP * D, D, BLOCK_D)
    b_g = load_log_decay(log_decay, A_log, dt_bias, o_row, m_t, i_h, MIN_LOG_DECAY)
    b_beta = pinned(load_scalars(beta, o_row, m_t, 1.0))

    b_dm = tl.zeros((C, BLOCK_D), tl.float32)
    b_s = tl.zeros((C, C), tl.float32)
    for i_v in range(V_PAD // BLOCK_V):
        o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
        b_do = load_tile(d_output + first * V, o_r, o_v, H * V, V, V_PAD)
        b_v = load_tile(v + first_kv * V, o_r, o_v, H // GROUP * V, V, V_PAD)
        b_u = load_state(kv, i_state, i_v, V_PAD, BLOCK_D, BLOCK_V)
        unit_u = tl.load(kv_units + i_state * (V_PAD // BLOCK_V) + i_v)
        b_s = tl.dot(b_do, tl.trans(b_v), b_s, input_precision=PRECISION)  # as they came in: exact, of any range
        b_do, unit_do = scale_rows(b_do.to(tl.float32))
        b_dm += tl.dot(b_do.to(OPERAND), tl.trans(b_u), input_precision=PRECISION) * (unit_do * unit_u)[:, None]

    b_c = tl.cumsum(b_g, axis=0)
    b_k, weight_k = key_operand(b_k, b_beta, OPERAND, QK_L2NORM, NORM_EPS)
    b_s *= decay_matrix(b_c, C) * (scale * weight_k * b_beta)[None, :]
    b_dm = dot_onto(b_dm * (scale * tl.exp(b_c))[:, None], b_s, b_k, PRECISION)

    b_q = load_tile(q + first * D, o_r, o_d, H * D, D, BLOCK_D).to(tl.float32)
    weight_q, unit_q = 1.0, 1.0
    if QK_L2NORM:
        b_q, unit_q = scale_rows(b_q)
        weight_q = query_weight(b_q, unit_q, QK_L2NORM, NORM_EPS)
    b_pi = tl.sum(b_dm * b_q, axis=1) * weight_q  # q·dm
    b_d_alpha = tl.zeros((C,), tl.float32)
    if SOLVE:
        store_tile(dm + i_state * C * D, b_dm, tl.arange(0, C), m_t, o_d, D, D, BLOCK_D)
        b_d_alpha += tl.sum(b_dm * load_tile(x + first * D, o_r, o_d, H * D, D, BLOCK_D).to(tl.float32), axis=1)
        if x_scale is not None:  # x = x_query·q + x_scale·x̂
            b_d_alpha *= load_scalars(x_scale, o_row, m_t, 1.0)
            b_d_alpha += load_scalars(x_query, o_row, m_t, 0.0) * b_pi
        b_d_alpha -= b_pi
        b_pi *= 1 - load_scalars(alpha, o_row, m_t, 1.0)
    else:  # Mix = q
        b_dq = normalise_rows_backward(b_dm, b_q, unit_q, QK_L2NORM, NORM_EPS)
        store_tile(dq + first * D, b_dq, o_r, m_t, o_d, H * D, D, BLOCK_D)
    if d_alpha is not None:
        tl.store(d_alpha + o_row, b_d_alpha.to(d_alpha.dtype.element_ty), mask=m_t)
    tl.store(pi + o_row, b_pi, mask=m_t)
