"""Eager, chunked Gated KalmaNet with the Chebyshev solver (docs/math.md §2–3): the CPU implementation and an oracle.

Everything but the recurrence of the chunk-start states is a batched product over all chunks; no H_t is ever formed.

Shapes: B batch, T tokens, H query heads, Hkv key/value heads, D key and V value dimension, N sequences (N = B, or the
packed sequences, then B = 1), C chunk size, L chunks of all sequences of a batch row together. Token tensors come in as
[B, T, H, ·] and are worked on as [B, H, L, C, ·]. The compute dtype is fp32, fp64 for fp64 inputs; logarithms are
natural. ``chunk_solve`` is the case V = 0: a value-free read-out costs nothing and needs no second code path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gka_ops.numerics import FRO_MIN, MIN_LOG_DECAY, NORM_EPS

DEFAULT_CHUNK_SIZE = 64

Form = Literal["increment", "three_term"]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of all arithmetic, states and norms: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ----------------------------------------------------------------------------------------------------------- inputs
class Inputs(NamedTuple):
    """The floating-point arguments of an operator as the user gave them, any dtype (docs/math.md §1).

    Attributes:
        q: [B, T, H, D].
        k: [B, T, Hkv, D].
        v: [B, T, Hkv, V]; V = 0 for the solve alone.
        log_decay: g [B, T, H], or the raw projection a when ``A_log`` is given; ``None`` is no decay.
        alpha: α [B, T, H]; ``None`` is 1.
        beta: β [B, T, H]; ``None`` is 1.
        ridge_scale: r, a float, [H] or [B, T, H].
        ridge_offset: b, a float, [H] or [B, T, H].
        A_log: [H] or ``None``.
        dt_bias: [H] or ``None`` (zero).
        initial_kk: H_0 [N, H, D, D] or ``None`` (zero).
        initial_kv: U_0 [N, H, D, V] or ``None`` (zero).
        cu_seqlens: [N + 1] or ``None``.
        qk_l2norm: normalise q and k first.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None = None
    alpha: Tensor | None = None
    beta: Tensor | None = None
    ridge_scale: float | Tensor = 0.02
    ridge_offset: float | Tensor = 0.0
    A_log: Tensor | None = None
    dt_bias: Tensor | None = None
    initial_kk: Tensor | None = None
    initial_kv: Tensor | None = None
    cu_seqlens: Tensor | None = None
    qk_l2norm: bool = False


