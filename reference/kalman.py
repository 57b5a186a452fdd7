r"""Gated KalmaNet as a Kalman filter: the covariance recursion (docs/math.md §1, items 3–8), and why nothing uses it.

With the ridge as a decaying initial term only (H_0 = c I, λ = 0), the read-out weights Φ_t = H_t^{-1} U_t are the mean
of a Kalman filter with covariance P_t = H_t^{-1}, and obey the recursive least squares recursion, with f = e^{g_t}:

    gain_t = P_{t-1} k_t / (f/β_t² + k_tᵀ P_{t-1} k_t)
    Φ_t = Φ_{t-1} + gain_t (v_t − Φ_{t-1}ᵀ k_t)ᵀ,     P_t = (P_{t-1} − gain_t k_tᵀ P_{t-1}) / f

It needs no solve, which is why it looks attractive. The library carries H and U instead and solves for every token:

* P_t is a difference of nearly equal positive definite matrices, then multiplied by 1/f > 1, so rounding errors grow
  like f^{-t}; nothing keeps P symmetric or positive definite. H and U are a contraction: their errors are multiplied by
  f ≤ 1.
* Directions that no key excites grow like f^{-t} in P as well (wind-up), so its condition number is unbounded. That of
  H_t + λ_t I is at most (1+ρ)/ρ, ρ = λ_t/‖H_t‖_F, whatever the data.
* A ridge tied to ‖H_t‖_F changes at every step by a full-rank amount, which no rank-one update can follow.

Measured in ``tests/numerics/test_kalman.py``: on keys that span 8 of 32 dimensions, P loses
definiteness after about 200 tokens in bf16, while H in fp32 stays accurate to fp32 rounding for all of 900.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class KalmanState(NamedTuple):
    """What the recursion carries, in the dtype it runs in.

    Attributes:
        covariance: P_t [..., D, D]; symmetric positive definite in exact arithmetic.
        weights: Φ_t [..., D, V].
    """

    covariance: Tensor
    weights: Tensor


def kalman_step(
    state: KalmanState, k: Tensor, v: Tensor, log_decay: Tensor | None = None, beta: Tensor | None = None
) -> KalmanState:
    """One token of the recursion, in the dtype of ``state``; every operation rounds to that dtype.

    Args:
        state: P_{t-1} [..., D, D] and Φ_{t-1} [..., D, V].
        k: key k̂_t [..., D], before its weight β.
        v: value [..., V], before its weight β.
        log_decay: natural logarithm of the decay [...], ≤ 0; ``None`` is 0.
        beta: β_t [...], the observation of the token has noise of variance 1/β²; ``None`` is 1.
    """
    covariance, weights = state
    k, v = k.to(covariance.dtype), v.to(covariance.dtype)
    one = torch.ones_like(k[..., 0])
    decay = one if log_decay is None else log_decay.exp().to(covariance.dtype)
    precision = one if beta is None else beta.to(covariance.dtype).square()
    pk = (covariance @ k.unsqueeze(-1)).squeeze(-1)
    innovation = v - (weights.mT @ k.unsqueeze(-1)).squeeze(-1)
    variance = (k * pk).sum(-1)
    gain = pk * (precision / (decay + precision * variance)).unsqueeze(
        -1
    )  # defined for β = 0 too: the token is ignored
    kp = (k.unsqueeze(-2) @ covariance).squeeze(
        -2
    )  # kᵀP rather than (Pk)ᵀ: P is not symmetric once it has been rounded
    return KalmanState(
        covariance=(covariance - gain.unsqueeze(-1) * kp.unsqueeze(-2)) / decay[..., None, None],
        weights=weights + gain.unsqueeze(-1) * innovation.unsqueeze(-2),
    )


def kalman_filter(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    initial_precision: float,
    dtype: torch.dtype,
) -> KalmanState:
    """Runs the recursion over a sequence from H_0 = c I, U_0 = 0 and returns the state after every token.

    Args:
        k: keys k̂ [B, T, H, D], before their weights β.
        v: values [B, T, H, V], before their weights β.
        log_decay: natural logarithm of the decay [B, T, H], ≤ 0; ``None`` is no decay.
        beta: β [B, T, H]; ``None`` is 1.
        initial_precision: c > 0, so that P_0 = I/c. It decays with the rest: it is no ridge after 1/(1−f) tokens.
        dtype: dtype of the whole recursion; inputs are rounded to it.

    Returns:
        P [B, T, H, D, D] and Φ [B, T, H, D, V]: the read-out of query q is Φ_tᵀ q_t (times the scale of the layer).

    Raises:
        ValueError: ``initial_precision`` is not > 0.
    """
    if not initial_precision > 0:
        raise ValueError(f"kalman_filter: expected initial_precision > 0, got {initial_precision!r}")
    B, T, H, D = k.shape
    identity = torch.eye(D, dtype=dtype, device=k.device)
    state = KalmanState(
        covariance=(identity / initial_precision).expand(B, H, D, D),
        weights=k.new_zeros(B, H, D, v.shape[-1], dtype=dtype),
    )
    covariance = k.new_empty(B, T, H, D, D, dtype=dtype)
    weights = k.new_empty(B, T, H, D, v.shape[-1], dtype=dtype)
    for t in range(T):
        state = kalman_step(
            state,
            k[:, t],
            v[:, t],
            None if log_decay is None else log_decay[:, t],
            None if beta is None else beta[:, t],
        )
        covariance[:, t], weights[:, t] = state
    return KalmanState(covariance, weights)
