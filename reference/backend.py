"""The operators' implementation by the eager reference: CPU, fp64, and ``impl="reference"`` on any device.

One function for each operator of ``torch.ops.gka``, with the operator's own signature less the trailing ``impl``,
called positionally. Outputs are fresh, contiguous tensors; one that does not apply is an empty [0] tensor. Equations:
:mod:`gka_ops.reference.chebyshev` (docs/math.md §1–3), :mod:`gka_ops.reference.adjoint` (§4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gka_ops import modifiers
from gka_ops.numerics import forward_iterations
from gka_ops.reference import adjoint, chebyshev
from gka_ops.reference.chebyshev import Inputs, compute_dtype

_SIXTEEN_BIT = (torch.bfloat16, torch.float16)


def _empty(q: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return q.new_empty(0, dtype=dtype or compute_dtype(q.dtype))


def _residual_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float16 if dtype in _SIXTEEN_BIT else dtype


def _inputs(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, alpha: Tensor | None, beta: Tensor | None,
    ridge_scale_tensor: Tensor | None, ridge_offset_tensor: Tensor | None, A_log: Tensor | None,
    dt_bias: Tensor | None, initial_kk: Tensor | None, initial_kv: Tensor | None, cu_seqlens: Tensor | None,
    ridge_scale: float, ridge_offset: float, qk_l2norm: bool,
) -> Inputs:  # fmt: skip
    """An operator's arguments as the reference takes them: a part of the ridge is its tensor, or else its float."""
    return Inputs(
        q=q, k=k, v=v, log_decay=log_decay, alpha=alpha, beta=beta,
        ridge_scale=ridge_scale if ridge_scale_tensor is None else ridge_scale_tensor,
        ridge_offset=ridge_offset if ridge_offset_tensor is None else ridge_offset_tensor,
        A_log=A_log, dt_bias=dt_bias, initial_kk=initial_kk, initial_kv=initial_kv, cu_seqlens=cu_seqlens,
        qk_l2norm=qk_l2norm,
    )  # fmt: skip


def _with_tangent(inputs: Inputs, ridge_mod: str, fro: Tensor | None = None) -> Inputs:
    """The inputs with r and b of a ``ridge_mod``'s tangent (``modifiers``) in the place of its leaves.

    ``fro``: ‖H_t‖_F [B, T, H], if known; it may be empty.
    """
    if not ridge_mod:
        return inputs
    leaves = inputs.ridge_scale if isinstance(inputs.ridge_scale, Tensor) else None
    if fro is None or fro.ndim == 1:
        plain = inputs._replace(v=_without_values(inputs.k), ridge_scale=0.0, ridge_offset=0.0, initial_kv=None)
        fro = chebyshev.forward(plain, 0).fro
    slope, offset = modifiers.linearised(ridge_mod, fro, leaves)
    return inputs._replace(ridge_scale=slope, ridge_offset=offset)


