"""Modifiers: callables of the user's that say what λ, the decay, queries or keys are, as FlexAttention has for scores.

``decay_mod``, ``query_mod`` and ``key_mod`` change operands before the operator sees them, and are PyTorch like any
other. ``ridge_mod`` cannot: ‖H_t‖_F exists inside the kernels alone. It is called once with an :class:`Expression` in
the place of ‖H_t‖_F, which notes what is done to it; everything else that it computes is a tensor, and stays one. The
note is the program, a text such as ``(maximum (mul 0.02 F) a0)``; the tensors that meet the expression are its leaves
a0, a1, … [B, T, H]. Program and leaves are arguments of the operator, so that a graph that holds the call is complete
without this process: Dynamo traces the callable as it traces anything, and exported programs contain the text.

A program has one value, λ = f(F, a), which both implementations replace by its tangent: with r = ∂f/∂F and b = λ − r F,
λ = r F + b is the ridge that the equations are written for (docs/math.md §1), in its value and in its derivatives. What
is left of the gradient is dλ ∂f/∂aᵢ for each leaf.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_LEAVES = 8
"""More would only be forgotten factors: what does not meet ‖H_t‖_F is computed before, however many tensors it has."""

Mod: TypeAlias = Callable[[Any, Tensor, Tensor, Tensor], Any]
"""``mod(x, b, h, t)``: x as the argument says, and indices that broadcast with it: of the batch row, head and token."""

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "neg": torch.neg, "abs": torch.abs, "exp": torch.exp, "log": torch.log, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt,
    "square": torch.square, "reciprocal": torch.reciprocal, "sigmoid": torch.sigmoid, "tanh": torch.tanh,
    "softplus": F.softplus,
}  # fmt: skip
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "maximum": torch.maximum,
    "minimum": torch.minimum, "lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge,
}  # fmt: skip
_ARITIES = {**dict.fromkeys(_UNARY, 1), **dict.fromkeys(_BINARY, 2), "where": 3}
_OTHER_NAMES = {
    "true_divide": "div", "truediv": "div", "divide": "div", "multiply": "mul", "subtract": "sub", "negative": "neg",
    "absolute": "abs", "less": "lt", "less_equal": "le", "greater": "gt", "greater_equal": "ge", "clip": "clamp",
}  # fmt: skip


def _functions() -> dict[Any, str]:
    """PyTorch's functions and methods by the names of operations; those like ``rsub`` reverse their operands."""
    names = [*_ARITIES, *_OTHER_NAMES, "clamp", "clamp_min", "clamp_max", "pow", "radd", "rsub", "rmul", "rtruediv"]
    found = {}
    for name in names:
        for owner in (torch, Tensor, F):
            for spelled in (name, f"__{name}__"):
                if hasattr(owner, spelled):
                    found[getattr(owner, spelled)] = _OTHER_NAMES.get(name, name)
    return found


_FUNCTIONS = _functions()
_SUPPORTED = ", ".join(sorted([*_ARITIES, "clamp", "pow with a number"]))


