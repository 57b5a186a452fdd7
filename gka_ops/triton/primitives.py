"""What the kernels share: chunk geometry, operand scaling, gates, norms and the Chebyshev iteration.

NOTE [Operands and units]
  Tensor-core operands are fp16 (fp32 for fp32 inputs), so their range must be kept by hand. Every operand is divided
  by a power of two, which is exact, and the factor travels beside it in fp32 as its "unit": rows of q, k, v and
  right-hand sides by their own largest entry, states by a bound that is carried along with them (state_unit). ℓ2
  normalisation and β never touch the operands: the effective key is κ_s·k̂_s with k̂_s the scaled row and
  κ_s = β_s·unit_s, or β_s/max(‖k̂_s‖, ε/unit_s) when normalised. So k̂ is exactly the key that came in (bf16 mantissas
  fit fp16), and the state pass and the solve use the very same vector.

Sections of MATH.md are those of docs/math.md.

Notation: i_ program and loop indices, o_ offset vectors, m_ masks, p_ pointers, b_ tiles; CAPITALS are constexpr.
Shapes in comments use C tokens of a chunk, D and V head dimensions (padded to powers of two, BLOCK_D and BLOCK_V).
"""

import triton
import triton.language as tl


# ------------------------------------------------------------------------------------------------------------ units
@triton.jit
def pow2_floor(b):
    """2^⌊log2 b⌋ for b >= 0, elementwise; 2^-126 where b is zero or subnormal, which weighs nothing in what follows."""
    bits = b.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.maximum(bits, 0x00800000).to(tl.float32, bitcast=True)


