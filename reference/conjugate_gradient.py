"""Conjugate gradients (CG) on the normalised system of docs/math.md §3.1: an ablation, never the library's solver.

On the usual spectra CG needs fewer operator applications than the Chebyshev iteration for the same error, because it
adapts to the spectrum it meets. It is not the default, and no operator offers it, for two reasons:

* Its stopping test looks at the residual, and the residual is no bound of the error: with ρ = λ/‖H‖_F the relative
  error may be (1+ρ)/ρ times the relative residual, 51 times at ρ = 0.02. Where the query lies almost along the only key
  so far, an exit at a residual of 2e-3 leaves an error near 1e-1. The a-priori count of the Chebyshev iteration
  (:func:`gka_ops.iterations_for`) bounds the error itself, for any data.
* Its coefficients are two inner products a row and step, which the next step waits for; the Chebyshev coefficients are
  known beforehand. And the truncated iterate is not linear in the right-hand side, so the transpose of one truncated
  solve is not another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gka_ops.numerics import DEFAULT_RIDGE, FRO_MIN

Operator = Callable[[Tensor], Tensor]


class CGResult(NamedTuple):
    """Result of :func:`conjugate_gradient`.

    Attributes:
        solution: [..., D].
        residual: relative norm ‖b − A x‖/‖b‖ of the *recursively updated* residual [...], 0 for a zero right-hand side.
        iterations: int64 [...], the operator applications that each row used.
    """

    solution: Tensor
    residual: Tensor
    iterations: Tensor


def _matrices_as_operator(matrices: Tensor) -> Operator:
    return lambda rows: (matrices @ rows.unsqueeze(-1)).squeeze(-1)


def conjugate_gradient(
    operator: Tensor | Operator, rhs: Tensor, *, num_iter: int, residual_tol: float | None = None
) -> CGResult:
    """Solves A_i x_i = b_i for many rows at once, from x = 0, in the dtype of ``rhs``.

    Args:
        operator: symmetric positive definite matrices [..., D, D], or a function that applies them to rows [..., D].
        rhs: right-hand sides b [..., D].
        num_iter: operator applications n ≥ 0; a row that is solved exactly before stays as it is.
        residual_tol: a row stops as soon as its relative residual is at most this (see the module's warning);
            ``None`` runs every row for ``num_iter``.

    Raises:
        ValueError: ``num_iter`` is negative, or ``residual_tol`` is.
    """
    if num_iter < 0:
        raise ValueError(f"conjugate_gradient: expected num_iter >= 0, got {num_iter}")
    if residual_tol is not None and not residual_tol >= 0:
        raise ValueError(f"conjugate_gradient: expected residual_tol >= 0 or None, got {residual_tol!r}")
    apply = _matrices_as_operator(operator.to(rhs.dtype)) if isinstance(operator, Tensor) else operator

    solution, residual, direction = torch.zeros_like(rhs), rhs, rhs
    start = (rhs * rhs).sum(-1, keepdim=True)
    norm = start
    threshold = start * (residual_tol or 0.0) ** 2
    iterations = torch.zeros(rhs.shape[:-1], dtype=torch.int64, device=rhs.device)
    for _ in range(num_iter):
        active = norm > threshold
        if not active.any():
            break
        image = apply(direction)
        curvature = (direction * image).sum(-1, keepdim=True)
        step = torch.where(active & (curvature > 0), norm / curvature, 0.0)
        solution = solution + step * direction
        residual = residual - step * image
        new_norm = torch.where(active, (residual * residual).sum(-1, keepdim=True), norm)
        direction = torch.where(active, residual + (new_norm / norm) * direction, direction)
        norm = new_norm
        iterations += active.squeeze(-1)
    relative = torch.where(start > 0, norm / start, 0.0).sqrt().squeeze(-1)
    return CGResult(solution, relative, iterations)


def solve(
    kk: Tensor,
    q: Tensor,
    ridge_scale: float | Tensor = DEFAULT_RIDGE,
    ridge_offset: float | Tensor = 0.0,
    *,
    num_iter: int,
    residual_tol: float | None = None,
    dtype: torch.dtype,
) -> CGResult:
    """x = (H + λ I)^{-1} q for explicit H: CG on (H + λ I)/η z = q, then x = z/η; η = ‖H‖_F + λ (docs/math.md §3.1).

    Args:
        kk: H_t, one matrix a token row [..., D, D], symmetric positive semidefinite.
        q: queries [..., D].
        ridge_scale: r in λ = r ‖H‖_F + b; a float or [...].
        ridge_offset: b; a float or [...].
        num_iter: operator applications.
        residual_tol: early exit of each row, see :func:`conjugate_gradient`.
        dtype: dtype of the whole solve; inputs are rounded to it.

    Returns:
        The solution x [..., D] in ``dtype``; 0 in dead rows, η ≤ 2^-40.
    """
    kk, q = kk.to(dtype), q.to(dtype)
    fro = torch.linalg.matrix_norm(kk)
    ridge = fro * ridge_scale + ridge_offset
    eta = fro + ridge
    dead = eta <= FRO_MIN
    eta = torch.where(dead, 1.0, eta).unsqueeze(-1)
    normalised, shift = _matrices_as_operator(kk / eta.unsqueeze(-1)), ridge.unsqueeze(-1) / eta

    def apply(rows: Tensor) -> Tensor:
        return normalised(rows) + shift * rows

    rhs = torch.where(dead.unsqueeze(-1), 0.0, q)
    result = conjugate_gradient(apply, rhs, num_iter=num_iter, residual_tol=residual_tol)
    return result._replace(solution=result.solution / eta)
