"""The ``torch.ops.gka`` operators: schemas, fakes, dispatch and autograd. Needs torch only.

The implementations are imported when an operator first runs: ``gka_ops.triton.launch`` for CUDA tensors,
``gka_ops.reference`` for everything else.

NOTE [Operator conventions]
  * Functional, fixed arity. An output that does not apply is an empty tensor of shape [0], never ``None``: the final
    states when ``output_final_state`` is false, the residuals when ``save_x`` is false, the gradient of an absent
    input.
  * The ridge is λ_t = r_t·‖H_t‖_F + b_t. ``ridge_scale_tensor`` [H] or [B, T, H] stands for r when given, else the
    float ``ridge_scale`` does; likewise ``ridge_offset_tensor`` and ``ridge_offset`` for b. With a program in
    ``ridge_mod`` (``modifiers``; only where ``num_iter > 0``) λ_t is its value instead, and ``ridge_scale_tensor``
    [B, T, H, n] holds its leaves.
  * With ``A_log``, ``log_decay`` holds the raw gate projection a, and log decay = −exp(A_log)·softplus(a + dt_bias).
  * Residuals: ``x`` and ``fro`` = ‖H_t‖_F [B, T, H]; not differentiable. For 16-bit inputs ``x`` holds fp16 rows x̂ of
    x_t = x_query·q_t + x_scale·x̂_t, with q_t the (normalised) query and x_query = <x_t, q_t>/<q_t, q_t>; otherwise it
    is x itself, and ``x_scale`` and ``x_query`` are empty. Why not plain fp16: with a short memory x is large outside
    the span of the keys, where it is parallel to q; rounding that would drown the small part that keys and values see.
  * ``boundary_kk`` and ``boundary_kv`` [slabs·B·H·D, D or V] (1 for B in a packed batch) are residuals of the Triton
    implementation alone: the states at the start of each slab, where its backward starts anew (docs/adr/0007). A
    backward computes what it needs and gets as an empty tensor, be it these or x. Graphs guard on whether a dimension
    is 0 or 1: so the first slab has its states here too, and the number of slabs no dimension to itself.

NOTE [Autograd kernels]
  ``torch.library.register_autograd`` would do, were it not for ``torch.func``: the autograd.Function that it makes is
  refused there. An operator's Autograd kernel already runs at one level of the functorch stack, like PyTorch's own
  kernels, so a single-level Function, which is what ``torch.func`` itself makes of a user's Function, is all that is
  needed (docs/adr/0004). Forward mode raises. The second derivative is that of the specification
  (``gka_ops.reference.double_backward``).

NOTE [Autocast] (docs/adr/0015)
  Under ``torch.autocast`` q, k and v are cast, above autograd, so that their gradients come back in their own dtypes.
  Gates, ridge and states stay as they are, at best fp32. The operators run with autocast off, so that it changes
  nothing of what implementations compute; so do the backwards, which take everything as the forward had it.

NOTE [Beside the dispatcher] (docs/adr/0008)
  To ask the dispatcher costs more than all else that the host does for a replayed call. So the public functions repeat
  a known call without the operator, where that makes no difference:

  * It is like one that the launcher has a plan for (``Recall``): the same types, metadata, scalars, grad mode and
    *effective* dispatch keys, those of the tensors with what the thread includes and excludes. :func:`replay_of` looks
    once whether these keys lead to this module's kernels and nothing else, and whether a gradient is needed. That
    leaves out functorch's transforms, functionalization, JIT tracing, conjugate views; fake tensors and subclasses are
    of other types, and a graph that Dynamo traces does not get here.
  * Under autocast, q, k and v have its dtype already. Its keys are effective ones; its dtype is asked for at each such
    call, and at no other.
  * It is not :func:`watched`, by what the keys do not show. That is asked at each call.
  * What the operator's other kernels do is done: the versions of mutated states count.

  A kernel that someone registers for these operators is noticed only after ``launcher.forget()``. An observer that is
  installed in C++ alone (Kineto on demand) does not see known calls.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch._guards import detect_fake_mode
from torch.autograd import forward_ad, profiler
from torch.autograd.function import _SingleLevelFunction
from torch.autograd.graph import increment_version

from gka_ops import kernel_options, validation
from gka_ops.numerics import backward_iterations
from gka_ops.recall import Replay

_library = torch.library.Library("gka", "DEF")

_KEYS = "Tensor q, Tensor k"
_RIDGE_AND_GATE = "Tensor? ridge_scale_tensor, Tensor? ridge_offset_tensor, Tensor? A_log, Tensor? dt_bias"
_SCALARS = "float ridge_scale, float ridge_offset, int num_iter"

SCHEMAS: dict[str, str] = {
    "chunk_solve": (
        f"({_KEYS}, Tensor? log_decay, Tensor? beta, {_RIDGE_AND_GATE}, Tensor? initial_kk, Tensor? cu_seqlens, "
        f"{_SCALARS}, bool qk_l2norm, bool output_final_state, str ridge_mod, str impl) -> "
        "(Tensor x, Tensor final_kk, Tensor fro)"
    ),
    "chunk_solve_backward": (
        f"(Tensor dx, Tensor? d_final_kk, {_KEYS}, Tensor? log_decay, Tensor? beta, {_RIDGE_AND_GATE}, "
        f"Tensor? initial_kk, Tensor? cu_seqlens, Tensor x, Tensor fro, {_SCALARS}, bool qk_l2norm, str ridge_mod, "
        "str impl) -> "
        "(Tensor dq, Tensor dk, Tensor d_log_decay, Tensor d_beta, Tensor d_ridge_scale, Tensor d_ridge_offset, "
        "Tensor d_A_log, Tensor d_dt_bias, Tensor d_initial_kk)"
    ),
    "chunk_gka": (
        f"({_KEYS}, Tensor v, Tensor? log_decay, Tensor? alpha, Tensor? beta, {_RIDGE_AND_GATE}, Tensor? initial_kk, "
        f"Tensor? initial_kv, Tensor? cu_seqlens, {_SCALARS}, float scale, bool qk_l2norm, bool output_final_state, "
        "bool save_x, str ridge_mod, str impl) -> "
        "(Tensor output, Tensor final_kk, Tensor final_kv, Tensor x, Tensor x_scale, Tensor x_query, Tensor fro, "
        "Tensor boundary_kk, Tensor boundary_kv)"
    ),
    "chunk_gka_backward": (
        f"(Tensor d_output, Tensor? d_final_kk, Tensor? d_final_kv, {_KEYS}, Tensor v, Tensor? log_decay, "
        f"Tensor? alpha, Tensor? beta, {_RIDGE_AND_GATE}, Tensor? initial_kk, Tensor? initial_kv, Tensor? cu_seqlens, "
        "Tensor x, Tensor x_scale, Tensor x_query, Tensor fro, Tensor boundary_kk, Tensor boundary_kv, "
        f"{_SCALARS}, float scale, bool qk_l2norm, str ridge_mod, str impl) -> "
        "(Tensor dq, Tensor dk, Tensor dv, Tensor d_log_decay, Tensor d_alpha, Tensor d_beta, Tensor d_ridge_scale, "
        "Tensor d_ridge_offset, Tensor d_A_log, Tensor d_dt_bias, Tensor d_initial_kk, Tensor d_initial_kv)"
    ),
    "recurrent_gka": (
        f"({_KEYS}, Tensor v, Tensor? log_decay, Tensor? alpha, Tensor? beta, {_RIDGE_AND_GATE}, Tensor(a!) kk, "
        f"Tensor(b!) kv, Tensor? state_indices, {_SCALARS}, float scale, bool qk_l2norm, str ridge_mod, str impl) -> "
        "Tensor"
    ),
}

for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))


# ----------------------------------------------------------------------------------------------------------- dtypes
def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of states, iterates, norms and gate gradients' accumulators: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def residual_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which ``chunk_gka`` saves x̂ for the backward: row-scaled fp16 for 16-bit inputs, else the input's."""
    return torch.float16 if dtype in (torch.bfloat16, torch.float16) else dtype