def l2norm(x: Tensor) -> Tensor:
    """x / max(‖x‖, ε) over the last dimension (docs/math.md §1)."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=NORM_EPS)


def softplus(x: Tensor) -> Tensor:
    """log(1 + eˣ), without the linear branch of ``torch.nn.functional.softplus`` (wrong by e^-20 above 20)."""
    return torch.logaddexp(x, torch.zeros_like(x))


def raw_log_decay(log_decay: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """g [B, T, H] before clamping: as given, or −exp(A_log)·softplus(a + dt_bias) (docs/math.md §1)."""
    a = log_decay.to(dtype)
    if A_log is None:
        return a
    bias = 0.0 if dt_bias is None else dt_bias.to(dtype)
    return -A_log.to(dtype).exp() * softplus(a + bias)


def _per_token(value: float | Tensor | None, default: float, q: Tensor) -> Tensor:
    """A gate or ridge part as a dense [B, T, H] tensor in the compute dtype."""
    dtype = compute_dtype(q.dtype)
    if isinstance(value, Tensor):
        return value.to(dtype).expand(q.shape[:3])
    return torch.full(q.shape[:3], default if value is None else value, dtype=dtype, device=q.device)


# ----------------------------------------------------------------------------------------------------- chunk layout
class ChunkTable(NamedTuple):
    """Where every token stands once each sequence is cut into chunks of its own (docs/math.md §5).

    Attributes:
        slots: int64 [L·C], the token in each slot; T marks padding.
        positions: int64 [T], the slot of each token.
        spans: (first, last + 1) chunk of each sequence; equal for an empty sequence.
        chunk_size: C.
    """

    slots: Tensor
    positions: Tensor
    spans: Sequence[tuple[int, int]]
    chunk_size: int

    def to_chunks(self, x: Tensor) -> Tensor:
        """[B, T, H, ...] to [B, H, L, C, ...], padded with zeros."""
        padded = torch.cat([x, x.new_zeros(x.shape[0], 1, *x.shape[2:])], dim=1)
        rows = padded.index_select(1, self.slots).transpose(1, 2)
        chunks = self.slots.numel() // self.chunk_size
        return rows.reshape(*rows.shape[:2], chunks, self.chunk_size, *rows.shape[3:]).contiguous()

    def to_tokens(self, x: Tensor) -> Tensor:
        """[B, H, L, C, ...] to a fresh, contiguous [B, T, H, ...]."""
        rows = x.reshape(*x.shape[:2], self.slots.numel(), *x.shape[4:])
        return rows.transpose(1, 2).index_select(1, self.positions).contiguous()


def chunk_table(num_tokens: int, cu_seqlens: Tensor | None, chunk_size: int, device: torch.device) -> ChunkTable:
    """The table of T tokens in one sequence, or packed as ``cu_seqlens`` says (reads its values)."""
    bounds: list[int] = [0, num_tokens] if cu_seqlens is None else cu_seqlens.tolist()
    slots, positions, spans, first = [], [], [], 0
    for start, end in pairwise(bounds):
        count = -(-(end - start) // chunk_size)
        slot = torch.full((count * chunk_size,), num_tokens, dtype=torch.int64)
        slot[: end - start] = torch.arange(start, end)
        slots.append(slot)
        positions.append(torch.arange(end - start) + first * chunk_size)
        spans.append((first, first + count))
        first += count
    return ChunkTable(torch.cat(slots).to(device), torch.cat(positions).to(device), spans, chunk_size)


class Operands(NamedTuple):
    """The effective operands of docs/math.md §1 in chunks: [B, H, L, C, ·], compute dtype, zero in padded slots.

    Attributes:
        q: q̂ [..., D].
        k: β k̂ [..., D], one copy for each query head.
        v: β v [..., V], likewise.
        g: log decay, clamped at ``MIN_LOG_DECAY``.
        alpha: α.
        r: ridge scale.
        b: ridge offset.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    alpha: Tensor
    r: Tensor
    b: Tensor


def effective_operands(inputs: Inputs, table: ChunkTable) -> Operands:
    """Normalises, weights by β, spreads keys and values over their query heads, and cuts into chunks."""
    dtype = compute_dtype(inputs.q.dtype)
    q, k, v = inputs.q.to(dtype), inputs.k.to(dtype), inputs.v.to(dtype)
    if inputs.qk_l2norm:
        q, k = l2norm(q), l2norm(k)
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    if inputs.beta is not None:
        beta = inputs.beta.to(dtype)[..., None]
        k, v = beta * k, beta * v
    if inputs.log_decay is None:
        g = _per_token(None, 0.0, inputs.q)
    else:
        g = raw_log_decay(inputs.log_decay, inputs.A_log, inputs.dt_bias, dtype).clamp(min=MIN_LOG_DECAY)
    return Operands(
        q=table.to_chunks(q),
        k=table.to_chunks(k),
        v=table.to_chunks(v),
        g=table.to_chunks(g),
        alpha=table.to_chunks(_per_token(inputs.alpha, 1.0, inputs.q)),
        r=table.to_chunks(_per_token(inputs.ridge_scale, 0.0, inputs.q)),
        b=table.to_chunks(_per_token(inputs.ridge_offset, 0.0, inputs.q)),
    )


# ------------------------------------------------------------------------------------------------ decays and states
class Decays(NamedTuple):
    """The decays within every chunk (docs/math.md §2), all in [0, 1].

    Attributes:
        gamma: γ_t = e^{c_t} [B, H, L, C], from the chunk start.
        pair: M_ts = e^{c_t − c_s} for s ≤ t, else 0 [B, H, L, C, C].
        tau: τ_t = e^{c_C − c_t} [B, H, L, C], to the chunk end.
        total: γ_C [B, H, L].
    """

    gamma: Tensor
    pair: Tensor
    tau: Tensor
    total: Tensor


