"""Forward of one chunk, second half: α mix and read-out (MATH.md §2)."""

import triton
import triton.language as tl

from gka_ops.triton.primitives import (
    chunk_and_head,
    chunk_bounds,
    decay_matrix,
    dot_onto,
    key_weight,
    load_log_decay,
    load_scalars,
    load_state,
    load_tile,
    pinned,
    query_weight,
    scale_rows,
    store_tile,
    token_rows_of_chunk,
)


@triton.jit(do_not_specialize=["T", "slab_first", "slab_chunks"])
def chunk_readout_kernel(
    q,  # [tokens, H, D]
    k,  # [tokens, Hkv, D]
    v,  # [tokens, Hkv, V]
    log_decay,  # [tokens, H] or None
    A_log,  # [H] or None
    dt_bias,  # [H] or None
    alpha,  # [tokens, H] or None
    beta,  # [tokens, H] or None
    x,  # [tokens, H, D], or None: no solve, x = q
    x_scale,  # [tokens, H] fp32, or None: x is stored as it is
    x_query,  # [tokens, H] fp32; read with x_scale
    kv,  # U_c [chunks, H, BLOCK_D, V_PAD] operand dtype
    kv_units,  # [chunks, H, V_PAD / BLOCK_V] fp32
    output,  # out [tokens, H, V]
    cu_seqlens,  # [N + 1] or None
    chunk_offsets,  # [N] or None
    chunk_sequence,  # [chunks] sequence of each chunk, -1 for unused, or None
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
    QK_L2NORM: tl.constexpr,
    NORM_EPS: tl.constexpr,
    MIN_LOG_DECAY: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program does one chunk of one query head: O = s [diag(γ) Mix U_c + (M ∘ Mix Kᵀ) V], Mix = (1 − α) q + α x.

    Mix is never formed: it is weight_q·q̂ + weight_x·x̂, and its part along q may be far too large to be rounded
    together with the part that the keys see.
    """
    i_c, i_h = chunk_and_head(H, FROM_LAST=x is None)
    i_n, start, end = chunk_bounds(i_c, T, cu_seqlens, chunk_offsets, chunk_sequence, slab_first, slab_chunks, C)
    if i_n < 0:
        return
    i_state = i_c.to(tl.int64) * H + i_h
    o_d = tl.arange(0, BLOCK_D)
    m_t, o_row, o_r = token_rows_of_chunk(start, end, i_h, H, C)
    first = start.to(tl.int64) * H + i_h
    first_kv = start.to(tl.int64) * (H // GROUP) + i_h // GROUP

    b_k = load_tile(k + first_kv * D, o_r, o_d, H // GROUP * D, D, BLOCK_D)
    b_q = load_tile(q + first * D, o_r, o_d, H * D, D, BLOCK_D)
    if x is not None:
        b_x = load_tile(x + first * D, o_r, o_d, H * D, D, BLOCK_D)
    b_g = load_log_decay(log_decay, A_log, dt_bias, o_row, m_t, i_h, MIN_LOG_DECAY)
    b_beta = pinned(load_scalars(beta, o_row, m_t, 1.0))

    b_k, unit_k = scale_rows(b_k.to(tl.float32))
    kappa = tl.where(m_t, key_weight(b_k, unit_k, b_beta, QK_L2NORM, NORM_EPS), 0.0)
    b_k = b_k.to(OPERAND)
    b_q, unit_q = scale_rows(b_q.to(tl.float32))
    weight_q = query_weight(b_q, unit_q, QK_L2NORM, NORM_EPS)
    b_q = b_q.to(OPERAND)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    if x is not None:
        b_alpha = pinned(load_scalars(alpha, o_row, m_t, 1.0))
        weight_x = b_alpha
        if x_scale is not None:
            weight_x = b_alpha * pinned(load_scalars(x_scale, o_row, m_t, 0.0))
            weight_q *= 1 - b_alpha + b_alpha * pinned(load_scalars(x_query, o_row, m_t, 0.0))
        else:
            weight_q *= 1 - b_alpha
        b_s = b_s * weight_q[:, None] + tl.dot(b_x, tl.trans(b_k), input_precision=PRECISION) * weight_x[:, None]
    else:
        b_s = b_s * weight_q[:, None]

    b_c = tl.cumsum(b_g, axis=0)
    gamma = tl.exp(b_c)
    b_s *= decay_matrix(b_c, C) * (kappa * b_beta)[None, :]
    for i_v in range(V_PAD // BLOCK_V):
        o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
        b_u = load_state(kv, i_state, i_v, V_PAD, BLOCK_D, BLOCK_V)
        b_v = load_tile(v + first_kv * V, o_r, o_v, H // GROUP * V, V, V_PAD)
        unit_u = tl.load(kv_units + i_state * (V_PAD // BLOCK_V) + i_v)
        b_o = tl.dot(b_q, b_u, input_precision=PRECISION) * (weight_q * gamma * unit_u)[:, None]
        if x is not None:
            b_o += tl.dot(b_x, b_u, input_precision=PRECISION) * (weight_x * gamma * unit_u)[:, None]
        b_p = b_s
        if b_v.dtype != tl.bfloat16:  # bf16 rows are multiplied as they came in
            b_v, unit_v = scale_rows(b_v.to(tl.float32))
            b_v, b_p = b_v.to(OPERAND), b_s * unit_v[None, :]
        b_o = dot_onto(b_o, b_p, b_v, PRECISION)
        store_tile(output + first * V, b_o * scale, o_r, m_t, o_v, H * V, V, V_PAD)