def _empty(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return like.new_empty(0, dtype=dtype or state_dtype(like.dtype))


def _num_sequences(q: Tensor, cu_seqlens: Tensor | None) -> int | torch.SymInt:
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _like(tensor: Tensor | None, q: Tensor) -> Tensor:
    """The fake of a gradient: contiguous and like its input, or empty where the input is absent."""
    return _empty(q) if tensor is None else torch.empty_like(tensor, memory_format=torch.contiguous_format)


# ------------------------------------------------------------------------------------------------------------ fakes
@torch.library.register_fake("gka::chunk_solve", lib=_library)
def _chunk_solve_fake(
    q, k, log_decay, beta, ridge_scale_tensor, ridge_offset_tensor, A_log, dt_bias, initial_kk, cu_seqlens,
    ridge_scale, ridge_offset, num_iter, qk_l2norm, output_final_state, ridge_mod, impl,
):  # fmt: skip
    dtype = state_dtype(q.dtype)
    B, T, H, D = q.shape
    x = q.new_empty(B, T, H, D, dtype=dtype)
    fro = q.new_empty(B, T, H, dtype=dtype)
    N = _num_sequences(q, cu_seqlens)
    final_kk = q.new_empty(N, H, D, D, dtype=dtype) if output_final_state else _empty(q)
    return x, final_kk, fro


@torch.library.register_fake("gka::chunk_solve_backward", lib=_library)
def _chunk_solve_backward_fake(
    dx, d_final_kk, q, k, log_decay, beta, ridge_scale_tensor, ridge_offset_tensor, A_log, dt_bias, initial_kk,
    cu_seqlens, x, fro, ridge_scale, ridge_offset, num_iter, qk_l2norm, ridge_mod, impl,
):  # fmt: skip
    inputs = (q, k, log_decay, beta, ridge_scale_tensor, ridge_offset_tensor, A_log, dt_bias, initial_kk)
    return tuple(_like(t, q) for t in inputs)


@torch.library.register_fake("gka::chunk_gka", lib=_library)
def _chunk_gka_fake(
    q, k, v, log_decay, alpha, beta, ridge_scale_tensor, ridge_offset_tensor, A_log, dt_bias, initial_kk, initial_kv,
    cu_seqlens, ridge_scale, ridge_offset, num_iter, scale, qk_l2norm, output_final_state, save_x, ridge_mod,
    impl,
):  # fmt: skip
    dtype = state_dtype(q.dtype)
    B, T, H, D = q.shape
    V = v.shape[-1]
    N = _num_sequences(q, cu_seqlens)
    output = q.new_empty(B, T, H, V)
    final_kk = q.new_empty(N, H, D, D, dtype=dtype) if output_final_state else _empty(q)
    final_kv = q.new_empty(N, H, D, V, dtype=dtype) if output_final_state else _empty(q)
    saves = save_x and num_iter > 0
    saved = residual_dtype(q.dtype)
    x = q.new_empty(B, T, H, D, dtype=saved) if saves else _empty(q, saved)
    x_scale = q.new_empty(B, T, H, dtype=dtype) if saves and saved == torch.float16 else _empty(q)
    x_query = torch.empty_like(x_scale)
    fro = q.new_empty(B, T, H, dtype=dtype) if saves else _empty(q)
    boundary_kk, boundary_kv = _empty(q), _empty(q)
    if save_x and runs_triton(q.device.type, q.dtype, D, impl):
        from gka_ops.triton.slabs import slab_count  # does not import Triton

        slabs = slab_count(B, T, H, None if cu_seqlens is None else N, solve=num_iter > 0)
        rows = slabs * (B if cu_seqlens is None else 1) * H * D
        boundary_kv = q.new_empty(rows, V, dtype=dtype)
        if num_iter > 0 or output_final_state:
            boundary_kk = q.new_empty(rows, D, dtype=dtype)
    return output, final_kk, final_kv, x, x_scale, x_query, fro, boundary_kk, boundary_kv


@torch.library.register_fake("gka::chunk_gka_backward", lib=_library)
def _chunk_gka_backward_fake(
    d_output, d_final_kk, d_final_kv, q, k, v, log_decay, alpha, beta, ridge_scale_tensor, ridge_offset_tensor, A_log,
    dt_bias, initial_kk, initial_kv, cu_seqlens, x, x_scale, x_query, fro, boundary_kk, boundary_kv, ridge_scale,
    ridge_offset, num_iter, scale, qk_l2norm, ridge_mod, impl,
):  # fmt: skip
    inputs = (
        q, k, v, log_decay, alpha, beta, ridge_scale_tensor, ridge_offset_tensor, A_log, dt_bias, initial_kk,
        initial_kv,
    )  # fmt: skip
    return tuple(_like(t, q) for t in inputs)


@torch.library.register_fake("gka::recurrent_gka", lib=_library)
def _recurrent_gka_fake(
    q, k, v, log_decay, alpha, beta, ridge_scale_tensor, ridge_offset_tensor, A_log, dt_bias, kk, kv, state_indices,
    ridge_scale, ridge_offset, num_iter, scale, qk_l2norm, ridge_mod, impl,
):  # fmt: skip
    B, T, H, _ = q.shape
    return q.new_empty(B, T, H, v.shape[-1])


# --------------------------------------------------------------------------------------------------------- dispatch
def runs_triton(device_type: str, dtype: torch.dtype, head_dim: int, impl: str) -> bool:
    """``impl="auto"`` is Triton on CUDA where the kernels support the dtype and head sizes, the reference elsewhere."""
    from gka_ops.triton import checks  # does not import Triton

    impl = kernel_options.bare(impl)
    if impl == "auto":
        return device_type == "cuda" and checks.unsupported_reason(dtype, head_dim) is None
    return impl == "triton"


def _backend(op: str, q: Tensor, impl: str) -> Any:
    """The module that runs this call; both have one function per operator with the operator's own signature."""
    validation.check_backend(op, impl, q)
    return _module(impl, q.is_cuda, q.dtype, q.size(-1))


def _run(op: str, q: Tensor, args: tuple[Any, ...]) -> Any:
    """Calls the implementation, with the kernel options behind its name if there are any."""
    *inputs, impl = args
    name = kernel_options.bare(impl)
    implementation = getattr(_backend(op, q, name), op)
    if name == impl:
        return implementation(*inputs)
    with kernel_options.forcing(op, impl):
        return implementation(*inputs)


@cache
def _module(impl: str, is_cuda: bool, dtype: torch.dtype, head_dim: int) -> Any:
    from gka_ops.triton import checks  # does not import Triton

    if impl == "auto":
        supported = checks.unsupported_reason(dtype, head_dim) is None
        impl = "triton" if is_cuda and supported else "reference"
    if impl == "reference":
        from gka_ops.reference import backend

        return backend
    checks.require_supported(dtype, head_dim)
    from gka_ops.triton import launch

    return launch


def _check_values(
    op: str, args: tuple[Any, ...], cu_seqlens: Tensor | None = None, state_indices: Tensor | None = None
) -> None:
    """Values are read where that is free (``cu_seqlens`` on the CPU) and in debug mode."""
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
        validation.check_cu_seqlens_values(op, cu_seqlens, args[0].shape[1])
    if validation.debug_enabled():
        schema = getattr(torch.ops.gka, op).default._schema
        named = {a.name: value for a, value in zip(schema.arguments, args, strict=True)}
        if named["ridge_mod"]:
            del named["ridge_scale_tensor"]  # leaves, which may be anything
        tensors = {n: t for n, t in named.items() if isinstance(t, Tensor) and t.is_floating_point()}
        validation.check_values(op, tensors, cu_seqlens, state_indices)


def _chunk_solve(*args):
    _check_values("chunk_solve", args, cu_seqlens=args[9])
    return _run("chunk_solve", args[0], args)


def _chunk_solve_backward(*args):
    return _run("chunk_solve_backward", args[2], args)


def _chunk_gka(*args):
    _check_values("chunk_gka", args, cu_seqlens=args[12])
    return _run("chunk_gka", args[0], args)


def _chunk_gka_backward(*args):
    return _run("chunk_gka_backward", args[3], args)


def _recurrent_gka(*args):
    _check_values("recurrent_gka", args, state_indices=args[12])
    return _run("recurrent_gka", args[0], args)


_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "chunk_solve": _chunk_solve,
    "chunk_solve_backward": _chunk_solve_backward,
    "chunk_gka": _chunk_gka,
    "chunk_gka_backward": _chunk_gka_backward,
    "recurrent_gka": _recurrent_gka,
}
for _name, _implementation in _IMPLEMENTATIONS.items():
    _library.impl(_name, _implementation, "CPU")
    _library.impl(_name, _implementation, "CUDA")


