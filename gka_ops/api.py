"""The functions users call. Each validates its arguments, then calls one registered operator.

Shapes use B batch, T tokens, H query heads, Hkv key/value heads (Hkv divides H; query head h reads key/value head
h // (H / Hkv)), D key dimension, V value dimension, N sequences. Equation numbers are those of ``docs/math.md``.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from gka_ops import kernel_options as options
from gka_ops import modifiers, ops  # registers torch.ops.gka
from gka_ops import validation as check
from gka_ops.kernel_options import KernelOptions
from gka_ops.modifiers import Mod
from gka_ops.numerics import DEFAULT_RIDGE, DEFAULT_TOL
from gka_ops.recall import Recall, Replay
from gka_ops.types import ChunkSolveOutput, DecayGate, GKAOutput, GKAState, Impl, Ridge


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


# NOTE [Known calls]
# What the checks say follows from the arguments' types, from the tensors' metadata and from the values of the others.
# So a call like one that passed is not checked again, and where nothing speaks against it, it is repeated beside the
# dispatcher (``ops``, NOTE [Beside the dispatcher]). A graph that is being traced is checked every time.
_ATTEMPTS = 8  # to find a replay; a call is recorded when it comes for the first or second time


class _Call:
    """What the checks said of a call, and what repeats calls like it, once that is known."""

    __slots__ = ("attempts", "checked", "replay")

    def __init__(self, checked: Any) -> None:
        self.checked, self.attempts = checked, _ATTEMPTS
        self.replay: Replay | None = None

    def learn(self, op: str, args: tuple[Any, ...], outputs: int, signature: tuple[Any, ...]) -> None:
        """After ``op(*args)``, a call with this signature and so many outputs that have elements: how to repeat it."""
        if self.replay is None and self.attempts > 0 and not ops.watched():
            self.attempts -= 1
            given, recalled = ([id(a) for a in some if isinstance(a, Tensor)] for some in (args, signature))
            if given == recalled:
                self.replay = ops.replay_of(op, args, outputs)


_chunk_gka_calls, _recurrent_gka_calls = Recall(), Recall()


def _recall(
    calls: Recall, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, alpha: Tensor | None,
    beta: Tensor | None, ridge: float | Ridge, gate: DecayGate | None, state: GKAState | None,
    sequences: Tensor | None, *others: Any,
) -> tuple[tuple[Any, ...], _Call | None, list[Tensor] | None]:  # fmt: skip
    """A call's signature, what is known of like calls, and its outputs where that was enough to make it."""
    scale, offset, least = ridge if type(ridge) is Ridge else (ridge, None, None)
    A_log, dt_bias = gate if type(gate) is DecayGate else (gate, None)
    kk, kv = state if type(state) is GKAState else (state, None)
    signature = (  # tensors in the operators' order
        q, k, v, log_decay, alpha, beta, scale, offset, A_log, dt_bias, kk, kv, sequences,
        least, type(ridge), type(gate), type(state), torch.is_grad_enabled(), *others,
    )  # fmt: skip
    found = calls.find(signature)
    if found is None:
        return signature, None, None
    call, tensors = found
    return signature, call, None if call.replay is None or ops.watched() else call.replay(tensors)


def _ridge_tensors(ridge: float | Ridge) -> tuple[Tensor | None, Tensor | None]:
    if type(ridge) is float or not isinstance(ridge, Ridge):
        return None, None
    scale, offset, _ = ridge
    return scale if isinstance(scale, Tensor) else None, offset if isinstance(offset, Tensor) else None


def _with_mods(
    op: str, q: Tensor, k: Tensor, v: Tensor | None, log_decay: Tensor | None, gate: DecayGate | None,
    decay_mod: Mod | None, query_mod: Mod | None, key_mod: Mod | None,
) -> tuple[Tensor, Tensor, Tensor | None, DecayGate | None]:  # fmt: skip
    """q, k, the log decay and the gate that is still to be applied to it, as the modifiers want them."""
    check.check_qkv(op, q, k, v)
    check.check_per_token(op, "log_decay", log_decay, q)
    A_log, dt_bias = check.check_gate(op, gate, log_decay, q)
    if decay_mod is not None:
        dtype = torch.promote_types(q.dtype, torch.float32)
        g = q.new_zeros(q.shape[:3], dtype=dtype) if log_decay is None else log_decay.to(dtype)
        if A_log is not None:
            g = -A_log.exp() * torch.nn.functional.softplus(g if dt_bias is None else g + dt_bias)
        log_decay, gate = modifiers.apply_mod(op, "decay_mod", decay_mod, g), None
    if query_mod is not None:
        q = modifiers.apply_mod(op, "query_mod", query_mod, q)
    if key_mod is not None:
        k = modifiers.apply_mod(op, "key_mod", key_mod, k)
    return q, k, log_decay, gate


