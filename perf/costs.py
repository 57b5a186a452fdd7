"""What a call costs at least: floating-point operations and bytes (MATH.md §6). A multiply-add is two operations.

FLOPs are those of the chunked algorithm (``gka_ops.flops``), which is what every implementation of it works through;
bytes are the operands and results alone, each moved once, so that a share of this floor says how far a call is from
what the card could do, not from what this algorithm could.
"""

from __future__ import annotations

from typing import NamedTuple

from gka_ops.flops import backward_flops, decode_flops, forward_flops
from gka_ops.numerics import backward_iterations

_ELEMENT = {"bf16": 2, "fp16": 2, "fp32": 4}
_GATES = 3 * 4  # log decay, α and β of a token and head, fp32
_STATE = 4  # bytes of an entry


class Shape(NamedTuple):
    """B sequences of T tokens (decode: B sequences, one token each), H query heads, Hkv key/value heads."""

    B: int
    T: int
    H: int
    Hkv: int
    D: int
    V: int
    dtype: str = "bf16"

    @property
    def tokens(self) -> int:
        return self.B * self.T

    @property
    def rows(self) -> int:
        """Tokens of all query heads."""
        return self.tokens * self.H


class Cost(NamedTuple):
    flops: float
    bytes: float

    def floor_seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The time that neither arithmetic nor memory can be faster than."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def _token_bytes(shape: Shape) -> float:
    """q, k, v and the output."""
    D, V = shape.D, shape.V
    return _ELEMENT[shape.dtype] * shape.tokens * (shape.H * (D + V) + shape.Hkv * (D + V))


def gka_forward(shape: Shape, num_iter: int) -> Cost:
    flops = forward_flops(shape.D, shape.V, num_iter)
    return Cost(shape.rows * flops, _token_bytes(shape) + shape.rows * _GATES)


def gka_forward_backward(shape: Shape, num_iter: int) -> Cost:
    """Forward and backward of all six inputs; the backward reads what the forward read and writes as much."""
    flops = backward_flops(shape.D, shape.V, backward_iterations(num_iter))
    forward = gka_forward(shape, num_iter)
    return Cost(forward.flops + shape.rows * flops, 3 * forward.bytes)


def solve_forward(shape: Shape, num_iter: int) -> Cost:
    """``chunk_solve``: x in fp32, no values."""
    D = shape.D
    operands = _ELEMENT[shape.dtype] * shape.tokens * D * (shape.H + shape.Hkv)
    return Cost(shape.rows * forward_flops(D, 0, num_iter), operands + shape.rows * (2 * 4 + 4 * D))


def gka_decode(shape: Shape, num_iter: int) -> Cost:
    """One token of B sequences; both states are read and written."""
    D, V = shape.D, shape.V
    flops = decode_flops(D, V, num_iter)
    states = 2 * _STATE * shape.rows * D * (D + V)
    return Cost(shape.rows * flops, states + _token_bytes(shape) + shape.rows * _GATES)


def attention_forward(shape: Shape) -> Cost:
    """Causal softmax attention: the half of the scores that the mask keeps."""
    scores = shape.B * shape.H * shape.T * (shape.T + 1) / 2
    return Cost(2 * scores * (shape.D + shape.V), _token_bytes(shape))


def attention_forward_backward(shape: Shape) -> Cost:
    """The backward forms the scores again: five products against the forward's two."""
    forward = attention_forward(shape)
    return Cost(3.5 * forward.flops, 3 * forward.bytes)


def attention_decode(shape: Shape, context: int) -> Cost:
    """One token of B sequences over ``context`` keys and values each."""
    D, V = shape.D, shape.V
    cache = _ELEMENT[shape.dtype] * shape.B * context * shape.Hkv * (D + V)
    return Cost(2 * shape.B * shape.H * context * (D + V), cache + _token_bytes(shape))