# --------------------------------------------------------------------------------------------------------- autograd
_DispatchKey, _DispatchKeySet = torch._C.DispatchKey, torch._C.DispatchKeySet
_IMPLEMENTED = (_DispatchKey.CPU, _DispatchKey.CUDA)
_AUTOCAST = (_DispatchKey.AutocastCPU, _DispatchKey.AutocastCUDA)
_AUTOCAST_KEYS = reduce(or_, map(_DispatchKeySet, _AUTOCAST))


def _without_autocast() -> Any:
    return torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS)


@cache
def _only_implementation_below(keyset: int) -> bool:
    """Whether, in a call with this set of keys, nothing but the implementation comes below autograd and the states'
    versions: no mode, no fake tensor, no transform."""
    below = _DispatchKeySet.from_raw_repr(keyset) & torch._C._after_ADInplaceOrView_keyset
    return below.highestPriorityTypeId() in _IMPLEMENTED


def _present(gradients: tuple[Tensor, ...], inputs: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Turns the empty gradients of absent inputs into ``None``."""
    return [g if t is not None else None for g, t in zip(gradients, inputs, strict=True)]


def _of_a_state(gradient: Tensor | None) -> Tensor | None:
    """``None`` for the gradient of a final state that was not asked for, which has one dimension: whether a size is 0
    cannot be asked where it is unbacked."""
    return None if gradient is None or gradient.ndim == 1 else gradient


def _chunk_solve_setup(ctx, inputs, output):
    *tensors, ridge_scale, ridge_offset, num_iter, qk_l2norm, _, ridge_mod, impl = inputs
    x, _, fro = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(fro)
    ctx.save_for_backward(*tensors, x, fro)
    ctx.scalars = (ridge_scale, ridge_offset, backward_iterations(num_iter), qk_l2norm, ridge_mod, impl)


def _chunk_solve_vjp(ctx, dx, d_final_kk, _):
    *inputs, x, fro = ctx.saved_tensors
    if dx is None:
        dx = torch.zeros_like(x)
    d_final_kk = _of_a_state(d_final_kk)
    gradients = torch.ops.gka.chunk_solve_backward(dx, d_final_kk, *inputs, x, fro, *ctx.scalars)
    *differentiable, _cu_seqlens = inputs
    return *_present(gradients, tuple(differentiable)), *[None] * 8


def _chunk_gka_setup(ctx, inputs, output):
    *tensors, ridge_scale, ridge_offset, num_iter, scale, qk_l2norm, _, _, ridge_mod, impl = inputs
    _, _, _, *residuals = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*residuals)
    ctx.save_for_backward(*tensors, *residuals)
    ctx.scalars = (ridge_scale, ridge_offset, backward_iterations(num_iter), scale, qk_l2norm, ridge_mod, impl)


def _chunk_gka_vjp(ctx, d_output, d_final_kk, d_final_kv, *_):
    saved = ctx.saved_tensors  # to be asked for once, says torch.utils.checkpoint
    inputs, residuals = saved[:13], saved[13:]
    if d_output is None:
        q, _, v = inputs[:3]
        d_output = q.new_zeros(*q.shape[:-1], v.shape[-1])
    d_final_kk, d_final_kv = _of_a_state(d_final_kk), _of_a_state(d_final_kv)
    gradients = torch.ops.gka.chunk_gka_backward(d_output, d_final_kk, d_final_kv, *inputs, *residuals, *ctx.scalars)
    *differentiable, _cu_seqlens = inputs
    return *_present(gradients, tuple(differentiable)), *[None] * 10


def _double_backward(op: str, upstream: Tensor, ridge_mod: str) -> Any:
    """The module with the second derivatives. A graph of theirs would hold every token's solve, one after the other."""
    if ridge_mod:
        raise NotImplementedError(f"{op}: expected first derivatives alone with a ridge_mod, got second ones")
    if detect_fake_mode(upstream) is not None:
        raise NotImplementedError(f"{op}: expected second derivatives in eager mode only, got a traced graph")
    from gka_ops.reference import double_backward

    return double_backward


def _chunk_solve_backward_setup(ctx, inputs, output):
    dx, d_final_kk, *tensors, _x, _fro, ridge_scale, ridge_offset, num_iter, qk_l2norm, ridge_mod, _impl = inputs
    ctx.save_for_backward(dx, d_final_kk, *tensors)
    ctx.scalars, ctx.ridge_mod = (ridge_scale, ridge_offset, num_iter, qk_l2norm), ridge_mod


def _chunk_solve_backward_vjp(ctx, *cotangents):
    dx, d_final_kk, *inputs, cu_seqlens = ctx.saved_tensors
    double_backward, upstream = _double_backward("chunk_solve", dx, ctx.ridge_mod), (dx, d_final_kk)
    d_upstream, d_inputs = double_backward.chunk_solve(cotangents, upstream, inputs, cu_seqlens, *ctx.scalars)
    return *d_upstream, *d_inputs, *[None] * 9


def _chunk_gka_backward_setup(ctx, inputs, output):
    *tensors, ridge_scale, ridge_offset, num_iter, scale, qk_l2norm, ridge_mod, _impl = inputs
    ctx.save_for_backward(*tensors[:16])  # without what the forward saved
    ctx.scalars, ctx.ridge_mod = (ridge_scale, ridge_offset, num_iter, scale, qk_l2norm), ridge_mod


def _chunk_gka_backward_vjp(ctx, *cotangents):
    d_output, d_final_kk, d_final_kv, *inputs, cu_seqlens = ctx.saved_tensors
    double_backward = _double_backward("chunk_gka", d_output, ctx.ridge_mod)
    upstream = d_output, d_final_kk, d_final_kv
    d_upstream, d_inputs = double_backward.chunk_gka(cotangents, upstream, inputs, cu_seqlens, *ctx.scalars)
    return *d_upstream, *d_inputs, *[None] * 14


def _refuse_forward_mode(op: str) -> None:
    """Below autograd the tangents of ``jvp`` are gone: going on would mean a silent zero tangent."""
    if forward_ad._current_level >= 0:
        raise NotImplementedError(f"{op}: expected reverse-mode differentiation, got forward mode (jvp)")


def _register_autograd(op: str, setup: Callable[..., None], vjp: Callable[..., tuple[Tensor | None, ...]]) -> None:
    """See NOTE [Autograd kernels]. ``setup(ctx, inputs, output)`` and ``vjp(ctx, *gradients)`` as in PyTorch's own."""
    overload, implementation = getattr(torch.ops.gka, op).default, _IMPLEMENTATIONS[op]

    def below(keyset, *args):
        with torch._C._AutoDispatchBelowAutograd():
            if _only_implementation_below(keyset.raw_repr()):  # what the dispatcher would do, without asking it
                return implementation(*args)
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def forward(ctx, keyset, *args):
        # A Function's forward runs with gradients off, but the outer levels of torch.func record what happens in it.
        with torch.set_grad_enabled(torch._C._are_functorch_transforms_active()):
            output = below(keyset, *args)
        setup(ctx, args, output)
        return output

    def backward(ctx, *gradients):
        return None, *vjp(ctx, *gradients)

    node: Any = type(f"{op}_autograd", (_SingleLevelFunction,), {"forward": forward, "backward": backward})

    def kernel(keyset, *args):
        _refuse_forward_mode(op)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return below(keyset, *args)
        if not torch._C._are_functorch_transforms_active():
            return node.apply(keyset, *args)
        with enable_single_level_autograd_function():
            return node.apply(keyset, *args)

    _library.impl(op, kernel, "Autograd", with_keyset=True)


_register_autograd("chunk_solve", _chunk_solve_setup, _chunk_solve_vjp)
_register_autograd("chunk_gka", _chunk_gka_setup, _chunk_gka_vjp)
_register_autograd("chunk_solve_backward", _chunk_solve_backward_setup, _chunk_solve_backward_vjp)
_register_autograd("chunk_gka_backward", _chunk_gka_backward_setup, _chunk_gka_backward_vjp)


def _recurrent_gka_autograd(keyset, *args):
    _refuse_forward_mode("recurrent_gka")
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args[:13]):
        raise RuntimeError(
            "recurrent_gka: expected inputs that require no gradient, or torch.no_grad(): decode is not differentiable"
        )
    with torch._C._AutoDispatchBelowAutograd():
        if _only_implementation_below(keyset.raw_repr()) and keyset.has(_DispatchKey.ADInplaceOrView):
            increment_version(args[10:12])
            return _recurrent_gka(*args)
        return torch.ops.gka.recurrent_gka.default.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _recurrent_gka_version(keyset, *args):
    """Bumps the states' versions, so that autograd notices where one was saved before it was advanced."""
    increment_version(args[10:12])
    return torch.ops.gka.recurrent_gka.default.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)