def _ridge_program(op: str, ridge_mod: Mod, ridge: float | Ridge, q: Tensor, count: int) -> tuple[str, Tensor | None]:
    """What the operator is given of a ``ridge_mod``; nothing without a solve."""
    if isinstance(ridge, Ridge):
        raise ValueError(
            f"{op}: expected ridge to be a number where ridge_mod says what λ is, the least λ/‖H‖ that it returns, "
            "got a Ridge"
        )
    return modifiers.ridge_program(op, ridge_mod, q) if count > 0 else ("", None)


def _check_tokens(
    op: str, q: Tensor, k: Tensor, v: Tensor | None, log_decay: Tensor | None, alpha: Tensor | None,
    beta: Tensor | None, gate: DecayGate | None, ridge: float | Ridge, num_iter: int | Literal["auto"], tol: float,
) -> tuple[float, float, Tensor | None, Tensor | None, Tensor | None, Tensor | None, int]:  # fmt: skip
    """What every function checks first. Returns the ridge's floats and tensors, the gate's, and the iteration count."""
    check.check_qkv(op, q, k, v)
    for name, tensor in (("log_decay", log_decay), ("alpha", alpha), ("beta", beta)):
        check.check_per_token(op, name, tensor, q)
    A_log, dt_bias = check.check_gate(op, gate, log_decay, q)
    r, b, r_tensor, b_tensor, smallest = check.check_ridge(op, ridge, q)
    return r, b, r_tensor, b_tensor, A_log, dt_bias, check.resolve_num_iter(op, num_iter, tol, smallest)


def _check_chunk_gka(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, alpha: Tensor | None, beta: Tensor | None,
    ridge: float | Ridge, num_iter: int | Literal["auto"], tol: float, scale: float | None, qk_l2norm: bool,
    gate: DecayGate | None, initial_state: GKAState | None, output_final_state: bool, cu_seqlens: Tensor | None,
    save_x: bool, impl: Impl,
) -> tuple[float, float, int, float, bool]:  # fmt: skip
    """Returns the ridge's floats, the iteration count, the read-out scale, and whether to save for a backward."""
    op = "chunk_gka"
    r, b, r_tensor, b_tensor, A_log, dt_bias, count = _check_tokens(
        op, q, k, v, log_decay, alpha, beta, gate, ridge, num_iter, tol
    )
    check.check_cu_seqlens(op, cu_seqlens, q)
    check.check_flag(op, "qk_l2norm", qk_l2norm)
    check.check_flag(op, "output_final_state", output_final_state)
    check.check_flag(op, "save_x", save_x)
    check.check_backend(op, impl, q)
    kk, kv = check.check_gka_state(op, "initial_state", initial_state, check.num_sequences(q, cu_seqlens), q, v)
    saves = save_x and _needs_grad(q, k, v, log_decay, alpha, beta, r_tensor, b_tensor, A_log, dt_bias, kk, kv)
    return r, b, count, check.resolve_scale(op, scale, q), saves


def _check_recurrent_gka(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, alpha: Tensor | None, beta: Tensor | None,
    state: GKAState, state_indices: Tensor | None, ridge: float | Ridge, num_iter: int | Literal["auto"], tol: float,
    scale: float | None, qk_l2norm: bool, gate: DecayGate | None, impl: Impl,
) -> tuple[float, float, int, float]:  # fmt: skip
    """Returns the ridge's floats, the iteration count and the read-out scale."""
    op = "recurrent_gka"
    r, b, r_tensor, b_tensor, A_log, dt_bias, count = _check_tokens(
        op, q, k, v, log_decay, alpha, beta, gate, ridge, num_iter, tol
    )
    check.check_flag(op, "qk_l2norm", qk_l2norm)
    check.check_backend(op, impl, q)
    check.check_state_indices(op, state_indices, q)
    if state is None:
        raise TypeError(f"{op}: expected state to be a GKAState, got None")
    kk, kv = check.check_gka_state(op, "state", state, None if state_indices is not None else q.shape[0], q, v)
    for name, part in (("state.kk", kk), ("state.kv", kv)):
        check.check_contiguous(op, name, part)
    if _needs_grad(q, k, v, log_decay, alpha, beta, r_tensor, b_tensor, A_log, dt_bias, kk, kv):
        raise RuntimeError(
            f"{op}: expected inputs that require no gradient, or torch.no_grad(): decode is not differentiable"
        )
    return r, b, count, check.resolve_scale(op, scale, q)


