"""The mixers: one layer, and what may stand at its core.

Every variant has the projections, short convolutions, gates, normalisation and output of :class:`gka_ops.GatedKalmaNet`
and differs in its core alone, the map from q, k, v and gates to what heads read out. So all models have the same
parameters, a few of which some cores leave unused: attention all gates, those without a solve α.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gka_ops import DecayGate, Ridge, chunk_gka
from gka_ops.nn import GatedKalmaNet, GatedKalmaNetCache, LayerOperands
from gka_ops.numerics import MIN_LOG_DECAY, NORM_EPS
from gka_ops.reference import conjugate_gradient
from gka_ops.reference.kalman import KalmanState, kalman_step

FIXED_RIDGE = 0.25
"""λ where it does not follow ‖H_t‖: what MesaNet (arXiv 2506.05233) bounds its own from below with."""

MEMORY = (8192.0, 64.0)
"""Tokens after which heads have forgotten to 1/e at first, log-uniform; with the layer's own initial decays, Mamba-2's,
some tens for a few heads."""

CHUNK = {"cpu": 64, "cuda": 512}
"""Tokens whose H_t conjugate gradients solve for at once, by device type: every iteration waits for the device once."""

Core = Callable[[LayerOperands, DecayGate, int], Tensor]
"""(operands, gate, iterations) to [B, T, H, V]."""


class UnavailableError(RuntimeError):
    """A core that is not installed here, or that refuses to run here."""


def chebyshev(operands: LayerOperands, gate: DecayGate, num_iter: int) -> Tensor:
    """The library's."""
    return chunk_gka(*operands[:6], ridge=operands.ridge, num_iter=num_iter, qk_l2norm=True, gate=gate).output


def linear(operands: LayerOperands, gate: DecayGate, num_iter: int) -> Tensor:
    """No solve: gated linear attention, a vanilla SSM."""
    return chebyshev(operands, gate, 0)


def no_gate(operands: LayerOperands, gate: DecayGate, num_iter: int) -> Tensor:
    """Nothing is forgotten."""
    kept = operands._replace(log_decay=None)
    return chunk_gka(*kept[:6], ridge=kept.ridge, num_iter=num_iter, qk_l2norm=True).output


def fixed_ridge(operands: LayerOperands, gate: DecayGate, num_iter: int) -> Tensor:
    """λ = ``FIXED_RIDGE``, whatever ‖H_t‖ is."""
    ridge = Ridge(0.0, FIXED_RIDGE)
    return chunk_gka(*operands[:6], ridge=ridge, num_iter=num_iter, qk_l2norm=True, gate=gate).output


def softmax(operands: LayerOperands, gate: DecayGate, num_iter: int) -> Tensor:
    """Causal attention; the convolutions are its positions."""
    q, k, v = (x.transpose(1, 2) for x in operands[:3])
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def gated_deltanet(operands: LayerOperands, gate: DecayGate, num_iter: int) -> Tensor:
    """Gated DeltaNet's (arXiv 2412.06464), from flash-linear-attention."""
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError as error:
        raise UnavailableError(f"flash-linear-attention: {error}") from None
    q, k, v = operands[:3]
    assert operands.beta is not None
    g, beta = log_decay_of(operands, gate), operands.beta.to(q.dtype)
    output: Tensor = chunk_gated_delta_rule(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0]
    return output


# ------------------------------------------------------------------------------------------------- evaluation only
def log_decay_of(operands: LayerOperands, gate: DecayGate) -> Tensor:
    """g [B, T, H] in at least fp32, as the operator computes it."""
    assert operands.log_decay is not None
    a = _wide(operands.log_decay)
    if gate.dt_bias is not None:
        a = a + gate.dt_bias
    return (-gate.A_log.exp() * torch.logaddexp(a, torch.zeros_like(a))).clamp(min=MIN_LOG_DECAY)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _normalised(x: Tensor) -> Tensor:
    return F.normalize(_wide(x), dim=-1, eps=NORM_EPS)


def _alpha_and_beta(operands: LayerOperands) -> tuple[Tensor, Tensor]:
    assert operands.alpha is not None and operands.beta is not None  # the layer is built with both
    return operands.alpha, operands.beta


