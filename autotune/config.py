"""Launch configurations as data: one frozen dataclass per kernel, and the heuristics that run where no table says more.

A configuration is chosen in Python before the launch; the kernels are plain ``@triton.jit``. The chunk size is part
of the operand class because all chunk kernels of one call must agree on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class KernelConfig:
    """Warps of one program, software-pipelining depth of its loops, and the most registers a thread may have."""

    num_warps: int
    num_stages: int
    max_registers: int | None = None

    def launch_options(self) -> dict[str, int]:
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.max_registers is None else {**options, "maxnreg": self.max_registers}


@dataclass(frozen=True)
class ChunkConfig:
    """Everything the chunk kernels of one ``chunk_gka`` or ``chunk_solve`` call are launched with.

    Attributes:
        chunk: C, tokens a chunk.
        solve_block_s: rows of H that the solves have on the chip at a time: all, which stay there, or each time anew.
        block_s: rows of a key-key state that the token gradients multiply the keys with at a time.
        block_v: columns of a key-value state (of V), and the width of the read-out's steps over V.
        block_state: columns of a state that one program of the forward state pass holds, at most.
        increment_columns: columns of what a chunk adds to the key-key gradient that one program forms.
        scan_entries: entries of a gradient of a state that one program of the scan over chunks holds.
        precision: Triton's ``input_precision`` for fp32 operands.
        solve_async: whether a Hopper card runs the solves' Gluon kernels; they need C = 64 and four warps.
        token_gradients_async: whether, with ``solve_async``, it runs those of the token gradients; for C = 64, D = 128.

    The rest is one :class:`KernelConfig` a kernel. Tables may say another one, and another ``block_state``,
    ``block_s``, ``increment_columns`` or ``scan_entries``, which belong to one kernel each; buffers and numerics
    depend on the others.
    """

    chunk: int
    solve_block_s: int
    block_s: int
    block_v: int
    block_state: int
    increment_columns: int
    scan_entries: int
    precision: str
    solve_async: bool
    token_gradients_async: bool
    state: KernelConfig
    solve: KernelConfig
    readout: KernelConfig
    backward_readout: KernelConfig
    backward_solve: KernelConfig
    backward_state: KernelConfig
    backward_scan: KernelConfig
    backward_value: KernelConfig
    backward_key: KernelConfig
    solve_hopper: KernelConfig
    backward_solve_hopper: KernelConfig
    backward_value_hopper: KernelConfig
    backward_key_hopper: KernelConfig


@dataclass(frozen=True)
class RecurrentConfig:
    """The decode kernel.

    Attributes:
        block_v: columns of U at a time.
        width: neighbouring columns of a state that a thread holds a part of.
        chains: chains of additions that a thread keeps going at once when it sums a column of a state.
    """

    block_v: int
    width: int
    chains: int
    kernel: KernelConfig

    def lanes(self, columns: int) -> int:
        """Threads of one warp that share a column of a tile of so many columns."""
        return min(32, max(1, 32 * self.kernel.num_warps * self.width // columns))


@cache
def chunk_config(padded_d: int, padded_v: int, is_fp32: bool) -> ChunkConfig:
    """The configuration for head dimensions padded to powers of two (≥ 16) and fp16 or fp32 operands.

    NOTE [Hopper miscompile] ptxas 12.8, which Triton 3.6 and 3.7 bring, leaves descriptors of operands in shared memory
    undefined in the read-out if block_v is 16 or 32 (12.9 does not): the output is garbage, or the card reports an
    illegal address. Narrow values are padded to 64 columns; ``tools/check_descriptors.py`` finds nothing there.
    The key-gradient kernel with four warps, D = 32, V = 64 and C = 64 once gave wrong dk on an H100; two or eight
    warps, or C = 32, were right: small heads use two, and ``space.excluded`` leaves four out. No configuration enters
    here without the accuracy tests of ``tests/gpu`` passing on the card.
    """
    large = padded_d > 128 or (is_fp32 and padded_d > 64)
    warps = 8 if padded_d > 128 else 4
    gradient_warps = 8 if padded_d > 64 else 4 if padded_d > 32 else 2
    token_warps = 8 if padded_d > 128 else 4 if padded_d > 32 else 2
    return ChunkConfig(
        chunk=(16 if large else 32) if is_fp32 else 32 if large else 64,
        solve_block_s=padded_d if not (large and is_fp32) else 64 if padded_d <= 128 else 32,
        block_s=min(padded_d, 32 if is_fp32 else 64) if large else padded_d,
        block_v=min(padded_v, 32) if large else min(padded_v, 64) if is_fp32 else 64,
        block_state=128 if padded_d <= 128 else 32 if is_fp32 else 64,
        increment_columns=min(padded_d, 64 if is_fp32 else 128),
        scan_entries=2048,
        precision="tf32x3",
        solve_async=padded_d in (64, 128) and not is_fp32,
        token_gradients_async=padded_d == 128 and not is_fp32,
        state=KernelConfig(num_warps=8 if max(padded_d, padded_v) > 64 else 4, num_stages=3),
        solve=KernelConfig(num_warps=warps, num_stages=1),
        readout=KernelConfig(
            num_warps=warps if is_fp32 else 4,
            num_stages=1,
            max_registers=168 if padded_d <= 128 and not is_fp32 else None,  # three programs a multiprocessor
        ),
        backward_readout=KernelConfig(
            num_warps=gradient_warps,
            num_stages=1,
            max_registers=128 if gradient_warps == 8 and not is_fp32 else None,  # two programs a multiprocessor
        ),
        backward_solve=KernelConfig(num_warps=warps, num_stages=1),
        backward_state=KernelConfig(
            num_warps=gradient_warps, num_stages=1, max_registers=None if is_fp32 or padded_d > 128 else 128
        ),
        backward_scan=KernelConfig(num_warps=4, num_stages=1, max_registers=None if is_fp32 else 80),
        backward_value=KernelConfig(num_warps=token_warps, num_stages=1),
        backward_key=KernelConfig(num_warps=token_warps, num_stages=1),
        solve_hopper=KernelConfig(num_warps=4, num_stages=1),
        backward_solve_hopper=KernelConfig(num_warps=4, num_stages=1),
        backward_value_hopper=KernelConfig(num_warps=4, num_stages=1),
        backward_key_hopper=KernelConfig(num_warps=4, num_stages=1),
    )


@cache
def recurrent_config(padded_d: int, padded_v: int, one_token: bool) -> RecurrentConfig:
    """The configuration of a decode step, fp32 throughout: as many threads as hold H with registers to spare.

    With one token H is gone when U comes, and its registers take as much of U; with more both are held at once.
    """
    columns = 32 if not one_token or padded_d > 128 else 128 if padded_d == 128 else 64
    return RecurrentConfig(
        block_v=min(padded_v, columns),
        width=2,
        chains=2,
        kernel=KernelConfig(16, 1, max_registers=128) if padded_d > 128 else KernelConfig(max(1, padded_d // 32), 1),
    )