def _of_leaves(
    ridge_mod: str, leaves: Tensor | None, d_scale: Tensor | None, d_offset: Tensor | None, fro: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the ridge's two tensors: with a ``ridge_mod`` of its leaves, and nothing."""
    if not ridge_mod:
        return d_scale, d_offset
    assert d_offset is not None  # b of the tangent is a tensor
    return None if leaves is None else modifiers.leaf_gradients(ridge_mod, d_offset, fro, leaves), None


def _without_values(k: Tensor) -> Tensor:
    """Values [B, T, Hkv, 0] of the solve alone."""
    return k.new_empty(*k.shape[:3], 0)


def _query(q: Tensor, qk_l2norm: bool) -> Tensor:
    """The effective query rows [B, T, H, D] in the compute dtype."""
    rows = q.to(compute_dtype(q.dtype))
    return chebyshev.l2norm(rows) if qk_l2norm else rows


def pack_rows(x: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x = x_query · q + x_scale · x̂ (NOTE [Operator conventions] of ``gka_ops.ops``), exact but for the rounding of x̂.

    Args:
        x: [..., D].
        q: the effective query [..., D].

    Returns:
        fp16 rows x̂ [..., D] with ‖x̂‖ in [1, 2) (or 0); a power of two x_scale [...] (1 where x̂ = 0); and
        x_query = <x, q>/<q, q> [...] (0 where q = 0).
    """
    square = (q * q).sum(-1)
    x_query = (x * q).sum(-1) / torch.where(square == 0, 1.0, square)
    x = x - x_query[..., None] * q
    norm = torch.linalg.vector_norm(x, dim=-1)
    exponent = torch.frexp(norm).exponent - 1
    scale = torch.ldexp(torch.ones_like(norm), exponent)
    scale = torch.where((norm > 0) & norm.isfinite(), scale, 1.0)
    return (x / scale[..., None]).to(torch.float16), scale, x_query


def unpack_rows(x: Tensor, x_scale: Tensor, x_query: Tensor, q: Tensor) -> Tensor:
    """The rows that :func:`pack_rows` saved, or plain rows where ``x_scale`` is empty, in the dtype of q."""
    rows = x.to(q.dtype)
    return rows if x_scale.ndim == 1 else x_query[..., None] * q + x_scale[..., None] * rows


def _residuals(result: chebyshev.Forward, q: Tensor, qk_l2norm: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, x_scale, x_query and fro, as ``chunk_gka`` returns them for the backward."""
    if q.dtype not in _SIXTEEN_BIT:
        return result.x, _empty(q), _empty(q), result.fro
    return *pack_rows(result.x, _query(q, qk_l2norm)), result.fro


def chunk_solve(
    q: Tensor,
    k: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    ridge_scale_tensor: Tensor | None,
    ridge_offset_tensor: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    initial_kk: Tensor | None,
    cu_seqlens: Tensor | None,
    ridge_scale: float,
    ridge_offset: float,
    num_iter: int,
    qk_l2norm: bool,
    output_final_state: bool,
    ridge_mod: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, T, H, D] and ‖H_t‖_F [B, T, H] in the compute dtype, and H after each sequence [N, H, D, D].

    Returns:
        (x, final_kk, fro).
    """
    inputs = _inputs(
        q, k, _without_values(k), log_decay, None, beta, ridge_scale_tensor, ridge_offset_tensor, A_log, dt_bias,
        initial_kk, None, cu_seqlens, ridge_scale, ridge_offset, qk_l2norm,
    )  # fmt: skip
    inputs = _with_tangent(inputs, ridge_mod)
    result = chebyshev.forward(inputs, num_iter)
    return result.x, result.final_kk if output_final_state else _empty(q), result.fro


def chunk_solve_backward(
    dx: Tensor,
    d_final_kk: Tensor | None,
    q: Tensor,
    k: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    ridge_scale_tensor: Tensor | None,
    ridge_offset_tensor: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    initial_kk: Tensor | None,
    cu_seqlens: Tensor | None,
    x: Tensor,
    fro: Tensor,
    ridge_scale: float,
    ridge_offset: float,
    num_iter: int,
    qk_l2norm: bool,
    ridge_mod: str,
) -> tuple[Tensor, ...]:
    """Gradients of ``chunk_solve`` from those of x and of the final H; ``x`` and ``fro`` are its outputs.

    Returns:
        (dq, dk, d_log_decay, d_beta, d_ridge_scale, d_ridge_offset, d_A_log, d_dt_bias, d_initial_kk), each like its
        input; empty for an absent one.
    """
    inputs = _inputs(
        q, k, _without_values(k), log_decay, None, beta, ridge_scale_tensor, ridge_offset_tensor, A_log, dt_bias,
        initial_kk, None, cu_seqlens, ridge_scale, ridge_offset, qk_l2norm,
    )  # fmt: skip
    d_output = dx.new_empty(*dx.shape[:3], 0)
    inputs = _with_tangent(inputs, ridge_mod, fro)
    g = adjoint.backward(inputs, x, fro, d_output, dx, d_final_kk, None, num_iter)
    d_ridge = _of_leaves(ridge_mod, ridge_scale_tensor, g.d_ridge_scale, g.d_ridge_offset, fro)
    gradients = (
        g.dq,
        g.dk,
        g.d_log_decay,
        g.d_beta,
        *d_ridge,
        g.d_A_log,
        g.d_dt_bias,
        g.d_initial_kk,
    )
    return tuple(_empty(q) if gradient is None else gradient for gradient in gradients)


def chunk_gka(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    ridge_scale_tensor: Tensor | None,
    ridge_offset_tensor: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    initial_kk: Tensor | None,
    initial_kv: Tensor | None,
    cu_seqlens: Tensor | None,
    ridge_scale: float,
    ridge_offset: float,
    num_iter: int,
    scale: float,
    qk_l2norm: bool,
    output_final_state: bool,
    save_x: bool,
    ridge_mod: str,
) -> tuple[Tensor, ...]:
    """o [B, T, H, V] in the dtype of q, the final states, and with ``save_x`` what the backward needs.

    Returns:
        (output, final_kk, final_kv, x, x_scale, x_query, fro, boundary_kk, boundary_kv); x packed for 16-bit inputs
        (:func:`pack_rows`), the boundaries empty.
    """
    inputs = _inputs(
        q, k, v, log_decay, alpha, beta, ridge_scale_tensor, ridge_offset_tensor, A_log, dt_bias,
        initial_kk, initial_kv, cu_seqlens, ridge_scale, ridge_offset, qk_l2norm,
    )  # fmt: skip
    inputs = _with_tangent(inputs, ridge_mod)
    result = chebyshev.forward(inputs, num_iter, scale)
    x, x_scale, x_query, fro = _empty(q, _residual_dtype(q.dtype)), _empty(q), _empty(q), _empty(q)
    if save_x and num_iter > 0:
        x, x_scale, x_query, fro = _residuals(result, q, qk_l2norm)
    final_kk, final_kv = (result.final_kk, result.final_kv) if output_final_state else (_empty(q), _empty(q))
    return result.output.to(q.dtype), final_kk, final_kv, x, x_scale, x_query, fro, _empty(q), _empty(q)


def chunk_gka_backward(
    d_output: Tensor,
    d_final_kk: Tensor | None,
    d_final_kv: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    ridge_scale_tensor: Tensor | None,
    ridge_offset_tensor: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    initial_kk: Tensor | None,
    initial_kv: Tensor | None,
    cu_seqlens: Tensor | None,
    x: Tensor,
    x_scale: Tensor,
    x_query: Tensor,
    fro: Tensor,
    boundary_kk: Tensor,
    boundary_kv: Tensor,
    ridge_scale: float,
    ridge_offset: float,
    num_iter: int,
    scale: float,
    qk_l2norm: bool,
    ridge_mod: str,
) -> tuple[Tensor, ...]:
    """Gradients of ``chunk_gka``. With ``num_iter > 0`` and an empty ``x``, x and ‖H_t‖_F are computed anew, as the
    forward did.

    Returns:
        (dq, dk, dv, d_log_decay, d_alpha, d_beta, d_ridge_scale, d_ridge_offset, d_A_log, d_dt_bias, d_initial_kk,
        d_initial_kv), each like its input; empty for an absent one.
    """
    inputs = _inputs(
        q, k, v, log_decay, alpha, beta, ridge_scale_tensor, ridge_offset_tensor, A_log, dt_bias,
        initial_kk, initial_kv, cu_seqlens, ridge_scale, ridge_offset, qk_l2norm,
    )  # fmt: skip
    inputs = _with_tangent(inputs, ridge_mod, fro)
    if num_iter > 0 and x.ndim == 1:
        x, x_scale, x_query, fro = _residuals(
            chebyshev.forward(inputs, forward_iterations(num_iter), scale), q, qk_l2norm
        )
    rows = unpack_rows(x, x_scale, x_query, _query(q, qk_l2norm))
    g = adjoint.backward(inputs, rows, fro, d_output, None, d_final_kk, d_final_kv, num_iter, scale)
    d_scale, d_offset = _of_leaves(ridge_mod, ridge_scale_tensor, g.d_ridge_scale, g.d_ridge_offset, fro)
    gradients = g._replace(d_ridge_scale=d_scale, d_ridge_offset=d_offset)
    return tuple(_empty(q) if gradient is None else gradient for gradient in gradients)


def recurrent_gka(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    ridge_scale_tensor: Tensor | None,
    ridge_offset_tensor: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    kk: Tensor,
    kv: Tensor,
    state_indices: Tensor | None,
    ridge_scale: float,
    ridge_offset: float,
    num_iter: int,
    scale: float,
    qk_l2norm: bool,
    ridge_mod: str,
) -> Tensor:
    """Decode (docs/math.md §5): advances the pool ``kk`` [S, H, D, D], ``kv`` [S, H, D, V] in place, token by token.

    ‖H_t‖_F is the norm of the updated H. A negative entry of ``state_indices`` [B] is padding: output 0, no slot is
    changed.

    Returns:
        o [B, T, H, V] in the dtype of q.
    """
    leaves, scale_tensor = (ridge_scale_tensor, None) if ridge_mod else (None, ridge_scale_tensor)
    inputs = _inputs(
        q, k, v, log_decay, alpha, beta, scale_tensor, ridge_offset_tensor, A_log, dt_bias,
        None, None, None, ridge_scale, ridge_offset, qk_l2norm,
    )  # fmt: skip
    B, T, H = q.shape[:3]
    output = q.new_zeros(B, T, H, v.shape[-1])
    if state_indices is None:
        state_indices = torch.arange(B, device=q.device)
    rows = torch.nonzero(state_indices >= 0)[:, 0]
    slots = state_indices[rows].to(torch.int64)

    # One chunk of one token each: the token axis of these operands is their chunk axis.
    table = chebyshev.chunk_table(T, None, 1, q.device)
    operands = chebyshev.effective_operands(inputs, table)
    operands = chebyshev.Operands(*(part.index_select(0, rows)[:, :, :, 0] for part in operands))
    H_t, U_t = kk.index_select(0, slots), kv.index_select(0, slots)
    for t in range(T):
        now = chebyshev.Operands(*(part[:, :, t] for part in operands))
        decay = now.g.exp()[..., None, None]
        H_t = decay * H_t + now.k[..., :, None] * now.k[..., None, :]
        U_t = decay * U_t + now.k[..., :, None] * now.v[..., None, :]
        m = now.q
        if num_iter > 0:
            slope, offset = now.r, now.b
            if ridge_mod:  # the tangent at the token's own norm
                of_token = None if leaves is None else leaves[rows, t]
                slope, offset = modifiers.linearised(ridge_mod, chebyshev.frobenius_norm(H_t), of_token)
            x = chebyshev.dense_solve(H_t, now.q, slope, offset, num_iter)
            m = chebyshev.mix(now.q, x, now.alpha)
        output[rows, t] = (scale * (m[..., None, :] @ U_t)[..., 0, :]).to(q.dtype)
    kk.index_copy_(0, slots, H_t)
    kv.index_copy_(0, slots, U_t)
    return output