def naive_cg(operands: LayerOperands, gate: DecayGate, num_iter: int) -> Tensor:
    """Conjugate gradients in the dtype of q, H_t rounded to it; states, mixing and read-out stay in fp32."""
    dtype = operands.q.dtype
    ridge = operands.ridge
    assert isinstance(ridge, float)
    with torch.autocast(operands.q.device.type, enabled=False):
        q, k, v = _normalised(operands.q), _normalised(operands.k), _wide(operands.v)
        alpha, beta = _alpha_and_beta(operands)
        g = log_decay_of(operands, gate)
        B, T, H, D = q.shape
        kk = q.new_zeros(B, H, D, D)
        solved = []
        chunk = CHUNK[q.device.type]
        for start in range(0, T, chunk):
            part = slice(start, start + chunk)
            weighted = (k[:, part] * beta[:, part, :, None]).transpose(1, 2)  # [B, H, C, D]
            c = g[:, part].transpose(1, 2).cumsum(-1)  # [B, H, C]
            pair = (c[..., :, None] - c[..., None, :]).tril().exp().tril()
            outer = (weighted[..., :, None] * weighted[..., None, :]).flatten(-2)  # [B, H, C, D²]
            every = (pair @ outer).unflatten(-1, (D, D)) + c.exp()[..., None, None] * kk[:, :, None]
            kk = every[:, :, -1]
            x = conjugate_gradient.solve(every, q[:, part].transpose(1, 2), ridge, num_iter=num_iter, dtype=dtype)
            solved.append(_wide(x.solution).transpose(1, 2))
        x = torch.cat(solved, 1)
        m = q + alpha[..., None] * (x - q)
        return chunk_gka(m, k, v, g, None, beta, num_iter=0).output.to(dtype)


def kalman(operands: LayerOperands, gate: DecayGate, num_iter: int) -> Tensor:
    """The Kalman filter's covariance recursion in the dtype of q, from P_0 = I / ``FIXED_RIDGE``; token by token.

    It has no ridge that follows ‖H_t‖: in fp32 it shows what that costs, in bf16 what the recursion's rounding does.
    """
    dtype = operands.q.dtype
    with torch.autocast(operands.q.device.type, enabled=False):
        q, k, v = _normalised(operands.q), _normalised(operands.k), _wide(operands.v)
        alpha, beta = _alpha_and_beta(operands)
        g = log_decay_of(operands, gate)
        B, T, H, D = q.shape
        eye = torch.eye(D, dtype=dtype, device=q.device) / FIXED_RIDGE
        state = KalmanState(eye.expand(B, H, D, D), q.new_zeros(B, H, D, v.shape[-1], dtype=dtype))
        read = []
        for t in range(T):
            state = kalman_step(state, k[:, t], v[:, t], g[:, t], beta[:, t])
            read.append((q[:, t, :, None].to(dtype) @ state.weights).squeeze(-2))
        filtered = _wide(torch.stack(read, 1)) * D**-0.5
        plain = chunk_gka(q, k, v, g, None, beta, num_iter=0).output
        return (plain + alpha[..., None] * (filtered - plain)).to(dtype)


# ------------------------------------------------------------------------------------------------------------- tables
@dataclass(frozen=True)
class Variant:
    """What is trained.

    Attributes:
        label: in tables.
        core: of its mixers.
        peer: whether the core is another library's, whose refusal to run is a result.
    """

    label: str
    core: Core
    peer: bool = False


VARIANTS: dict[str, Variant] = {
    "gka": Variant("GKA", chebyshev),
    "linear": Variant("num_iter=0 (vanilla SSM)", linear),
    "softmax": Variant("softmax attention", softmax),
    "gated_deltanet": Variant("Gated DeltaNet", gated_deltanet, peer=True),
    "no_gate": Variant("GKA, no forgetting gate", no_gate),
    "fixed_ridge": Variant(f"GKA, fixed ridge {FIXED_RIDGE}", fixed_ridge),
}

SOLVERS: dict[str, Core] = {"chebyshev": chebyshev, "cg": naive_cg, "kalman": kalman}
"""What a trained GKA model is evaluated with."""


class StudiedMixer(GatedKalmaNet):
    """:class:`GatedKalmaNet`, all of whose parts are used, with an exchangeable core."""

    def __init__(self, hidden_size: int, head_dim: int, num_heads: int, core: Core, num_iter: int) -> None:
        super().__init__(hidden_size, head_dim, num_heads, num_iter=num_iter)
        self.core = core
        assert self.A_log is not None and self.dt_bias is not None and self.a_proj is not None
        with torch.no_grad():
            rate = torch.empty_like(self.dt_bias).uniform_(*(-math.log(tokens) for tokens in MEMORY)).exp()
            self.A_log.zero_()
            self.dt_bias.copy_(rate.expm1().log())  # the inverse of softplus

    def forward(
        self,
        x: Tensor,
        cache: GatedKalmaNetCache | None = None,
        cu_seqlens: Tensor | None = None,
        state_indices: Tensor | None = None,
    ) -> Tensor:
        """[B, T, hidden_size] to the same; neither caches nor packed sequences.

        Raises:
            ValueError: there is a cache or packing.
        """
        if cache is not None or cu_seqlens is not None or state_indices is not None:
            raise ValueError("StudiedMixer: expected whole sequences without cache and packing, got one of them")
        gate, num_iter = self.gate, self.num_iter
        assert gate is not None and isinstance(num_iter, int) and self.g_proj is not None
        o = self.core(self.operands(x), gate, num_iter)
        y: Tensor = self.o_proj(self.o_norm(o, self.g_proj(x).unflatten(-1, o.shape[-2:])).flatten(-2))
        return y
