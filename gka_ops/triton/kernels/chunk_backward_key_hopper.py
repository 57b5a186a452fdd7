"""chunk_backward_key_kernel for Hopper with 16-bit inputs, in Gluon; several warpgroups share a product by columns.

What differs from chunk_backward_key.py is where things are. States and rows are copied into shared memory while earlier
ones are worked on, the tensor cores take all operands from there, and so do vectors of tokens, which every warp reads
as the rows or columns of whatever tile it needs them for: nothing is converted from layout to layout.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from gka_ops.triton.primitives import (
    chunk_and_head,
    chunk_bounds,
    decayed_max,
    effective_log_decay,
    formed_anew,
    load_tile,
    query_weight,
    row_norm,
    scale_rows,
    score_unit,
    store_gate_gradients,
    store_tile,
)
from gka_ops.triton.primitives_hopper import (
    arrived,
    copy_rows,
    kept,
    load_sums,
    places,
    scalars_in_row,
    shared_scalars,
    sums_of_rows,
    to_shared,
)


@gluon.jit(do_not_specialize=["T", "slab_first", "slab_chunks"])
def chunk_backward_key_hopper_kernel(
    q,  # everything as in chunk_backward_key_kernel; with a solve, x in fp16 and dk_u
    k,
    log_decay,
    A_log,
    dt_bias,
    beta,
    x,
    x_scale,
    x_query,
    y,
    y_scale,
    w_local,
    kk,
    kk_units,
    dkk,
    dkk_units,
    dk_u,
    dk_u_units,
    m_u,
    j_u,
    traces,
    pi,
    dk,
    d_beta,
    d_log_decay,
    d_A_log,
    d_dt_bias,
    cu_seqlens,
    chunk_offsets,
    chunk_sequence,
    slab_first,
    slab_chunks,
    T,
    H: gl.constexpr,
    GROUP: gl.constexpr,
    D: gl.constexpr,
    BLOCK_D: gl.constexpr,
    ROW_U: gl.constexpr,
    PIECES: gl.constexpr,
    BLOCK_S: gl.constexpr,
    C: gl.constexpr,
    SOLVE: gl.constexpr,
    QK_L2NORM: gl.constexpr,
    NORM_EPS: gl.constexpr,
    MIN_LOG_DECAY: gl.constexpr,
    OPERAND: gl.constexpr,
    PRECISION: gl.constexpr,
):
    i_c, i_h = chunk_and_head(H)
    i_n, start, end = chunk_bounds(i_c, T, cu_seqlens, chunk_offsets, chunk_sequence, slab_first, slab_chunks, C)
    if i_n < 0:
        return
    i_state = i_c.to(gl.int64) * H + i_h
    first = start.to(gl.int64) * H + i_h
    first_kv = start.to(gl.int64) * (H // GROUP) + i_h // GROUP

    # 16 bytes a thread for what travels; the products', whose columns warpgroups share; vectors of tokens, whole
    # in every warp, whose scans then need no other
    WARPS: gl.constexpr = gl.num_warps()
    TILE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [WARPS, 1], [1, 0])
    M_R: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, WARPS // 4], [16, BLOCK_D // (WARPS // 4), 16])
    M_S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, WARPS // 4], [16, C // (WARPS // 4), 16])
    SCALARS: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, WARPS // 4], [1, 0])
    TOKENS: gl.constexpr = gl.BlockedLayout([C // 32], [32], [WARPS], [0])
    TILE_ROWS: gl.constexpr = gl.SliceLayout(1, TILE)
    ROWS: gl.constexpr = gl.SliceLayout(1, M_R)
    S_ROWS: gl.constexpr = gl.SliceLayout(1, M_S)
    S_COLUMNS: gl.constexpr = gl.SliceLayout(0, M_S)
    S_STATE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_D, BLOCK_D], OPERAND)
    S_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, BLOCK_D], OPERAND)
    S_SCORES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], OPERAND)

    # Everything that the products with the states need is under way before anything waits.
    m_t, o_row, _ = places(start, end, i_h, H, C, gl.SliceLayout(0, SCALARS))
    b_of_xy = scalars_in_row(x_scale, 0, o_row, m_t, SCALARS) + scalars_in_row(x_query, 1, o_row, m_t, SCALARS)
    b_of_xy += scalars_in_row(y_scale, 2, o_row, m_t, SCALARS) + scalars_in_row(w_local, 3, o_row, m_t, SCALARS)
    b_of_u = scalars_in_row(dk_u_units, 0, o_row, m_t, SCALARS) + scalars_in_row(m_u, 1, o_row, m_t, SCALARS)
    b_gate = scalars_in_row(pi, 0, o_row, m_t, SCALARS)
    if log_decay is not None:
        b_gate += scalars_in_row(log_decay, 1, o_row, m_t, SCALARS)
    if beta is not None:
        b_gate += scalars_in_row(beta, 2, o_row, m_t, SCALARS)
    unit_r, unit_h = gl.load(dkk_units + i_state), gl.load(kk_units + i_state)
    o_d = gl.arange(0, BLOCK_D, gl.SliceLayout(0, TILE))
    o_s = gl.arange(0, BLOCK_D, TILE_ROWS)
    _, _, o_r = places(start, end, i_h, H, C, TILE_ROWS)
    s_r = gl.allocate_shared_memory(OPERAND, [BLOCK_D, BLOCK_D], S_STATE)
    s_h = gl.allocate_shared_memory(OPERAND, [BLOCK_D, BLOCK_D], S_STATE)
    copy_rows(s_r, dkk + i_state * BLOCK_D * BLOCK_D, o_s, o_d, BLOCK_D)
    copy_rows(s_h, kk + i_state * BLOCK_D * BLOCK_D, o_s, o_d, BLOCK_D)
    j_next = gl.load(j_u + i_state)
    if traces is not None:
        o_p = gl.arange(0, triton.next_power_of_2(PIECES), TOKENS)
        pieces = gl.load(traces + i_state * PIECES + o_p, mask=o_p < PIECES, other=0.0)
    tl.debug_barrier()  # without one, ptxas puts the copies behind the first wait for these loads
    b_k = load_tile(k + first_kv * D, o_r, o_d, H // GROUP * D, D, BLOCK_D)
    b_q = load_tile(q + first * D, o_r, o_d, H * D, D, BLOCK_D)
    s_of_xy, s_of_u, s_gate = shared_scalars(b_of_xy), shared_scalars(b_of_u), shared_scalars(b_gate)
    b_k, unit_k = scale_rows(b_k.to(gl.float32))
    s_k = to_shared(b_k.to(OPERAND))
    s_unit_k, s_norm_k = kept(unit_k), kept(row_norm(b_k, unit_k, NORM_EPS))
    b_q, unit_q = scale_rows(b_q.to(gl.float32))
    s_q = to_shared(b_q.to(OPERAND))
    s_weight_q = kept(query_weight(b_q, unit_q, QK_L2NORM, NORM_EPS))
    arrived(1)

    b_zero_r, b_zero_s = gl.zeros([C, BLOCK_D], gl.float32, M_R), gl.zeros([C, C], gl.float32, M_S)
    b_dk = warpgroup_mma(s_k, s_r, b_zero_r, use_acc=False, is_async=True)

    m_t, o_row, _ = places(start, end, i_h, H, C, TOKENS)
    b_g = gl.zeros([C], gl.float32, TOKENS)
    if log_decay is not None:
        b_g = s_gate.index(1).load(TOKENS)
    b_g = effective_log_decay(b_g, A_log, dt_bias, m_t, i_h, MIN_LOG_DECAY)
    b_c = tl.cumsum(b_g, axis=0)
    c_end = gl.sum(b_g, axis=0)
    if traces is not None:
        j_next += gl.exp(c_end) * gl.sum(pieces, axis=0)
    b_beta = gl.full([C], 1.0, gl.float32, TOKENS)
    if beta is not None:
        b_beta = s_gate.index(2).load(TOKENS)
    length, key_norm = s_unit_k.load(TOKENS), s_norm_k.load(TOKENS)
    if QK_L2NORM:
        nu = 1 / key_norm
    else:
        nu = length
    nu = gl.where(m_t, nu, 0.0)
    along = s_of_xy.index(1).load(TOKENS) * s_weight_q.load(TOKENS)
    across = s_of_xy.index(0).load(TOKENS)
    b_ys, b_wt = s_of_xy.index(2).load(TOKENS), s_of_xy.index(3).load(TOKENS)
    weight_r = 2 * gl.exp(c_end - b_c) * unit_r
    weight_h = 2 * b_wt * gl.exp(b_c) * unit_h
    kappa_2 = 2 * b_beta * b_beta * nu * nu
    later = gl.maximum(b_ys * (gl.abs(along) + gl.abs(across)), gl.abs(b_wt) * kappa_2)
    bound = gl.maximum(decayed_max(b_c, later, True), gl.abs(b_wt) * decayed_max(-b_c, kappa_2, False))
    # What falls 2^-40 below the products with the states does not show; dK in this unit stays finite.
    bound = gl.maximum(bound, 2.0**-40 * (gl.abs(weight_r) + gl.abs(weight_h)))
    unit = score_unit(bound, BLOCK_D)
    inverse = 1 / unit
    s_c, s_inverse = kept(b_c * 1.4426950408889634), kept(inverse)  # in powers of two
    s_of_r, s_of_h = kept(weight_r * inverse), kept(weight_h * inverse)
    s_wt, s_kappa, s_wt_kappa = kept(b_wt), kept(kappa_2), kept(b_wt * kappa_2)
    s_m_r, s_m_h = kept(0.5 * nu * nu * weight_r), kept(0.5 * nu * nu * weight_h)
    s_unit, s_nu, s_beta, s_g = kept(unit), kept(nu), kept(b_beta), kept(b_g)
    s_along, s_across = kept(along * b_ys), kept(across * b_ys)  # with the units of Y's rows

    # What is no longer needed makes room for what comes next.
    b_dk = warpgroup_mma_wait(0, [b_dk])
    tl.debug_barrier()
    s_xy = s_r._reinterpret(OPERAND, [BLOCK_D // C, C, BLOCK_D], S_TILE)
    s_w, s_y = s_xy.index(0), s_xy.index(1)
    start = formed_anew(start, slab_chunks)
    first = start.to(gl.int64) * H + i_h
    _, _, o_r = places(start, end, i_h, H, C, TILE_ROWS)
    copy_rows(s_w, x + first * D, o_r, o_d, H * D)
    copy_rows(s_y, y + i_state * C * D, o_r, o_d, D)
    arrived(2)
    b_kh = warpgroup_mma(s_k, s_h, b_zero_r, use_acc=False, is_async=True)
    b_gram = warpgroup_mma(s_k, s_k.permute((1, 0)), b_zero_s, use_acc=False, is_async=True)
    s_k_r_k = sums_of_rows(b_dk * s_k.load(M_R).to(gl.float32), WARPS)
    b_dk *= s_of_r.load(ROWS)[:, None]
    b_kh, b_gram = warpgroup_mma_wait(0, [b_kh, b_gram])
    tl.debug_barrier()
    s_u = s_h._reinterpret(OPERAND, [BLOCK_D // C, C, BLOCK_D], S_TILE).index(0)
    s_scores = s_h._reinterpret(OPERAND, [BLOCK_D * BLOCK_D // (C * C), C, C], S_SCORES)
    copy_rows(s_u, dk_u + first * ROW_U, o_r, o_d, H * ROW_U)
    s_k_h_k = sums_of_rows(b_kh * s_k.load(M_R).to(gl.float32), WARPS)
    b_dk += b_kh * s_of_h.load(ROWS)[:, None]
    tl.debug_barrier()

    o_t, o_s = gl.arange(0, C, S_ROWS), gl.arange(0, C, S_COLUMNS)
    anticausal = o_t[:, None] <= o_s[None, :]
    b_lag = s_c.load(S_COLUMNS)[None, :] - s_c.load(S_ROWS)[:, None]
    b_decay = gl.exp2(-gl.abs(b_lag)) * s_inverse.load(S_ROWS)[:, None]
    b_w = gl.where(
        anticausal, s_wt_kappa.load(S_COLUMNS)[None, :], s_wt.load(S_ROWS)[:, None] * s_kappa.load(S_COLUMNS)[None, :]
    )
    b_pk = b_gram * b_decay * b_w  # W∘K Kᵀ
    s_pk = to_shared(b_pk.to(OPERAND))
    arrived(1)
    b_dk = warpgroup_mma(s_pk, s_k, b_dk, is_async=True)
    b_kq = warpgroup_mma(s_k, s_q.permute((1, 0)), b_zero_s, use_acc=False, is_async=True)
    b_kw = warpgroup_mma(s_k, s_w.permute((1, 0)), b_zero_s, use_acc=False, is_async=True)
    s_gram_pairs = sums_of_rows(b_pk * b_gram, WARPS)
    b_e = gl.where(anticausal, -b_decay, 0.0)  # −Mᵀ
    b_dk, b_kq, b_kw = warpgroup_mma_wait(0, [b_dk, b_kq, b_kw])
    b_ky = warpgroup_mma(s_k, s_y.permute((1, 0)), b_zero_s, use_acc=False, is_async=True)
    along, across = s_along.load(S_COLUMNS)[None, :], s_across.load(S_COLUMNS)[None, :]
    b_kx = (b_kq * along + b_kw * across) * b_e
    s_kx, s_kyq = s_scores.index(2), s_scores.index(3)  # beside s_u
    s_kx.store(b_kx.to(OPERAND))
    b_ky = warpgroup_mma_wait(0, [b_ky])
    s_pairs = sums_of_rows(b_kx * b_ky, WARPS)
    b_ky *= b_e
    s_kyq.store((b_ky * along).to(OPERAND))
    tl.debug_barrier()  # W∘K Kᵀ makes room
    s_pk.store((b_ky * across).to(OPERAND))
    arrived(0)
    b_dk = warpgroup_mma(s_kx, s_y, b_dk, is_async=True)
    b_dk = warpgroup_mma(s_kyq, s_q, b_dk, is_async=True)
    b_dk = warpgroup_mma(s_pk, s_w, b_dk, is_async=True)

    b_beta, nu, unit = s_beta.load(TOKENS), s_nu.load(TOKENS), s_unit.load(TOKENS)
    m_r = s_m_r.load(TOKENS) * load_sums(s_k_r_k, TOKENS)
    pairs = 0.5 * load_sums(s_gram_pairs, TOKENS) + load_sums(s_pairs, TOKENS)
    start = formed_anew(start, slab_chunks)
    m_t, o_row, _ = places(start, end, i_h, H, C, TOKENS)
    b_m = m_r + s_m_h.load(TOKENS) * load_sums(s_k_h_k, TOKENS) + nu * nu * unit * pairs
    m_v = s_of_u.index(1).load(TOKENS)
    j_next += gl.sum(b_beta * b_beta * m_r, axis=0)  # J⁺ = <Ω⁺, H_end> + <Ξ⁺, U_end>
    weight = b_beta * b_beta
    radial = gl.zeros([C], gl.float32, TOKENS)
    if QK_L2NORM:  # MATH.md §4.5, with k·dk from the sums above
        length, key_norm = s_unit_k.load(TOKENS), s_norm_k.load(TOKENS)
        radial = gl.where(key_norm > NORM_EPS / length, 2 * b_m + m_v, 0.0)  # at or below ε the norm is constant
        weight /= key_norm * length
    s_of_dk, s_of_k = kept(unit * nu * weight), kept(nu * radial * weight)
    s_of_u = kept(s_of_u.index(0).load(TOKENS) * weight)
    store_gate_gradients(
        b_m + m_v, s_gate.index(0).load(TOKENS), j_next, b_beta, s_g.load(TOKENS), d_beta, d_log_decay, d_A_log,
        d_dt_bias, log_decay, A_log, dt_bias, o_row, m_t, i_h, i_state, MIN_LOG_DECAY,
    )  # fmt: skip
    b_dk, s_q, s_pk, s_xy = warpgroup_mma_wait(0, [b_dk, s_q, s_pk, s_xy])  # theirs until now
    tl.debug_barrier()
    b_dk *= s_of_dk.load(ROWS)[:, None]
    if QK_L2NORM:
        b_dk -= s_k.load(M_R).to(gl.float32) * s_of_k.load(ROWS)[:, None]
    b_dk += s_u.load(M_R).to(gl.float32) * s_of_u.load(ROWS)[:, None]
    m_t, _, o_r = places(start, end, i_h, H, C, TILE_ROWS)
    first = start.to(gl.int64) * H + i_h
    b_dk = gl.convert_layout(b_dk.to(dk.dtype.element_ty), TILE)
    store_tile(dk + first * D, b_dk, o_r, m_t, o_d, H * D, D, BLOCK_D)
