"""Checks that do not depend on a backend, with one message style: what was expected, and what came.

Structural checks (rank, shape, dtype, device) read no tensor values, so they trace through ``torch.compile`` without a
graph break. Checks of values run inside the operators, when they really execute: ``cu_seqlens`` whenever it is on the
CPU, everything else only in debug mode, because reading values stops a GPU.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gka_ops.numerics import BETA_EPS, iterations_for
from gka_ops.types import IMPLS, DecayGate, GKAState, Ridge

DEBUG_VARIABLE = "GKA_OPS_DEBUG"
INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
AUTOCAST_DEVICES = ("cpu", "cuda")

# The dictionary below ``os.environ``, which itself takes two exceptions, 1.6 µs, to say that a variable is not set.
_environment, _variable = os.environ._data, os.environ.encodekey(DEBUG_VARIABLE)  # type: ignore[attr-defined]
_off = (None, *map(os.environ.encodevalue, ("", "0")))
_debug_depth = 0


@contextlib.contextmanager
def debug_mode() -> Iterator[None]:
    """Within this context every operator call also checks tensor values (and so waits for the GPU).

    Raises ``ValueError`` from the operator for: a NaN or infinity in q, k, v, the gates or the initial state; a
    positive log decay; alpha or beta outside [0, 1]; a negative ridge; a non-symmetric initial ``kk``; malformed
    ``cu_seqlens``; a ``state_indices`` entry beyond the pool or used twice. The environment variable
    ``GKA_OPS_DEBUG=1`` does the same for a whole process; it is read at each call.
    """
    global _debug_depth
    _debug_depth += 1
    try:
        yield
    finally:
        _debug_depth -= 1


def debug_enabled() -> bool:
    """Whether value checks run: inside :func:`debug_mode`, or ``GKA_OPS_DEBUG`` set to anything but empty or 0."""
    return _debug_depth > 0 or _environment.get(_variable) not in _off


def _shape(tensor: Tensor) -> list[Any]:
    return list(tensor.shape)


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which an operator gets q, k or v: autocast's where that is on, but fp64 stays what it is."""
    kind = tensor.device.type
    if kind not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(kind):
        return tensor.dtype
    return torch.get_autocast_dtype(kind) if tensor.dtype in INPUT_DTYPES[:3] else tensor.dtype


