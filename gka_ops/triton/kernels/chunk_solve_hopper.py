"""chunk_solve_kernel for Hopper with 16-bit inputs, in Gluon: the products of an iteration run while it computes.

What differs from chunk_solve.py is who waits for whom. Triton waits for a product where it is issued; here the three
of an iteration are issued one behind the other, and vectors are worked on in their shadow. Helpers of ``primitives``
are called where they work element by element or along rows; what relates tokens to tokens is written out, because here
a tile has a layout and a vector that of its rows or its columns.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from gka_ops.triton.primitives import (
    chunk_and_head,
    chunk_bounds,
    formed_anew,
    key_weight,
    linearised,
    load_log_decay,
    load_ridge,
    load_scalars,
    load_tile,
    normalise,
    pow2_floor,
    pow2_inverse,
    query_weight,
    scale_rows,
    split_along_query,
    store_tile,
)
from gka_ops.triton.primitives_hopper import chebyshev, places, stored, to_shared


@gluon.jit
def products_of_keys(s_k, s_h, M_S: gl.constexpr, M_R: gl.constexpr):
    """K̂ K̂ᵀ [C, C] and K̂ Ĥ [C, BLOCK_D]."""
    C: gl.constexpr = s_k.shape[0]
    D: gl.constexpr = s_k.shape[1]
    b_zero_s, b_zero_r = gl.zeros([C, C], gl.float32, M_S), gl.zeros([C, D], gl.float32, M_R)
    b_gram = warpgroup_mma(s_k, s_k.permute((1, 0)), b_zero_s, use_acc=False, is_async=True)
    b_kh = warpgroup_mma(s_k, s_h, b_zero_r, use_acc=False, is_async=True)
    return warpgroup_mma_wait(0, [b_gram, b_kh])


@gluon.jit(do_not_specialize=["slab_first", "slab_chunks", "T", "num_iter"])
def chunk_solve_hopper_kernel(
    q,  # everything as in chunk_solve_kernel
    k,
    log_decay,
    A_log,
    dt_bias,
    beta,
    ridge_scale_tensor,
    ridge_offset_tensor,
    kk,
    kk_units,
    x,
    x_scale,
    x_query,
    fro,
    cu_seqlens,
    chunk_offsets,
    chunk_sequence,
    slab_first,
    slab_chunks,
    ridge_scale,
    ridge_offset,
    num_iter,
    T,
    H: gl.constexpr,
    GROUP: gl.constexpr,
    D: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_S: gl.constexpr,
    C: gl.constexpr,
    SCALE_PER_TOKEN: gl.constexpr,
    OFFSET_PER_TOKEN: gl.constexpr,
    CONSTANT_DELTA: gl.constexpr,
    QK_L2NORM: gl.constexpr,
    NORM_EPS: gl.constexpr,
    FRO_MIN: gl.constexpr,
    MIN_LOG_DECAY: gl.constexpr,
    OPERAND: gl.constexpr,
    PRECISION: gl.constexpr,
):
    i_c, i_h = chunk_and_head(H, FROM_LAST=True)
    i_n, start, end = chunk_bounds(i_c, T, cu_seqlens, chunk_offsets, chunk_sequence, slab_first, slab_chunks, C)
    if i_n < 0:
        return
    i_state = i_c.to(gl.int64) * H + i_h
    first = start.to(gl.int64) * H + i_h
    first_kv = start.to(gl.int64) * (H // GROUP) + i_h // GROUP

    # 16 bytes a thread for what travels; the accumulators' layouts, of x and of scores; tokens one a thread
    TILE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    M_R: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    M_S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    TOKENS: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    TILE_ROWS: gl.constexpr = gl.SliceLayout(1, TILE)
    ROWS: gl.constexpr = gl.SliceLayout(1, M_R)
    S_ROWS: gl.constexpr = gl.SliceLayout(1, M_S)
    S_COLUMNS: gl.constexpr = gl.SliceLayout(0, M_S)

    o_d = gl.arange(0, BLOCK_D, gl.SliceLayout(0, TILE))
    o_h = gl.arange(0, BLOCK_D, TILE_ROWS)
    m_t, o_row, _ = places(start, end, i_h, H, C, TOKENS)
    _, _, o_r = places(start, end, i_h, H, C, TILE_ROWS)
    b_g = load_log_decay(log_decay, A_log, dt_bias, o_row, m_t, i_h, MIN_LOG_DECAY)
    b_beta = load_scalars(beta, o_row, m_t, 1.0)
    b_k = load_tile(k + first_kv * D, o_r, o_d, H // GROUP * D, D, BLOCK_D)
    b_h = gl.load(kk + i_state * BLOCK_D * BLOCK_D + (o_h[:, None] * BLOCK_D + o_d[None, :]))
    unit_h = gl.load(kk_units + i_state)
    b_q = load_tile(q + first * D, o_r, o_d, H * D, D, BLOCK_D)

    b_c = tl.cumsum(b_g, axis=0) * 1.4426950408889634  # in powers of two
    b_k32, unit_k = scale_rows(b_k.to(gl.float32))
    kappa = key_weight(b_k32, unit_k, gl.convert_layout(b_beta, TILE_ROWS), QK_L2NORM, NORM_EPS)
    kappa = gl.where(m_t, gl.convert_layout(kappa, TOKENS), 0.0)
    s_k, s_h = to_shared(b_k32.to(OPERAND)), to_shared(b_h)
    b_h32 = b_h.to(gl.float32)
    h_square = gl.sum(gl.sum(b_h32 * b_h32, axis=1), axis=0)
    stored()

    # frobenius_norm
    b_gram, b_kh = products_of_keys(s_k, s_h, M_S, M_R)
    f_c = gl.sqrt(h_square) * unit_h
    square = kappa * kappa
    unit = pow2_floor(gl.maximum(gl.max(square, axis=0), f_c))
    inverse = pow2_inverse(unit)
    weight = square * inverse
    k_h_k = gl.convert_layout(gl.sum(b_kh * s_k.load(M_R).to(gl.float32), axis=1), TOKENS) * (unit_h * inverse)
    o_t, o_s = gl.arange(0, C, S_ROWS), gl.arange(0, C, S_COLUMNS)
    b_lag = gl.convert_layout(b_c, S_ROWS)[:, None] - gl.convert_layout(b_c, S_COLUMNS)[None, :]
    b_m = gl.where(o_t[:, None] >= o_s[None, :], gl.exp2(b_lag), 0.0)
    b_pair = b_gram * b_gram * b_m
    b_pair *= gl.convert_layout(weight, S_ROWS)[:, None] * gl.convert_layout(weight, S_COLUMNS)[None, :]
    pairs = 2 * gl.sum(b_pair, axis=1) - gl.sum(gl.where(o_t[:, None] == o_s[None, :], b_pair, 0.0), axis=1)
    gamma = gl.exp2(b_c)
    j = 2 * gamma * weight * k_h_k + gl.convert_layout(pairs, TOKENS)
    f_c = f_c * inverse
    fro2 = gl.convert_layout(gl.sum(b_m * b_m * gl.convert_layout(j, S_COLUMNS)[None, :], axis=1), TOKENS)
    fro2 += gamma * gamma * f_c * f_c
    b_fro = gl.sqrt(gl.where(fro2 < 0, 0.0, fro2)) * unit
    gl.store(fro + o_row, b_fro, mask=m_t)

    b_ridge = load_ridge(ridge_scale_tensor, ridge_scale, o_row, m_t, i_h, SCALE_PER_TOKEN)
    b_offset = load_ridge(ridge_offset_tensor, ridge_offset, o_row, m_t, i_h, OFFSET_PER_TOKEN)
    b_ridge, b_offset = linearised(b_fro, b_ridge, b_offset)
    inv_eta, weight_h = normalise(b_fro, b_ridge, b_offset, FRO_MIN, CONSTANT_DELTA)
    phi = gl.convert_layout(gamma * unit_h * weight_h, ROWS)[:, None]
    b_psi = b_m * gl.convert_layout(weight_h, S_ROWS)[:, None] * gl.convert_layout(square, S_COLUMNS)[None, :]
    if CONSTANT_DELTA:
        delta = ridge_scale / (1 + ridge_scale)
    else:
        delta = gl.convert_layout(1 - b_fro * weight_h, ROWS)[:, None]
    b_q, unit_q = scale_rows(gl.convert_layout(b_q, M_R).to(gl.float32))
    weight_q = query_weight(b_q, unit_q, QK_L2NORM, NORM_EPS)
    inv_eta = gl.convert_layout(inv_eta, ROWS)
    b_z = chebyshev(b_q, s_h, s_k, phi, b_psi, delta, num_iter)  # x = weight_q/η z

    start = formed_anew(start, num_iter)
    first = start.to(gl.int64) * H + i_h
    m_t, _, o_r = places(start, end, i_h, H, C, TILE_ROWS)
    if x_scale is None:
        b_x = gl.convert_layout(b_z * (weight_q * inv_eta)[:, None], TILE)
        store_tile(x + first * D, b_x, o_r, m_t, o_d, H * D, D, BLOCK_D)
    else:  # x = c q + w
        b_q = gl.convert_layout(load_tile(q + first * D, o_r, o_d, H * D, D, BLOCK_D), M_R).to(gl.float32)
        b_w, c = split_along_query(b_z, b_q * pow2_inverse(unit_q)[:, None])
        b_w, unit_w = scale_rows(b_w)
        b_x = gl.convert_layout(b_w.to(x.dtype.element_ty), TILE)
        store_tile(x + first * D, b_x, o_r, m_t, o_d, H * D, D, BLOCK_D)
        m_t, o_row, _ = places(start, end, i_h, H, C, ROWS)
        gl.store(x_scale + o_row, unit_w * weight_q * inv_eta, mask=m_t)
        gl.store(x_query + o_row, c * inv_eta, mask=m_t)
