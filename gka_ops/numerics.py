"""The numerical constants of the library and the a-priori Chebyshev iteration count: pure Python, imports nothing else.

Every other module may import this one, so that each constant has exactly one owner.
"""

from __future__ import annotations

import math

DEFAULT_RIDGE: float = 0.02
"""Default ridge scale r in λ_t = r·‖H_t‖_F + b (paper, MATH.md §1)."""

DEFAULT_TOL: float = 2e-3
"""Default bound on the relative truncation error of x that ``num_iter="auto"`` guarantees."""

BACKWARD_EXTRA_ITERATIONS: int = 4
"""Operator applications that the backward solve makes beyond the forward's.

Gradients are up to five times more sensitive to stopping early than outputs (MATH.md §4.6). At the default ridge, four
more applications shrink the guaranteed factor of the adjoint solve by 3.1.
"""

NORM_EPS: float = 1e-6
"""ε of the ℓ2 normalisation: k̂ = k / max(‖k‖, ε) (MATH.md §1)."""

BETA_EPS: float = 1e-6
"""The layer weighs tokens by β = sigmoid(·) + ε, as the published one does: no token is dropped altogether."""

FRO_MIN: float = 2.0**-40
"""F_min of MATH.md §2: a row with ‖H_t‖_F + λ_t at or below it is dead (x_t = 0, no gradient)."""

MIN_LOG_DECAY: float = -120.0
"""Log decays are clamped here: e^-120 is 0 in fp32, and differences of cumulative sums stay finite (MATH.md §2)."""

MAX_AUTO_ITERATIONS: int = 1000
"""``iterations_for`` refuses to return more: such a ridge and tolerance ask for another solver."""


def iterations_for(ridge: float, tol: float = DEFAULT_TOL) -> int:
    """Number of Chebyshev operator applications that guarantees a relative error ``tol`` of x, for any data.

    The spectrum of the normalised system lies in [ρ, 1+ρ], so n applications shrink residual and error by at least
    T_{n+1}(1 + 2ρ); the count is n = ⌈acosh(1/tol) / acosh(1 + 2ρ)⌉ − 1, at least 1 (MATH.md §3.1).

    Args:
        ridge: smallest ridge scale ρ = λ/‖H‖_F of any token, dimensionless, > 0.
        tol: wanted bound on ‖x − x_n‖/‖x‖, in (0, 1).

    Raises:
        ValueError: ``ridge`` is not a positive finite number, ``tol`` is not in (0, 1), or the count exceeds
            ``MAX_AUTO_ITERATIONS``.
    """
    if not 0 < ridge < math.inf:
        raise ValueError(f"iterations_for: expected a finite ridge > 0, got {ridge!r}")
    if not 0 < tol < 1:
        raise ValueError(f"iterations_for: expected 0 < tol < 1, got {tol!r}")
    count = max(1, math.ceil(math.acosh(1 / tol) / math.acosh(1 + 2 * ridge)) - 1)
    if count > MAX_AUTO_ITERATIONS:
        raise ValueError(
            f"iterations_for: ridge {ridge!r} with tol {tol!r} needs {count} iterations, more than "
            f"{MAX_AUTO_ITERATIONS}; use a larger ridge or a larger tol"
        )
    return count


def backward_iterations(num_iter: int) -> int:
    """Operator applications of the adjoint solve that belongs to a forward with ``num_iter`` (0 stays 0)."""
    return num_iter + BACKWARD_EXTRA_ITERATIONS if num_iter > 0 else 0


def forward_iterations(num_iter: int) -> int:
    """Operator applications of the forward to which an adjoint solve with ``num_iter`` belongs (0 stays 0)."""
    return max(1, num_iter - BACKWARD_EXTRA_ITERATIONS) if num_iter > 0 else 0
