"""What one :class:`gka_ops.GatedKalmaNet` layer remembers between calls."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from gka_ops.types import GKAState


class GatedKalmaNetCache(NamedTuple):
    """Memory of one layer for N sequences. Zeros are the start of a sequence; every call advances it in place.

    It is a tuple of fixed buffers, so that it passes through ``torch.compile`` as a pytree and stays valid in a CUDA
    graph. K is the width of the short convolutions.

    Attributes:
        q_tail: [N, H·D, K−1], the last K−1 inputs of the query convolution, oldest first.
        k_tail: [N, Hkv·D, K−1], the same for keys.
        v_tail: [N, Hkv·V, K−1], the same for values.
        state: the operator's state, fp32 (fp64 for an fp64 layer), ``kk`` [N, H, D, D] and ``kv`` [N, H, D, V].
    """

    q_tail: Tensor
    k_tail: Tensor
    v_tail: Tensor
    state: GKAState
