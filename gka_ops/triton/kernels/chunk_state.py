"""Forward state pass: H_c or U_c at the start of every chunk, and after the last token (MATH.md §2, "states")."""

import triton
import triton.language as tl

from gka_ops.triton.primitives import (
    effective_log_decay,
    largest_entry,
    load_raw_rows,
    load_scalars,
    pow2_inverse,
    query_weight,
    scale_rows,
    sequence_bounds,
    sequence_ends,
    state_unit,
)

# The state on the way is kept in units of 2^-11 times its stored unit, and so are the right-hand rows that are added
# to it: with a long memory one chunk's rows are far smaller than the bound of the state, and fp16 has no room below.
FINE = tl.constexpr(2.0**-11)


@triton.jit
def fine_unit(bound):
    """(unit, 1/unit) of a state on the way. Bounds at the low end of fp32 count as zero, so that 1/unit is finite."""
    unit, inverse = state_unit(tl.where(bound < 2.0**-112, 0.0, bound))
    return unit * FINE, inverse * (1 / FINE)


@triton.jit
def load_chunk(
    k, r, log_decay, beta, first, end, H, GROUP, i_h, o_d, o_r, D: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr,
    R_PAD: tl.constexpr, C: tl.constexpr, SAME_ROWS: tl.constexpr,
):  # fmt: skip
    """What one step reads of the C tokens from ``first``: their k and r rows as they are; g (raw) and β of the first
    and of the second half of them. Tokens past the end have rows of zeros.

    Only a chunk's first row is counted in 64 bits.
    """
    o_t, o_half = tl.arange(0, C), tl.arange(0, C // 2)
    m_t, m_0, m_1 = first + o_t < end, first + o_half < end, first + C // 2 + o_half < end
    row, row_kv = first.to(tl.int64) * H + i_h, first.to(tl.int64) * (H // GROUP) + i_h // GROUP
    b_k = load_raw_rows(k + row_kv * D, o_t * (H // GROUP), m_t, o_d, D, BLOCK_D)
    b_r = b_k
    if not SAME_ROWS:
        b_r = load_raw_rows(r + row_kv * R, o_t * (H // GROUP), m_t, o_r, R, R_PAD)
    o_0, o_1 = row + o_half * H, row + C // 2 * H + o_half * H
    g_0, g_1 = load_scalars(log_decay, o_0, m_0, 0.0), load_scalars(log_decay, o_1, m_1, 0.0)
    beta_0, beta_1 = load_scalars(beta, o_0, m_0, 1.0), load_scalars(beta, o_1, m_1, 1.0)
    return b_k, b_r, g_0, g_1, beta_0, beta_1


@triton.jit
def step_operands(
    b_k, b_r, g_0, g_1, beta_0, beta_1, A_log, dt_bias, bound, unit, first, end, i_h, C: tl.constexpr,
    OPERAND: tl.constexpr, RIGHT_IS_KEY: tl.constexpr, SAME_ROWS: tl.constexpr, QK_L2NORM: tl.constexpr,
    NORM_EPS: tl.constexpr, MIN_LOG_DECAY: tl.constexpr,
):  # fmt: skip
    """(left [C, BLOCK_D], right [C, BLOCK_R], factor, bound, unit) of S' = factor·S + leftᵀ right, in units of S'.

    Nothing here depends on S. Half a chunk's scalars fill one warp, so sums over them need no other.
    """
    o_half = first + tl.arange(0, C // 2)
    g_0 = effective_log_decay(g_0, A_log, dt_bias, o_half < end, i_h, MIN_LOG_DECAY)
    g_1 = effective_log_decay(g_1, A_log, dt_bias, o_half + C // 2 < end, i_h, MIN_LOG_DECAY)
    c_1 = tl.sum(g_1, axis=0)
    c_end = tl.sum(g_0, axis=0) + c_1
    gamma_end = tl.exp(c_end)
    weight_0 = tl.exp(c_end - tl.cumsum(g_0, axis=0)) * beta_0 * beta_0  # τ β²
    weight_1 = tl.exp(c_1 - tl.cumsum(g_1, axis=0)) * beta_1 * beta_1
    weight = tl.reshape(tl.trans(tl.join(weight_0, weight_1)), (C,))
    b_k, unit_k = scale_rows(b_k.to(tl.float32))
    nu = query_weight(b_k, unit_k, QK_L2NORM, NORM_EPS)
    weight *= nu
    b_r = b_k if SAME_ROWS else b_r.to(tl.float32)
    if RIGHT_IS_KEY:  # scaled entries are below 2, so those of k̂ k̂ᵀ below 4; every column block must find the same
        weight *= nu
        bound_update = 4 * tl.sum(weight, axis=0)
    else:
        bound_update = 2 * tl.sum(weight * tl.max(tl.abs(b_r), axis=1), axis=0)
    bound = bound * gamma_end + bound_update
    unit_next, inverse = fine_unit(bound)
    weight *= inverse
    if RIGHT_IS_KEY and not SAME_ROWS:
        weight *= pow2_inverse(unit_k)
    return b_k.to(OPERAND), (b_r * weight[:, None]).to(OPERAND), gamma_end * unit * inverse, bound, unit_next


@triton.jit
def walk_sequence(
    k, r, log_decay, A_log, dt_bias, beta, initial, states, units, final, carry, boundary, boundary_chunks, cu_seqlens,
    chunk_offsets, slab_first, slab_chunks, T, H, GROUP, i_r, i_nh, D: tl.constexpr, R: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, R_PAD: tl.constexpr, UNITS: tl.constexpr, C: tl.constexpr,
    RIGHT_IS_KEY: tl.constexpr, QK_L2NORM: tl.constexpr, NORM_EPS: tl.constexpr, MIN_LOG_DECAY: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Column block ``i_r`` of the state S [BLOCK_D, R_PAD] of keys and right-hand rows r: S' = γ_C S + Kᵀ diag(τ) R.

    S is accumulated in the units in which it is stored next. It starts from the initial state, or from what the earlier
    slab left (``carry``).

    Loads must be pipelined (num_stages >= 3) and not carried in registers: 16-bit elements of a carried tile are taken
    apart early in the step that loads them, which then waits for memory.
    """
    i_h = i_nh % H
    start, end, number, place, n_chunks = sequence_bounds(
        i_nh, T, H, cu_seqlens, chunk_offsets, slab_first, slab_chunks, C
    )
    begins, enters, ends, _, i_carry = sequence_ends(i_nh, T, H, cu_seqlens, chunk_offsets, slab_first, slab_chunks, C)
    o_d, o_r = tl.arange(0, BLOCK_D), i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_state = (o_d < D)[:, None] & (o_r < R)[None, :]
    p_state = o_d[:, None] * R + o_r[None, :]
    p_nh, p_carry = i_nh.to(tl.int64) * D * R, i_carry * D * R
    p_stored = o_d[:, None] * R_PAD + o_r[None, :]
    o_unit = i_r * UNITS + tl.arange(0, UNITS)
    SAME_ROWS: tl.constexpr = RIGHT_IS_KEY and BLOCK_R == BLOCK_D

    boundary_stride = tl.num_programs(1) * D * R  # programs are N·H; in a packed batch a boundary has one state a head
    if cu_seqlens is not None:
        boundary_stride = H * D * R

    b_state = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
    bound, unit = 0.0, 0.0
    if initial is not None:
        if begins:
            bound = largest_entry(initial + p_nh, R, o_d, D, BLOCK_D, BLOCK_R, R_PAD // BLOCK_R)
            unit, inverse = fine_unit(bound)
            b_state += tl.load(initial + p_nh + p_state, mask=m_state, other=0.0) * inverse
    if carry is not None:
        if enters:
            bound = largest_entry(carry + p_carry, R, o_d, D, BLOCK_D, BLOCK_R, R_PAD // BLOCK_R)
            unit, inverse = fine_unit(bound)
            b_state += tl.load(carry + p_carry + p_state, mask=m_state, other=0.0) * inverse
    if boundary is not None:
        if (number % boundary_chunks == 0) & (n_chunks > 0):
            i_boundary = (number // boundary_chunks).to(tl.int64) * boundary_stride
            tl.store(boundary + i_boundary + p_carry + p_state, b_state * unit, mask=m_state)
    for i_c in range(n_chunks):
        first = start + i_c * C
        b_k, b_r, g_0, g_1, beta_0, beta_1 = load_chunk(
            k, r, log_decay, beta, first, end, H, GROUP, i_h, o_d, o_r, D, R, BLOCK_D, R_PAD, C, SAME_ROWS
        )
        if states is not None:
            i_state = (place + i_c).to(tl.int64) * H + i_h
            tl.store(states + i_state * BLOCK_D * R_PAD + p_stored, (b_state * FINE).to(OPERAND))
            b_unit = tl.full((UNITS,), unit * (1 / FINE), tl.float32)
            if RIGHT_IS_KEY:
                tl.store(units + i_state + o_unit, b_unit, mask=o_unit == 0)
            else:
                tl.store(units + i_state * (R_PAD // BLOCK_R * UNITS) + o_unit, b_unit)

        b_left, b_right, factor, bound, unit = step_operands(
            b_k, b_r, g_0, g_1, beta_0, beta_1, A_log, dt_bias, bound, unit, first, end, i_h, C, OPERAND, RIGHT_IS_KEY,
            SAME_ROWS, QK_L2NORM, NORM_EPS, MIN_LOG_DECAY,
        )  # fmt: skip
        b_state = tl.dot(tl.trans(b_left), b_right, b_state * factor, input_precision=PRECISION)
        if boundary is not None:
            next_number = number + i_c + 1
            if (next_number % boundary_chunks == 0) & (i_c + 1 < n_chunks):
                i_boundary = (next_number // boundary_chunks).to(tl.int64) * boundary_stride
                tl.store(boundary + i_boundary + p_carry + p_state, b_state * unit, mask=m_state)
    if final is not None:
        tl.store(final + p_nh + p_state, b_state * unit, mask=m_state & ends)


@triton.jit(do_not_specialize=["T", "slab_first", "slab_chunks", "boundary_chunks"])
def chunk_state_kernel(
    k,  # [tokens, Hkv, D]
    v,  # [tokens, Hkv, V]; read if KV_BLOCKS
    log_decay,  # [tokens, H] or None
    A_log,  # [H] or None
    dt_bias,  # [H] or None
    beta,  # [tokens, H] or None
    initial_kk,  # [N, H, D, D] fp32 or None
    initial_kv,  # [N, H, D, V] fp32 or None
    kk,  # out H_c [chunks, H, BLOCK_D, BLOCK_D] operand dtype, or None: boundaries alone are wanted
    kk_units,  # out [chunks, H] fp32; written with kk
    kv,  # out U_c [chunks, H, BLOCK_D, V_PAD] operand dtype or None
    kv_units,  # out [chunks, H, V_PAD / BLOCK_V] fp32; written with kv
    final_kk,  # out [N, H, D, D] fp32 or None
    final_kv,  # out [N, H, D, V] fp32 or None
    carry_kk,  # [N or 1, H, D, D] fp32: state at the slab's start of sequences that began before, or None: none did
    carry_kv,  # [N or 1, H, D, V] fp32 or None
    boundary_kk,  # out [slabs, N or 1, H, D, D] fp32: states at the start of every boundary_chunks-th chunk, or None
    boundary_kv,  # out [slabs, N or 1, H, D, V] fp32 or None
    boundary_chunks,
    cu_seqlens,  # [N + 1] or None
    chunk_offsets,  # [N] first chunk of each sequence, or None
    slab_first,
    slab_chunks,
    T,
    H,
    GROUP,  # query heads per key/value head
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,  # columns of H a program holds
    BLOCK_R: tl.constexpr,  # columns of U a program holds, one or more times BLOCK_V
    BLOCK_V: tl.constexpr,  # columns of U that have a unit of their own in kv_units
    V_PAD: tl.constexpr,
    KK_BLOCKS: tl.constexpr,  # column blocks of H: BLOCK_D / BLOCK_N, or 0 to leave H out
    KV_BLOCKS: tl.constexpr,  # column blocks of U: V_PAD / BLOCK_R, or 0 to leave U out
    C: tl.constexpr,
    QK_L2NORM: tl.constexpr,
    NORM_EPS: tl.constexpr,
    MIN_LOG_DECAY: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program walks one sequence and query head with one column block of H or of U; all blocks run side by side."""
    i_col, i_nh = tl.program_id(0), tl.program_id(1)
    if KK_BLOCKS > 0:
        if i_col < KK_BLOCKS:
            walk_sequence(
                k, k, log_decay, A_log, dt_bias, beta, initial_kk, kk, kk_units, final_kk, carry_kk, boundary_kk,
                boundary_chunks, cu_seqlens, chunk_offsets, slab_first, slab_chunks, T, H, GROUP, i_col, i_nh,
                D, D, BLOCK_D, BLOCK_N, BLOCK_D, 1, C, True, QK_L2NORM, NORM_EPS, MIN_LOG_DECAY,
                OPERAND, PRECISION,
            )  # fmt: skip
    if KV_BLOCKS > 0:
        if i_col >= KK_BLOCKS:
            walk_sequence(
                k, v, log_decay, A_log, dt_bias, beta, initial_kv, kv, kv_units, final_kv, carry_kv, boundary_kv,
                boundary_chunks, cu_seqlens, chunk_offsets, slab_first, slab_chunks, T, H, GROUP,
                i_col - KK_BLOCKS, i_nh, D, V, BLOCK_D, BLOCK_R, V_PAD, BLOCK_R // BLOCK_V, C, False,
                QK_L2NORM, NORM_EPS, MIN_LOG_DECAY, OPERAND, PRECISION,
            )  # fmt: skip