def chunk_decays(g: Tensor) -> Decays:
    """Decays of chunks with log decays g [B, H, L, C].

    The sums c run in fp64: after a few tokens at the clamp c is in the thousands, and an fp32 difference c_t − c_s of
    two such sums would be wrong by 5e-4.
    """
    c = g.to(torch.float64).cumsum(-1)
    size = g.shape[-1]
    causal = torch.ones(size, size, dtype=torch.bool, device=g.device).tril()
    difference = (c[..., :, None] - c[..., None, :]).to(g.dtype)
    return Decays(
        gamma=c.to(g.dtype).exp(),
        pair=difference.masked_fill(~causal, -torch.inf).exp(),
        tau=(c[..., -1:] - c).to(g.dtype).exp(),
        total=c[..., -1].to(g.dtype).exp(),
    )


class States(NamedTuple):
    """One of the two states around every chunk.

    Attributes:
        starts: Hc or Uc [B, H, L, D, ·].
        ends: the same after the chunk's last token.
        final: [N, H, D, ·] after each sequence, fresh.
    """

    starts: Tensor
    ends: Tensor
    final: Tensor


def chunk_states(left: Tensor, right: Tensor, decays: Decays, initial: Tensor | None, table: ChunkTable) -> States:
    """Hc' = γ_C Hc + leftᵀ diag(τ) right over the chunks of every sequence (docs/math.md §2).

    Args:
        left: K [B, H, L, C, D].
        right: K or V [B, H, L, C, ·].
        decays: of the same chunks.
        initial: H_0 or U_0 [N, H, D, ·], ``None`` for zero.
        table: which chunks belong to which sequence.
    """
    increments = left.mT @ (decays.tau[..., None] * right)
    total = decays.total[..., None, None]
    B, H = left.shape[:2]
    if initial is None:
        initial = left.new_zeros(B * len(table.spans), H, *increments.shape[-2:])
    starts, final = torch.empty_like(increments), []
    # One of the two counts is 1, so this takes [B, ...] from a plain batch and one packed sequence at a time otherwise.
    for state, (first, last) in zip(initial.to(left.dtype).split(B) if B else [initial], table.spans, strict=True):
        for i in range(first, last):
            starts[:, :, i] = state
            state = total[:, :, i] * state + increments[:, :, i]
        final.append(state)
    return States(starts, total * starts + increments, torch.cat(final))


def frobenius_norms(k: Tensor, starts: Tensor, decays: Decays) -> Tensor:
    """F_t = ‖H_t‖_F [B, H, L, C] of every token, from K Hc and K Kᵀ alone (docs/math.md §2).

    Every term of the sum is ≥ 0. Large operands are scaled down by a power of two for each chunk, so that no square
    overflows; small ones stay, since what underflows in F² lies far below F_min².
    """
    largest = torch.maximum(starts.abs().amax((-2, -1)), k.square().sum(-1).amax(-1))
    half = torch.frexp(largest.clamp(min=1.0)).exponent // 2
    unit = torch.ldexp(torch.ones_like(largest), half)[..., None, None]
    k, starts = k / unit, starts / unit.square()
    gram = (k @ k.mT).square()
    own = torch.diagonal(gram, dim1=-2, dim2=-1)
    earlier = (decays.pair * gram).sum(-1) - own
    added = 2 * decays.gamma * ((k @ starts) * k).sum(-1) + 2 * earlier + own
    before = decays.gamma.square() * starts.square().sum((-2, -1))[..., None]
    squared = before + (decays.pair.square() @ added[..., None])[..., 0]
    return squared.clamp(min=0.0).sqrt() * unit[..., 0].square()


# ------------------------------------------------------------------------------------------------------------ solve
class RowNorms(NamedTuple):
    """How every row of the solve is normalised, and which rows have a policy of their own (docs/math.md §2, §3.1).

    Attributes:
        delta: δ = λ/η in [0, 1], with η = F + λ; 1 in dead and flat rows.
        inverse: 1/η, so that x = z/η; 0 in dead rows, where x = 0.
        weight: 1/η for the H_t part of the normalised operator; 0 in dead and flat rows, where it is the identity.
        regular: neither dead (F + λ ≤ F_min) nor flat (F ≤ F_min and b > 0, where λ = b and x = q/b).
    """

    delta: Tensor
    inverse: Tensor
    weight: Tensor
    regular: Tensor


