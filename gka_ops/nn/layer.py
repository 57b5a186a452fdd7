"""``GatedKalmaNet``: the sequence-mixing layer around :func:`gka_ops.chunk_gka`."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from gka_ops.api import chunk_gka, recurrent_gka
from gka_ops.nn.cache import GatedKalmaNetCache
from gka_ops.nn.conv import Packing, ShortConvolution
from gka_ops.nn.norm import GatedRMSNorm
from gka_ops.numerics import DEFAULT_RIDGE, DEFAULT_TOL
from gka_ops.types import DecayGate, GKAState, Impl
from gka_ops.validation import check_impl, resolve_num_iter

A_RANGE = (2.0**-10, 16.0)
"""Initial decay rates exp(A_log) are uniform in it: Mamba-2's (0, 16) kept away from log 0; per unit of time step."""

DT_RANGE = (1e-3, 0.1)
"""Initial time steps softplus(dt_bias) are log-uniform in it."""


class LayerOperands(NamedTuple):
    """What the layer hands to the operator for an input [B, T, hidden]: the first six arguments of ``chunk_gka``.

    Attributes:
        q: [B, T, H, D].
        k: [B, T, Hkv, D].
        v: [B, T, Hkv, V].
        log_decay: [B, T, H], the raw decay projection (the operator applies the gate).
        alpha: [B, T, H] in (0, 1), at least fp32.
        beta: [B, T, H] in (0, 1), at least fp32.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    alpha: Tensor
    beta: Tensor


class GatedKalmaNet(nn.Module):
    r"""Gated KalmaNet layer (arXiv 2511.21016): a token mixer with a fixed-size memory that answers ridge regressions.

        q, k, v = SiLU(conv(q_proj x)), SiLU(conv(k_proj x)), SiLU(conv(v_proj x)),   q and k divided by their ℓ2 norms
        g = −exp(A_log)·softplus(a_proj x + dt_bias),   α = sigmoid(alpha_proj x),   β = sigmoid(b_proj x)
        y = o_proj( RMSNorm(chunk_gka(q, k, v, g, α, β)) · o_norm.weight · SiLU(g_proj x) )

    Parameters carry the names of the published checkpoints. Everything between projection and normalisation runs in one
    operator, without a graph break and without a compilation per sequence length.

    Args:
        hidden_size: width of input and output.
        head_dim: key dimension D of a head; one of 16 to 256 for the Triton kernels.
        num_heads: query heads H. Gates and states exist per query head.
        num_kv_heads: key/value heads Hkv, a divisor of H; ``None`` means H.
        head_v_dim: value dimension V of a head; ``None`` means D.
        conv_size: taps K of the short convolutions.
        ridge: ridge scale r of λ_t = r·‖H_t‖_F.
        num_iter: Chebyshev iterations of the solve, ``"auto"`` to take them from ``tol``, 0 for gated linear attention
            (then ``alpha_proj`` has no effect and a zero gradient).
        tol: relative truncation error of the solve that ``num_iter="auto"`` guarantees.
        norm_eps: ε of the output RMSNorm.
        impl: implementation of the operator, as in :func:`gka_ops.chunk_gka`.
        device: where to create the parameters.
        dtype: dtype of the parameters, except ``A_log`` and ``dt_bias``, which are created in at least fp32.

    Raises:
        ValueError: a size is not positive, ``num_kv_heads`` does not divide ``num_heads``, or a scalar is out of range.
    """

    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        head_v_dim: int | None = None,
        conv_size: int = 4,
        ridge: float = DEFAULT_RIDGE,
        num_iter: int | Literal["auto"] = "auto",
        tol: float = DEFAULT_TOL,
        norm_eps: float = 1e-5,
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        head_v_dim = head_dim if head_v_dim is None else head_v_dim
        sizes = {
            "hidden_size": hidden_size,
            "head_dim": head_dim,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_v_dim": head_v_dim,
            "conv_size": conv_size,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"GatedKalmaNet: expected {name} >= 1, got {value}")
        if num_heads % num_kv_heads != 0:
            raise ValueError(
                f"GatedKalmaNet: expected num_kv_heads to divide num_heads = {num_heads}, got {num_kv_heads}"
            )
        if not (ridge >= 0 and math.isfinite(ridge)):
            raise ValueError(f"GatedKalmaNet: expected a finite ridge >= 0, got {ridge}")
        resolve_num_iter("GatedKalmaNet", num_iter, tol, ridge)
        check_impl("GatedKalmaNet", impl)

        self.hidden_size = hidden_size
        self.head_dim = head_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_v_dim = head_v_dim
        self.conv_size = conv_size
        self.ridge = ridge
        self.num_iter: int | Literal["auto"] = num_iter
        self.tol = tol
        self.impl: Impl = impl

        H, Hkv, D, V = num_heads, num_kv_heads, head_dim, head_v_dim
        gate_dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)

        def linear(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)

        self.q_proj = linear(hidden_size, H * D)
        self.k_proj = linear(hidden_size, Hkv * D)
        self.v_proj = linear(hidden_size, Hkv * V)
        self.a_proj = linear(hidden_size, H)
        self.b_proj = linear(hidden_size, H, bias=True)
        self.alpha_proj = linear(hidden_size, H, bias=True)
        self.A_log = nn.Parameter(torch.empty(H, device=device, dtype=gate_dtype))
        self.dt_bias = nn.Parameter(torch.empty(H, device=device, dtype=gate_dtype))
        self.q_conv1d = ShortConvolution(H * D, conv_size, device=device, dtype=dtype)
        self.k_conv1d = ShortConvolution(Hkv * D, conv_size, device=device, dtype=dtype)
        self.v_conv1d = ShortConvolution(Hkv * V, conv_size, device=device, dtype=dtype)
        self.g_proj = linear(hidden_size, H * V)
        self.o_norm = GatedRMSNorm(V, norm_eps, device=device, dtype=dtype)
        self.o_proj = linear(H * V, hidden_size)
        self._reset_gate()

    def reset_parameters(self) -> None:
        """Initialises every parameter anew, for instance after ``to_empty`` on a layer built on the meta device."""
        for child in self.children():
            child.reset_parameters()  # type: ignore[operator]  # every child has one
        self._reset_gate()

    @torch.no_grad()
    def _reset_gate(self) -> None:
        """Mamba-2's initial decay: A uniform in ``A_RANGE``, dt = softplus(dt_bias) log-uniform in ``DT_RANGE``."""
        self.A_log.uniform_(*A_RANGE).log_()
        dt = torch.empty_like(self.dt_bias).uniform_(*map(math.log, DT_RANGE)).exp_()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    @property
    def gate(self) -> DecayGate:
        """The decay gate's parameters, as the operators take them."""
        return DecayGate(self.A_log, self.dt_bias)

    def init_cache(self, batch_size: int, dtype: torch.dtype | None = None) -> GatedKalmaNetCache:
        """A cache at the start of ``batch_size`` sequences, on the device of the layer.

        Args:
            dtype: of the convolution tails; ``None`` means that of ``q_proj.weight``. The state is fp32 in any case
                (fp64 for an fp64 layer).
        """
        weight = self.q_proj.weight
        H, Hkv, D, V = self.num_heads, self.num_kv_heads, self.head_dim, self.head_v_dim
        q_tail, k_tail, v_tail = (
            weight.new_zeros(batch_size, channels, self.conv_size - 1, dtype=dtype)
            for channels in (H * D, Hkv * D, Hkv * V)
        )
        state_dtype = torch.promote_types(weight.dtype, torch.float32)
        kk = weight.new_zeros(batch_size, H, D, D, dtype=state_dtype)
        kv = weight.new_zeros(batch_size, H, D, V, dtype=state_dtype)
        return GatedKalmaNetCache(q_tail, k_tail, v_tail, GKAState(kk, kv))

    def operands(
        self, x: Tensor, cache: GatedKalmaNetCache | None = None, cu_seqlens: Tensor | None = None
    ) -> LayerOperands:
        """The operator's arguments for ``x`` [B, T, hidden_size]; advances the tails of ``cache`` in place."""
        packing = None if cu_seqlens is None else Packing.of(cu_seqlens, x.shape[1])
        q_tail, k_tail, v_tail = (None, None, None) if cache is None else cache[:3]
        q = self.q_conv1d(self.q_proj(x), q_tail, packing).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.k_conv1d(self.k_proj(x), k_tail, packing).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_conv1d(self.v_proj(x), v_tail, packing).unflatten(-1, (self.num_kv_heads, self.head_v_dim))
        return LayerOperands(q, k, v, self.a_proj(x), _sigmoid(self.alpha_proj(x)), _sigmoid(self.b_proj(x)))

    def forward(self, x: Tensor, cache: GatedKalmaNetCache | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mixes tokens.

        Args:
            x: [B, T, hidden_size].
            cache: the sequences to continue; advanced **in place** past the tokens of ``x``. One token a sequence runs
                ``recurrent_gka``, more run ``chunk_gka``. For inference only. ``None`` starts from nothing and keeps
                nothing.
            cu_seqlens: int32 or int64 [N + 1], boundaries of N sequences packed along T (then B = 1, and a cache has N
                rows).

        Returns:
            [B, T, hidden_size], in the dtype of ``o_proj``.

        Raises:
            ValueError: ``x`` or ``cache`` has another shape than documented.
            RuntimeError: ``cache`` is given while gradients are enabled.
        """
        self._check(x, cache, cu_seqlens)
        operands = self.operands(x, cache, cu_seqlens)
        if cache is not None and cu_seqlens is None and x.shape[1] == 1:
            o = recurrent_gka(
                *operands,
                state=cache.state,
                ridge=self.ridge,
                num_iter=self.num_iter,
                tol=self.tol,
                qk_l2norm=True,
                gate=self.gate,
                impl=self.impl,
            )
        else:
            o, final_state = chunk_gka(
                *operands,
                ridge=self.ridge,
                num_iter=self.num_iter,
                tol=self.tol,
                qk_l2norm=True,
                gate=self.gate,
                initial_state=None if cache is None else cache.state,
                output_final_state=cache is not None,
                cu_seqlens=cu_seqlens,
                impl=self.impl,
            )
            if cache is not None and final_state is not None:
                cache.state.kk.copy_(final_state.kk)
                cache.state.kv.copy_(final_state.kv)
        gate = self.g_proj(x).unflatten(-1, (self.num_heads, self.head_v_dim))
        y: Tensor = self.o_proj(self.o_norm(o, gate).flatten(-2))
        return y

    def _check(self, x: Tensor, cache: GatedKalmaNetCache | None, cu_seqlens: Tensor | None) -> None:
        if x.ndim != 3 or x.shape[2] != self.hidden_size:
            raise ValueError(f"GatedKalmaNet: expected x of shape [B, T, {self.hidden_size}], got {list(x.shape)}")
        if cu_seqlens is not None and cu_seqlens.ndim != 1:
            raise ValueError(f"GatedKalmaNet: expected cu_seqlens of shape [N + 1], got {list(cu_seqlens.shape)}")
        if cu_seqlens is not None and x.shape[0] != 1:
            raise ValueError(f"GatedKalmaNet: expected a packed batch of size 1 with cu_seqlens, got {x.shape[0]}")
        if cache is None:
            return
        if torch.is_grad_enabled():
            raise RuntimeError(
                "GatedKalmaNet: expected torch.no_grad() or torch.inference_mode() around a call with a cache, which "
                "carries no gradient, got a call with gradients enabled"
            )
        N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        for name, channels in (
            ("q_tail", self.q_conv1d.channels),
            ("k_tail", self.k_conv1d.channels),
            ("v_tail", self.v_conv1d.channels),
        ):
            shape, expected = list(getattr(cache, name).shape), [N, channels, self.conv_size - 1]
            if shape != expected:
                raise ValueError(f"GatedKalmaNet: expected cache.{name} of shape {expected}, got {shape}")

    def extra_repr(self) -> str:
        return (
            f"{self.hidden_size}, head_dim={self.head_dim}, num_heads={self.num_heads}, "
            f"num_kv_heads={self.num_kv_heads}, head_v_dim={self.head_v_dim}, conv_size={self.conv_size}, "
            f"ridge={self.ridge}, num_iter={self.num_iter!r}"
        )


def _sigmoid(x: Tensor) -> Tensor:
    """Sigmoid in at least fp32: a 16-bit gate near 1 would have lost its distance to 1."""
    return torch.sigmoid(x.to(torch.promote_types(x.dtype, torch.float32)))