def chunk_gka(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    ridge: float | Ridge = DEFAULT_RIDGE,
    num_iter: int | Literal["auto"] = "auto",
    tol: float = DEFAULT_TOL,
    scale: float | None = None,
    qk_l2norm: bool = False,
    gate: DecayGate | None = None,
    initial_state: GKAState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    ridge_mod: Mod | None = None,
    decay_mod: Mod | None = None,
    query_mod: Mod | None = None,
    key_mod: Mod | None = None,
    save_x: bool = True,
    impl: Impl = "auto",
    kernel_options: KernelOptions | None = None,
) -> GKAOutput:
    r"""Gated KalmaNet attention over whole sequences: solve, mix and read out (MATH.md §1–2).

    For every token, with k ← β k and v ← β v:

        H_t = e^{g_t} H_{t-1} + k_t k_tᵀ,   U_t = e^{g_t} U_{t-1} + k_t v_tᵀ,   λ_t = r_t ‖H_t‖_F + b_t
        x_t = (H_t + λ_t I)^{-1} q_t,   m_t = q_t + α_t (x_t − q_t),   o_t = scale · U_tᵀ m_t

    Args:
        q: queries [B, T, H, D]; bf16, fp16 or fp32, or fp64 (reference implementation only). Under ``torch.autocast``
            q, k and v are cast to its dtype (fp64 is not), and nothing else is.
        k: keys [B, T, Hkv, D], the dtype of q.
        v: values [B, T, Hkv, V], the dtype of q.
        log_decay: g [B, T, H], natural logarithm of the decay, ≤ 0; ``None`` means no decay. With ``gate`` it holds the
            raw projection instead. Values below −120 act as −120 (e^-120 is 0 in fp32).
        alpha: α [B, T, H] in [0, 1], how much of the solved query is used; ``None`` means 1.
        beta: β [B, T, H] in [0, 1], the weight of a token's key and value; ``None`` means 1.
        ridge: r as a float, or a :class:`Ridge` whose parts are floats or tensors [H] or [B, T, H] with gradients.
        num_iter: Chebyshev operator applications n; ``"auto"`` takes the smallest n that guarantees ``tol``; 0 skips
            the solve (m = q: plain gated linear attention, ``alpha`` has no effect). The backward solve makes a few
            more (``numerics.BACKWARD_EXTRA_ITERATIONS``).
        tol: relative truncation error of x that ``"auto"`` guarantees for any data.
        scale: s; ``None`` means D^-0.5.
        qk_l2norm: divide every query and key by max(‖·‖₂, 1e-6) first.
        gate: with :class:`DecayGate`, g = −exp(A_log)·softplus(log_decay + dt_bias) is computed inside the kernels.
        initial_state: (H_0, U_0) as fp32 [N, H, D, D] and [N, H, D, V]; H_0 must be symmetric positive semidefinite.
        output_final_state: whether to return the state after the last token of every sequence.
        cu_seqlens: int32 or int64 [N + 1], boundaries of N sequences packed along T (then B = 1), from 0 to T. An empty
            sequence passes its state through.
        ridge_mod: ``ridge_mod(fro, b, h, t)`` is λ of a token from ‖H_t‖_F, its batch row, head and index: a pointwise
            function that may use tensors, with gradients (see ``gka_ops.modifiers``). ``ridge`` is then a number, the
            least λ/‖H‖ that it returns, and serves ``"auto"`` alone. Without second derivatives.
        decay_mod: ``decay_mod(g, b, h, t)`` is the log decay from g [B, T, H], the gate's or ``log_decay``.
        query_mod: ``query_mod(q, b, h, t)`` is the query from q [B, T, H, D], before ``qk_l2norm``.
        key_mod: ``key_mod(k, b, h, t)``, the key from k [B, T, Hkv, D], likewise.
        save_x: whether what the backward needs of the solve (x, ‖H_t‖_F and states, the largest that is saved) is kept
            for it. If not, the backward solves once more, with the same iterations and so to the same gradients.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``; an explicit choice never falls back.
        kernel_options: launch parameters of Triton kernels, in the place of what tables of this card and heuristics
            say, also in the backward: ``{"readout": {"num_warps": 8}}``, with names and values of ``gka-autotune
            explain``. For experts: values are checked, and whether a combination is fast, fits a card's shared memory
            or meets a compiler's bug is not. Without effect on the reference implementation.

    Returns:
        ``GKAOutput(output, final_state)``: output [B, T, H, V] in the dtype of q.

    Raises:
        ValueError: a shape, device, or scalar value is not as above.
        TypeError: a dtype or an argument type is not as above.

    A NaN or infinity in a token reaches the outputs of its own chunk and of all later tokens of its sequence and head,
    never another sequence or head. Rows with ‖H_t‖_F + λ_t ≤ 2^-40 (only zero keys so far) give x_t = 0, with zero
    gradient. Gradients flow to every floating-point tensor argument; for ``initial_state.kk`` it is the symmetric
    gradient. Second derivatives are those of the exact solve, in fp64 and token by token: for small problems, and in
    eager mode only. Forward-mode differentiation raises ``NotImplementedError``.
    """
    if decay_mod is not None or query_mod is not None or key_mod is not None:
        q, k, log_decay, gate = _with_mods("chunk_gka", q, k, v, log_decay, gate, decay_mod, query_mod, key_mod)
    chosen: str = impl if kernel_options is None else options.with_options("chunk_gka", impl, kernel_options)
    known = ridge_mod is None and not torch.compiler.is_compiling()
    signature, call, outputs = (None, None, None) if not known else _recall(
        _chunk_gka_calls, q, k, v, log_decay, alpha, beta, ridge, gate, initial_state, cu_seqlens,
        num_iter, tol, scale, qk_l2norm, output_final_state, save_x, chosen,
    )  # fmt: skip
    if outputs is not None:
        return GKAOutput(outputs[0], GKAState(*outputs[1:]) if output_final_state else None)
    if call is None:
        call = _Call(_check_chunk_gka(
            q, k, v, log_decay, alpha, beta, ridge, num_iter, tol, scale, qk_l2norm, gate, initial_state,
            output_final_state, cu_seqlens, save_x, impl,
        ))  # fmt: skip
        if signature is not None:
            _chunk_gka_calls.keep(signature, call)
    r, b, count, factor, saves = call.checked
    r_tensor, b_tensor = _ridge_tensors(ridge)
    program = ""
    if ridge_mod is not None:
        program, r_tensor = _ridge_program("chunk_gka", ridge_mod, ridge, q, count)
        saves = saves or (save_x and _needs_grad(r_tensor))
    A_log, dt_bias = (None, None) if gate is None else gate
    kk, kv = (None, None) if initial_state is None else initial_state
    args = (
        q, k, v, log_decay, alpha, beta, r_tensor, b_tensor, A_log, dt_bias, kk, kv, cu_seqlens,
        r, b, count, factor, qk_l2norm, output_final_state, saves, program, chosen,
    )  # fmt: skip
    output, final_kk, final_kv, *_ = torch.ops.gka.chunk_gka(*args)
    if signature is not None:
        call.learn("chunk_gka", args, 3 if output_final_state else 1, signature)
    return GKAOutput(output, GKAState(final_kk, final_kv) if output_final_state else None)


