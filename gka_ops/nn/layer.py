"""``GatedKalmaNet``: the sequence-mixing layer around :func:`gka_ops.chunk_gka`."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from gka_ops.api import chunk_gka, recurrent_gka
from gka_ops.nn.cache import BUFFERS, GatedKalmaNetCache, Slots, read_slots, write_slots
from gka_ops.nn.conv import Packing, ShortConvolution, next_tail
from gka_ops.nn.norm import GatedRMSNorm
from gka_ops.numerics import BETA_EPS, DEFAULT_RIDGE, DEFAULT_TOL
from gka_ops.types import DecayGate, GKAState, Impl, Ridge
from gka_ops.validation import check_flag, check_impl, check_tensor, resolve_num_iter

A_RANGE = (2.0**-10, 16.0)
"""Initial decay rates exp(A_log) are uniform in it: Mamba-2's (0, 16) kept away from log 0; per unit of time step."""

DT_RANGE = (1e-3, 0.1)
"""Initial time steps softplus(dt_bias) are log-uniform in it."""

NO_DECAY = -1e4
"""A raw decay projection whose softplus is 0 in every dtype, whatever the bias: the state keeps all it has."""

Projections: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""What the convolutions of q, k and v read: [B, T, heads·size] each."""

Tails: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""What they read before: [N, heads·size, K−1] each."""