def surely(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes, that of an error, holds. Where only the run will know (sizes that depend on data,
    ``mark_unbacked``), the answer is no, and the graph that is being traced will check it."""
    if not isinstance(condition, torch.SymBool) and not torch.compiler.is_compiling():
        return bool(condition)  # a tensor, where torch.jit traces
    from torch.fx.experimental.symbolic_shapes import guard_or_false, guard_or_true  # imports SymPy

    if guard_or_false(condition):
        return True
    if guard_or_true(condition):
        torch._check(torch.sym_not(condition))
    return False


def _other_shape(tensor: Tensor, shape: tuple[Any, ...]) -> bool:
    return tensor.ndim != len(shape) or any(surely(a != b) for a, b in zip(tensor.shape, shape, strict=True))


def check_tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: expected {name} to be a torch.Tensor, got {type(value).__name__}")


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{op}: expected {name} to have a floating-point dtype, got {tensor.dtype}")


def check_shape(op: str, name: str, tensor: Tensor, shape: tuple[Any, ...], meaning: str) -> None:
    if _other_shape(tensor, shape):
        raise ValueError(f"{op}: expected {name} of shape {meaning} = {list(shape)}, got {_shape(tensor)}")


def check_device(op: str, name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{op}: expected {name} on the device of q, {device}, got {tensor.device}")


def check_impl(op: str, impl: object) -> None:
    if impl not in IMPLS:
        raise ValueError(f"{op}: expected impl to be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)


def check_number(op: str, name: str, value: object) -> None:
    if not _is_number(value):
        raise TypeError(f"{op}: expected {name} to be a number, got {type(value).__name__}")


def check_flag(op: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: expected {name} to be a bool, got {type(value).__name__}")


def check_qkv(op: str, q: Tensor, k: Tensor, v: Tensor | None) -> None:
    """q [B, T, H, D], k [B, T, Hkv, D], v [B, T, Hkv, V]; one dtype after autocast, one device, Hkv divides H."""
    named = [("q", q), ("k", k)] + ([("v", v)] if v is not None else [])
    for name, tensor in named:
        check_tensor(op, name, tensor)
        if tensor.ndim != 4:
            heads = "H" if name == "q" else "Hkv"
            last = "V" if name == "v" else "D"
            raise ValueError(f"{op}: expected {name} of shape [B, T, {heads}, {last}], got {_shape(tensor)}")
    if q.dtype not in INPUT_DTYPES:
        raise TypeError(f"{op}: expected q to be bfloat16, float16, float32 or float64, got {q.dtype}")
    B, T, H, D = q.shape
    for name, tensor in named[1:]:
        if tensor.dtype != q.dtype and autocast_dtype(tensor) != autocast_dtype(q):
            raise TypeError(f"{op}: expected {name} to have the dtype of q, {q.dtype}, got {tensor.dtype}")
        check_device(op, name, tensor, q.device)
    if surely(k.shape[0] != B) or surely(k.shape[1] != T) or surely(k.shape[3] != D):
        raise ValueError(f"{op}: expected k of shape [B, T, Hkv, D] = [{B}, {T}, Hkv, {D}], got {_shape(k)}")
    Hkv = k.shape[2]
    if v is not None and (surely(v.shape[0] != B) or surely(v.shape[1] != T) or surely(v.shape[2] != Hkv)):
        raise ValueError(f"{op}: expected v of shape [B, T, Hkv, V] = [{B}, {T}, {Hkv}, V], got {_shape(v)}")
    if surely(H == 0) or surely(D == 0) or surely(Hkv == 0) or (v is not None and surely(v.shape[3] == 0)):
        got = ", ".join(f"{name} {_shape(tensor)}" for name, tensor in named)
        raise ValueError(f"{op}: expected at least one head and non-empty head dimensions, got {got}")
    if surely(H % Hkv != 0):
        raise ValueError(f"{op}: expected the number of key/value heads to divide the {H} query heads, got {Hkv}")


def check_per_token(op: str, name: str, tensor: Tensor | None, q: Tensor) -> None:
    """A gate: floating point, [B, T, H], on q's device."""
    if tensor is None:
        return
    check_tensor(op, name, tensor)
    check_floating(op, name, tensor)
    check_shape(op, name, tensor, q.shape[:3], "[B, T, H]")
    check_device(op, name, tensor, q.device)


def check_per_head(op: str, name: str, tensor: Tensor, q: Tensor) -> None:
    check_tensor(op, name, tensor)
    check_floating(op, name, tensor)
    check_shape(op, name, tensor, q.shape[2:3], "[H]")
    check_device(op, name, tensor, q.device)


def check_gate(
    op: str, gate: DecayGate | None, log_decay: Tensor | None, q: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Returns (A_log, dt_bias)."""
    if gate is None:
        return None, None
    if not isinstance(gate, DecayGate):
        raise TypeError(f"{op}: expected gate to be a DecayGate or None, got {type(gate).__name__}")
    if log_decay is None:
        raise ValueError(f"{op}: expected log_decay to hold the raw gate projection when gate is given, got None")
    check_per_head(op, "gate.A_log", gate.A_log, q)
    if gate.dt_bias is not None:
        check_per_head(op, "gate.dt_bias", gate.dt_bias, q)
    return gate.A_log, gate.dt_bias


def check_ridge(
    op: str, ridge: float | Ridge, q: Tensor
) -> tuple[float, float, Tensor | None, Tensor | None, float | None]:
    """Returns (scale, offset, scale tensor, offset tensor, smallest known scale)."""
    if not isinstance(ridge, Ridge):
        if not _is_number(ridge):
            hint = "; a tensor goes into Ridge(scale=...)" if isinstance(ridge, Tensor) else ""
            raise TypeError(f"{op}: expected ridge to be a number or a Ridge, got {type(ridge).__name__}{hint}")
        ridge = Ridge(ridge)
    values: list[float] = []
    tensors: list[Tensor | None] = []
    for name, part in (("scale", ridge.scale), ("offset", ridge.offset)):
        if isinstance(part, Tensor):
            label = f"ridge.{name}"
            check_floating(op, label, part)
            if part.ndim == 1:
                check_per_head(op, label, part, q)
            elif part.ndim == 3:
                check_per_token(op, label, part, q)
            else:
                raise ValueError(f"{op}: expected {label} of shape [H] or [B, T, H], got {_shape(part)}")
            values.append(0.0)
            tensors.append(part)
        else:
            check_number(op, f"ridge.{name}", part)
            if not 0 <= part < float("inf"):
                raise ValueError(f"{op}: expected a finite ridge.{name} >= 0, got {part}")
            values.append(float(part))
            tensors.append(None)
    if ridge.min_scale is not None:
        check_number(op, "ridge.min_scale", ridge.min_scale)
        if not 0 < ridge.min_scale < float("inf"):
            raise ValueError(f"{op}: expected a finite ridge.min_scale > 0, got {ridge.min_scale}")
    smallest = values[0] if tensors[0] is None else ridge.min_scale
    return values[0], values[1], tensors[0], tensors[1], smallest


def resolve_num_iter(op: str, num_iter: object, tol: float, smallest_ridge: float | None) -> int:
    """The iteration count: an int as it is, ``"auto"`` from ``tol`` and the smallest ridge scale (MATH.md §3.1)."""
    check_number(op, "tol", tol)
    if not 0 < tol < 1:
        raise ValueError(f"{op}: expected 0 < tol < 1, got {tol}")
    if num_iter == "auto":
        if smallest_ridge is None:
            raise ValueError(
                f"{op}: expected an int num_iter, or Ridge(..., min_scale=...) from which to take it, because "
                'num_iter="auto" cannot read the smallest value of a tensor ridge scale'
            )
        if not smallest_ridge > 0:
            raise ValueError(
                f'{op}: expected a ridge scale > 0 with num_iter="auto" (the count grows without bound as it goes to '
                f"0), got {smallest_ridge}"
            )
        return iterations_for(smallest_ridge, tol)
    if isinstance(num_iter, bool) or not isinstance(num_iter, int):
        raise TypeError(f'{op}: expected num_iter to be an int or "auto", got {num_iter!r}')
    if num_iter < 0:
        raise ValueError(f"{op}: expected num_iter >= 0, got {num_iter}")
    return num_iter


def check_cu_seqlens(op: str, cu_seqlens: Tensor | None, q: Tensor) -> None:
    if cu_seqlens is None:
        return
    check_tensor(op, "cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: expected cu_seqlens to be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or surely(cu_seqlens.shape[0] < 2):
        raise ValueError(f"{op}: expected cu_seqlens of shape [N + 1] with N >= 1, got {_shape(cu_seqlens)}")
    check_device(op, "cu_seqlens", cu_seqlens, q.device)
    if surely(q.shape[0] != 1):
        raise ValueError(f"{op}: expected a packed batch of size B = 1 with cu_seqlens, got B = {q.shape[0]}")


def num_sequences(q: Tensor, cu_seqlens: Tensor | None) -> Any:
    """N: the batch size, or the number of packed sequences."""
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _check_state_part(op: str, name: str, part: object, shape: tuple[Any, ...], meaning: str, q: Tensor) -> None:
    check_tensor(op, name, part)
    assert isinstance(part, Tensor)
    expected = torch.float64 if q.dtype == torch.float64 else torch.float32
    if part.dtype != expected:
        raise TypeError(f"{op}: expected {name} to be {expected}, got {part.dtype}")
    check_shape(op, name, part, shape, meaning)
    check_device(op, name, part, q.device)


def check_kk(op: str, name: str, kk: Tensor | None, count: Any, q: Tensor) -> None:
    """H_0: [N, H, D, D], fp32 (fp64 for fp64 inputs)."""
    if kk is not None:
        H, D = q.shape[2:]
        _check_state_part(op, name, kk, (count, H, D, D), "[N, H, D, D]", q)


def check_gka_state(
    op: str, name: str, state: GKAState | None, count: Any, q: Tensor, v: Tensor
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """(kk [N, H, D, D], kv [N, H, D, V]); ``count`` is N, or ``None`` for a pool of any size."""
    if state is None:
        return None, None
    if not isinstance(state, GKAState):
        raise TypeError(f"{op}: expected {name} to be a GKAState, got {type(state).__name__}")
    check_tensor(op, f"{name}.kk", state.kk)
    slots = state.kk.shape[0] if count is None and state.kk.ndim else count
    check_kk(op, f"{name}.kk", state.kk, slots, q)
    H, D = q.shape[2:]
    _check_state_part(op, f"{name}.kv", state.kv, (slots, H, D, v.shape[3]), "[N, H, D, V]", q)
    return state.kk, state.kv


def check_contiguous(op: str, name: str, tensor: Tensor | None) -> None:
    if tensor is not None and not tensor.is_contiguous():
        raise ValueError(f"{op}: expected a contiguous {name}, got strides {list(tensor.stride())}")


def check_state_indices(op: str, state_indices: Tensor | None, q: Tensor) -> None:
    if state_indices is None:
        return
    check_tensor(op, "state_indices", state_indices)
    if state_indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: expected state_indices to be int32 or int64, got {state_indices.dtype}")
    check_shape(op, "state_indices", state_indices, q.shape[:1], "[B]")
    check_device(op, "state_indices", state_indices, q.device)


def resolve_scale(op: str, scale: float | None, q: Tensor) -> float:
    """The read-out scale s, D^-0.5 by default."""
    if scale is None:
        return float(q.shape[3]) ** -0.5
    check_number(op, "scale", scale)
    return float(scale)


def check_backend(op: str, impl: object, q: Tensor) -> None:
    """``impl`` is known, and Triton is asked for only where it can run."""
    check_impl(op, impl)
    if impl == "triton" and q.device.type != "cuda" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        raise ValueError(
            f'{op}: expected CUDA tensors with impl="triton", got {q.device} '
            "(on the CPU it runs only under Triton's interpreter, TRITON_INTERPRET=1)"
        )


# ----------------------------------------------------------------------------------------------------------- values
def _fail_if(condition: Tensor, message: str) -> None:
    if bool(condition.any()):
        raise ValueError(message)


def check_cu_seqlens_values(op: str, cu_seqlens: Tensor, num_tokens: int) -> None:
    """cu_seqlens starts at 0, never decreases and ends at the number of packed tokens."""
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != num_tokens or any(b < a for a, b in pairwise(offsets)):
        raise ValueError(
            f"{op}: expected cu_seqlens to rise from 0 to T = {num_tokens} without decreasing, got {offsets}"
        )


def check_values(op: str, tensors: dict[str, Tensor], cu_seqlens: Tensor | None, state_indices: Tensor | None) -> None:
    """The checks of :func:`debug_mode`. ``tensors`` holds the floating-point arguments by the operator's names."""
    if cu_seqlens is not None:
        check_cu_seqlens_values(op, cu_seqlens, tensors["q"].shape[1])
    if state_indices is not None:
        slots, rows = tensors["kk"].shape[0], state_indices >= 0
        used = state_indices[rows]
        _fail_if(used >= slots, f"{op}: expected state_indices < {slots} (the pool's slots), got a larger one")
        if used.unique().numel() != used.numel():
            raise ValueError(f"{op}: expected each slot at most once in state_indices, got a slot twice")
        # Slots that are not in use, and padding, may hold anything.
        chosen = {"kk": used, "kv": used}
        tensors = {n: t[chosen.get(n, rows)] if t.ndim > 1 else t for n, t in tensors.items()}
    for name, tensor in tensors.items():
        _fail_if(~torch.isfinite(tensor), f"{op}: expected finite values in {name}, got NaN or infinity")
    log_decay = tensors.get("log_decay")
    if log_decay is not None and tensors.get("A_log") is None:
        _fail_if(log_decay > 0, f"{op}: expected log_decay <= 0 (natural logarithm of a decay), got a positive value")
    for name, excess in (("alpha", 0.0), ("beta", BETA_EPS)):
        gate = tensors.get(name)
        if gate is not None:
            _fail_if((gate < 0) | (gate > 1 + excess), f"{op}: expected {name} in [0, 1], got a value outside")
    for name in ("ridge_scale_tensor", "ridge_offset_tensor"):
        part = tensors.get(name)
        if part is not None:
            _fail_if(part < 0, f"{op}: expected {name} >= 0, got a negative value")
    for name in ("initial_kk", "kk"):
        kk = tensors.get(name)
        if kk is not None:
            asymmetry = (kk - kk.mT).abs().amax(dim=(-2, -1))
            bound = 1e-4 * kk.abs().amax(dim=(-2, -1))
            _fail_if(
                asymmetry > bound, f"{op}: expected {name} to be symmetric, got a state that differs from its transpose"
            )
