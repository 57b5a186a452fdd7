"""Runs candidates on a card: the bench of ``tuner``. It belongs into a process of its own, whose launches it changes.

An operator is run with the candidate forced. Of its launches, those of the kernel in question are picked: they are
compiled only, or repeated with the same arguments and timed. A call may launch a kernel several times, for different
ends (the scan of a backward: of U, then of H), and a candidate that suits one of them may not suit the others.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import gka_ops
from gka_ops.autotune import choice, space
from gka_ops.autotune.key import Key
from gka_ops.autotune.space import Parameters
from gka_ops.autotune.tuner import HEADS
from gka_ops.triton import launch, launcher, slabs

_operators: Any = launch  # whose function ``launch`` is replaced

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_MOST_ELEMENTS = 2**29  # of q; longer sequences are cut for timing, where programs come in many waves anyway
_MOST_INACCURATE = 1.25  # times the error of the heuristic
_LEAST_ERROR = 1e-6
_VANISHING = 1e-30  # the square of a result's size: without a solve α has no gradient
_WARM_UP, _SAMPLES, _REPEATS = 3, 5, 10
_AHEAD = 2_000_000  # cycles that the card waits, so that the host has queued the launches when they begin


class Bench:
    """See ``tuner.Bench``. ``device``: ``cpu`` runs Triton's interpreter, which cannot compile or time."""

    def __init__(self, device: str = "cuda") -> None:
        self._device = device
        self._exact: dict[Hashable, dict[str, Tensor]] = {}
        self._allowed: dict[Hashable, dict[str, float]] = {}
        self._timed: Hashable = None
        self._inputs: dict[str, Any] = {}
        launcher._replayable = lambda tensor: False  # every launch passes by ``launch``

    def compile(self, key: Key, parameters: Parameters) -> dict[str, int]:
        """All builds that a call wants: slabs of a backward want several. The most of each number counts."""
        found: dict[str, int] = {}
        for kernel, grid, arguments in self._launches(key, parameters):
            binary = kernel.warmup(grid=grid, **arguments)
            binary.run  # noqa: B018  (a property that loads)
            used = {"registers": binary.n_regs, "spills": binary.n_spills, "shared_memory": binary.metadata.shared}
            found = {name: max(number, found.get(name, 0)) for name, number in used.items()}
        return found

    def _launches(self, key: Key, parameters: Parameters) -> list[tuple[Any, Any, dict[str, Any]]]:
        """The kernel, grid and arguments of every launch of the kernel in a call, of which none is done."""
        found: list[tuple[Any, Any, dict[str, Any]]] = []
        inputs = _inputs(key, self._device, small=True)
        with (
            _cut_like(key),
            choice.override(key.kernel, **parameters),
            _watched(key, lambda *l: found.append(l), launching=False),
        ):
            _results(key, inputs, "triton")
        if not found:
            raise RuntimeError(f"{key} is not launched by such a call")
        return found

    def check(self, key: Key, parameters: Parameters) -> str | None:
        inputs, problem = _inputs(key, self._device, small=True), _problem(key)
        launches = []
        with _cut_like(key):
            if problem not in self._allowed:
                wide = {
                    name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
                    for name, value in inputs.items()
                }
                self._exact[problem] = _results(key, wide, "reference")
                ordinary = _errors(_results(key, inputs, "triton"), self._exact[problem])
                self._allowed[problem] = {name: _MOST_INACCURATE * e + _LEAST_ERROR for name, e in ordinary.items()}
            with choice.override(key.kernel, **parameters), _watched(key, lambda *launched: launches.append(launched)):
                errors = _errors(_results(key, inputs, "triton"), self._exact[problem])
        if not launches:
            raise RuntimeError(f"{key} is not launched by such a call")
        allowed = self._allowed[problem]
        wrong = [
            f"{name} differs by {error:.1e}, of {allowed[name]:.1e} allowed"
            for name, error in errors.items()
            if not error <= allowed[name]
        ]
        return f"wrong: {'; '.join(wrong)}" if wrong else None

    def time(self, key: Key, parameters: Parameters) -> float:
        """Microseconds of a launch, as the mean of all of a call. Those that are alike are measured once."""
        if self._timed != _problem(key):
            self._timed, self._inputs = _problem(key), {}  # the old ones are let go before the new ones come
            self._inputs = _inputs(key, self._device, small=False)
        found: dict[Hashable, float] = {}
        times: list[float] = []

        def timed(kernel: Any, grid: Any, arguments: dict[str, Any]) -> None:
            kind = grid, _kind(arguments)
            if kind not in found:
                found[kind] = _microseconds(kernel, grid, arguments)
            times.append(found[kind])

        with choice.override(key.kernel, **parameters), _watched(key, timed):
            _results(key, self._inputs, "triton")
        if not times:
            raise RuntimeError(f"{key} is not launched by such a call")
        return statistics.mean(times)