@triton.jit
def pow2_inverse(unit):
    """1/unit of a power of two, exactly, by its exponent alone: a division takes ten instructions."""
    return (0x7F000000 - unit.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def scale_rows(b):
    """[R, N] fp32 -> rows divided by a power of two to a largest entry in [1, 2), and those units [R]."""
    unit = pow2_floor(tl.max(tl.abs(b), axis=1))
    return b * pow2_inverse(unit)[:, None], unit


@triton.jit
def as_sums(b, OPERAND: tl.constexpr):
    """b [M, N] fp32 as it is, held by the threads as they hold the tensor cores' sums: it is the sum of no products.

    A thread has two rows there, whose sums or maxima take 4 shuffles; as loaded it has a part of each of 8 rows or
    more, which take 32, and what meets products after that passes through shared memory once more.
    """
    if tl.float16 == OPERAND:
        b = tl.dot(tl.zeros((b.shape[0], 16), tl.float16), tl.zeros((16, b.shape[1]), tl.float16), b)
    return b


@triton.jit
def key_operand(b_k, b_beta, OPERAND: tl.constexpr, QK_L2NORM: tl.constexpr, NORM_EPS: tl.constexpr):
    """Key rows as they came in -> (operand rows [C, D], weight [C]) with effective key weight_s·row_s.

    bf16 rows are left alone: bf16 has the range of fp32, so they need no units.
    """
    if b_k.dtype == tl.bfloat16:
        weight = b_beta
        if QK_L2NORM:
            _, kappa, unit = scale_keys(b_k.to(tl.float32), b_beta, QK_L2NORM, NORM_EPS)
            weight = kappa / unit
        return b_k, weight
    else:
        b_hat, kappa, _ = scale_keys(b_k.to(tl.float32), b_beta, QK_L2NORM, NORM_EPS)
        return b_hat.to(OPERAND), kappa


@triton.jit
def dot_onto(b_acc, b_x, b_y, PRECISION: tl.constexpr):
    """acc + x @ y for fp32 x [M, K] of any range and operand y [K, N], from :func:`key_operand`."""
    if b_y.dtype == tl.bfloat16:  # two terms, for one has 8 bits only
        b_hi = b_x.to(tl.bfloat16)
        b_lo = (b_x - b_hi.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(b_lo, b_y, tl.dot(b_hi, b_y, b_acc))
    else:
        b_x, unit = scale_rows(b_x)
        return b_acc + tl.dot(b_x.to(b_y.dtype), b_y, input_precision=PRECISION) * unit[:, None]


# --------------------------------------------------------------------------------------------------------- geometry
@triton.jit
def chunk_and_head(H, FROM_LAST: tl.constexpr = False):
    """Program -> (chunk, query head). Heads vary fastest: programs that run side by side read whole rows of tokens.

    Programs start about in the order of their numbers. A kernel goes through the chunks from the last to the first
    where the one before it came to the last ones last, for these are in L2 still.
    """
    i = tl.program_id(0)
    if FROM_LAST:
        i = tl.num_programs(0) - 1 - i
    return i // H, i % H


@triton.jit
def chunk_bounds(i_c, T, cu_seqlens, chunk_offsets, chunk_sequence, slab_first, slab_chunks, C: tl.constexpr):
    """Chunk of the slab -> (sequence or -1, first token, end of the sequence). Tokens count through the batch.

    A slab is ``slab_chunks`` chunks from number ``slab_first``: of each sequence, one sequence after the other, or of
    a packed batch, whose chunks are numbered through.
    """
    if cu_seqlens is None:
        i_n = i_c // slab_chunks
        start = i_n * T + (slab_first + i_c % slab_chunks) * C
        end = (i_n + 1) * T
    else:
        number = slab_first + i_c
        i_n = tl.load(chunk_sequence + number).to(tl.int32)
        first = tl.load(cu_seqlens + i_n).to(tl.int32)
        end = tl.load(cu_seqlens + i_n + 1).to(tl.int32)
        start = first + (number - tl.load(chunk_offsets + i_n).to(tl.int32)) * C
    return i_n, start, end


@triton.jit
def sequence_bounds(i_nh, T, H, cu_seqlens, chunk_offsets, slab_first, slab_chunks, C: tl.constexpr):
    """What a slab (:func:`chunk_bounds`) has of a sequence: (first token, end of the sequence, number of the first
    chunk, its place in the slab, number of chunks).
    """
    i_n = i_nh // H
    start, end, first, last = sequence_chunks(i_n, T, cu_seqlens, chunk_offsets, C)
    number = tl.maximum(first, slab_first)
    n_chunks = tl.maximum(tl.minimum(last, slab_first + slab_chunks) - number, 0)
    place = tl.minimum(number - slab_first, slab_chunks - 1)  # in the slab even where it has nothing of the sequence
    if cu_seqlens is None:
        place += i_n * slab_chunks
    return start + (number - first) * C, end, number, place, n_chunks


@triton.jit
def sequence_chunks(i_n, T, cu_seqlens, chunk_offsets, C: tl.constexpr):
    """Sequence -> (first token, end, number of its first chunk, and of the chunk after its last)."""
    if cu_seqlens is None:
        start, first = i_n * T, 0
        end = start + T
    else:
        start = tl.load(cu_seqlens + i_n).to(tl.int32)
        end = tl.load(cu_seqlens + i_n + 1).to(tl.int32)
        first = tl.load(chunk_offsets + i_n).to(tl.int32)
    return start, end, first, first + tl.cdiv(end - start, C)


@triton.jit
def sequence_ends(i_nh, T, H, cu_seqlens, chunk_offsets, slab_first, slab_chunks, C: tl.constexpr):
    """Of a sequence in the slab: whether it begins here, or goes on from an earlier slab; and whether it ends here, or
    goes on in a later one. All false where it is not in the slab. An empty sequence is where its first chunk would be.

    Last, the row in [.., H] of what a sequence hands over from slab to slab. In a packed batch only one does.
    """
    i_n, row = i_nh // H, i_nh
    _, _, first, last = sequence_chunks(i_n, T, cu_seqlens, chunk_offsets, C)
    slab_end = slab_first + slab_chunks
    present = (first < slab_end) & (tl.maximum(last, first + 1) > slab_first)
    begins, ends = present & (first >= slab_first), present & (last <= slab_end)
    if cu_seqlens is not None:
        row = i_nh % H
    return begins, present & (first < slab_first), ends, present & (last > slab_end), row.to(tl.int64)


@triton.jit
def token_rows(start, end, i_h, H, GROUP, C: tl.constexpr):
    """Of the C tokens from ``start``: which exist, their rows in [tokens, H] and in [tokens, Hkv] tensors."""
    o_t = start + tl.arange(0, C)
    return o_t < end, o_t.to(tl.int64) * H + i_h, o_t.to(tl.int64) * (H // GROUP) + i_h // GROUP


@triton.jit
def token_rows_of_chunk(start, end, i_h, H: tl.constexpr, C: tl.constexpr):
    """Of the C tokens from ``start``: which exist, their rows in [tokens, H] tensors, and their places in the chunk.

    Places past the end repeat the last one, so that no tile needs a mask of rows: weights keep them out.
    """
    o_c = tl.arange(0, C)
    return start + o_c < end, (start + o_c).to(tl.int64) * H + i_h, tl.minimum(o_c, end - start - 1)


@triton.jit
def formed_anew(start, positive):
    """``start`` as the compiler cannot recognise it (``positive`` >= 1, so the addend is 0).

    What is indexed from it is computed anew instead of living across what lies between: across the solve every
    register counts, and a spilled one travels to HBM and back, because the solves in flight push it out of L2.
    """
    return start + tl.minimum(positive, 0)


@triton.jit
def load_raw_rows(p, o_row, m_t, o_d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a token tensor [.., D] as they are, [C, BLOCK_D]; zero outside."""
    mask = m_t[:, None] if D == BLOCK_D else m_t[:, None] & (o_d < D)[None, :]
    return tl.load(p + o_row[:, None] * D + o_d[None, :], mask=mask, other=0.0)


@triton.jit
def load_tile(p, o_r, o_d, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows ``o_r`` [C] (32 bits, all in bounds) of a tensor [.., D] from ``p``, as they are stored [C, BLOCK_D]."""
    p_tile = p + (o_r[:, None] * stride + o_d[None, :])
    return tl.load(p_tile) if D == BLOCK_D else tl.load(p_tile, mask=(o_d < D)[None, :], other=0.0)


@triton.jit
def store_tile(p, b, o_r, m_t, o_d, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    mask = m_t[:, None] if D == BLOCK_D else m_t[:, None] & (o_d < D)[None, :]
    tl.store(p + (o_r[:, None] * stride + o_d[None, :]), b.to(p.dtype.element_ty), mask=mask)


@triton.jit
def load_rows(p, o_row, m_t, o_d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a token tensor [.., D] as fp32 [C, BLOCK_D]; zero outside."""
    return load_raw_rows(p, o_row, m_t, o_d, D, BLOCK_D).to(tl.float32)


@triton.jit
def load_scalars(p, o_row, m_t, default):
    """A per-token scalar [C] in fp32, or ``default`` where the tensor is absent; ``default`` outside."""
    if p is None:
        return tl.where(m_t, default, default).to(tl.float32)
    else:
        return tl.load(p + o_row, mask=m_t, other=default).to(tl.float32)


# ------------------------------------------------------------------------------------------------------------ gates
@triton.jit
def softplus(b):
    return tl.where(b > 0, b, 0.0) + tl.log(1 + tl.exp(-tl.abs(b)))


@triton.jit
def sigmoid(b):
    return 1 / (1 + tl.exp(-b))


@triton.jit
def load_log_decay(log_decay, A_log, dt_bias, o_row, m_t, i_h, MIN_LOG_DECAY: tl.constexpr):
    """g [C] of the tokens at ``o_row``: see :func:`effective_log_decay`."""
    return effective_log_decay(load_scalars(log_decay, o_row, m_t, 0.0), A_log, dt_bias, m_t, i_h, MIN_LOG_DECAY)


@triton.jit
def effective_log_decay(b_g, A_log, dt_bias, m_t, i_h, MIN_LOG_DECAY: tl.constexpr):
    """g [C]: given, or −exp(A_log)·softplus(a + dt_bias); clamped from below, 0 outside (MATH.md §1)."""
    if A_log is not None:
        if dt_bias is not None:
            b_g += tl.load(dt_bias + i_h).to(tl.float32)
        b_g = -tl.exp(tl.load(A_log + i_h).to(tl.float32)) * softplus(b_g)
    b_g = tl.where(b_g < MIN_LOG_DECAY, MIN_LOG_DECAY, b_g)  # a NaN stays a NaN
    return tl.where(m_t, b_g, 0.0)


@triton.jit
def decay_matrix(b_c, C: tl.constexpr):
    """M_ts = e^{c_t − c_s} for s <= t, else 0 (MATH.md §2)."""
    o_c = tl.arange(0, C)
    b_c *= 1.4426950408889634  # a power of two takes half the instructions of a power of e
    return tl.where(o_c[:, None] >= o_c[None, :], tl.exp2(b_c[:, None] - b_c[None, :]), 0.0)


@triton.jit
def decayed_squares_from(b_c, b, C: tl.constexpr):
    """Σ_{s>=t} e^{2 (c_s − c_t)} b_s [C]: a sum from the end where the chunk decays little, else by the matrix."""
    middle = 0.5 * tl.min(b_c, axis=0)
    if middle > -16:
        b_sum = tl.exp(2 * (middle - b_c)) * tl.cumsum(tl.exp(2 * (b_c - middle)) * b, axis=0, reverse=True)
    else:
        b_m = decay_matrix(b_c, C)
        b_sum = tl.sum(b_m * b_m * b[:, None], axis=0)
    return b_sum


@triton.jit
def decay_between(b_c):
    """e^{−|c_t − c_s|} [C, C]: M on and below the diagonal, Mᵀ on and above it."""
    return tl.exp2(tl.abs(b_c[None, :] - b_c[:, None]) * -1.4426950408889634)


@triton.jit
def row_norm(b, unit, NORM_EPS: tl.constexpr):
    """max(‖b‖, ε/unit) of scaled rows [C, D]: times ``unit`` it is the ℓ2 norm that normalisation divides by."""
    norm = tl.sqrt(tl.sum(b * b, axis=1))
    floor = NORM_EPS * pow2_inverse(unit)
    return tl.where(norm < floor, floor, norm)


@triton.jit
def key_weight(b_k, unit, b_beta, QK_L2NORM: tl.constexpr, NORM_EPS: tl.constexpr):
    """κ [C] with effective key κ_s·k̂_s, from scaled key rows k̂ [C, D] and β [C]; next to 0 for a zero key."""
    if QK_L2NORM:
        return b_beta / row_norm(b_k, unit, NORM_EPS)
    else:
        return b_beta * unit


@triton.jit
def scale_keys(b_k, b_beta, QK_L2NORM: tl.constexpr, NORM_EPS: tl.constexpr):
    """Key rows in fp32 -> (k̂ [C, D], κ [C], their units [C]): scale_rows and key_weight from one maximum a row."""
    largest = tl.max(tl.abs(b_k), axis=1)
    unit = pow2_floor(largest)
    b_k *= (1 / unit)[:, None]
    if QK_L2NORM:
        weight = b_beta / row_norm(b_k, unit, NORM_EPS)
    else:
        weight = b_beta * unit
    return b_k, tl.where(largest == 0, 0.0, weight), unit


@triton.jit
def query_weight(b_q, unit, QK_L2NORM: tl.constexpr, NORM_EPS: tl.constexpr):
    """[C] with effective query weight_t·q̂_t, from scaled query rows q̂ [C, D]."""
    if QK_L2NORM:
        return 1 / row_norm(b_q, unit, NORM_EPS)
    else:
        return unit


@triton.jit
def load_ridge(p, value, o_row, m_t, i_h, PER_TOKEN: tl.constexpr):
    """A part of the ridge [C]: the float, the head's, or the tokens' own."""
    if p is None:
        return tl.where(m_t, value, value).to(tl.float32)
    else:
        if PER_TOKEN:
            return tl.load(p + o_row, mask=m_t, other=1.0).to(tl.float32)
        else:
            b = tl.load(p + i_h).to(tl.float32)
            return tl.where(m_t, b, b)


@triton.jit
def linearised(fro, scale, offset):
    """(r, b) [C] of λ = r F + b from what :func:`load_ridge` loaded. ``modified`` puts a modifier's tangent here."""
    return scale, offset


# ------------------------------------------------------------------------------------------------------- the system
@triton.jit
def state_unit(bound):
    """(unit, 1/unit) of a stored state of entries up to ``bound``: scaled, they stay below 8.

    (0, 0) if it is zero, or has faded so far that 1/unit would not be finite.

    The bound is carried along with the state, from the units of what enters it, so that every column block of a
    state has the same unit without talking to the others. It may be too large by some powers of two: fp16 has room
    for that below.
    """
    unit = pow2_floor(bound) * 0.25
    vanishing = bound < 2.0**-124
    return tl.where(vanishing, 0.0, unit), tl.where(vanishing, 0.0, 1 / unit)


@triton.jit
def largest_entry(p, R, o_d, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCKS: tl.constexpr):
    """max |S| of a whole initial or final state [D, R] at ``p``, one column block after the other."""
    bound = 0.0
    for i_r in range(BLOCKS):
        o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
        b = tl.load(p + o_d[:, None] * R + o_r[None, :], mask=(o_d < D)[:, None] & (o_r < R)[None, :], other=0.0)
        bound = tl.maximum(bound, tl.max(tl.max(tl.abs(b), axis=1), axis=0), propagate_nan=tl.PropagateNan.ALL)
    return bound


@triton.jit
def load_state(p, i_state, i_col, COLS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Column block ``i_col`` [ROWS, BLOCK] of a stored chunk state [.., ROWS, COLS], in units of its unit."""
    o_r, o_c = tl.arange(0, ROWS), i_col * BLOCK + tl.arange(0, BLOCK)
    return tl.load(p + i_state * ROWS * COLS + o_r[:, None] * COLS + o_c[None, :])


@triton.jit
def load_rows_of_state(p, i_r, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Row block ``i_r`` [ROWS, COLS] of the stored chunk state at ``p``. Volatile, or the compiler would keep them
    in registers across a loop that reads one after the other."""
    o_r, o_c = i_r * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    return tl.load(p + o_r[:, None] * COLS + o_c[None, :], volatile=True)


@triton.jit
def state_operand(p, i_state, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr):
    """A stored key-key state as :func:`times_state` takes it: the tile [BLOCK_D, BLOCK_D], or its address, if no more
    than BLOCK_S of its rows are to be on the chip at a time."""
    if BLOCK_S == BLOCK_D:
        return load_state(p, i_state, 0, BLOCK_D, BLOCK_D, BLOCK_D)
    else:
        return p + i_state * BLOCK_D * BLOCK_D


@triton.jit
def times_state(b_acc, b, h, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr):
    """acc + b S for operand rows b [C, N] and N rows of a :func:`state_operand`."""
    N: tl.constexpr = b.shape[1]
    COLS: tl.constexpr = b_acc.shape[1]
    if BLOCK_S == COLS:
        return tl.dot(b, h, b_acc, input_precision=PRECISION)
    elif BLOCK_S == N:
        return tl.dot(b, load_rows_of_state(h, 0, BLOCK_S, COLS), b_acc, input_precision=PRECISION)
    else:
        b_left, b_right = tl.split(tl.permute(tl.reshape(b, (b.shape[0], 2, N // 2)), (0, 2, 1)))
        b_acc = times_state(b_acc, b_left, h, BLOCK_S, PRECISION)
        return times_state(b_acc, b_right, h + N // 2 * COLS, BLOCK_S, PRECISION)


@triton.jit
def sum_of_squares(h, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr):
    """‖S‖_F² of a :func:`state_operand`."""
    if BLOCK_S == BLOCK_D:
        b_h = h.to(tl.float32)
        return tl.sum(b_h * b_h)
    else:
        square = 0.0
        for i_s in range(BLOCK_D // BLOCK_S):
            b_h = load_rows_of_state(h, i_s, BLOCK_S, BLOCK_D).to(tl.float32)
            square += tl.sum(b_h * b_h)
        return square


@triton.jit
def sum_of_pieces(p, i_state, PIECES: tl.constexpr):
    """The sum of a chunk state's ``PIECES`` numbers."""
    o = tl.arange(0, triton.next_power_of_2(PIECES))
    return tl.sum(tl.load(p + i_state * PIECES + o, mask=o < PIECES, other=0.0), axis=0)


@triton.jit
def frobenius_norm(
    b_k, kappa, h, h_square, h_unit, gamma, b_m, b_gram, C: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr
):
    """‖H_t‖_F [C] of every token of a chunk without forming H_t (MATH.md §2).

    F_t² = γ_t² F_c² + Σ_{r<=t} Γ_tr² j_r,   j_t = 2 γ_t k_tᵀ H_c k_t + 2 Σ_{s<t} Γ_ts (k_t·k_s)² + |k_t|⁴

    Every term is >= 0. ``h`` is H_c, a :func:`state_operand`, ``h_square`` F_c² in units of ``h_unit``²,
    ``b_gram`` K̂ K̂ᵀ.
    """
    o_c = tl.arange(0, C)
    f_c = tl.sqrt(h_square) * h_unit
    weight = kappa * kappa
    unit = pow2_floor(tl.maximum(tl.max(weight, axis=0), f_c))  # F in units of the chunk's largest term: no overflow
    inverse = pow2_inverse(unit)
    weight = weight * inverse
    b_kh = times_state(tl.zeros(b_k.shape, tl.float32), b_k, h, BLOCK_S, PRECISION)
    k_h_k = tl.sum(b_kh * b_k.to(tl.float32), axis=1) * (h_unit * inverse)
    b_pair = b_gram * b_gram * b_m * weight[:, None] * weight[None, :]
    diagonal = tl.sum(tl.where(o_c[:, None] == o_c[None, :], b_pair, 0.0), axis=1)
    j = 2 * gamma * weight * k_h_k + 2 * tl.sum(b_pair, axis=1) - diagonal
    f_c = f_c * inverse
    fro2 = gamma * gamma * f_c * f_c + tl.sum(b_m * b_m * j[None, :], axis=1)
    return tl.sqrt(tl.where(fro2 < 0, 0.0, fro2)) * unit


@triton.jit
def normalise(fro, ridge_scale, ridge_offset, FRO_MIN: tl.constexpr, CONSTANT_DELTA: tl.constexpr):
    """(1/η, weight of H) [C] of the normalised system (H_t + λ_t I)/η_t, η_t = F_t + λ_t (MATH.md §3.1, edge cases §2).

    1/η is 0 on dead rows, which makes x 0; the weight of H is 0 also where F <= F_min, which makes x = q/b. With no
    offset (CONSTANT_DELTA) the two are one.
    """
    if CONSTANT_DELTA:
        eta = fro + ridge_scale * fro
        inv_eta = tl.where(eta <= FRO_MIN, 0.0, 1 / eta)
        weight_h = inv_eta
    else:
        vanishing = fro <= FRO_MIN
        dead = fro + ridge_scale * fro + ridge_offset <= FRO_MIN
        f = tl.where(vanishing & (ridge_offset > 0), 0.0, fro)
        eta = f + ridge_scale * f + ridge_offset
        inv_eta = tl.where(dead, 0.0, 1 / tl.where(dead, 1.0, eta))
        weight_h = tl.where(vanishing & (ridge_offset > 0), 0.0, inv_eta)
    return inv_eta, weight_h


@triton.jit
def operator_weights(weight_h, unit_h, kappa, gamma, b_m):
    """φ [C] and Ψ [C, C] of the normalised operator (MATH.md §3.2); φ‖Ĥ‖ and Ψ are at most 1."""
    return gamma * unit_h * weight_h, b_m * weight_h[:, None] * (kappa * kappa)[None, :]


@triton.jit
def certainly(i):
    """True, which the compiler cannot know: 5 is no square modulo a power of two.

    What stands under it is a block of its own and stays where it is written, next to a product under way; otherwise
    the compiler moves it to after the wait for that product or a later one.
    """
    return i * i != 5


@triton.jit
def add_within_chunk(b_s, b_d, b_k, b_psi, weight, PRECISION: tl.constexpr):
    """s + (Ψ ∘ β d K̂ᵀ) K̂."""
    b_scores = tl.dot(b_d, tl.trans(b_k), input_precision=PRECISION)
    return tl.dot((b_scores * weight.to(tl.float32)).to(b_k.dtype) * b_psi, b_k, b_s, input_precision=PRECISION)


@triton.jit
def next_increment(b_d, weight, nu, b_s, b_z, delta, theta, h2):
    """(d, β, ν) of the next Chebyshev step, from s = b − (B − δ) z."""
    h2_nu = h2 * nu
    c = 0.5 * h2_nu * weight.to(tl.float32)
    nu = 1 / (2 * theta - h2_nu)
    return c.to(b_d.dtype) * b_d + (b_s - delta * b_z).to(b_d.dtype), (2 * nu).to(b_d.dtype), nu


@triton.jit
def chebyshev(b_b, h, b_k, phi, b_psi, delta, num_iter, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr):
    """z ≈ B^{-1} b for rows b [C, BLOCK_D] fp32 by num_iter applications of B, increment form (MATH.md §3.1, 3.3).

    B(X) = diag(φ) X Ĥ + (Ψ ∘ X K̂ᵀ) K̂ + δ X with spectrum in [δ, 1].
    Ĥ is a :func:`state_operand`, ``delta`` a scalar or [C, 1].

    The increments are β d with d <- c d + r, one product an entry: β = 2ν, but ν in the first. β and d are rounded to
    the operand type before anything uses them, so that r = b − B z stays true; only the products' weights φ and Ψ
    carry errors. The products accumulate s = r + δ z, which nothing else touches: K̂'s is still under way while z
    takes the increment and the operand of Ĥ's is formed.
    """
    theta = 0.5 * (1 + delta)
    h2 = 0.25 * (1 - delta) * (1 - delta)
    nu = 1 / theta
    weight = nu.to(b_k.dtype)
    b_d = b_b.to(b_k.dtype)
    b_z = tl.zeros(b_b.shape, tl.float32)
    b_s = b_b
    b_phi = (-phi).to(b_k.dtype)[:, None]
    b_psi = (-b_psi).to(b_k.dtype)
    b_s = add_within_chunk(b_s, b_d, b_k, b_psi, weight, PRECISION)
    for i in range(num_iter - 1):
        if certainly(i):
            b_z += weight.to(tl.float32) * b_d.to(tl.float32)
        b_s = times_state(b_s, b_d * (b_phi * weight), h, BLOCK_S, PRECISION)
        b_d, weight, nu = next_increment(b_d, weight, nu, b_s, b_z, delta, theta, h2)
        b_s = add_within_chunk(b_s, b_d, b_k, b_psi, weight, PRECISION)
    b_z += weight.to(tl.float32) * b_d.to(tl.float32)
    b_s = times_state(b_s, b_d * (b_phi * weight), h, BLOCK_S, PRECISION)
    b_d, weight, nu = next_increment(b_d, weight, nu, b_s, b_z, delta, theta, h2)
    return b_z + weight.to(tl.float32) * b_d.to(tl.float32)


@triton.jit
def normalise_rows_backward(b_d, b_hat, unit, QK_L2NORM: tl.constexpr, NORM_EPS: tl.constexpr):
    """Gradient of the rows that came in from that of the normalised rows (MATH.md §4.5); b_hat are the scaled rows."""
    if QK_L2NORM:
        norm = row_norm(b_hat, unit, NORM_EPS)
        b_unit = b_hat * (1 / norm)[:, None]
        radial = tl.sum(b_unit * b_d, axis=1)
        radial = tl.where(norm > NORM_EPS / unit, radial, 0.0)  # at or below ε the denominator is constant
        return (b_d - b_unit * radial[:, None]) * (1 / (norm * unit))[:, None]
    else:
        return b_d


# ------------------------------------------------------------------------------------------------ the solution's rows
@triton.jit
def split_along_query(b_x, b_q):
    """x = c·q + w [C, BLOCK_D] with w orthogonal to q [C, BLOCK_D]: returns (w, c [C]).

    With a short memory x is large and nearly parallel to q outside the span of the keys; w is small there, so
    rounding w to fp16 leaves the part that keys and values see intact, which rounding x would not.
    """
    square = tl.sum(b_q * b_q, axis=1)
    c = tl.sum(b_x * b_q, axis=1) / tl.where(square == 0, 1.0, square)
    return b_x - c[:, None] * b_q, c


@triton.jit
def load_query(
    q, o_row, m_t, o_d, D: tl.constexpr, BLOCK_D: tl.constexpr, QK_L2NORM: tl.constexpr, NORM_EPS: tl.constexpr
):
    """Scaled rows q̂ [C, BLOCK_D] in fp32, the weight [C] with effective query weight_t·q̂_t, and the rows' units [C]."""
    b_q, unit_q = scale_rows(load_rows(q, o_row, m_t, o_d, D, BLOCK_D))
    return b_q, query_weight(b_q, unit_q, QK_L2NORM, NORM_EPS), unit_q


@triton.jit
def effective_query(b_q, QK_L2NORM: tl.constexpr, NORM_EPS: tl.constexpr):
    """(rows [C, BLOCK_D], weight [C], unit [C]) of the rows that came in, for fp32 arithmetic: the effective query is
    weight·rows. Only normalisation scales the rows, by 1/unit."""
    if QK_L2NORM:
        b_q, unit = scale_rows(b_q)
        weight = query_weight(b_q, unit, QK_L2NORM, NORM_EPS)
    else:
        unit = tl.full((b_q.shape[0],), 1.0, tl.float32)
        weight = unit
    return b_q, weight, unit


@triton.jit
def load_solution(x, x_scale, x_query, b_q, o_row, m_t, o_d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """x [C, BLOCK_D] in fp32: stored as it is, or as x_query·q + x_scale·x̂ with effective query columns ``b_q``."""
    b_x = load_rows(x, o_row, m_t, o_d, D, BLOCK_D)
    if x_scale is not None:
        b_x *= load_scalars(x_scale, o_row, m_t, 1.0)[:, None]
        b_x += load_scalars(x_query, o_row, m_t, 0.0)[:, None] * b_q
    return b_x


@triton.jit
def split_solution(b_x, x_scale, x_query, b_q, weight_q, o_row, m_t):
    """x = along·q̂ + across·ŵ: scaled rows ŵ [C, BLOCK_D], along [C], across [C], from x as it is stored.

    Products with x are formed from those with q̂ and ŵ: the part of x along q is too large to be rounded with the rest.
    """
    if x_scale is not None:
        return (
            b_x,
            pinned(load_scalars(x_query, o_row, m_t, 0.0)) * weight_q,
            pinned(load_scalars(x_scale, o_row, m_t, 0.0)),
        )
    else:
        b_w, along = split_along_query(b_x, b_q)
        b_w, across = scale_rows(b_w)
        return b_w, along, across


# --------------------------------------------------------------------------------------------------- key gradients
@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def second(a, b):
    return b


@triton.jit
def pinned(b):
    """b [C], computed once. Scalars of tokens count as cheap, so the compiler would load them, with their addresses,
    anew in every layout that a tile needs them in; it does not look through a scan, and this one is over nothing."""
    return tl.associative_scan(b, 0, second)


@triton.jit
def decayed_max(b_c, b, REVERSE: tl.constexpr):
    """max_s e^{c_s − c_t} b_s [C] over s <= t, or over s >= t, for b >= 0 and c whose differences are <= 0 there."""
    b_c *= 1.4426950408889634  # in powers of two
    return tl.exp2(tl.associative_scan(b_c + tl.log2(b), 0, larger, reverse=REVERSE) - b_c)


@triton.jit
def score_unit(bound, BLOCK_D: tl.constexpr):
    """Units [R] of rows of weighted scores (a·b) w with scaled rows a, b [., BLOCK_D] and |w| <= bound, known before
    the scores are: |a·b| < 4·BLOCK_D, so that in this unit they end below 2^15. It may be far too large a bound."""
    return pow2_floor(tl.maximum(bound, 2.0**-100)) * (BLOCK_D / 4096)


@triton.jit
def keys_times_state(
    b_k, k, unit_k, state, i_state, o_r, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """K̂ S [C, BLOCK_D] of a stored key-key state, BLOCK_S of its rows at a time."""
    if BLOCK_S == BLOCK_D:
        b_s = load_state(state, i_state, 0, BLOCK_D, BLOCK_D, BLOCK_D)
        return tl.dot(b_k, b_s, input_precision=PRECISION)
    else:
        o_d = tl.arange(0, BLOCK_D)
        b_ks = tl.zeros(b_k.shape, tl.float32)
        for i_s in range(BLOCK_D // BLOCK_S):
            o_s = i_s * BLOCK_S + tl.arange(0, BLOCK_S)
            b_ki = load_tile(k, o_r, o_s, stride, D, BLOCK_D) * (1 / unit_k)[:, None]
            b_s = tl.load(state + i_state * BLOCK_D * BLOCK_D + o_s[:, None] * BLOCK_D + o_d[None, :])
            b_ks = tl.dot(b_ki.to(b_k.dtype), b_s, b_ks, input_precision=PRECISION)
        return b_ks


@triton.jit
def store_gate_gradients(
    b_m, b_pi, j_next, b_beta, b_g, d_beta, d_log_decay, d_A_log, d_dt_bias, log_decay, A_log, dt_bias, o_row, m_t,
    i_h, i_state, MIN_LOG_DECAY: tl.constexpr,
):  # fmt: skip
    """dβ and dg (or the raw projection's gradient) of one chunk (MATH.md §4.4–4.5) from m_t = (k·dk + v·dv) / 2β_t²."""
    if d_beta is not None:  # β scales key and value alike: β dβ = k·dk + v·dv
        tl.store(d_beta + o_row, (2 * b_beta * b_m).to(d_beta.dtype.element_ty), mask=m_t)
    if d_log_decay is not None:  # dg_t = J⁺ + Σ_{s>=t} (π_s − (k_s·dk_s + v_s·dv_s)/2)
        b_kappa = tl.where(m_t, b_beta * b_beta * b_m, 0.0)
        b_dg = j_next + tl.cumsum(b_pi - b_kappa, axis=0, reverse=True)
        b_dg = tl.where(m_t & (b_g > MIN_LOG_DECAY), b_dg, 0.0)
        if A_log is not None:
            b_a = load_scalars(log_decay, o_row, m_t, 0.0)
            if dt_bias is not None:
                b_a += tl.load(dt_bias + i_h).to(tl.float32)
            tl.store(d_A_log + i_state, tl.sum(b_dg * b_g, axis=0))
            b_dg *= -tl.exp(tl.load(A_log + i_h).to(tl.float32)) * sigmoid(b_a)
            if d_dt_bias is not None:
                tl.store(d_dt_bias + i_state, tl.sum(b_dg, axis=0))
        tl.store(d_log_decay + o_row, b_dg.to(d_log_decay.dtype.element_ty), mask=m_t)
