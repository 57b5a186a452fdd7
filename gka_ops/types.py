"""The named tuples of the public surface. They are pytrees, so they pass through ``torch.compile`` as they are."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

from torch import Tensor

from gka_ops.numerics import DEFAULT_RIDGE

Impl: TypeAlias = Literal["auto", "triton", "reference"]
"""Which implementation runs: ``"auto"`` picks, an explicit one never falls back silently."""

IMPLS: tuple[str, ...] = ("auto", "triton", "reference")


class Ridge(NamedTuple):
    """Ridge strength λ_t = scale_t·‖H_t‖_F + offset_t (MATH.md §1).

    Attributes:
        scale: r, a float ≥ 0 or a tensor of shape [H] or [B, T, H] with gradients; dimensionless.
        offset: b, a float ≥ 0 or a tensor of shape [H] or [B, T, H] with gradients; in the units of ‖H‖_F.
        min_scale: a lower bound of a tensor ``scale``, from which ``num_iter="auto"`` takes its count (reading the
            minimum off the device would stop the GPU and break a compiled graph). Ignored for a float ``scale``.
    """

    scale: float | Tensor = DEFAULT_RIDGE
    offset: float | Tensor = 0.0
    min_scale: float | None = None


class DecayGate(NamedTuple):
    """Parameters of the Mamba-2 style decay gate: log decay = −exp(A_log)·softplus(a + dt_bias).

    Attributes:
        A_log: [H], natural logarithm of the decay rate.
        dt_bias: [H], added to the raw projection ``a`` before the softplus; ``None`` means zero.
    """

    A_log: Tensor
    dt_bias: Tensor | None = None


class GKAState(NamedTuple):
    """What GKA remembers of a sequence, per query head, in fp32 (fp64 for fp64 inputs).

    Attributes:
        kk: H_t [N, H, D, D], the decayed Σ k kᵀ; symmetric positive semidefinite.
        kv: U_t [N, H, D, V], the decayed Σ k vᵀ.
    """

    kk: Tensor
    kv: Tensor


class GKAOutput(NamedTuple):
    """Result of :func:`gka_ops.chunk_gka`: ``output`` [B, T, H, V] and, if asked for, the state after the end."""

    output: Tensor
    final_state: GKAState | None


class ChunkSolveOutput(NamedTuple):
    """Result of :func:`gka_ops.chunk_solve`: ``x`` [B, T, H, D] in at least fp32, and H after the end if asked for."""

    x: Tensor
    final_state: Tensor | None