# -------------------------------------------------------------------------------------------------------- expressions
class Expression:
    """What a ``ridge_mod`` computes from ‖H_t‖_F so far. Takes the pointwise operators and functions of PyTorch.

    Attributes:
        program: its text; leaves are written ``a0``, ``a1``, …
        leaves: the tensors that they stand for.
    """

    def __init__(self, program: str, leaves: list[Tensor]) -> None:
        self.program = program
        self.leaves = leaves

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Expression:
        if function not in _FUNCTIONS:
            raise TypeError(f"ridge_mod: expected one of {_SUPPORTED}, got {function}")
        return _call(_FUNCTIONS[function], args, kwargs or {})

    def __add__(self, other: Any) -> Expression:
        return _combine("add", self, other)

    def __radd__(self, other: Any) -> Expression:
        return _combine("add", other, self)

    def __sub__(self, other: Any) -> Expression:
        return _combine("sub", self, other)

    def __rsub__(self, other: Any) -> Expression:
        return _combine("sub", other, self)

    def __mul__(self, other: Any) -> Expression:
        return _combine("mul", self, other)

    def __rmul__(self, other: Any) -> Expression:
        return _combine("mul", other, self)

    def __truediv__(self, other: Any) -> Expression:
        return _combine("div", self, other)

    def __rtruediv__(self, other: Any) -> Expression:
        return _combine("div", other, self)

    def __pow__(self, exponent: Any) -> Expression:
        return _power(self, exponent)

    def __neg__(self) -> Expression:
        return _combine("neg", self)

    def __abs__(self) -> Expression:
        return _combine("abs", self)

    def __lt__(self, other: Any) -> Expression:
        return _combine("lt", self, other)

    def __le__(self, other: Any) -> Expression:
        return _combine("le", self, other)

    def __gt__(self, other: Any) -> Expression:
        return _combine("gt", self, other)

    def __ge__(self, other: Any) -> Expression:
        return _combine("ge", self, other)

    def __bool__(self) -> bool:
        raise TypeError("ridge_mod: expected no control flow on ‖H‖, which has no value here; use torch.where")

    def __float__(self) -> float:
        raise TypeError(
            "ridge_mod: expected no number to be made of ‖H‖, which has no value here; use tensor functions"
        )

    def __getitem__(self, index: Any) -> Expression:
        raise TypeError(
            "ridge_mod: expected ‖H‖ of the token itself alone, got an index into it; other tokens' are not there"
        )

    def __getattr__(self, name: str) -> Any:
        if _OTHER_NAMES.get(name, name) in _ARITIES or name in ("clamp", "clip", "pow", "clamp_min", "clamp_max"):
            return functools.partial(_call_method, _OTHER_NAMES.get(name, name), self)
        raise AttributeError(f"ridge_mod: expected one of {_SUPPORTED}, got {name}")


def _call_method(name: str, *args: Any, **kwargs: Any) -> Expression:
    return _call(name, args, kwargs)


def _call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Expression:
    if name == "clamp":
        return _clamp(*args, **kwargs)
    if name == "clamp_min" and not kwargs:
        return _clamp(args[0], args[1])
    if name == "clamp_max" and not kwargs:
        return _clamp(args[0], None, args[1])
    if name == "pow" and not kwargs:
        return _power(*args)
    if name in ("radd", "rsub", "rmul", "rtruediv"):
        return _combine("div" if name == "rtruediv" else name[1:], args[1], args[0])
    if _ARITIES.get(name) != len(args) or kwargs:
        raise TypeError(f"ridge_mod: expected one of {_SUPPORTED}, got {name} with {len(args) + len(kwargs)} arguments")
    return _combine(name, *args)


def _combine(name: str, *args: Any) -> Expression:
    parts: list[str] = [name]
    leaves: list[Tensor] = []
    for arg in args:
        part = arg
        if isinstance(arg, Tensor):
            part = Expression("a0", [arg])
        elif not isinstance(arg, Expression):
            part = Expression(_number(arg), [])
        parts.append(_renumbered(part.program, len(leaves)))
        leaves = leaves + part.leaves
    return Expression("(" + " ".join(parts) + ")", leaves)


def _renumbered(program: str, first: int) -> str:
    """``program`` with leaves that are counted from ``first``."""
    words = program.replace("(", "( ").replace(")", " )").split(" ")
    words = [f"a{int(word[1:]) + first}" if word[0] == "a" and word[1:].isdigit() else word for word in words]
    return " ".join(words).replace("( ", "(").replace(" )", ")")