def row_norms(fro: Tensor, r: Tensor, b: Tensor) -> RowNorms:
    """λ_t = r F + b and η_t = F + λ with the edge cases of docs/math.md §2; all arguments of one shape."""
    lam = r * fro + b
    eta = fro + lam
    dead = eta <= FRO_MIN
    flat = ~dead & (fro <= FRO_MIN) & (b > 0)
    regular = ~(dead | flat)
    eta = torch.where(dead, 1.0, torch.where(flat, b, eta))
    inverse = 1.0 / eta
    return RowNorms(
        delta=torch.where(regular, lam * inverse, 1.0),
        inverse=torch.where(dead, 0.0, inverse),
        weight=torch.where(regular, inverse, 0.0),
        regular=regular,
    )


def chebyshev(
    operator: Callable[[Tensor], Tensor], rhs: Tensor, delta: Tensor, num_iter: int, form: Form = "increment"
) -> Tensor:
    """z_{n+1} ≈ B⁻¹ rhs after n applications of B, whose spectrum lies in [δ, 1] (docs/math.md §3.1).

    Args:
        operator: B, acting on the rows of [..., D].
        rhs: [..., D].
        delta: lower end of each row's spectrum [..., 1]; δ = 1 means B = 1 and z = rhs.
        num_iter: n ≥ 1.
        form: carry the increment d and the residual, or the last two iterates. Equal up to rounding.
    """
    theta, h = (1.0 + delta) / 2, (1.0 - delta) / 2
    nu = 1.0 / theta
    z = nu * rhs
    d, residual, previous = z, rhs, torch.zeros_like(z)
    for _ in range(num_iter):
        nu_next = 1.0 / (2.0 * theta - h.square() * nu)
        momentum, step = h.square() * nu * nu_next, 2.0 * nu_next
        if form == "increment":
            residual = residual - operator(d)
            d = momentum * d + step * residual
            z = z + d
        else:
            z, previous = (1.0 + momentum) * z - momentum * previous + step * (rhs - operator(z)), z
        nu = nu_next
    return z


class ChunkOperator(NamedTuple):
    """B = A_t/η_t of every token: diag(φ) X Hc + (Ψ ∘ (X Kᵀ)) K + diag(δ) X (docs/math.md §2, §3.1).

    Attributes:
        k: K [B, H, L, C, D].
        starts: Hc [B, H, L, D, D].
        phi: γ_t/η_t [B, H, L, C, 1].
        psi: M_ts/η_t [B, H, L, C, C].
        norms: of every row [B, H, L, C].
    """

    k: Tensor
    starts: Tensor
    phi: Tensor
    psi: Tensor
    norms: RowNorms

    def apply(self, x: Tensor) -> Tensor:
        """B applied to the rows of x [B, H, L, C, D]."""
        return self.phi * (x @ self.starts) + (self.psi * (x @ self.k.mT)) @ self.k + self.norms.delta[..., None] * x

    def solve(self, rhs: Tensor, num_iter: int, form: Form = "increment") -> Tensor:
        """A_t⁻¹ rhs_t of every token, to the accuracy of n = ``num_iter`` applications; 0 in dead rows."""
        z = chebyshev(self.apply, rhs, self.norms.delta[..., None], num_iter, form)
        return self.norms.inverse[..., None] * z


def chunk_operator(operands: Operands, decays: Decays, starts: Tensor, fro: Tensor) -> ChunkOperator:
    """The normalised operator of chunks with states Hc [B, H, L, D, D] and norms F [B, H, L, C]."""
    norms = row_norms(fro, operands.r, operands.b)
    weight = norms.weight[..., None]
    return ChunkOperator(operands.k, starts, weight * decays.gamma[..., None], weight * decays.pair, norms)


