"""Floating-point operations of the operators (MATH.md §6), and what ``torch.utils.flop_counter`` is told of them.

They are those of the chunked algorithm with ``CHUNK`` tokens a chunk, whatever the implementation does: a multiply-add
is two operations, products of tokens of a chunk are counted in full, and what an implementation computes anew for want
of memory is not counted, but for the solve of a backward for which nothing was saved. Per token and query head, for key
dimension D, value dimension V (0: the solve alone) and n applications of the solve's operator.

``torch.utils.flop_counter`` imports Triton, which ``import gka_ops`` must not. So the formulas are registered when it
is imported, or at once where it has been.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from gka_ops.numerics import forward_iterations

CHUNK = 64


def step_flops(D: int) -> int:
    """One application of the operator that the solve iterates: (H_t + λ_t I) d of every token."""
    return 2 * D * D + 4 * CHUNK * D


def forward_flops(D: int, V: int, n: int, final_kk: bool = False) -> int:
    """``chunk_gka``, or ``chunk_solve`` with V = 0. Without a solve H matters as a final state alone."""
    C = CHUNK
    of_values = 4 * D * V + 2 * C * D + 2 * C * V if V > 0 else 0  # U, and the read-out
    if n == 0:
        return of_values + (2 * D * D if final_kk else 0)
    return of_values + n * step_flops(D) + 4 * D * D + 2 * C * D  # H, ‖H_t‖_F and the solve


def backward_flops(D: int, V: int, n: int, d_final_kk: bool = False) -> int:
    """The backward of either. ``n``: as it makes them, ``numerics.backward_iterations`` of the forward's."""
    C = CHUNK
    of_values = 8 * D * V + 6 * C * D + 6 * C * V if V > 0 else 0
    if n == 0:
        return of_values + (2 * D * D if d_final_kk else 0)
    return of_values + n * step_flops(D) + 8 * D * D + 12 * C * D


def decode_flops(D: int, V: int, n: int) -> int:
    """``recurrent_gka``: both states advance whether or not there is a solve."""
    solve = 2 * n * D * D + 2 * D * D if n > 0 else 0
    return solve + 3 * D * (D + V) + 2 * D * V


# --------------------------------------------------------------------------------------------------------- registration
def _of_call(named: dict[str, Any]) -> tuple[int, int, int, int]:
    """Rows (tokens of all query heads), D, V and the number of applications of a call."""
    B, T, H, D = named["q"].shape
    return B * T * H, D, named["v"].shape[-1] if "v" in named else 0, named["num_iter"]


def _forward(named: dict[str, Any]) -> int:
    rows, D, V, n = _of_call(named)
    return rows * forward_flops(D, V, n, named["output_final_state"])


def _backward(named: dict[str, Any]) -> int:
    rows, D, V, n = _of_call(named)
    solves_again = forward_flops(D, 0, forward_iterations(n)) if n > 0 and named["x"].numel() == 0 else 0
    return rows * (backward_flops(D, V, n, named["d_final_kk"] is not None) + solves_again)


def _decode(named: dict[str, Any]) -> int:
    rows, D, V, n = _of_call(named)
    return rows * decode_flops(D, V, n)


_FORMULAS: dict[str, Callable[[dict[str, Any]], int]] = {
    "chunk_solve": _forward, "chunk_solve_backward": _backward, "chunk_gka": _forward, "chunk_gka_backward": _backward,
    "recurrent_gka": _decode,
}  # fmt: skip


def _register(op: str, formula: Callable[[dict[str, Any]], int]) -> None:
    from torch.utils.flop_counter import register_flop_formula

    packet = getattr(torch.ops.gka, op)
    names = [argument.name for argument in packet.default._schema.arguments]

    def counted(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return formula(dict(zip(names, args, strict=False)) | kwargs)

    register_flop_formula(packet, get_raw=True)(counted)


def _register_all() -> None:
    for op, formula in _FORMULAS.items():
        _register(op, formula)


_FLOP_COUNTER = "torch.utils.flop_counter"


class _WhenImported(importlib.abc.MetaPathFinder):
    """Registers the formulas as soon as the module that takes them has been executed."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _FLOP_COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register_all()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def tell_flop_counter() -> None:
    """Registers the formulas of the operators, now or when they are first asked for."""
    if _FLOP_COUNTER in sys.modules:
        _register_all()
    else:
        sys.meta_path.insert(0, _WhenImported())
