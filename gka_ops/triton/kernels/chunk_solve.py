"""Forward of one chunk, first half: norms and Chebyshev solve (MATH.md §2–3)."""

import triton
import triton.language as tl

from gka_ops.triton.primitives import (
    as_sums,
    chebyshev,
    chunk_and_head,
    chunk_bounds,
    decay_matrix,
    formed_anew,
    frobenius_norm,
    key_weight,
    linearised,
    load_log_decay,
    load_ridge,
    load_scalars,
    load_tile,
    normalise,
    operator_weights,
    pow2_inverse,
    query_weight,
    scale_rows,
    split_along_query,
    state_operand,
    store_tile,
    sum_of_squares,
    token_rows_of_chunk,
)


@triton.jit(do_not_specialize=["T", "slab_first", "slab_chunks", "num_iter"])
def chunk_solve_kernel(
    q,  # [tokens, H, D]
    k,  # [tokens, Hkv, D]
    log_decay,  # [tokens, H] or None
    A_log,  # [H] or None
    dt_bias,  # [H] or None
    beta,  # [tokens, H] or None
    ridge_scale_tensor,  # [H] or [tokens, H] or None
    ridge_offset_tensor,  # [H] or [tokens, H] or None
    kk,  # H_c [chunks, H, BLOCK_D, BLOCK_D] operand dtype
    kk_units,  # [chunks, H] fp32
    x,  # out [tokens, H, D]
    x_scale,  # out [tokens, H] fp32, or None: x is stored as it is
    x_query,  # out [tokens, H] fp32: x = x_query·q + x_scale·x̂; written with x_scale
    fro,  # out ‖H_t‖_F [tokens, H] fp32
    cu_seqlens,  # [N + 1] or None
    chunk_offsets,  # [N] or None
    chunk_sequence,  # [chunks] sequence of each chunk, -1 for unused, or None
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
    SCALE_PER_TOKEN: tl.constexpr,
    OFFSET_PER_TOKEN: tl.constexpr,
    CONSTANT_DELTA: tl.constexpr,  # the ridge is one float ratio: every Chebyshev coefficient is a scalar
    QK_L2NORM: tl.constexpr,
    NORM_EPS: tl.constexpr,
    FRO_MIN: tl.constexpr,
    MIN_LOG_DECAY: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program does one chunk of one query head: x_t = (H_t + λ_t I)⁻¹ q_t of its tokens."""
    i_c, i_h = chunk_and_head(H, FROM_LAST=True)
    i_n, start, end = chunk_bounds(i_c, T, cu_seqlens, chunk_offsets, chunk_sequence, slab_first, slab_chunks, C)
    if i_n < 0:
        return
    i_state = i_c.to(tl.int64) * H + i_h
    o_d = tl.arange(0, BLOCK_D)
    m_t, o_row, o_r = token_rows_of_chunk(start, end, i_h, H, C)
    first = start.to(tl.int64) * H + i_h
    first_kv = start.to(tl.int64) * (H // GROUP) + i_h // GROUP

    # Everything that is read travels at once, before anything waits for it.
    b_g = load_log_decay(log_decay, A_log, dt_bias, o_row, m_t, i_h, MIN_LOG_DECAY)
    b_beta = load_scalars(beta, o_row, m_t, 1.0)
    b_k = load_tile(k + first_kv * D, o_r, o_d, H // GROUP * D, D, BLOCK_D)
    h, unit_h = state_operand(kk, i_state, BLOCK_D, BLOCK_S), tl.load(kk_units + i_state)
    b_q = load_tile(q + first * D, o_r, o_d, H * D, D, BLOCK_D)

    b_c = tl.cumsum(b_g, axis=0)
    gamma = tl.exp(b_c)
    b_k32, unit_k = scale_rows(as_sums(b_k.to(tl.float32), OPERAND))
    kappa = tl.where(m_t, key_weight(b_k32, unit_k, b_beta, QK_L2NORM, NORM_EPS), 0.0)
    b_k = b_k32.to(OPERAND)
    h_square = sum_of_squares(h, BLOCK_D, BLOCK_S)
    b_gram = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION)
    # Adding nothing of a product's makes M a tile of the tensor cores' layout, where a thread has two rows, not 32.
    b_m = decay_matrix(b_c, C) + 0.0 * b_gram
    b_fro = frobenius_norm(b_k, kappa, h, h_square, unit_h, gamma, b_m, b_gram, C, BLOCK_S, PRECISION)
    tl.store(fro + o_row, b_fro, mask=m_t)
    b_ridge = load_ridge(ridge_scale_tensor, ridge_scale, o_row, m_t, i_h, SCALE_PER_TOKEN)
    b_offset = load_ridge(ridge_offset_tensor, ridge_offset, o_row, m_t, i_h, OFFSET_PER_TOKEN)
    b_ridge, b_offset = linearised(b_fro, b_ridge, b_offset)
    inv_eta, weight_h = normalise(b_fro, b_ridge, b_offset, FRO_MIN, CONSTANT_DELTA)
    phi, b_psi = operator_weights(weight_h, unit_h, kappa, gamma, b_m)
    if CONSTANT_DELTA:
        delta = ridge_scale / (1 + ridge_scale)
    else:
        delta = (1 - b_fro * weight_h)[:, None]
    b_q, unit_q = scale_rows(as_sums(b_q.to(tl.float32), OPERAND))
    weight_q = query_weight(b_q, unit_q, QK_L2NORM, NORM_EPS)
    b_z = chebyshev(b_q, h, b_k, phi, b_psi, delta, num_iter, BLOCK_S, PRECISION)  # x = weight_q/η z

    start = formed_anew(start, num_iter)
    m_t, o_row, o_r = token_rows_of_chunk(start, end, i_h, H, C)
    first = start.to(tl.int64) * H + i_h
    if x_scale is None:
        store_tile(x + first * D, b_z * (weight_q * inv_eta)[:, None], o_r, m_t, o_d, H * D, D, BLOCK_D)
    else:  # x = c q + w
        b_q = as_sums(load_tile(q + first * D, o_r, o_d, H * D, D, BLOCK_D).to(tl.float32), OPERAND)
        b_q *= pow2_inverse(unit_q)[:, None]
        b_w, c = split_along_query(b_z, b_q)
        b_w, unit_w = scale_rows(b_w)
        store_tile(x + first * D, b_w, o_r, m_t, o_d, H * D, D, BLOCK_D)
        tl.store(x_scale + o_row, unit_w * weight_q * inv_eta, mask=m_t)
        tl.store(x_query + o_row, c * inv_eta, mask=m_t)