def _kind(arguments: dict[str, Any]) -> Hashable:
    """What makes launches of a kernel alike: which operands there are, and which switches are on."""
    return frozenset((name, isinstance(value, Tensor), value is True) for name, value in arguments.items())


def _microseconds(kernel: Any, grid: Any, arguments: dict[str, Any]) -> float:
    for _ in range(_WARM_UP):
        kernel[grid](**arguments)
    samples: list[float] = []
    for _ in range(_SAMPLES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_AHEAD)
        start.record()
        for _ in range(_REPEATS):
            kernel[grid](**arguments)
        end.record()
        end.synchronize()
        samples.append(1e3 * start.elapsed_time(end) / _REPEATS)
    return statistics.median(samples)


@contextmanager
def _watched(key: Key, see: Callable[[Any, Any, dict[str, Any]], None], *, launching: bool = True) -> Iterator[None]:
    """Shows the launches of a key's kernel in its pass, before they happen; without ``launching`` none happens."""
    ordinary = _operators.launch
    _, function = space.KERNELS[key.kernel].source

    def watching(kernel: Any, grid: Any, /, **arguments: Any) -> None:
        in_pass = key.when != "backward" or torch._C._current_graph_task_id() != -1
        if kernel.fn.__name__ == function and in_pass:
            see(kernel, grid, arguments)
        if launching:
            ordinary(kernel, grid, **arguments)

    _operators.launch = watching
    try:
        yield
    finally:
        _operators.launch = ordinary


def _problem(key: Key) -> Hashable:
    """What the inputs and results of a call with the key's options depend on: kernels of one call may share them."""
    return replace(key, kernel=""), _solves(key), space.KERNELS[key.kernel].values


def _sequences_and_heads(key: Key) -> tuple[int, int]:
    H = min(key.N, HEADS)
    return key.N // H, H


@contextmanager
def _cut_like(key: Key) -> Iterator[None]:
    """Cuts the backward of a few tokens into slabs where that of all of the key's is: kernels carry states between."""
    sequences, H = _sequences_and_heads(key)
    if key.when != "backward" or slabs.slab_count(sequences, key.T, H, solve=_solves(key)) == 1:
        yield
        return
    ordinary = slabs.PROGRAMS, slabs.LEAST_CHUNKS
    slabs.PROGRAMS, slabs.LEAST_CHUNKS = 1, 2
    try:
        yield
    finally:
        slabs.PROGRAMS, slabs.LEAST_CHUNKS = ordinary