class LayerOperands(NamedTuple):
    """What the layer hands to the operator for an input [B, T, hidden]: arguments of ``chunk_gka``.

    Attributes:
        q: [B, T, H, D].
        k: [B, T, Hkv, D].
        v: [B, T, Hkv, V].
        log_decay: [B, T, H], the raw decay projection (the operator applies the gate); ``None`` without decay.
        alpha: [B, T, H] in (0, 1), at least fp32; ``None`` for 1.
        beta: [B, T, H] in (0, 1 + ε), at least fp32; ``None`` for 1.
        ridge: the layer's, or a :class:`gka_ops.Ridge` with one scale a token and head.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    alpha: Tensor | None
    beta: Tensor | None
    ridge: float | Ridge


class DraftTokens(NamedTuple):
    """What :meth:`GatedKalmaNet.accept` needs of the T tokens a sequence that :meth:`GatedKalmaNet.verify` read.

    Attributes:
        projections: what the convolutions read.
        operands: what they made of it.
    """

    projections: Projections
    operands: LayerOperands


class GatedKalmaNet(nn.Module):
    r"""Gated KalmaNet layer (arXiv 2511.21016): a token mixer with a fixed-size memory that answers ridge regressions.

        q, k, v = SiLU(conv(q_proj x)), SiLU(conv(k_proj x)), SiLU(conv(v_proj x)),   q and k divided by their ℓ2 norms
        g = −exp(A_log)·softplus(a_proj x + dt_bias),   α = sigmoid(alpha_proj x),   β = sigmoid(b_proj x) + 1e-6
        y = o_proj( RMSNorm(chunk_gka(q, k, v, g, α, β)) · o_norm.weight · SiLU(g_proj x) )

    Parameters carry the names and shapes of the published checkpoints, whose layers make 30 iterations
    (``num_iter=30``). Everything between projection and normalisation runs in one operator, without a graph break and
    without a compilation per sequence length.

    There are H = max(query, key, value heads) states, gates and outputs; head h reads query head h // (H / Hq), and
    likewise keys and values. Fewer key/value heads than H cost nothing; other combinations repeat what is fewer.

    One difference to the published layer remains, below the resolution of 16-bit inputs: it divides q and k by ‖·‖ + ε,
    and the operator by max(‖·‖, ε), ε = 1e-6 (MATH.md §1), a relative difference of at most ε/‖·‖. That of q cancels in
    the RMSNorm, but for its own ε.

    Args:
        hidden_size: width of input and output.
        head_dim: key dimension D of a head; one of 16 to 256 for the Triton kernels.
        num_heads: query heads Hq.
        num_kv_heads: key heads Hk, and value heads; ``None`` means Hq.
        num_v_heads: value heads Hv, if not as many as keys.
        head_v_dim: value dimension V of a head; ``None`` means D.
        conv_size: taps K of the short convolutions.
        use_v_conv: convolve values; without it they are ``v_proj x``, without a SiLU.
        use_forgetting_gate: decay the state; without it g = 0, and there are no ``a_proj``, ``A_log`` and ``dt_bias``.
        use_beta_gate: weigh tokens by β; without it β = 1, and there is no ``b_proj``.
        use_alpha_connection: mix the solved query with the query by α; without it α = 1, the solved query alone, and
            there is no ``alpha_proj``.
        use_output_gate: multiply by SiLU(g_proj x); without it there is no ``g_proj``.
        ridge: ridge scale r of λ_t = r·‖H_t‖_F.
        ridge_range: bounds (r_min, r_max) of a ridge scale learned per token and head,
            r_t = r_min·(r_max/r_min)^sigmoid(ridge_proj x), which is ``ridge`` at first; ``None`` for a constant one.
        num_iter: Chebyshev iterations of the solve, ``"auto"`` to take them from ``tol`` and the smallest ridge scale,
            0 for gated linear attention (then ``alpha_proj`` and ``ridge_proj`` have no effect and zero gradients).
        tol: relative truncation error of the solve that ``num_iter="auto"`` guarantees.
        norm_eps: ε of the output RMSNorm.
        save_x: whether the operator keeps what its backward needs of the solve, as in :func:`gka_ops.chunk_gka`.
        impl: implementation of the operator, as in :func:`gka_ops.chunk_gka`.
        device: where to create the parameters.
        dtype: dtype of the parameters, except ``A_log`` and ``dt_bias``, which are created in at least fp32.

    Raises:
        ValueError: a size is not positive, a number of heads does not divide H, or a scalar is out of range.
    """

    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        num_v_heads: int | None = None,
        head_v_dim: int | None = None,
        conv_size: int = 4,
        use_v_conv: bool = True,
        use_forgetting_gate: bool = True,
        use_beta_gate: bool = True,
        use_alpha_connection: bool = True,
        use_output_gate: bool = True,
        ridge: float = DEFAULT_RIDGE,
        ridge_range: tuple[float, float] | None = None,
        num_iter: int | Literal["auto"] = "auto",
        tol: float = DEFAULT_TOL,
        norm_eps: float = 1e-6,
        save_x: bool = True,
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        num_v_heads = num_kv_heads if num_v_heads is None else num_v_heads
        head_v_dim = head_dim if head_v_dim is None else head_v_dim
        heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "num_v_heads": num_v_heads}
        sizes = {"hidden_size": hidden_size, "head_dim": head_dim, "head_v_dim": head_v_dim, "conv_size": conv_size}
        for name, value in (heads | sizes).items():
            if value < 1:
                raise ValueError(f"GatedKalmaNet: expected {name} >= 1, got {value}")
        H = max(heads.values())
        for name, value in heads.items():
            if H % value != 0:
                raise ValueError(f"GatedKalmaNet: expected {name} to divide the {H} heads of the state, got {value}")
        if not (ridge >= 0 and math.isfinite(ridge)):
            raise ValueError(f"GatedKalmaNet: expected a finite ridge >= 0, got {ridge}")
        if ridge_range is not None and not 0 < ridge_range[0] < ridge < ridge_range[1] < math.inf:
            raise ValueError(f"GatedKalmaNet: expected a ridge_range around ridge = {ridge}, got {ridge_range}")
        resolve_num_iter("GatedKalmaNet", num_iter, tol, ridge if ridge_range is None else ridge_range[0])
        check_flag("GatedKalmaNet", "save_x", save_x)
        check_impl("GatedKalmaNet", impl)

        self.hidden_size = hidden_size
        self.head_dim = head_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.num_v_heads = num_v_heads
        self.num_state_heads = H
        self.head_v_dim = head_v_dim
        self.conv_size = conv_size
        self.ridge = ridge
        self.ridge_range = ridge_range
        self.num_iter: int | Literal["auto"] = num_iter
        self.tol = tol
        self.save_x = save_x
        self.impl: Impl = impl

        Hq, Hk, Hv, D, V = num_heads, num_kv_heads, num_v_heads, head_dim, head_v_dim
        gate_dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)

        def linear(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)

        def convolution(channels: int) -> ShortConvolution:
            return ShortConvolution(channels, conv_size, device=device, dtype=dtype)

        def per_head() -> nn.Parameter:
            return nn.Parameter(torch.empty(H, device=device, dtype=gate_dtype))

        self.q_proj = linear(hidden_size, Hq * D)
        self.k_proj = linear(hidden_size, Hk * D)
        self.v_proj = linear(hidden_size, Hv * V)
        self.a_proj = linear(hidden_size, H) if use_forgetting_gate else None
        self.b_proj = linear(hidden_size, H, bias=True) if use_beta_gate else None
        self.alpha_proj = linear(hidden_size, H, bias=True) if use_alpha_connection else None
        self.ridge_proj = None if ridge_range is None else linear(hidden_size, H, bias=True)
        self.A_log = per_head() if use_forgetting_gate else None
        self.dt_bias = per_head() if use_forgetting_gate else None
        self.q_conv1d = convolution(Hq * D)
        self.k_conv1d = convolution(Hk * D)
        self.v_conv1d = convolution(Hv * V) if use_v_conv else None
        self.g_proj = linear(hidden_size, H * V) if use_output_gate else None
        self.o_norm = GatedRMSNorm(V, norm_eps, device=device, dtype=dtype)
        self.o_proj = linear(H * V, hidden_size)
        self._reset_gates()

    def reset_parameters(self) -> None:
        """Initialises every parameter anew, for instance after ``to_empty`` on a layer built on the meta device."""
        for child in self.children():
            child.reset_parameters()  # type: ignore[operator]  # every child has one
        self._reset_gates()

    @torch.no_grad()
    def _reset_gates(self) -> None:
        """Mamba-2's initial decay: A uniform in ``A_RANGE``, dt = softplus(dt_bias) log-uniform in ``DT_RANGE``.
        A learned ridge starts as the constant ``ridge``.
        """
        if self.A_log is not None and self.dt_bias is not None:
            self.A_log.uniform_(*A_RANGE).log_()
            dt = torch.empty_like(self.dt_bias).uniform_(*map(math.log, DT_RANGE)).exp_()
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        if self.ridge_proj is not None and self.ridge_range is not None:
            low, high = self.ridge_range
            nn.init.zeros_(self.ridge_proj.weight)
            nn.init.constant_(self.ridge_proj.bias, math.log(math.log(self.ridge / low) / math.log(high / self.ridge)))

    @property
    def gate(self) -> DecayGate | None:
        """The decay gate's parameters, as the operators take them; ``None`` without decay."""
        return None if self.A_log is None else DecayGate(self.A_log, self.dt_bias)

    @property
    def _convolutions(self) -> tuple[ShortConvolution, ShortConvolution, ShortConvolution | None]:
        return self.q_conv1d, self.k_conv1d, self.v_conv1d

    def init_cache(self, num_slots: int, dtype: torch.dtype | None = None) -> GatedKalmaNetCache:
        """A cache of ``num_slots`` sequences at their start, on the device of the layer.

        Args:
            dtype: of the convolution tails; ``None`` means that of ``q_proj.weight``. The state is fp32 in any case
                (fp64 for an fp64 layer).
        """
        weight = self.q_proj.weight
        shapes, state_dtype = self._cache_shapes(num_slots), torch.promote_types(weight.dtype, torch.float32)
        q_tail, k_tail, v_tail = (weight.new_zeros(shape, dtype=dtype) for shape in shapes[:3])
        kk, kv = (weight.new_zeros(shape, dtype=state_dtype) for shape in shapes[3:])
        return GatedKalmaNetCache(q_tail, k_tail, v_tail, GKAState(kk, kv))

    def _cache_shapes(self, num_slots: int) -> tuple[tuple[int, ...], ...]:
        """Of :attr:`GatedKalmaNetCache.buffers`."""
        H, D, V = self.num_state_heads, self.head_dim, self.head_v_dim
        widths = self.num_heads * D, self.num_kv_heads * D, self.num_v_heads * V
        taps = (0 if conv is None else self.conv_size - 1 for conv in self._convolutions)
        tails = ((num_slots, width, K) for width, K in zip(widths, taps, strict=True))
        return *tails, (num_slots, H, D, D), (num_slots, H, D, V)

    def operands(self, x: Tensor, cu_seqlens: Tensor | None = None) -> LayerOperands:
        """The operator's arguments for ``x`` [B, T, hidden_size], from the start of its sequences."""
        packing = None if cu_seqlens is None else Packing.of(cu_seqlens, x.shape[1])
        return self._operands(x, self._project(x), (None, None, None), packing)

    def _project(self, x: Tensor) -> Projections:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def _operands(
        self,
        x: Tensor,
        projections: Projections,
        tails: Tails | tuple[None, None, None],
        packing: Packing | None,
    ) -> LayerOperands:
        q, k, v = (
            y if conv is None else conv(y, tail, packing)
            for conv, y, tail in zip(self._convolutions, projections, tails, strict=True)
        )
        kv_heads = math.lcm(self.num_kv_heads, self.num_v_heads)
        return LayerOperands(
            q=_heads(q, self.num_heads, self.num_state_heads),
            k=_heads(k, self.num_kv_heads, kv_heads),
            v=_heads(v, self.num_v_heads, kv_heads),
            log_decay=None if self.a_proj is None else self.a_proj(x),
            alpha=None if self.alpha_proj is None else _sigmoid(self.alpha_proj(x)),
            beta=None if self.b_proj is None else _sigmoid(self.b_proj(x)) + BETA_EPS,
            ridge=self._ridge(x),
        )

    def _ridge(self, x: Tensor) -> float | Ridge:
        if self.ridge_proj is None or self.ridge_range is None:
            return self.ridge
        low, high = self.ridge_range
        return Ridge(low * torch.exp(math.log(high / low) * _sigmoid(self.ridge_proj(x))), min_scale=low)

    def _chunk(
        self, operands: LayerOperands, state: GKAState | None, output_final_state: bool, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, GKAState | None]:
        return chunk_gka(
            *operands[:6],
            ridge=operands.ridge,
            num_iter=self.num_iter,
            tol=self.tol,
            qk_l2norm=True,
            gate=self.gate,
            initial_state=state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
            save_x=self.save_x,
            impl=self.impl,
        )

    def _read_out(self, o: Tensor, x: Tensor) -> Tensor:
        gate = None if self.g_proj is None else self.g_proj(x).unflatten(-1, (self.num_state_heads, self.head_v_dim))
        y: Tensor = self.o_proj(self.o_norm(o, gate).flatten(-2))
        return y

    def forward(
        self,
        x: Tensor,
        cache: GatedKalmaNetCache | None = None,
        cu_seqlens: Tensor | None = None,
        state_indices: Tensor | None = None,
    ) -> Tensor:
        """Mixes tokens.

        Args:
            x: [B, T, hidden_size].
            cache: the sequences to continue; advanced **in place** past the tokens of ``x``. One token a sequence runs
                ``recurrent_gka``, more run ``chunk_gka``: a prompt may come in pieces. For inference only. ``None``
                starts from nothing and keeps nothing.
            cu_seqlens: int32 or int64 [N + 1], boundaries of N sequences packed along T (then B = 1); ``None`` means
                N = B sequences of T tokens.
            state_indices: int32 or int64 [N], the slot of ``cache`` of each sequence; a negative entry marks padding
                (output 0, no slot touched). ``None`` means slot n for sequence n, of N slots. No slot may appear twice.

        Returns:
            [B, T, hidden_size], in the dtype of ``o_proj``.

        Raises:
            ValueError: ``x``, ``cache``, ``cu_seqlens`` or ``state_indices`` has another shape or device than
                documented, or ``state_indices`` comes without ``cache``.
            TypeError: ``state_indices`` has another dtype.
            RuntimeError: ``cache`` is given while gradients are enabled.
        """
        self._check(x, cache, cu_seqlens, state_indices)
        packing = None if cu_seqlens is None else Packing.of(cu_seqlens, x.shape[1])
        projections = self._project(x)
        if cache is None:
            operands = self._operands(x, projections, (None, None, None), packing)
            return self._read_out(self._chunk(operands, None, False, cu_seqlens)[0], x)
        slots = None if state_indices is None else Slots.of(state_indices)
        tails = _tails(cache, slots)
        operands = self._operands(x, projections, tails, packing)
        if packing is None and x.shape[1] == 1:
            o = self._recurrent(operands, cache, state_indices, self.num_iter)
        else:
            o, final_state = self._chunk(operands, _state(cache, slots), True, cu_seqlens)
            assert final_state is not None  # asked for
            for part, final in zip(cache.state, final_state, strict=True):
                write_slots(part, final, slots)
        starts, lengths = (None, None) if packing is None else packing[:2]
        _advance_tails(cache, tails, projections, slots, starts, lengths)
        return _without_padding(self._read_out(o, x), state_indices, packing)

    def _recurrent(
        self,
        operands: LayerOperands,
        cache: GatedKalmaNetCache,
        slots: Tensor | None,
        num_iter: int | Literal["auto"],
    ) -> Tensor:
        return recurrent_gka(
            *operands[:6],
            state=cache.state,
            state_indices=slots,
            ridge=operands.ridge,
            num_iter=num_iter,
            tol=self.tol,
            qk_l2norm=True,
            gate=self.gate,
            impl=self.impl,
        )

    def verify(
        self, x: Tensor, cache: GatedKalmaNetCache, state_indices: Tensor | None = None
    ) -> tuple[Tensor, DraftTokens]:
        """Reads draft tokens of speculative decoding **without** advancing ``cache``; :meth:`accept` does that.

        Args:
            x: [B, T, hidden_size], T draft tokens of every sequence, a few. Where a sequence has fewer, fill up with
                any finite ones: nothing depends on a later token.
            cache: the sequences that they would continue.
            state_indices: as in :meth:`forward`.

        Returns:
            The output of the drafts, [B, T, hidden_size], and what :meth:`accept` needs of them.

        Raises:
            As :meth:`forward`.
        """
        self._check(x, cache, None, state_indices)
        projections = self._project(x)
        slots = None if state_indices is None else Slots.of(state_indices)
        operands = self._operands(x, projections, _tails(cache, slots), None)
        o, _ = self._chunk(operands, _state(cache, slots), False, None)
        y = _without_padding(self._read_out(o, x), state_indices, None)
        return y, DraftTokens(projections, operands)

    def accept(
        self,
        draft: DraftTokens,
        num_accepted: Tensor,
        cache: GatedKalmaNetCache,
        state_indices: Tensor | None = None,
    ) -> None:
        """Advances ``cache`` **in place** past the first accepted tokens of each sequence, as if the others never were.

        Only sums are updated, nothing is solved again. Waits for nothing on the device.

        Args:
            draft: from :meth:`verify` on the same cache and slots.
            num_accepted: int32 or int64 [B], how many of its T tokens each sequence keeps, 0 to T.
            cache: the sequences to advance.
            state_indices: as in :meth:`forward`.

        Raises:
            ValueError: ``num_accepted`` has another shape or device than documented.
            TypeError: ``num_accepted`` has another dtype.
            RuntimeError: gradients are enabled.
        """
        B, T = draft.operands.q.shape[:2]
        _check_no_gradients()
        _check_indices("num_accepted", num_accepted, B, draft.operands.q)
        tokens = torch.arange(T, device=num_accepted.device)
        kept = (tokens < num_accepted[:, None])[..., None]  # [B, T, 1]
        log_decay, beta = draft.operands.log_decay, draft.operands.beta
        if log_decay is not None:
            log_decay = log_decay.masked_fill(~kept, NO_DECAY)
        if beta is None:
            beta = kept.to(cache.state.kk.dtype).expand(draft.operands.q.shape[:3])
        else:
            beta = beta.masked_fill(~kept, 0)
        operands = draft.operands._replace(log_decay=log_decay, beta=beta)
        self._recurrent(operands, cache, state_indices, 0)
        starts = torch.arange(B, device=num_accepted.device) * T
        slots = None if state_indices is None else Slots.of(state_indices)
        _advance_tails(cache, _tails(cache, slots), draft.projections, slots, starts, num_accepted)

    def _check(
        self,
        x: Tensor,
        cache: GatedKalmaNetCache | None,
        cu_seqlens: Tensor | None,
        state_indices: Tensor | None,
    ) -> None:
        if x.ndim != 3 or x.shape[2] != self.hidden_size:
            raise ValueError(f"GatedKalmaNet: expected x of shape [B, T, {self.hidden_size}], got {list(x.shape)}")
        if cu_seqlens is not None and cu_seqlens.ndim != 1:
            raise ValueError(f"GatedKalmaNet: expected cu_seqlens of shape [N + 1], got {list(cu_seqlens.shape)}")
        if cu_seqlens is not None and x.shape[0] != 1:
            raise ValueError(f"GatedKalmaNet: expected a packed batch of size 1 with cu_seqlens, got {x.shape[0]}")
        if cache is None:
            if state_indices is not None:
                raise ValueError("GatedKalmaNet: expected a cache with state_indices, got None")
            return
        _check_no_gradients()
        N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        slots = N
        if state_indices is not None:
            _check_indices("state_indices", state_indices, N, x)
            slots = cache.q_tail.shape[0]
        for name, buffer, shape in zip(BUFFERS, cache.buffers, self._cache_shapes(slots), strict=True):
            if buffer.shape != shape:
                raise ValueError(
                    f"GatedKalmaNet: expected cache.{name} of shape {list(shape)}, got {list(buffer.shape)}"
                )

    def extra_repr(self) -> str:
        return (
            f"{self.hidden_size}, head_dim={self.head_dim}, num_heads={self.num_heads}, "
            f"num_kv_heads={self.num_kv_heads}, num_v_heads={self.num_v_heads}, head_v_dim={self.head_v_dim}, "
            f"conv_size={self.conv_size}, ridge={self.ridge}, ridge_range={self.ridge_range}, "
            f"num_iter={self.num_iter!r}"
        )