def chunk_solve(
    q: Tensor,
    k: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    ridge: float | Ridge = DEFAULT_RIDGE,
    num_iter: int | Literal["auto"] = "auto",
    tol: float = DEFAULT_TOL,
    qk_l2norm: bool = False,
    gate: DecayGate | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    ridge_mod: Mod | None = None,
    decay_mod: Mod | None = None,
    query_mod: Mod | None = None,
    key_mod: Mod | None = None,
    impl: Impl = "auto",
    kernel_options: KernelOptions | None = None,
) -> ChunkSolveOutput:
    r"""The ridge-regression solve alone: x_t = (H_t + λ_t I)^{-1} q_t for every token (MATH.md §1–3).

    Arguments are those of :func:`chunk_gka`, without values, α and scale. ``initial_state`` is H_0 [N, H, D, D]. With
    ``num_iter=0`` x is q (normalised if ``qk_l2norm``).

    Returns:
        ``ChunkSolveOutput(x, final_state)``: x [B, T, H, D] in fp32 (fp64 for fp64 inputs), whatever the dtype of q: x
        may be large outside the span of the keys, and rounding it to 16 bits destroys what a read-out sees of it.
        final_state is H [N, H, D, D] after the last token, or ``None``.

    Raises:
        ValueError: a shape, device, or scalar value is not as documented.
        TypeError: a dtype or an argument type is not as documented.
    """
    op = "chunk_solve"
    if decay_mod is not None or query_mod is not None or key_mod is not None:
        q, k, log_decay, gate = _with_mods(op, q, k, None, log_decay, gate, decay_mod, query_mod, key_mod)
    r, b, r_tensor, b_tensor, A_log, dt_bias, count = _check_tokens(
        op, q, k, None, log_decay, None, beta, gate, ridge, num_iter, tol
    )
    check.check_cu_seqlens(op, cu_seqlens, q)
    check.check_flag(op, "qk_l2norm", qk_l2norm)
    check.check_flag(op, "output_final_state", output_final_state)
    check.check_backend(op, impl, q)
    check.check_kk(op, "initial_state", initial_state, check.num_sequences(q, cu_seqlens), q)
    program = ""
    if ridge_mod is not None:
        program, r_tensor = _ridge_program(op, ridge_mod, ridge, q, count)
    chosen: str = impl if kernel_options is None else options.with_options(op, impl, kernel_options)
    x, final_kk, _ = torch.ops.gka.chunk_solve(
        q, k, log_decay, beta, r_tensor, b_tensor, A_log, dt_bias, initial_state, cu_seqlens,
        r, b, count, qk_l2norm, output_final_state, program, chosen,
    )  # fmt: skip
    return ChunkSolveOutput(x, final_kk if output_final_state else None)


