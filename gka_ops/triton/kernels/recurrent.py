"""Decode step: states advanced in place, solve and read-out of one or a few tokens (MATH.md §5)."""

import triton
import triton.language as tl

from gka_ops.triton.primitives import (
    formed_anew,
    load_log_decay,
    load_ridge,
    load_scalars,
    normalise,
    pow2_floor,
)


@triton.jit
def load_vector(p, i_row, o, SIZE: tl.constexpr, NORMALISE: tl.constexpr, NORM_EPS: tl.constexpr):
    """One row of a token tensor [.., SIZE] as fp32 [BLOCK], divided by max(‖row‖, ε) if asked for."""
    b = tl.load(p + i_row * SIZE + o, mask=o < SIZE, other=0.0).to(tl.float32)
    if NORMALISE:
        unit = pow2_floor(tl.max(tl.abs(b), axis=0))
        b = b * (1 / unit)
        norm = tl.sqrt(tl.sum(b * b, axis=0))
        b = b * (1 / tl.where(norm < NORM_EPS / unit, NORM_EPS / unit, norm))
    return b


@triton.jit
def columns(i, SIZE: tl.constexpr):
    """The ``i``-th SIZE columns of a state, as threads are to hold them: one each, neighbours in neighbouring threads.

    Left to itself the compiler gives a thread four neighbours and spreads a column's rows over the program.
    """
    return i * SIZE + tl.max_contiguous(tl.arange(0, SIZE), 1)


@triton.jit
def over_rows(b, CHAINS: tl.constexpr):
    """Column sums [N] of b [N, R], columns first: a thread sums its own, in CHAINS chains that need not wait for each
    other."""
    return tl.sum(tl.sum(tl.reshape(b, (b.shape[0], CHAINS, b.shape[1] // CHAINS)), axis=2), axis=1)


@triton.jit
def solve(b_q, b_h, weight_h, delta, num_iter, CHAINS: tl.constexpr):
    """z ≈ B⁻¹ q [BLOCK_D] of B = weight·H + δ I, as :func:`~gka_ops.triton.primitives.chebyshev` in fp32.

    Not on tensor cores: one vector fills a sixteenth of their tile, and waits for as many multiplications in a row as
    they take for D; nor would H stay in registers. H is symmetric, so the sum goes over its rows.
    """
    theta = 0.5 * (1 + delta)
    h2 = 0.25 * (1 - delta) * (1 - delta)
    nu = 1 / theta
    b_d = nu * b_q
    b_z = b_d
    b_r = b_q
    for _ in range(num_iter):
        b_r = (b_r - delta * b_d) - weight_h * over_rows(b_h * b_d[None, :], CHAINS)
        nu_next = 1 / (2 * theta - h2 * nu)
        b_d = h2 * nu * nu_next * b_d + 2 * nu_next * b_r
        b_z += b_d
        nu = nu_next
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
    CHAINS: tl.constexpr,
    SOLVE: tl.constexpr,
    SCALE_PER_TOKEN: tl.constexpr,
    OFFSET_PER_TOKEN: tl.constexpr,
    QK_L2NORM: tl.constexpr,
    NORM_EPS: tl.constexpr,
    FRO_MIN: tl.constexpr,
    MIN_LOG_DECAY: tl.constexpr,
):
    """One program does one query head of one sequence, H held on chip over its T tokens.

    Tiles of states have columns first: a thread holds whole columns, so that sums over rows need no exchange.
    """
    i_h, i_b = tl.program_id(0), tl.program_id(1)
    o_r, o_c = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_D)
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
    p_kk = kk + (slot * H + i_h) * D * D + columns(0, BLOCK_D)[:, None] + o_r[None, :] * D
    m_kk = (o_c < D)[:, None] & (o_r < D)[None, :]
    b_h = tl.load(p_kk, mask=m_kk, other=0.0, eviction_policy="evict_first")
    for i_t in range(T):
        i_row = ((i_b * T + i_t) * H + i_h).to(tl.int64)
        i_kv = ((i_b * T + i_t) * (H // GROUP) + i_h // GROUP).to(tl.int64)
        o_one = i_row + tl.arange(0, 1)
        m_one = tl.arange(0, 1) == 0
        gamma = tl.exp(load_log_decay(log_decay, A_log, dt_bias, o_one, m_one, i_h, MIN_LOG_DECAY))
        b_beta = load_scalars(beta, o_one, m_one, 1.0)
        b_k = load_vector(k, i_kv, o_c, D, QK_L2NORM, NORM_EPS) * b_beta
        b_h = b_h * gamma[:, None] + b_k[:, None] * b_k[None, :]
        if i_t == T - 1:  # before the solve, for memory to have work during it
            tl.store(p_kk, b_h, mask=m_kk, eviction_policy="evict_first")
        b_mix = load_vector(q, i_row, o_c, D, QK_L2NORM, NORM_EPS)
        if SOLVE:
            b_fro = tl.sqrt(tl.sum(over_rows(b_h * b_h, CHAINS)[None, :], axis=1))
            b_ridge = load_ridge(ridge_scale_tensor, ridge_scale, o_one, m_one, i_h, SCALE_PER_TOKEN)
            b_offset = load_ridge(ridge_offset_tensor, ridge_offset, o_one, m_one, i_h, OFFSET_PER_TOKEN)
            inv_eta, weight_h = normalise(b_fro, b_ridge, b_offset, FRO_MIN, False)
            delta = 1 - b_fro * weight_h
            unit_q = pow2_floor(tl.max(tl.abs(b_mix), axis=0))
            b_x = solve(b_mix * (1 / unit_q), b_h, weight_h, delta, num_iter, CHAINS) * (unit_q * inv_eta)
            b_mix += load_scalars(alpha, o_one, m_one, 1.0) * (b_x - b_mix)  # m = q + α (x − q)
            b_k = load_vector(k, formed_anew(i_kv, num_iter), o_c, D, QK_L2NORM, NORM_EPS) * b_beta
        for i_v in range(V_PAD // BLOCK_V):
            o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
            p_kv = kv + (slot * H + i_h) * D * V + columns(i_v, BLOCK_V)[:, None] + o_r[None, :] * V
            m_kv = (o_v < V)[:, None] & (o_r < D)[None, :]
            b_v = load_vector(v, i_kv, o_v, V, False, NORM_EPS) * b_beta
            b_u = (
                tl.load(p_kv, mask=m_kv, other=0.0, eviction_policy="evict_first") * gamma[:, None]
                + b_v[:, None] * b_k[None, :]
            )
            tl.store(p_kv, b_u, mask=m_kv, eviction_policy="evict_first")
            b_o = over_rows(b_u * b_mix[None, :], CHAINS) * scale
            tl.store(output + i_row * V + o_v, b_o.to(output.dtype.element_ty), mask=o_v < V)
        tl.debug_barrier()  # the next token reads the values that this one stored