def _number(value: Any) -> str:
    if not isinstance(value, (int, float)):
        raise TypeError(f"ridge_mod: expected tensors and numbers beside ‖H‖, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"ridge_mod: expected finite numbers, got {value}")
    return repr(float(value))


def _clamp(x: Any, min: Any = None, max: Any = None) -> Expression:
    if min is not None:
        x = _combine("maximum", x, min)
    return x if max is None else _combine("minimum", x, max)


def _power(base: Any, exponent: Any) -> Expression:
    if not isinstance(base, Expression) or not isinstance(exponent, (int, float)):
        raise TypeError("ridge_mod: expected a number as the exponent of ‖H‖; use torch.exp for others")
    if exponent == 2:
        return _combine("square", base)
    return _combine("exp", _combine("mul", float(exponent), _combine("log", base)))


# ------------------------------------------------------------------------------------------------------- what is called
def indices(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Batch row [B, 1, 1], head [H] and token [T, 1] of ``x`` [B, T, H, ...], int64."""
    B, T, H = x.shape[:3]
    b, h, t = (torch.arange(n, device=x.device) for n in (B, H, T))
    return b[:, None, None], h, t[:, None]


def ridge_program(op: str, mod: Mod, q: Tensor) -> tuple[str, Tensor | None]:
    """The program of a ``ridge_mod``, and its leaves [B, T, H, n] in at least fp32; ``None`` where it has none.

    Raises:
        TypeError: it is no pointwise function of ‖H‖ that the kernels know.
        ValueError: a tensor in it does not broadcast to [B, T, H], or there are too many.
    """
    found = mod(Expression("F", []), *indices(q))
    if not isinstance(found, Expression):
        found = _combine("add", found, 0.0)
    leaves = found.leaves
    if len(leaves) > MAX_LEAVES:
        raise ValueError(
            f"{op}: expected at most {MAX_LEAVES} tensors that meet ‖H‖ in ridge_mod, got {len(leaves)}; what does not "
            "depend on ‖H‖ can be computed first"
        )
    if not leaves:
        return found.program, None
    shape, dtype = q.shape[:3], torch.promote_types(q.dtype, torch.float32)
    return found.program, torch.stack([_broadcast(op, leaf, shape).to(dtype) for leaf in leaves], dim=-1)


def _broadcast(op: str, leaf: Tensor, shape: torch.Size) -> Tensor:
    if leaf.ndim > 3 or any(n not in (1, size) for n, size in zip(leaf.shape[::-1], shape[::-1], strict=False)):
        raise ValueError(
            f"{op}: expected tensors in ridge_mod that broadcast to [B, T, H] = {list(shape)}, got {list(leaf.shape)}"
        )
    return leaf.expand(shape)


def apply_mod(op: str, name: str, mod: Mod, x: Tensor) -> Tensor:
    """``x`` [B, T, heads] or [B, T, heads, D] as ``mod`` wants it.

    Raises:
        ValueError: what it returns has another shape.
        TypeError: what it returns is no tensor, or one of another dtype.
    """
    b, h, t = indices(x)
    found = mod(x, b, h, t) if x.ndim == 3 else mod(x, b[..., None], h[:, None], t[..., None])
    if not isinstance(found, Tensor):
        raise TypeError(f"{op}: expected {name} to return a tensor, got {type(found).__name__}")
    if found.shape != x.shape:
        raise ValueError(
            f"{op}: expected {name} to return a tensor like its first argument, {list(x.shape)}, got "
            f"{list(found.shape)}; it may use broadcasting, but neither sum nor index that argument"
        )
    return found.to(x.dtype)


# ---------------------------------------------------------------------------------------------------------- programs
Node: TypeAlias = "float | str | tuple[Any, ...]"
"""A number, a variable (``F`` or ``a0``, …), or an operation: its name and its operands."""

_WORD = re.compile(r"\(|\)|[^\s()]+")
_VARIABLE = re.compile(r"F|a\d+")
ZERO, ONE = 0.0, 1.0


@functools.lru_cache(maxsize=256)
def parse(program: str) -> Node:
    """The tree of a program. Raises ``ValueError`` for any other text."""
    words = _WORD.findall(program)
    node, rest = _parse(program, words)
    if rest:
        raise ValueError(f"expected one expression, got {program!r}")
    return node


def _parse(program: str, words: Sequence[str]) -> tuple[Node, Sequence[str]]:
    if not words or words[0] == ")":
        raise ValueError(f"expected an operand, got {program!r}")
    word, rest = words[0], words[1:]
    if word != "(":
        if _VARIABLE.fullmatch(word):
            return word, rest
        try:
            return float(word), rest
        except ValueError:
            raise ValueError(f"expected a number or variable, got {word!r} in {program!r}") from None
    if not rest or rest[0] not in _ARITIES:
        raise ValueError(f"expected an operation after '(' in {program!r}")
    name, rest = rest[0], rest[1:]
    operands = []
    for _ in range(_ARITIES[name]):
        operand, rest = _parse(program, rest)
        operands.append(operand)
    if not rest or rest[0] != ")":
        raise ValueError(f"expected {_ARITIES[name]} operands of {name} in {program!r}")
    return (name, *operands), rest[1:]


def evaluate(node: Node, variables: dict[str, Tensor]) -> Tensor:
    """The value of a tree, a tensor like ``variables["F"]`` (a truth value for a comparison)."""
    if isinstance(node, str):
        return variables[node]
    if isinstance(node, float):
        return torch.full_like(variables["F"], node)
    name, *operands = node
    values = [evaluate(operand, variables) for operand in operands]
    functions: dict[str, Callable[..., Any]] = {"where": torch.where, **_UNARY, **_BINARY}
    value: Tensor = functions[name](*values)
    return value


def derivative(node: Node, variable: str) -> Node:
    """∂node/∂variable. At a kink it is that of the side of the first operand."""
    if not isinstance(node, tuple):
        return ONE if node == variable else ZERO
    name, *operands = node
    if name in ("lt", "le", "gt", "ge"):
        return ZERO
    if name == "where":
        return _select(operands[0], derivative(operands[1], variable), derivative(operands[2], variable))
    x = operands[0]
    dx = derivative(x, variable)
    if name in _UNARY:
        return _times(_slope(name, x, node), dx)
    y = operands[1]
    dy = derivative(y, variable)
    match name:
        case "add":
            return _plus(dx, dy)
        case "sub":
            return _plus(dx, _times(-ONE, dy))
        case "mul":
            return _plus(_times(dx, y), _times(x, dy))
        case "div":
            return _plus(_times(dx, ("reciprocal", y)), _times(_times(-ONE, dy), ("div", node, y)))
        case "maximum":
            return _select(("ge", x, y), dx, dy)
        case _:
            return _select(("le", x, y), dx, dy)  # minimum


def _slope(name: str, x: Node, y: Node) -> Node:
    """dy/dx of y = name(x)."""
    match name:
        case "neg":
            return -ONE
        case "abs":
            return _select(("ge", x, ZERO), ONE, -ONE)
        case "exp":
            return y
        case "log":
            return ("reciprocal", x)
        case "sqrt":
            return ("div", 0.5, y)
        case "rsqrt":
            return ("div", ("mul", -0.5, y), x)
        case "square":
            return ("mul", 2.0, x)
        case "reciprocal":
            return ("neg", ("square", y))
        case "sigmoid":
            return ("mul", y, ("sub", ONE, y))
        case "tanh":
            return ("sub", ONE, ("square", y))
        case _:
            return ("sigmoid", x)  # softplus


def _plus(x: Node, y: Node) -> Node:
    return y if x == ZERO else x if y == ZERO else ("add", x, y)


def _times(x: Node, y: Node) -> Node:
    if ZERO in (x, y):
        return ZERO
    return y if x == ONE else x if y == ONE else ("mul", x, y)


def _select(condition: Node, x: Node, y: Node) -> Node:
    return x if x == y else ("where", condition, x, y)


def leaf_count(node: Node) -> int:
    if isinstance(node, tuple):
        return max(leaf_count(operand) for operand in node[1:])
    return int(node[1:]) + 1 if isinstance(node, str) and node != "F" else 0


def linearised(program: str, fro: Tensor, leaves: Tensor | None) -> tuple[Tensor, Tensor]:
    """r = ∂λ/∂F, 0 where H vanishes, and b = λ − r F of every token, like ``fro`` [B, T, H]."""
    node, variables = parse(program), _variables(fro, leaves)
    slope = torch.where(fro > 0, evaluate(derivative(node, "F"), variables), 0.0)
    return slope, evaluate(node, variables) - slope * fro


def leaf_gradients(program: str, d_lambda: Tensor, fro: Tensor, leaves: Tensor) -> Tensor:
    """dλ ∂λ/∂aᵢ [B, T, H, n] from dλ [B, T, H]."""
    node, variables = parse(program), _variables(fro, leaves)
    partial = [evaluate(derivative(node, f"a{i}"), variables) for i in range(leaves.shape[-1])]
    return (d_lambda[..., None] * torch.stack(partial, dim=-1)).to(leaves.dtype)


def _variables(fro: Tensor, leaves: Tensor | None) -> dict[str, Tensor]:
    parts = () if leaves is None else leaves.unbind(-1)
    return {"F": fro, **{f"a{i}": part.to(fro.dtype) for i, part in enumerate(parts)}}