def _inputs(key: Key, device: str, *, small: bool) -> dict[str, Any]:
    """Arguments of a call that launches the kernel with the key's options; few tokens, or as many as the key says."""
    sequences, H = _sequences_and_heads(key)
    length = 3 * key.C + 17 if small and key.when != "decode" else key.T
    if small:
        sequences = min(sequences, 2)
    if not small and key.when != "decode":
        length = max(key.C, min(length, _MOST_ELEMENTS // (sequences * H * key.D)))
    B, T = sequences, length
    options = set(key.options)
    if "varlen" in options:
        sequences = max(sequences, 2)
        B, T = 1, length * (sequences if small else 1)
    dtype = _DTYPES[key.dtype]
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(kind)

    Hkv = H // 2 if "gqa" in options else H
    V = key.V if space.KERNELS[key.kernel].values else key.D
    q, k = normal(B, T, H, key.D), normal(B, T, Hkv, key.D)
    if "l2norm" not in options:
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    inputs: dict[str, Any] = {"q": q.to(dtype), "k": k.to(dtype)}
    if V:
        inputs["v"] = normal(B, T, Hkv, V, kind=dtype)
    for name in ("alpha", "beta"):
        if name in options:
            inputs[name] = normal(B, T, H).sigmoid()
    if "gate" in options:
        inputs |= {"log_decay": normal(B, T, H), "A_log": normal(H) - 4, "dt_bias": normal(H)}
    elif "decay" in options:
        inputs["log_decay"] = -0.02 * normal(B, T, H).sigmoid()
    tensors = []
    if "ridge_token" in options:
        tensors.append(0.02 + 0.02 * normal(B, T, H).sigmoid())
    if "ridge_head" in options:
        tensors.append(0.02 + 0.02 * normal(H).sigmoid())
    inputs |= dict(zip(("ridge_scale", "ridge_offset"), tensors, strict=False))
    if "ridge_offset" in options:
        inputs.setdefault("ridge_offset", 0.02)
    if "varlen" in options:
        bounds = [T * i // sequences for i in range(sequences + 1)]
        inputs["cu_seqlens"] = torch.tensor(bounds, device=device)
    if key.when == "decode":
        kk = normal(B, H, key.D, key.D)
        inputs |= {"kk": kk @ kk.mT / key.D, "kv": normal(B, H, key.D, V)}
    return inputs


def _results(key: Key, inputs: dict[str, Any], impl: str) -> dict[str, Tensor]:
    """What a call returns, and the gradients of its inputs where the key is one of a backward."""
    backward = key.when == "backward"
    given = {
        name: value.detach().clone().requires_grad_(backward and value.is_floating_point())
        if isinstance(value, Tensor)
        else value
        for name, value in inputs.items()
    }
    call: dict[str, Any] = dict(given)
    scale, offset = call.pop("ridge_scale", 0.02), call.pop("ridge_offset", 0.0)
    least = 0.02 if isinstance(scale, Tensor) else None
    A_log, dt_bias = call.pop("A_log", None), call.pop("dt_bias", None)
    call |= {
        "ridge": gka_ops.Ridge(scale, offset, least),
        "gate": None if A_log is None else gka_ops.DecayGate(A_log, dt_bias),
        "num_iter": "auto" if _solves(key) else 0,
        "qk_l2norm": "l2norm" in key.options,
        "impl": impl,
    }
    with torch.set_grad_enabled(backward):
        if key.when == "decode":
            state = gka_ops.GKAState(call.pop("kk"), call.pop("kv"))
            output = gka_ops.recurrent_gka(**call, state=state)
            return {"output": output, "kk": state.kk, "kv": state.kv}
        operator: Any = gka_ops.chunk_gka if "v" in call else gka_ops.chunk_solve
        output = operator(**call)[0]
        if not backward:
            return {"output": output}
        generator = torch.Generator().manual_seed(1)
        output.backward(torch.randn(output.shape, generator=generator).to(output.device, output.dtype))
    return {name: value.grad for name, value in given.items() if isinstance(value, Tensor) and value.grad is not None}


def _solves(key: Key) -> bool:
    return "solve" in key.options or "solve" not in space.KERNELS[key.kernel].options


def _errors(results: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """‖Δ‖/‖·‖ of every result, and of the token for which it is largest."""
    errors = {}
    for name, value in results.items():
        reference = exact[name]
        rows = reference.double().reshape(-1, reference.shape[-1])
        difference = value.double().reshape(rows.shape) - rows
        size = rows.square().sum().clamp(min=_VANISHING)
        worst = difference.square().sum(-1).max() * rows.shape[0]
        errors[name] = float((difference.square().sum() / size).sqrt())
        errors[f"a row of {name}"] = float((worst / size).sqrt())
    return errors
