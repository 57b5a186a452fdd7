"""chunk_backward_solve_kernel for Hopper with 16-bit inputs, in Gluon: see chunk_solve_hopper.py.

The tiles that are needed after the solve, q and dMix, wait for it in shared memory, and so do the tokens' scalars.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

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
    normalise_rows_backward,
    query_weight,
    scale_rows,
    store_tile,
)
from gka_ops.triton.primitives_hopper import arrived, chebyshev, kept, places, to_shared


@gluon.jit(do_not_specialize=["slab_first", "slab_chunks", "T", "num_iter"])
def chunk_backward_solve_hopper_kernel(
    dx,  # everything as in chunk_backward_solve_kernel, with THROUGH_READOUT
    q,
    k,
    log_decay,
    A_log,
    dt_bias,
    alpha,
    beta,
    ridge_scale_tensor,
    ridge_offset_tensor,
    x,
    x_scale,
    x_query,
    fro,
    kk,
    kk_units,
    dq,
    y,
    y_scale,
    d_ridge_scale,
    d_ridge_offset,
    w_local,
    pi,
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
    THROUGH_READOUT: gl.constexpr,
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
    gl.static_assert(THROUGH_READOUT)
    i_c, i_h = chunk_and_head(H)
    i_n, start, end = chunk_bounds(i_c, T, cu_seqlens, chunk_offsets, chunk_sequence, slab_first, slab_chunks, C)
    if i_n < 0:
        return
    i_state = i_c.to(gl.int64) * H + i_h
    first = start.to(gl.int64) * H + i_h
    first_kv = start.to(gl.int64) * (H // GROUP) + i_h // GROUP

    # 16 bytes a thread for what travels, of 16 and 32 bits; the accumulators' layouts, of y and of scores; tokens one
    # a thread
    TILE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    TILE_32: gl.constexpr = gl.BlockedLayout([1, 4], [128 // BLOCK_D, BLOCK_D // 4], [4, 1], [1, 0])
    M_R: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    M_S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    TOKENS: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    TILE_ROWS: gl.constexpr = gl.SliceLayout(1, TILE)
    TILE_32_ROWS: gl.constexpr = gl.SliceLayout(1, TILE_32)
    ROWS: gl.constexpr = gl.SliceLayout(1, M_R)
    S_ROWS: gl.constexpr = gl.SliceLayout(1, M_S)
    S_COLUMNS: gl.constexpr = gl.SliceLayout(0, M_S)
    SHARED_H: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_D, BLOCK_D], OPERAND)
    SHARED_DX: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 4, [1, 0])  # read at once: 32 bytes of 4 rows

    o_d = gl.arange(0, BLOCK_D, gl.SliceLayout(0, TILE))
    o_d32 = gl.arange(0, BLOCK_D, gl.SliceLayout(0, TILE_32))
    o_h = gl.arange(0, BLOCK_D, TILE_ROWS)
    m_t, o_row, _ = places(start, end, i_h, H, C, TOKENS)
    _, _, o_r = places(start, end, i_h, H, C, TILE_ROWS)
    _, _, o_r32 = places(start, end, i_h, H, C, TILE_32_ROWS)
    s_h = gl.allocate_shared_memory(OPERAND, [BLOCK_D, BLOCK_D], SHARED_H)
    s_dx = gl.allocate_shared_memory(gl.float32, [C, BLOCK_D], SHARED_DX)
    p_h = kk + i_state * BLOCK_D * BLOCK_D + (o_h[:, None] * BLOCK_D + o_d[None, :])
    p_dx = dx + i_state * C * D + (o_r32[:, None] * D + o_d32[None, :])
    b_k = load_tile(k + first_kv * D, o_r, o_d, H // GROUP * D, D, BLOCK_D)
    b_q = load_tile(q + first * D, o_r, o_d, H * D, D, BLOCK_D)
    unit_h = gl.load(kk_units + i_state)
    b_g = load_log_decay(log_decay, A_log, dt_bias, o_row, m_t, i_h, MIN_LOG_DECAY)
    b_beta = load_scalars(beta, o_row, m_t, 1.0)
    b_fro = load_scalars(fro, o_row, m_t, 0.0)
    b_ridge = load_ridge(ridge_scale_tensor, ridge_scale, o_row, m_t, i_h, SCALE_PER_TOKEN)
    b_offset = load_ridge(ridge_offset_tensor, ridge_offset, o_row, m_t, i_h, OFFSET_PER_TOKEN)
    b_alpha = load_scalars(alpha, o_row, m_t, 1.0)
    b_pi = load_scalars(pi, o_row, m_t, 0.0)
    b_ridge, b_offset = linearised(b_fro, b_ridge, b_offset)
    async_copy.async_copy_global_to_shared(s_h, p_h)
    async_copy.async_copy_global_to_shared(s_dx, p_dx, (o_d32 < D)[None, :])
    async_copy.commit_group()
    s_q = to_shared(b_q)
    s_fro, s_ridge, s_offset, s_alpha, s_pi = kept(b_fro), kept(b_ridge), kept(b_offset), kept(b_alpha), kept(b_pi)

    b_c = tl.cumsum(b_g, axis=0) * 1.4426950408889634  # in powers of two
    b_k32, unit_k = scale_rows(b_k.to(gl.float32))
    kappa = key_weight(b_k32, unit_k, gl.convert_layout(b_beta, TILE_ROWS), QK_L2NORM, NORM_EPS)
    kappa = gl.where(m_t, gl.convert_layout(kappa, TOKENS), 0.0)
    s_k = to_shared(b_k32.to(OPERAND))
    inv_eta, weight_h = normalise(b_fro, b_ridge, b_offset, FRO_MIN, CONSTANT_DELTA)
    s_c, s_weight_y = kept(b_c), kept(inv_eta * b_alpha)  # dx = α dMix
    s_weight_h, s_square, s_phi = kept(weight_h), kept(kappa * kappa), kept(gl.exp2(b_c) * unit_h * weight_h)
    s_delta = kept(1 - b_fro * weight_h)
    arrived(0)

    o_t, o_s = gl.arange(0, C, S_ROWS), gl.arange(0, C, S_COLUMNS)
    b_lag = s_c.load(S_ROWS)[:, None] - s_c.load(S_COLUMNS)[None, :]
    b_m = gl.where(o_t[:, None] >= o_s[None, :], gl.exp2(b_lag), 0.0)
    b_psi = b_m * s_weight_h.load(S_ROWS)[:, None] * s_square.load(S_COLUMNS)[None, :]
    if CONSTANT_DELTA:
        delta = ridge_scale / (1 + ridge_scale)
    else:
        delta = s_delta.load(ROWS)[:, None]
    b_dx, weight_y = scale_rows(s_dx.load(M_R))
    s_unit = kept(weight_y)
    b_z = chebyshev(b_dx, s_h, s_k, s_phi.load(ROWS)[:, None], b_psi, delta, num_iter)  # y = weight_y z

    start = formed_anew(start, num_iter)
    first = start.to(gl.int64) * H + i_h
    first_y = formed_anew(i_state, num_iter) * C
    m_t, _, o_r = places(start, end, i_h, H, C, TILE_ROWS)
    m_y, o_row, _ = places(start, end, i_h, H, C, ROWS)
    b_x = load_tile(x + first * D, o_r, o_d, H * D, D, BLOCK_D)
    weight_x, along = load_scalars(x_scale, o_row, m_y, 1.0), load_scalars(x_query, o_row, m_y, 0.0)
    weight_y = s_unit.load(ROWS) * s_weight_y.load(ROWS)
    b_scaled, unit_y = scale_rows(b_z)
    b_scaled = gl.convert_layout(b_scaled.to(y.dtype.element_ty), TILE)
    store_tile(y + first_y * D, b_scaled, o_r, m_t, o_d, D, D, BLOCK_D)
    gl.store(y_scale + o_row, unit_y * weight_y, mask=m_y)

    b_q = s_q.load(M_R).to(gl.float32)
    if QK_L2NORM:
        b_q, unit_q = scale_rows(b_q)
        along *= query_weight(b_q, unit_q, QK_L2NORM, NORM_EPS)
    else:
        unit_q = 1.0
    b_x = gl.convert_layout(b_x, M_R).to(gl.float32)
    y_x = weight_x * gl.sum(b_z * b_x, axis=1) + along * gl.sum(b_z * b_q, axis=1)
    b_d_lambda = -weight_y * y_x
    gl.store(pi + o_row, s_pi.load(ROWS) - s_offset.load(ROWS) * b_d_lambda, mask=m_y)
    b_y = b_z * weight_y[:, None] + s_dx.load(M_R) * (1 - s_alpha.load(ROWS))[:, None]
    b_dq = normalise_rows_backward(b_y, b_q, unit_q, QK_L2NORM, NORM_EPS)
    b_dq = gl.convert_layout(b_dq.to(dq.dtype.element_ty), TILE)
    store_tile(dq + first * D, b_dq, o_r, m_t, o_d, H * D, D, BLOCK_D)

    b_fro = s_fro.load(ROWS)
    vanishing = b_fro <= FRO_MIN
    b_mu = gl.where(vanishing, 0.0, s_ridge.load(ROWS) * b_d_lambda / gl.where(vanishing, 1.0, b_fro))
    b_mu = gl.convert_layout(gl.where(m_y, b_mu, 0.0), S_COLUMNS)
    o_t, o_s = gl.arange(0, C, S_ROWS), gl.arange(0, C, S_COLUMNS)
    b_lag = s_c.load(S_COLUMNS)[None, :] - s_c.load(S_ROWS)[:, None]
    b_m = gl.where(o_s[None, :] >= o_t[:, None], gl.exp2(b_lag), 0.0)
    b_w = gl.sum(b_m * b_m * b_mu[None, :], axis=1)
    gl.store(w_local + o_row, gl.convert_layout(b_w, ROWS), mask=m_y)
    if d_ridge_scale is not None:
        gl.store(d_ridge_scale + o_row, b_d_lambda * b_fro, mask=m_y)
    if d_ridge_offset is not None:
        gl.store(d_ridge_offset + o_row, b_d_lambda, mask=m_y)
