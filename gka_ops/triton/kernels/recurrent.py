"""Decode step: states advanced in place, solve and read-out of one or a few tokens (MATH.md §5)."""

import triton
import triton.language as tl

from gka_ops.triton.primitives import (
    chebyshev,
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
def solve_on_tensor_cores(b_q, b_b, delta, num_iter, ROWS: tl.constexpr, PRECISION: tl.constexpr):
    """z [BLOCK_D] of B z = q by Chebyshev; q is the first row of a tile as high as tensor cores need."""
    first = (tl.arange(0, ROWS) == 0)[:, None]
    ones = tl.full((ROWS,), 1.0, tl.float32)
    b_rows = tl.where(first, b_q[None, :], 0.0)
    b_z = chebyshev(b_rows, b_b, None, ones, None, delta[:, None], num_iter, PRECISION)
    return tl.sum(tl.where(first, b_z, 0.0), axis=0)


@triton.jit
def solve_by_reduction(b_q, b_b, delta, num_iter):
    """The same in fp32 without tensor cores, for an operator too large for shared memory; B is symmetric."""
    theta = 0.5 * (1 + delta)
    h2 = 0.25 * (1 - delta) * (1 - delta)
    nu = 1 / theta
    b_d = nu * b_q
    b_z = b_d
    b_r = b_q
    for _ in range(num_iter):
        b_r -= tl.sum(b_b * b_d[None, :], axis=1) + delta * b_d
        nu_next = 1 / (2 * theta - h2 * nu)
        b_d = h2 * nu * nu_next * b_d + 2 * nu_next * b_r
        b_z += b_d
        nu = nu_next
    return b_z


@triton.jit(do_not_specialize=["T", "num_iter"])
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
    ROWS: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
    SOLVE: tl.constexpr,
    SCALE_PER_TOKEN: tl.constexpr,
    OFFSET_PER_TOKEN: tl.constexpr,
    QK_L2NORM: tl.constexpr,
    NORM_EPS: tl.constexpr,
    FRO_MIN: tl.constexpr,
    MIN_LOG_DECAY: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program does one query head of one sequence, H held on chip over its T tokens."""
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
    p_kk = kk + (slot * H + i_h) * D * D + o_r[:, None] * D + o_c[None, :]
    m_kk = (o_r < D)[:, None] & (o_c < D)[None, :]
    b_h = tl.load(p_kk, mask=m_kk, other=0.0)
    for i_t in range(T):
        i_row = ((i_b * T + i_t) * H + i_h).to(tl.int64)
        i_kv = ((i_b * T + i_t) * (H // GROUP) + i_h // GROUP).to(tl.int64)
        o_one = i_row + tl.arange(0, 1)
        m_one = tl.arange(0, 1) == 0
        gamma = tl.exp(load_log_decay(log_decay, A_log, dt_bias, o_one, m_one, i_h, MIN_LOG_DECAY))
        b_beta = load_scalars(beta, o_one, m_one, 1.0)
        b_k = load_vector(k, i_kv, o_c, D, QK_L2NORM, NORM_EPS) * b_beta
        b_h = b_h * gamma[:, None] + b_k[:, None] * b_k[None, :]
        b_mix = load_vector(q, i_row, o_c, D, QK_L2NORM, NORM_EPS)
        if SOLVE:
            b_fro = tl.sqrt(tl.sum(tl.sum(b_h * b_h, axis=1, keep_dims=True), axis=0))
            b_ridge = load_ridge(ridge_scale_tensor, ridge_scale, o_one, m_one, i_h, SCALE_PER_TOKEN)
            b_offset = load_ridge(ridge_offset_tensor, ridge_offset, o_one, m_one, i_h, OFFSET_PER_TOKEN)
            inv_eta, weight_h = normalise(b_fro, b_ridge, b_offset, FRO_MIN, False)
            delta = 1 - b_fro * weight_h
            unit_q = pow2_floor(tl.max(tl.abs(b_mix), axis=0))
            b_q = b_mix * (1 / unit_q)
            if TENSOR_CORES:
                b_operator = (b_h * weight_h[:, None]).to(OPERAND)
                b_z = solve_on_tensor_cores(b_q, b_operator, delta, num_iter, ROWS, PRECISION)
            else:
                b_z = solve_by_reduction(b_q, b_h * weight_h[:, None], delta, num_iter)
            b_x = b_z * (unit_q * inv_eta)
            b_mix += load_scalars(alpha, o_one, m_one, 1.0) * (b_x - b_mix)  # m = q + α (x − q)
        for i_v in range(V_PAD // BLOCK_V):
            o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
            p_kv = kv + (slot * H + i_h) * D * V + o_r[:, None] * V + o_v[None, :]
            m_kv = (o_r < D)[:, None] & (o_v < V)[None, :]
            b_v = load_vector(v, i_kv, o_v, V, False, NORM_EPS) * b_beta
            b_u = tl.load(p_kv, mask=m_kv, other=0.0) * gamma[:, None] + b_k[:, None] * b_v[None, :]
            tl.store(p_kv, b_u, mask=m_kv)
            b_o = tl.sum(b_u * b_mix[:, None], axis=0) * scale
            tl.store(output + i_row * V + o_v, b_o.to(output.dtype.element_ty), mask=o_v < V)
        tl.debug_barrier()  # the next token reads the values that this one stored
    tl.store(p_kk, b_h, mask=m_kk)