def frobenius_norm(h: Tensor) -> Tensor:
    """‖H‖_F over the last two dimensions, safe from overflow of the squares."""
    largest = h.abs().amax((-2, -1))
    unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest.clamp(min=1.0)).exponent)
    return torch.linalg.vector_norm(h / unit[..., None, None], dim=(-2, -1)) * unit


def dense_solve(h: Tensor, q: Tensor, r: Tensor, b: Tensor, num_iter: int) -> Tensor:
    """x = (H + λ I)⁻¹ q for explicit states, as decode does it (docs/math.md §5).

    Args:
        h: [..., D, D].
        q: [..., D].
        r: [...].
        b: [...].
        num_iter: n ≥ 1.
    """
    norms = row_norms(frobenius_norm(h), r, b)
    matrix, delta = norms.weight[..., None, None] * h, norms.delta[..., None]
    z = chebyshev(lambda d: (d[..., None, :] @ matrix)[..., 0, :] + delta * d, q, delta, num_iter)
    return norms.inverse[..., None] * z


def mix(q: Tensor, x: Tensor, alpha: Tensor) -> Tensor:
    """m = (1 − α) q + α x, rows [..., D], α [...] (docs/math.md §1)."""
    return (1.0 - alpha[..., None]) * q + alpha[..., None] * x


def read_out(m: Tensor, operands: Operands, decays: Decays, starts: Tensor, scale: float) -> Tensor:
    """O = s (diag(γ) M Uc + (M ∘ (M Kᵀ)) V) [B, H, L, C, V] of the rows m (docs/math.md §2)."""
    across = decays.gamma[..., None] * (m @ starts)
    return scale * (across + (decays.pair * (m @ operands.k.mT)) @ operands.v)


# ---------------------------------------------------------------------------------------------------------- forward
class Chunked(NamedTuple):
    """All that forward and backward share before any solve.

    Attributes:
        table: the layout.
        operands: effective operands in chunks.
        decays: of every chunk.
        kk: H around every chunk.
        kv: U around every chunk.
    """

    table: ChunkTable
    operands: Operands
    decays: Decays
    kk: States
    kv: States


def chunked(inputs: Inputs, chunk_size: int = DEFAULT_CHUNK_SIZE) -> Chunked:
    """Operands, decays and chunk states of ``inputs``."""
    table = chunk_table(inputs.q.shape[1], inputs.cu_seqlens, chunk_size, inputs.q.device)
    operands = effective_operands(inputs, table)
    decays = chunk_decays(operands.g)
    kk = chunk_states(operands.k, operands.k, decays, inputs.initial_kk, table)
    kv = chunk_states(operands.k, operands.v, decays, inputs.initial_kv, table)
    return Chunked(table, operands, decays, kk, kv)


class Forward(NamedTuple):
    """Results in the compute dtype, token-major, fresh and contiguous.

    Attributes:
        output: o [B, T, H, V].
        x: [B, T, H, D].
        fro: F [B, T, H].
        final_kk: H after each sequence [N, H, D, D].
        final_kv: U after each sequence [N, H, D, V].
    """

    output: Tensor
    x: Tensor
    fro: Tensor
    final_kk: Tensor
    final_kv: Tensor


def forward(
    inputs: Inputs,
    num_iter: int,
    scale: float = 1.0,
    *,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    form: Form = "increment",
) -> Forward:
    """The whole forward (docs/math.md §1–3).

    Args:
        inputs: the operator's tensors.
        num_iter: operator applications n; 0 skips the solve: x = q.
        scale: s of the read-out.
        chunk_size: C; changes the result only by rounding.
        form: of the Chebyshev iteration.
    """
    table, operands, decays, kk, kv = chunked(inputs, chunk_size)
    fro = frobenius_norms(operands.k, kk.starts, decays)
    x = m = operands.q
    if num_iter > 0:
        x = chunk_operator(operands, decays, kk.starts, fro).solve(operands.q, num_iter, form)
        m = mix(operands.q, x, operands.alpha)
    output = read_out(m, operands, decays, kv.starts, scale)
    return Forward(table.to_tokens(output), table.to_tokens(x), table.to_tokens(fro), kk.final, kv.final)