_library.impl("recurrent_gka", _recurrent_gka_autograd, "Autograd", with_keyset=True)
_library.impl("recurrent_gka", _recurrent_gka_version, "ADInplaceOrView", with_keyset=True)


# --------------------------------------------------------------------------------------------------------- autocast
def _register_autocast(op: str, operands: int) -> None:
    """See NOTE [Autocast]. ``operands``: how many tensors, from the first on, are cast."""
    overload = getattr(torch.ops.gka, op).default

    def kernel(*args):
        cast = [tensor.to(validation.autocast_dtype(tensor)) for tensor in args[:operands]]
        with _without_autocast():
            return overload(*cast, *args[operands:])

    for key in _AUTOCAST:
        _library.impl(op, kernel, key.name)


for _name, _operands in {"chunk_solve": 2, "chunk_gka": 3, "recurrent_gka": 3}.items():
    _register_autocast(_name, _operands)
for _name in ("chunk_solve_backward", "chunk_gka_backward"):
    _register_autocast(_name, 0)


# -------------------------------------------------------------------------------------------- beside the dispatcher
_OURS = (_DispatchKey.AutogradCPU, _DispatchKey.AutogradCUDA, _DispatchKey.ADInplaceOrView, *_AUTOCAST)
_SILENT = (_DispatchKey.BackendSelect,)  # unless someone registers
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack


