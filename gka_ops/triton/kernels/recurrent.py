"""Decode step: states advanced in place, solve and read-out of one or a few tokens (MATH.md §5).

A tile of a state is [SIDE, LANES, BLOCKS, ROWS]: its columns are numbered by (block, side), its rows by (lane, row).
Threads lie along SIDE and LANES, warps along BLOCKS. So LANES neighbouring threads share a column; its sum takes
log2 LANES shuffles, and nothing passes between warps. A vector is held by columns, [SIDE, 1, BLOCKS, 1], each entry
by the threads that share the column, or by rows, [1, LANES, 1, ROWS].
"""

import triton
import triton.language as tl

from gka_ops.triton.primitives import (
    formed_anew,
    linearised,
    load_log_decay,
    load_ridge,
    load_scalars,
    normalise,
    pow2_floor,
)


@triton.jit
def columns(SIZE: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Numbers of SIZE columns [SIDE, 1, BLOCKS, 1], as threads are to hold them: WIDTH neighbours each.

    Left to itself the compiler gives a thread four neighbours and spreads a column's rows over the program.
    """
    SIDE: tl.constexpr = 32 * WIDTH // LANES
    side = tl.max_contiguous(tl.arange(0, SIDE), WIDTH)
    return tl.arange(0, SIZE // SIDE)[None, None, :, None] * SIDE + side[:, None, None, None]


@triton.jit
def rows(SIZE: tl.constexpr, LANES: tl.constexpr):
    """Numbers of SIZE rows [1, LANES, 1, ROWS].

    Lanes take turns at four rows: a vector by rows comes from shared memory four entries at a time, and those of all
    lanes lie side by side, in different banks.
    """
    row = tl.arange(0, SIZE // LANES)[None, None, None, :]
    return row // 4 * (4 * LANES) + tl.arange(0, LANES)[None, :, None, None] * 4 + row % 4


@triton.jit
def by_rows(b, LANES: tl.constexpr):
    """A vector by columns, as one by rows."""
    SIZE: tl.constexpr = b.shape[0] * b.shape[2]
    b = tl.reshape(tl.permute(b, (1, 3, 2, 0)), (SIZE // LANES // 4, LANES, 4))
    return tl.reshape(tl.permute(b, (1, 0, 2)), (LANES, SIZE // LANES))[None, :, None, :]


@triton.jit
def load_vector(p, o_c, SIZE: tl.constexpr, LANES: tl.constexpr):
    """A vector in fp32 as it is loaded, [SIDE, LANES, BLOCKS, 1]: one of the threads that share a column has its entry,
    the others have 0."""
    lane = tl.arange(0, LANES)[None, :, None, None]
    return tl.load(p + (o_c + 0 * lane), mask=(o_c < SIZE) & (lane == 0), other=0.0).to(tl.float32)


@triton.jit
def by_columns(b):
    """A vector as it was loaded, by columns.

    What is done to it before this is done once. The compiler would do by rows what is done between this and
    :func:`by_rows`, and hold the rows meanwhile.
    """
    return tl.sum(b, axis=1, keep_dims=True)


@triton.jit
def store_vector(p, b, o_c, SIZE: tl.constexpr, LANES: tl.constexpr):
    """Stores a vector by columns the way it is loaded."""
    lane = tl.arange(0, LANES)[None, :, None, None]
    tl.store(p + (o_c + 0 * lane), b.to(p.dtype.element_ty), mask=(o_c < SIZE) & (lane == 0))


@triton.jit
def over_columns(b):
    """The sum of a vector, by columns or as it was loaded."""
    return tl.sum(tl.sum(tl.sum(tl.sum(b, axis=0), axis=0), axis=1), axis=0)


@triton.jit
def unit_of(b):
    """The power of two that divides a vector to a largest entry in [1, 2)."""
    return pow2_floor(tl.max(tl.max(tl.max(tl.max(tl.abs(b), axis=0), axis=0), axis=1), axis=0))


@triton.jit
def inverse_norm(b, unit, NORM_EPS: tl.constexpr):
    """1 / max(‖b‖, ε/unit) of a vector that was divided by its unit."""
    norm = tl.sqrt(over_columns(b * b))
    return 1 / tl.where(norm < NORM_EPS / unit, NORM_EPS / unit, norm)


@triton.jit
def over_rows(b, CHAINS: tl.constexpr):
    """Column sums of b [SIDE, LANES, BLOCKS, ROWS]: a thread sums its own rows, in CHAINS chains that need not wait for
    each other."""
    b = tl.reshape(b, (b.shape[0], b.shape[1], b.shape[2], CHAINS, b.shape[3] // CHAINS))
    return tl.sum(tl.sum(tl.sum(b, axis=4), axis=3, keep_dims=True), axis=1, keep_dims=True)


@triton.jit
def solve(b_q, b_h, weight_h, delta, num_iter, CHAINS: tl.constexpr):
    """z ≈ B⁻¹ q by columns of B = weight·H + δ I, as :func:`~gka_ops.triton.primitives.chebyshev` in fp32.

    Not on tensor cores: one vector fills a sixteenth of their tile, and waits for as many multiplications in a row as
    they take for D; nor would H stay in registers. H is symmetric, so the sum goes over its rows.
    """
    theta = 0.5 * (1 + delta)
    quarter = 0.0625 * (1 - delta) * (1 - delta)  # of h²
    mu = 2 / theta
    b_e = 0.5 * b_q  # the increment in units of its weight μ = 2ν: one operation less waits for the sum over rows
    b_z = mu * b_e
    b_r = b_q
    for _ in range(num_iter):
        b_r -= mu * delta * b_e
        b_y = mu * weight_h * over_rows(b_h * by_rows(b_e, b_h.shape[1]), CHAINS)
        b_e = (quarter * mu * mu * b_e + b_r) - b_y
        b_r -= b_y
        mu = 1 / (theta - quarter * mu)
        b_z += mu * b_e
    return b_z


@triton.jit(do_not_specialize=["num_iter"], do_not_specialize_on_alignment=["T"])
def recurrent_kernel(
    q,  # [B·T, H, D]
    k,  # [B·T, Hkv, D]
    v,  # [B·T, Hkv, V]
    log_decay,  # [B·T, H] or None
    A_log,  # [H] or None
    dt_bias,  # [H] or None
    alpha,  # [B·T, H] or None
    beta,  # [B·T, H] or None
    ridge_scale_tensor,  # [H] or [B·T, H] or None
    ridge_offset_tensor,  # [H] or [B·T, H] or None
    kk,  # H, in and out [slots, H, D, D] fp32
    kv,  # U, in and out [slots, H, D, V] fp32
    state_indices,  # [B], negative for padding, or None
    output,  # out [B·T, H, V]
    ridge_scale,
    ridge_offset,
    scale,
    num_iter,
    T,
    H,
    GROUP,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    V_PAD: tl.constexpr,
    LANES: tl.constexpr,  # threads that share a column of H
    LANES_V: tl.constexpr,  # and of U
    WIDTH: tl.constexpr,
    CHAINS: tl.constexpr,
    SOLVE: tl.constexpr,
    SCALE_PER_TOKEN: tl.constexpr,
    OFFSET_PER_TOKEN: tl.constexpr,
    QK_L2NORM: tl.constexpr,
    NORM_EPS: tl.constexpr,
    FRO_MIN: tl.constexpr,
    MIN_LOG_DECAY: tl.constexpr,
):
    """One program does one query head of one sequence, H held on chip over its T tokens; U passes through."""
    i_h, i_b = tl.program_id(0), tl.program_id(1)
    slot = i_b.to(tl.int64)
    if state_indices is not None:
        slot = tl.load(state_indices + i_b).to(tl.int64)
    if slot < 0:
        for i_t in range(T):
            i_row = ((i_b * T + i_t) * H + i_h).to(tl.int64)
            for i_v in range(V_PAD // BLOCK_V):
                o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
                tl.store(output + i_row * V + o_v, tl.zeros((BLOCK_V,), output.dtype.element_ty), mask=o_v < V)
        return
    o_c, o_r = columns(BLOCK_D, LANES, WIDTH), rows(BLOCK_D, LANES)
    o_cv, o_rv = columns(BLOCK_V, LANES_V, WIDTH), rows(BLOCK_D, LANES_V)
    p_kk = kk + (slot * H + i_h) * D * D + (o_c + o_r * D)
    p_kv = kv + (slot * H + i_h) * D * V + (o_cv + o_rv * V)
    m_kk = (o_c < D) & (o_r < D)
    b_h = tl.load(p_kk, mask=m_kk, other=0.0, eviction_policy="evict_first")
    for i_t in range(T):
        i_row = ((i_b * T + i_t) * H + i_h).to(tl.int64)
        i_kv = ((i_b * T + i_t) * (H // GROUP) + i_h // GROUP).to(tl.int64)
        b_k = load_vector(k + i_kv * D, o_c, D, LANES)
        b_q = load_vector(q + i_row * D, o_c, D, LANES)
        gamma = tl.exp(load_log_decay(log_decay, A_log, dt_bias, i_row, True, i_h, MIN_LOG_DECAY))
        b_beta = load_scalars(beta, i_row, True, 1.0)
        b_alpha = load_scalars(alpha, i_row, True, 1.0)
        unit_q = unit_of(b_q)
        b_q *= 1 / unit_q
        weight_q = unit_q  # of b_q in the query
        if QK_L2NORM:
            unit_k = unit_of(b_k)
            b_k *= 1 / unit_k
            b_k *= inverse_norm(b_k, unit_k, NORM_EPS)
            weight_q = inverse_norm(b_q, unit_q, NORM_EPS)
        b_key = b_k * b_beta
        b_k, b_q = by_columns(b_key), by_columns(b_q)
        b_h = b_h * gamma + b_k * by_rows(b_k, LANES)
        if i_t == T - 1:  # before the solve, for memory to have work during it
            tl.store(p_kk, b_h, mask=m_kk, eviction_policy="evict_first")
        b_mix = b_q * weight_q
        if SOLVE:
            b_fro = tl.sqrt(over_columns(over_rows(b_h * b_h, CHAINS)))
            b_ridge = load_ridge(ridge_scale_tensor, ridge_scale, i_row, True, i_h, SCALE_PER_TOKEN)
            b_offset = load_ridge(ridge_offset_tensor, ridge_offset, i_row, True, i_h, OFFSET_PER_TOKEN)
            b_ridge, b_offset = linearised(b_fro, b_ridge, b_offset)
            inv_eta, weight_h = normalise(b_fro, b_ridge, b_offset, FRO_MIN, False)
            b_x = solve(b_q, b_h, weight_h, 1 - b_fro * weight_h, num_iter, CHAINS) * (weight_q * inv_eta)
            b_mix = (1 - b_alpha) * b_mix + b_alpha * b_x
        b_mix = by_rows(b_mix, LANES_V)
        b_k = by_rows(by_columns(formed_anew(b_key, num_iter)) if SOLVE else b_k, LANES_V)
        for i_v in range(V_PAD // BLOCK_V):
            o_v = i_v * BLOCK_V + o_cv
            m_kv = (o_v < V) & (o_rv < D)
            b_v = by_columns(load_vector(v + i_kv * V, o_v, V, LANES_V) * b_beta)
            b_u = tl.load(p_kv + i_v * BLOCK_V, mask=m_kv, other=0.0, eviction_policy="evict_first")
            b_u = b_u * gamma + b_v * b_k
            tl.store(p_kv + i_v * BLOCK_V, b_u, mask=m_kv, eviction_policy="evict_first")
            store_vector(output + i_row * V, over_rows(b_u * b_mix, CHAINS) * scale, o_v, V, LANES_V)
        tl.debug_barrier()  # the next token reads the values that this one stored