def recurrent_gka(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    state: GKAState,
    state_indices: Tensor | None = None,
    ridge: float | Ridge = DEFAULT_RIDGE,
    num_iter: int | Literal["auto"] = "auto",
    tol: float = DEFAULT_TOL,
    scale: float | None = None,
    qk_l2norm: bool = False,
    gate: DecayGate | None = None,
    ridge_mod: Mod | None = None,
    decay_mod: Mod | None = None,
    query_mod: Mod | None = None,
    key_mod: Mod | None = None,
    impl: Impl = "auto",
    kernel_options: KernelOptions | None = None,
) -> Tensor:
    r"""Decode: advances ``state`` **in place** by the T given tokens of every sequence and returns their outputs.

    Same arguments and equations as :func:`chunk_gka`, so that decoding continues what ``chunk_gka`` began; meant for T
    of one or a few tokens. Not differentiable.

    Args:
        state: the pool of states, (kk [S, H, D, D], kv [S, H, D, V]), contiguous; fp32, or fp64 for fp64 inputs. The
            slots in use are overwritten.
        state_indices: int32 or int64 [B], the slot of each sequence; a negative entry marks padding (output 0, no slot
            touched). ``None`` means slot b for sequence b, and then S = B. No slot may appear twice.

    Returns:
        output [B, T, H, V] in the dtype of q.

    Raises:
        ValueError: a shape, device, or scalar value is not as documented.
        TypeError: a dtype or an argument type is not as documented.
        RuntimeError: an input requires a gradient while gradients are enabled.
    """
    if decay_mod is not None or query_mod is not None or key_mod is not None:
        q, k, log_decay, gate = _with_mods("recurrent_gka", q, k, v, log_decay, gate, decay_mod, query_mod, key_mod)
    chosen: str = impl if kernel_options is None else options.with_options("recurrent_gka", impl, kernel_options)
    known = ridge_mod is None and not torch.compiler.is_compiling()
    signature, call, outputs = (None, None, None) if not known else _recall(
        _recurrent_gka_calls, q, k, v, log_decay, alpha, beta, ridge, gate, state, state_indices,
        num_iter, tol, scale, qk_l2norm, chosen,
    )  # fmt: skip
    if outputs is not None:
        return outputs[0]
    if call is None:
        call = _Call(_check_recurrent_gka(
            q, k, v, log_decay, alpha, beta, state, state_indices, ridge, num_iter, tol, scale, qk_l2norm, gate, impl
        ))  # fmt: skip
        if signature is not None:
            _recurrent_gka_calls.keep(signature, call)
    r, b, count, factor = call.checked
    r_tensor, b_tensor = _ridge_tensors(ridge)
    program = ""
    if ridge_mod is not None:
        program, r_tensor = _ridge_program("recurrent_gka", ridge_mod, ridge, q, count)
    A_log, dt_bias = (None, None) if gate is None else gate
    args = (
        q, k, v, log_decay, alpha, beta, r_tensor, b_tensor, A_log, dt_bias, *state, state_indices,
        r, b, count, factor, qk_l2norm, program, chosen,
    )  # fmt: skip
    output = torch.ops.gka.recurrent_gka(*args)
    if signature is not None:
        call.learn("recurrent_gka", args, 1, signature)
    return output