def watched() -> bool:
    """Whether something that dispatch keys do not show wants to see, change or refuse calls of operators."""
    return (
        _dispatch_modes() > 0
        or _function_modes() > 0
        or profiler._is_profiler_enabled
        or forward_ad._current_level >= 0
        or validation.debug_enabled()
    )


def _keys(tensors: tuple[Tensor, ...]) -> torch._C.DispatchKeySet:
    """Those by which the dispatcher would choose kernels for a call with these tensors here and now."""
    keys = torch._C._dispatch_tls_local_include_set()
    for tensor in tensors:
        keys = keys | torch._C._dispatch_keys(tensor)
    return keys - torch._C._dispatch_tls_local_exclude_set()


def _only_ours(op: str, keys: torch._C.DispatchKeySet) -> bool:
    """Whether the dispatcher would run nothing but this module's kernels."""
    while (key := keys.highestPriorityTypeId()) not in _IMPLEMENTED:
        silent = key in _SILENT and not torch._C._dispatch_has_kernel_for_dispatch_key(f"gka::{op}", key.name)
        if not silent and key not in _OURS:
            return False
        keys = keys.remove(key)
    return True


def replay_of(op: str, args: tuple[Any, ...], outputs: int) -> Replay | None:
    """What repeats calls like ``op(*args)``, which has so many outputs with elements, if that is known and allowed.

    It is for calls that :class:`gka_ops.recall.Recall` finds alike, and only while they are not :func:`watched`.
    """
    tensors = tuple(a for a in args if isinstance(a, Tensor))
    keys, q, impl = _keys(tensors), args[0], args[-1]
    if kernel_options.bare(impl) != impl:  # a replay would not know of them
        return None
    implementation = getattr(_module(impl, q.is_cuda, q.dtype, q.size(-1)), op)
    needs_grad = torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)
    if needs_grad or not _only_ours(op, keys) or not hasattr(implementation, "replay_of"):
        return None
    mutated = slice(0)
    if op == "recurrent_gka" and keys.has(_DispatchKey.ADInplaceOrView):
        kk = sum(isinstance(a, Tensor) for a in args[:10])
        mutated = slice(kk, kk + 2)
    replay: Replay | None = implementation.replay_of(args[:-1], outputs, mutated)
    if replay is None or not any(map(keys.has, _AUTOCAST)):
        return replay
    return _replay_under_autocast(replay, args[:3])


def _replay_under_autocast(replay: Replay, operands: tuple[Tensor, ...]) -> Replay | None:
    """That of a call whose operands (q, k, v) autocast has nothing to do with."""
    kind, dtype = operands[0].device.type, operands[0].dtype
    if any(validation.autocast_dtype(tensor) != tensor.dtype for tensor in operands):
        return None

    def replay_in(tensors: tuple[Tensor, ...]) -> list[Tensor] | None:
        unchanged = dtype == torch.float64 or torch.get_autocast_dtype(kind) == dtype
        return replay(tensors) if unchanged else None

    return replay_in
