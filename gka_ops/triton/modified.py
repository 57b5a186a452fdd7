"""Kernels with a modifier inside: λ from the program of a ``ridge_mod`` (``gka_ops.modifiers``) instead of r F + b.

A kernel asks two functions about the ridge, ``load_ridge`` and ``linearised``. A modified kernel is the same source
with other functions of these names, whose own source is written here from the program. So the kernels know nothing of
modifiers, and a call without one runs what it always ran.

What is written depends on the program alone, whose grammar has no names but its own. Triton caches the machine code on
disk by the source of kernel and functions.
"""

from __future__ import annotations

import functools
import hashlib
import linecache
from types import FunctionType
from typing import Any

import torch
import triton
import triton.language as tl

from gka_ops import modifiers
from gka_ops.modifiers import Node

_OPERATIONS = {
    "neg": "-{0}", "abs": "tl.abs({0})", "exp": "tl.exp({0})", "log": "tl.log({0})", "sqrt": "tl.sqrt({0})",
    "rsqrt": "tl.rsqrt({0})", "square": "{0} * {0}", "reciprocal": "1 / {0}", "sigmoid": "tl.sigmoid({0})",
    "tanh": "2 * tl.sigmoid(2 * {0}) - 1",
    "softplus": "tl.maximum({0}, 0.0) + tl.log(1 + tl.exp(-tl.abs({0})))",
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}", "maximum": "tl.maximum({0}, {1})",
    "minimum": "tl.minimum({0}, {1})", "lt": "{0} < {1}", "le": "{0} <= {1}", "gt": "{0} > {1}", "ge": "{0} >= {1}",
    "where": "tl.where({0}, {1}, {2})",
}  # fmt: skip


def with_modifier(kernel: Any, ridge_mod: str) -> Any:
    """``kernel`` itself without a program, else the kernel that takes λ from it."""
    return _modified(kernel, ridge_mod) if ridge_mod else kernel


@functools.lru_cache(maxsize=256)
def _modified(kernel: Any, ridge_mod: str) -> Any:
    functions = _functions(ridge_mod)
    plain = kernel.fn
    copy = FunctionType(plain.__code__, {**plain.__globals__, **functions}, plain.__name__, plain.__defaults__)
    copy.__module__, copy.__doc__ = plain.__module__, plain.__doc__
    copy.__annotations__, copy.__kwdefaults__ = plain.__annotations__, plain.__kwdefaults__
    copy.__qualname__ = f"{plain.__qualname__}_{_digest(ridge_mod)}"
    if hasattr(kernel, "kwargs"):  # interpreted
        return type(kernel)(copy, **kernel.kwargs)
    options = ("do_not_specialize", "do_not_specialize_on_alignment", "debug", "noinline", "launch_metadata")
    return type(kernel)(copy, **{option: getattr(kernel, option) for option in options})


def _digest(ridge_mod: str) -> str:
    return hashlib.sha256(ridge_mod.encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=256)
def _functions(ridge_mod: str) -> dict[str, Any]:
    """``load_ridge`` and ``linearised`` of a program."""
    text, name = source(ridge_mod), f"<ridge_mod {_digest(ridge_mod)}>"
    linecache.cache[name] = len(text), None, text.splitlines(keepends=True), name  # Triton reads a function's source
    scope: dict[str, Any] = {"__name__": __name__, "triton": triton, "tl": tl}
    exec(compile(text, name, "exec"), scope)
    return {function: scope[function] for function in ("load_ridge", "linearised")}


def source(ridge_mod: str) -> str:
    """The two functions of a program, as Triton code."""
    node = modifiers.parse(ridge_mod)
    leaves = [f"a{i}" for i in range(modifiers.leaf_count(node))]
    count = len(leaves)
    loads = "".join(f"tl.load(p + o_row * {count} + {i}, mask=m_t, other=1.0), " for i in range(count))
    lines: list[str] = []
    names: dict[Node, str] = {}
    value = _emit(node, names, lines)
    slope = _emit(modifiers.derivative(node, "F"), names, lines)
    body = [
        *(f"{leaf} = leaves[{i}]" for i, leaf in enumerate(leaves)),
        *lines,
        f"slope = tl.where(F > 0, {slope}, 0.0)",
    ]
    return "\n".join([
        "@triton.jit",
        "def load_ridge(p, value, o_row, m_t, i_h, PER_TOKEN: tl.constexpr):",
        "    if p is None:",
        "        return value",
        "    else:",
        f"        return ({loads})" if leaves else "        return value",
        "", "",
        "@triton.jit",
        "def linearised(F, leaves, offset):",
        *(f"    {line}" for line in body),
        f"    return slope, {value} - slope * F",
        "",
    ])  # fmt: skip


def _emit(node: Node, names: dict[Node, str], lines: list[str]) -> str:
    """The expression or variable that stands for ``node``; what is computed for it goes to ``lines``, once."""
    if isinstance(node, str):
        return node
    if not isinstance(node, tuple) or not _variable(node):
        return repr(float(modifiers.evaluate(node, {"F": torch.zeros((), dtype=torch.float64)})))
    if node not in names:
        name, *operands = node
        text = _OPERATIONS[name].format(*(_emit(operand, names, lines) for operand in operands))
        names[node] = f"t{len(names)}"
        lines.append(f"{names[node]} = {text}")
    return names[node]


def _variable(node: Node) -> bool:
    """Whether a node's value depends on a variable."""
    return isinstance(node, str) or (isinstance(node, tuple) and any(_variable(operand) for operand in node[1:]))
