"""chunk_backward_value_kernel for Hopper with bf16 inputs and a solve, in Gluon: see chunk_backward_key_hopper.py."""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from gka_ops.triton.primitives import (
    chunk_and_head,
    chunk_bounds,
    effective_log_decay,
    formed_anew,
    load_tile,
    pow2_floor,
    pow2_inverse,
    query_weight,
    scale_rows,
    store_tile,
)
from gka_ops.triton.primitives_hopper import (
    arrived,
    copy_rows,
    kept,
    largest_of_rows,
    load_largest,
    load_sums,
    places,
    scalars_in_row,
    shared_scalars,
    stored,
    sums_of_rows,
    to_shared,
)


@gluon.jit(do_not_specialize=["T", "slab_first", "slab_chunks"])
def chunk_backward_value_hopper_kernel(
    d_output,  # everything as in chunk_backward_value_kernel; with a solve, x in fp16 and dk_u, and V = D
    q,
    k,
    v,
    log_decay,
    A_log,
    dt_bias,
    alpha,
    beta,
    x,
    x_scale,
    x_query,
    dkv,
    dkv_units,
    dv,
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
    scale,
    T,
    H: gl.constexpr,
    GROUP: gl.constexpr,
    D: gl.constexpr,
    V: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_V: gl.constexpr,
    V_PAD: gl.constexpr,
    ROW_U: gl.constexpr,
    PIECES: gl.constexpr,
    C: gl.constexpr,
    SOLVE: gl.constexpr,
    QK_L2NORM: gl.constexpr,
    NORM_EPS: gl.constexpr,
    MIN_LOG_DECAY: gl.constexpr,
    OPERAND: gl.constexpr,
    PRECISION: gl.constexpr,
):
    gl.static_assert(D == BLOCK_D and V == D and V_PAD == 2 * BLOCK_V)
    i_c, i_h = chunk_and_head(H)
    i_n, start, end = chunk_bounds(i_c, T, cu_seqlens, chunk_offsets, chunk_sequence, slab_first, slab_chunks, C)
    if i_n < 0:
        return
    i_state = i_c.to(gl.int64) * H + i_h
    first = start.to(gl.int64) * H + i_h
    first_kv = start.to(gl.int64) * (H // GROUP) + i_h // GROUP

    WARPS: gl.constexpr = gl.num_warps()
    TILE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [WARPS, 1], [1, 0])
    M_R: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, WARPS // 4], [16, BLOCK_D // (WARPS // 4), 16])
    M_S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, WARPS // 4], [16, C // (WARPS // 4), 16])
    SCALARS: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, WARPS // 4], [1, 0])
    TOKENS: gl.constexpr = gl.BlockedLayout([C // 32], [32], [WARPS], [0])
    TILE_ROWS: gl.constexpr = gl.SliceLayout(1, TILE)
    TILE_COLUMNS: gl.constexpr = gl.SliceLayout(0, TILE)
    ROWS: gl.constexpr = gl.SliceLayout(1, M_R)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, M_R)
    S_ROWS: gl.constexpr = gl.SliceLayout(1, M_S)
    S_COLUMNS: gl.constexpr = gl.SliceLayout(0, M_S)
    S_STATE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_D, V_PAD], OPERAND)
    S_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, BLOCK_D], OPERAND)
    S_SCORES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], OPERAND)
    VALUE: gl.constexpr = v.dtype.element_ty

    # Everything is under way before anything waits.
    m_t, o_row, _ = places(start, end, i_h, H, C, gl.SliceLayout(0, SCALARS))
    b_of_x = scalars_in_row(x_scale, 0, o_row, m_t, SCALARS) + scalars_in_row(x_query, 1, o_row, m_t, SCALARS)
    if alpha is not None:
        b_of_x += scalars_in_row(alpha, 2, o_row, m_t, SCALARS)
    b_gate = gl.zeros([4, C], gl.float32, SCALARS)
    if log_decay is not None:
        b_gate += scalars_in_row(log_decay, 0, o_row, m_t, SCALARS)
    if beta is not None:
        b_gate += scalars_in_row(beta, 1, o_row, m_t, SCALARS)
    o_v = gl.arange(0, BLOCK_D, TILE_COLUMNS)
    unit_left, unit_right = gl.load(dkv_units + 2 * i_state), gl.load(dkv_units + 2 * i_state + 1)
    o_s = gl.arange(0, BLOCK_D, TILE_ROWS)
    _, _, o_r = places(start, end, i_h, H, C, TILE_ROWS)
    s_w = gl.allocate_shared_memory(OPERAND, [C, BLOCK_D], S_TILE)
    s_do = gl.allocate_shared_memory(VALUE, [C, BLOCK_D], S_TILE)
    s_xi = gl.allocate_shared_memory(OPERAND, [BLOCK_D, V_PAD], S_STATE)
    copy_rows(s_w, x + first * D, o_r, o_v, H * D)
    copy_rows(s_xi, dkv + i_state * BLOCK_D * V_PAD, o_s, o_v, V_PAD)
    copy_rows(s_do, d_output + first * V, o_r, o_v, H * V)
    if traces is not None:
        o_p = gl.arange(0, triton.next_power_of_2(PIECES), TOKENS)
        pieces = gl.load(traces + i_state * PIECES + o_p, mask=o_p < PIECES, other=0.0)
    tl.debug_barrier()  # without one, ptxas puts the copies behind the first wait for these loads
    b_k = load_tile(k + first_kv * D, o_r, o_v, H // GROUP * D, D, BLOCK_D)
    b_q = load_tile(q + first * D, o_r, o_v, H * D, D, BLOCK_D)
    b_v = load_tile(v + first_kv * V, o_r, o_v, H // GROUP * V, V, V_PAD)
    s_of_x, s_gate = shared_scalars(b_of_x), shared_scalars(b_gate)
    b_k, unit_k = scale_rows(b_k.to(gl.float32))
    s_k = to_shared(b_k.to(OPERAND))
    s_nu = kept(query_weight(b_k, unit_k, QK_L2NORM, NORM_EPS))
    b_q, unit_q = scale_rows(b_q.to(gl.float32))
    s_q = to_shared(b_q.to(OPERAND))
    s_weight_q = kept(query_weight(b_q, unit_q, QK_L2NORM, NORM_EPS))
    arrived(1)

    b_zero_r, b_zero_s = gl.zeros([C, BLOCK_D], gl.float32, M_R), gl.zeros([C, C], gl.float32, M_S)
    b_kq = warpgroup_mma(s_k, s_q.permute((1, 0)), b_zero_s, use_acc=False, is_async=True)
    b_kw = warpgroup_mma(s_k, s_w.permute((1, 0)), b_zero_s, use_acc=False, is_async=True)
    b_dv = warpgroup_mma(s_k, s_xi, b_zero_r, use_acc=False, is_async=True)

    unit_xi = gl.where(o_v < BLOCK_V, unit_left, unit_right)[None, :]
    s_unit_v = kept(pow2_floor(gl.max(gl.abs(b_v.to(gl.float32) * unit_xi), axis=1)))  # of rows of V in units of Ξ
    m_t, o_row, _ = places(start, end, i_h, H, C, TOKENS)
    b_g = gl.zeros([C], gl.float32, TOKENS)
    if log_decay is not None:
        b_g = s_gate.index(0).load(TOKENS)
    b_g = effective_log_decay(b_g, A_log, dt_bias, m_t, i_h, MIN_LOG_DECAY)
    b_c = tl.cumsum(b_g, axis=0)
    c_end = gl.sum(b_g, axis=0)
    tau = gl.exp(c_end - b_c)
    j_next = 0.0  # J⁺'s part through U
    if traces is not None:
        j_next += gl.exp(c_end) * gl.sum(pieces, axis=0)
    b_beta = gl.full([C], 1.0, gl.float32, TOKENS)
    if beta is not None:
        b_beta = s_gate.index(1).load(TOKENS)
    nu = gl.where(m_t, s_nu.load(TOKENS), 0.0)
    # Mix = (1 − α) q + α x
    weight_q = s_weight_q.load(TOKENS)
    mix_q, mix_w = s_of_x.index(1).load(TOKENS) * weight_q, s_of_x.index(0).load(TOKENS)
    if alpha is not None:
        b_alpha = s_of_x.index(2).load(TOKENS)
        mix_q, mix_w = (1 - b_alpha) * weight_q + b_alpha * mix_q, b_alpha * mix_w
    mix_q, mix_w = gl.where(m_t, mix_q, 0.0), gl.where(m_t, mix_w, 0.0)
    s_c, s_tau = kept(b_c * 1.4426950408889634), kept(tau)  # in powers of two
    s_mix_q, s_mix_w = kept(mix_q), kept(mix_w)
    s_of_dv, s_square = kept(b_beta * b_beta * nu), kept(b_beta * b_beta)

    # K makes room for V, as it came in and then scaled; later Ξ does for weighted scores.
    b_kq, b_kw, b_dv = warpgroup_mma_wait(0, [b_kq, b_kw, b_dv])
    tl.debug_barrier()
    s_v = s_k._reinterpret(VALUE, [C, BLOCK_D], S_TILE)
    s_v.store(b_v)
    arrived(0)
    b_vdo = warpgroup_mma(s_v, s_do.permute((1, 0)), b_zero_s, use_acc=False, is_async=True)
    o_t, o_s = gl.arange(0, C, S_ROWS), gl.arange(0, C, S_COLUMNS)
    b_lag = s_c.load(S_COLUMNS)[None, :] - s_c.load(S_ROWS)[:, None]
    b_decay = gl.where(o_t[:, None] <= o_s[None, :], scale * gl.exp2(-gl.abs(b_lag)), 0.0)  # s Mᵀ
    b_kmix = b_kq * s_mix_q.load(S_COLUMNS)[None, :] + b_kw * s_mix_w.load(S_COLUMNS)[None, :]
    b_km = b_kmix * b_decay  # s Mᵀ∘K Mixᵀ
    b_hi = b_km.to(VALUE)  # two terms, for one has 8 bits only
    s_hi = to_shared(b_hi)
    b_lo = (b_km - b_hi.to(gl.float32)).to(VALUE)
    b_dv *= gl.where(gl.arange(0, V_PAD, COLUMNS) < BLOCK_V, unit_left, unit_right)[None, :]
    s_next = sums_of_rows(b_dv * s_v.load(M_R).to(gl.float32), WARPS)
    b_dv *= s_tau.load(ROWS)[:, None]
    b_vdo = warpgroup_mma_wait(0, [b_vdo])
    b_vdo *= b_decay
    s_pairs = sums_of_rows(b_kmix * b_vdo, WARPS)
    b_v = s_v.load(TILE).to(gl.float32) * unit_xi  # as it was stored: nothing waits
    tl.debug_barrier()
    s_vxi = s_k._reinterpret(OPERAND, [C, BLOCK_D], S_TILE)
    s_vxi.store((b_v * pow2_inverse(s_unit_v.load(TILE_ROWS))[:, None]).to(OPERAND))
    stored()
    b_dk = warpgroup_mma(s_vxi, s_xi.permute((1, 0)), b_zero_r, use_acc=False, is_async=True)
    mix_q, mix_w = s_mix_q.load(S_COLUMNS)[None, :], s_mix_w.load(S_COLUMNS)[None, :]
    s_largest = largest_of_rows(gl.abs(b_vdo) * gl.maximum(gl.abs(mix_q), gl.abs(mix_w)), WARPS)
    tl.debug_barrier()
    # What falls 2^-40 below the product with the state does not show; dK in this unit stays finite.
    of_state = s_tau.load(TOKENS) * s_unit_v.load(TOKENS)
    unit = pow2_floor(gl.maximum(load_largest(s_largest, TOKENS), 2.0**-40 * of_state))
    s_unit, s_of_state = kept(unit), kept(of_state * pow2_inverse(unit))
    b_dk, s_vxi = warpgroup_mma_wait(0, [b_dk, s_vxi])  # its own until now
    tl.debug_barrier()
    s_scores = s_xi._reinterpret(OPERAND, [BLOCK_D * V_PAD // (C * C), C, C], S_SCORES)
    s_lo = s_scores.index(0)._reinterpret(VALUE, [C, C], S_SCORES)
    s_pq, s_pw = s_scores.index(1), s_scores.index(2)
    s_lo.store(b_lo)
    b_vdo *= pow2_inverse(s_unit.load(S_ROWS))[:, None]
    s_pq.store((b_vdo * mix_q).to(OPERAND))
    s_pw.store((b_vdo * mix_w).to(OPERAND))
    b_dk *= s_of_state.load(ROWS)[:, None]
    stored()
    b_dv = warpgroup_mma(s_hi, s_do, b_dv, is_async=True)
    b_dv = warpgroup_mma(s_lo, s_do, b_dv, is_async=True)
    b_dk = warpgroup_mma(s_pq, s_q, b_dk, is_async=True)
    b_dk = warpgroup_mma(s_pw, s_w, b_dk, is_async=True)

    start = formed_anew(start, slab_chunks)
    first = start.to(gl.int64) * H + i_h
    m_t, o_row, _ = places(start, end, i_h, H, C, TOKENS)
    nu = gl.where(m_t, s_nu.load(TOKENS), 0.0)
    m_next = nu * s_tau.load(TOKENS) * load_sums(s_next, TOKENS)
    gl.store(m_u + o_row, nu * load_sums(s_pairs, TOKENS) + m_next, mask=m_t)
    gl.store(j_u + i_state, j_next + gl.sum(s_square.load(TOKENS) * m_next, axis=0))
    m_t, o_row, o_r = places(start, end, i_h, H, C, TILE_ROWS)
    b_dv, s_hi, s_do = warpgroup_mma_wait(2, [b_dv, s_hi, s_do])  # theirs until now
    tl.debug_barrier()
    b_dv = gl.convert_layout((b_dv * s_of_dv.load(ROWS)[:, None]).to(dv.dtype.element_ty), TILE)
    store_tile(dv + first * V, b_dv, o_r, m_t, o_v, H * V, V, V_PAD)
    b_dk, s_q, s_w, s_scores = warpgroup_mma_wait(0, [b_dk, s_q, s_w, s_scores])
    tl.debug_barrier()
    s_largest = largest_of_rows(gl.abs(b_dk), WARPS)
    tl.debug_barrier()
    unit_dk = pow2_floor(load_largest(s_largest, ROWS))
    b_dk = gl.convert_layout((b_dk * pow2_inverse(unit_dk)[:, None]).to(OPERAND), TILE)
    store_tile(dk_u + first * ROW_U, b_dk, o_r, m_t, o_v, H * ROW_U, D, BLOCK_D)
    unit_dk = pow2_floor(load_largest(s_largest, TILE_ROWS))
    gl.store(dk_u_units + o_row, unit_dk * s_unit.load(TILE_ROWS), mask=m_t)