def _tails(cache: GatedKalmaNetCache, slots: Slots | None) -> Tails:
    q_tail, k_tail, v_tail = (read_slots(tail, slots) for tail in cache[:3])
    return q_tail, k_tail, v_tail


def _state(cache: GatedKalmaNetCache, slots: Slots | None) -> GKAState:
    return GKAState(*(read_slots(part, slots) for part in cache.state))


def _advance_tails(
    cache: GatedKalmaNetCache,
    tails: Tails,
    projections: Projections,
    slots: Slots | None,
    starts: Tensor | None,
    lengths: Tensor | None,
) -> None:
    for buffer, tail, y in zip(cache[:3], tails, projections, strict=True):
        write_slots(buffer, next_tail(tail, y, starts, lengths), slots)


def _without_padding(y: Tensor, state_indices: Tensor | None, packing: Packing | None) -> Tensor:
    """``y`` [B, T, hidden] with zeros for the tokens of sequences whose slot is negative."""
    if state_indices is None:
        return y
    padding = state_indices < 0
    padding = padding[:, None, None] if packing is None else padding[packing.sequence][:, None]
    return y.masked_fill(padding, 0)


def _check_no_gradients() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "GatedKalmaNet: expected torch.no_grad() or torch.inference_mode() around a call with a cache, which "
            "carries no gradient, got a call with gradients enabled"
        )


def _check_indices(name: str, indices: Tensor, count: int, x: Tensor) -> None:
    check_tensor("GatedKalmaNet", name, indices)
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"GatedKalmaNet: expected {name} to be int32 or int64, got {indices.dtype}")
    if indices.shape != (count,):
        raise ValueError(f"GatedKalmaNet: expected {name} of shape [{count}], got {list(indices.shape)}")
    if indices.device != x.device:
        raise ValueError(f"GatedKalmaNet: expected {name} on {x.device}, got {indices.device}")


def _heads(x: Tensor, count: int, expanded: int) -> Tensor:
    """[B, T, expanded, size] of ``count`` heads [B, T, count·size], each repeated for its group."""
    x = x.unflatten(-1, (count, -1))
    return x if count == expanded else x.repeat_interleave(expanded // count, dim=2)


def _sigmoid(x: Tensor) -> Tensor:
    """Sigmoid in at least fp32: a 16-bit gate near 1 would have lost its distance to 1."""
    return torch.sigmoid(x.to(torch.promote_types(x.dtype, torch.float32)))
