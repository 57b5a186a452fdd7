"""Runs the kernels: buffers, grids and order. One function per operator, with the operator's own signature.

A forward is the state pass (H_c and U_c), the solve and the read-out. A backward works through slabs of chunks, from
the last to the first (docs/adr/0007): it recomputes the chunk-start states, then goes back through U, through the
read-out and the solve (stage A), and through H. Through either state it gathers that state's gradients (stage B) and
forms those of keys, values and gates (stage C); docs/math.md §4.3.
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from gka_ops import modifiers
from gka_ops.autotune import choice, device
from gka_ops.autotune.config import chunk_config, recurrent_config
from gka_ops.autotune.key import Problem, bucket
from gka_ops.autotune.space import padded
from gka_ops.numerics import FRO_MIN, MIN_LOG_DECAY, NORM_EPS, forward_iterations
from gka_ops.triton.checks import require_states
from gka_ops.triton.kernels.chunk_backward_key import chunk_backward_key_kernel
from gka_ops.triton.kernels.chunk_backward_key_hopper import chunk_backward_key_hopper_kernel
from gka_ops.triton.kernels.chunk_backward_readout import chunk_backward_readout_kernel
from gka_ops.triton.kernels.chunk_backward_solve import chunk_backward_solve_kernel
from gka_ops.triton.kernels.chunk_backward_solve_hopper import chunk_backward_solve_hopper_kernel
from gka_ops.triton.kernels.chunk_backward_state import chunk_backward_scan_kernel, chunk_backward_state_kernel
from gka_ops.triton.kernels.chunk_backward_value import chunk_backward_value_kernel
from gka_ops.triton.kernels.chunk_backward_value_hopper import chunk_backward_value_hopper_kernel
from gka_ops.triton.kernels.chunk_readout import chunk_readout_kernel
from gka_ops.triton.kernels.chunk_solve import chunk_solve_kernel
from gka_ops.triton.kernels.chunk_solve_hopper import chunk_solve_hopper_kernel
from gka_ops.triton.kernels.chunk_state import chunk_state_kernel
from gka_ops.triton.kernels.recurrent import recurrent_kernel
from gka_ops.triton.launcher import POINTER_ALIGNMENT, launch, replays
from gka_ops.triton.modified import with_modifier
from gka_ops.triton.slabs import slab_count

_TRITON_DTYPES = {torch.float16: triton.language.float16, torch.float32: triton.language.float32}
_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _on_device(tensor: Tensor) -> Any:
    """Kernels launch on the current device: make it the tensors' own."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


def _multiprocessors(tensor: Tensor) -> int:
    if tensor.device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def _options(
    log_decay: Tensor | None, alpha: Tensor | None, beta: Tensor | None, A_log: Tensor | None,
    ridge_scale_tensor: Tensor | None, ridge_offset_tensor: Tensor | None, cu_seqlens: Tensor | None,
    ridge_offset: float, num_iter: int, qk_l2norm: bool, group: int, ridge_mod: str,
) -> frozenset[str]:  # fmt: skip
    """Those of ``autotune.key.OPTIONS`` that apply to a call."""
    ridge_dims = {ridge.ndim for ridge in (ridge_scale_tensor, ridge_offset_tensor) if ridge is not None}
    applies = {
        "alpha": alpha is not None, "beta": beta is not None, "decay": log_decay is not None and A_log is None,
        "gate": A_log is not None, "gqa": group > 1, "l2norm": qk_l2norm, "ridge_offset": ridge_offset != 0,
        "ridge_head": 1 in ridge_dims, "ridge_token": 3 in ridge_dims or ridge_mod != "", "solve": num_iter > 0,
        "varlen": cu_seqlens is not None,
    }  # fmt: skip
    return frozenset(option for option, given in applies.items() if given)


def _autotune_device(tensor: Tensor) -> device.Device | None:
    return device.current(tensor.get_device()) if tensor.is_cuda else None


def _configuration() -> object:
    """Stands for what the launches of a call depend on beside its arguments: the same object for the same."""
    return _one_for(chunk_config, recurrent_config, choice.state())


@functools.lru_cache(maxsize=64)
def _one_for(*parts: object) -> object:
    return object()


class _States(NamedTuple):
    """Chunk-level states in the operand dtype with their units, and the fp32 state after the last token."""

    states: Tensor | None
    units: Tensor | None
    final: Tensor | None


_NO_STATES = _States(None, None, None)


class _Pair(NamedTuple):
    """Something of H and the same of U, where there is such a thing."""

    kk: Tensor | None = None
    kv: Tensor | None = None

    def at(self, i: int) -> _Pair:
        return _Pair(*(None if tensor is None else tensor[i] for tensor in self))


_NOTHING = _Pair()


class _Slab(NamedTuple):
    """A run of chunks: of every sequence, side by side, or of a packed batch, whose chunks are numbered through."""

    first: int
    chunks: int

    def geometry(self) -> dict[str, int]:
        return {"slab_first": self.first, "slab_chunks": self.chunks}


class _Problem:
    """The arguments of one call, its sizes, its configuration and its chunk tables.

    ``when``: forward or backward. ``training``: whether the call may be part of a training step.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor | None, log_decay: Tensor | None, alpha: Tensor | None,
        beta: Tensor | None, ridge_scale_tensor: Tensor | None, ridge_offset_tensor: Tensor | None,
        A_log: Tensor | None, dt_bias: Tensor | None, initial_kk: Tensor | None, initial_kv: Tensor | None,
        cu_seqlens: Tensor | None, ridge_scale: float, ridge_offset: float, num_iter: int, scale: float,
        qk_l2norm: bool, ridge_mod: str, *, when: str, training: bool = True,
    ) -> None:  # fmt: skip
        self.q, self.k, self.v = q.contiguous(), k.contiguous(), _contiguous(v)
        self.log_decay, self.alpha, self.beta = _contiguous(log_decay), _contiguous(alpha), _contiguous(beta)
        self.A_log, self.dt_bias = _contiguous(A_log), _contiguous(dt_bias)
        self.ridge_scale_tensor = _contiguous(ridge_scale_tensor)
        self.ridge_offset_tensor = _contiguous(ridge_offset_tensor)
        self.initial_kk, self.initial_kv = _contiguous(initial_kk), _contiguous(initial_kv)
        self.scale, self.solve, self.qk_l2norm, self.ridge_mod = scale, num_iter > 0, qk_l2norm, ridge_mod
        self.num_iter = num_iter

        self.B, self.T, self.H, self.D = q.shape
        self.V = self.D if v is None else v.shape[-1]
        self.Hkv = k.shape[2]
        self.tokens = self.B * self.T
        is_fp32 = q.dtype == torch.float32
        self.operand = torch.float32 if is_fp32 else torch.float16
        self.block_d = padded(self.D)
        config = chunk_config(self.block_d, padded(self.V), is_fp32)
        options = _options(
            log_decay, alpha, beta, A_log, ridge_scale_tensor, ridge_offset_tensor, cu_seqlens, ridge_offset, num_iter,
            qk_l2norm, self.group, ridge_mod,
        )  # fmt: skip
        sequences = self.B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        problem = Problem(
            when, _DTYPE_NAMES[q.dtype], self.D, 0 if v is None else self.V, config.chunk, bucket(self.T),
            bucket(sequences * self.H), options,
        )  # fmt: skip
        self.config = choice.chosen(config, problem, _autotune_device(q), training=training)
        self.v_pad = triton.cdiv(self.V, self.config.block_v) * self.config.block_v
        chunk = self.config.chunk
        self.cu_seqlens: Tensor | None = None
        self.chunk_offsets: Tensor | None = None
        self.chunk_sequence: Tensor | None = None
        if cu_seqlens is None:
            self.N = self.side_by_side = self.B
            self.length = triton.cdiv(self.T, chunk)
            slabs = slab_count(self.B, self.T, self.H, solve=self.solve)
        else:
            self.N, self.side_by_side = cu_seqlens.shape[0] - 1, 1
            self.length = self.tokens // chunk + self.N  # an upper bound that needs no read of the device
            self._chunk_tables(cu_seqlens, chunk)
            slabs = slab_count(1, self.tokens, self.H, self.N, solve=self.solve)
        self.whole = _Slab(0, max(1, self.length))
        self.slab_count = int(slabs)
        require_states(self.N, self.H, self.D * max(self.D, self.V), self.slab_count)
        self.slab_chunks = triton.cdiv(self.whole.chunks, self.slab_count)

        self.geometry = {
            "cu_seqlens": self.cu_seqlens, "T": self.T, "H": self.H, "D": self.D, "BLOCK_D": self.block_d, "C": chunk,
        }  # fmt: skip
        self.tables = {"chunk_offsets": self.chunk_offsets, "chunk_sequence": self.chunk_sequence}
        self.gate = {"log_decay": self.log_decay, "A_log": self.A_log, "dt_bias": self.dt_bias}
        self.numerics = {
            "QK_L2NORM": qk_l2norm, "NORM_EPS": NORM_EPS, "MIN_LOG_DECAY": MIN_LOG_DECAY,
            "PRECISION": self.config.precision,
        }  # fmt: skip
        self.ridge = {
            "ridge_scale_tensor": self.ridge_scale_tensor, "ridge_offset_tensor": self.ridge_offset_tensor,
            "ridge_scale": ridge_scale, "ridge_offset": ridge_offset, "num_iter": num_iter,
            "CONSTANT_DELTA": not ridge_mod
            and ridge_scale_tensor is None and ridge_offset_tensor is None and ridge_offset == 0,
            **ridge_kind(ridge_scale_tensor, ridge_offset_tensor),
        }  # fmt: skip
        self.values = {"V": self.V, "BLOCK_V": self.config.block_v, "V_PAD": self.v_pad}

    def _chunk_tables(self, cu_seqlens: Tensor, chunk: int) -> None:
        """chunk -> sequence and sequence -> first chunk, on the device. Boundaries are made monotone from 0 to T, so
        that malformed ones cannot write out of bounds."""
        bounds = torch.cummax(cu_seqlens.long().clamp(0, self.tokens), dim=0).values
        bounds[:1].zero_()
        bounds[-1:].fill_(self.tokens)
        counts = (bounds.diff() + (chunk - 1)) // chunk
        ends = counts.cumsum(0)
        index = torch.arange(self.length, device=cu_seqlens.device)
        sequence = torch.searchsorted(ends, index, right=True)
        self.cu_seqlens = bounds
        self.chunk_offsets = ends - counts
        self.chunk_sequence = torch.where(index < ends[-1], sequence, -1)

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.q.new_empty(shape, dtype=dtype)

    def in_one_place(self, *wanted: tuple[tuple[int, ...], torch.dtype] | None) -> list[Tensor | None]:
        """Buffers of which each is done with before the next is written, so that all begin at the same address."""
        sizes = [0 if buffer is None else math.prod(buffer[0]) * buffer[1].itemsize for buffer in wanted]
        place = self.new(max(sizes) // self.operand.itemsize, dtype=self.operand)
        return [
            None if buffer is None else place[: size // self.operand.itemsize].view(buffer[1]).view(buffer[0])
            for size, buffer in zip(sizes, wanted, strict=True)
        ]

    def kk_shape(self, chunks: int) -> tuple[int, ...]:
        return (chunks, self.H, self.block_d, self.block_d)

    def kv_shape(self, chunks: int) -> tuple[int, ...]:
        return (chunks, self.H, self.block_d, self.v_pad)

    def kk_units(self, chunks: int) -> Tensor:
        return self.new(chunks, self.H)

    def kv_units(self, chunks: int) -> Tensor:
        return self.new(chunks, self.H, self.v_pad // self.config.block_v)

    def per_token(self, wanted: bool = True) -> Tensor | None:
        return self.new(self.B, self.T, self.H) if wanted else None

    @property
    def group(self) -> int:
        return self.H // self.Hkv

    def slabs(self) -> list[_Slab]:
        return [
            _Slab(first, min(self.slab_chunks, self.length - first))
            for first in range(0, self.length, self.slab_chunks)
        ]

    def chunks(self, slab: _Slab) -> int:
        """Places for chunks in a slab of all sequences."""
        return self.side_by_side * min(slab.chunks, self.length)

    def chunk_grid(self, slab: _Slab) -> tuple[int]:
        return (self.chunks(slab) * self.H,)

    def handed_over(self, want_kk: bool, *shape: int) -> _Pair:
        """Room for ``shape`` of the fp32 states, or their gradients, that sequences hand over from slab to slab."""
        rows = (*shape, self.side_by_side, self.H, self.D)
        return _Pair(self.new(*rows, self.D) if want_kk else None, None if self.v is None else self.new(*rows, self.V))

    def boundary_states(self, want_kk: bool) -> _Pair:
        """Room for the states at the start of every slab; zero where there may be no chunk."""
        states = self.handed_over(want_kk, self.slab_count)
        if self.cu_seqlens is not None or (self.slab_count - 1) * self.slab_chunks >= self.length:
            for state in states:
                if state is not None:
                    state.zero_()
        return states

    def empty(self) -> Tensor:
        return self.q.new_empty(0, dtype=torch.float32)


def ridge_kind(scale: Tensor | None, offset: Tensor | None) -> dict[str, bool]:
    """Compile-time facts of the ridge's tensors: [B, T, H] or [H]."""
    return {
        "SCALE_PER_TOKEN": scale is not None and scale.ndim == 3,
        "OFFSET_PER_TOKEN": offset is not None and offset.ndim == 3,
    }


# ------------------------------------------------------------------------------------------------------------ stages
def _state_widths(p: _Problem, want_kk: bool) -> tuple[int, int]:
    """Columns of H and of U that one program of the forward state pass holds.

    The widest of the configuration, for every column block works on the keys anew; fewer while that gives twice as
    many programs no more than the multiprocessors. Column blocks of U are whole blocks of BLOCK_V.
    """
    width = p.config.block_state

    def widths() -> tuple[int, int]:
        block_r = p.config.block_v
        while block_r < width and p.v_pad % (2 * block_r) == 0:
            block_r *= 2
        return min(p.block_d, width), block_r

    def programs() -> int:
        block_n, block_r = widths()
        return p.N * p.H * (want_kk * p.block_d // block_n + (p.v is not None) * p.v_pad // block_r)

    while width > p.config.block_v and 2 * programs() <= _multiprocessors(p.q):
        width //= 2
    return widths()


def new_states(p: _Problem, chunks: int, want_kk: bool, want_final: bool = False) -> tuple[_States, _States]:
    """Room for H_c (if wanted) and U_c (if there are values) of so many chunks."""
    kk = kv = _NO_STATES
    if want_kk:
        final = p.new(p.N, p.H, p.D, p.D) if want_final else None
        kk = _States(p.new(*p.kk_shape(chunks), dtype=p.operand), p.kk_units(chunks), final)
    if p.v is not None:
        final = p.new(p.N, p.H, p.D, p.V) if want_final else None
        kv = _States(p.new(*p.kv_shape(chunks), dtype=p.operand), p.kv_units(chunks), final)
    return kk, kv


def chunk_states(
    p: _Problem, slab: _Slab, want_kk: bool, kk: _States, kv: _States, carry: _Pair = _NOTHING,
    boundaries: _Pair = _NOTHING,
) -> None:  # fmt: skip
    """H_c (if wanted) and U_c (if there are values) of every chunk of a slab, in one pass.

    ``carry``: the states at its start; ``boundaries``: room for those at the start of every slab.
    """
    block_n, block_r = _state_widths(p, want_kk)
    kk_blocks = p.block_d // block_n if want_kk else 0
    kv_blocks = 0 if p.v is None else p.v_pad // block_r
    if kk_blocks + kv_blocks > 0 and p.N > 0:
        launch(chunk_state_kernel, (kk_blocks + kv_blocks, p.N * p.H),
            k=p.k, v=p.v, **p.gate, beta=p.beta, initial_kk=p.initial_kk, initial_kv=p.initial_kv, kk=kk.states,
            kk_units=kk.units, kv=kv.states, kv_units=kv.units, final_kk=kk.final, final_kv=kv.final,
            carry_kk=carry.kk, carry_kv=carry.kv, boundary_kk=boundaries.kk, boundary_kv=boundaries.kv,
            boundary_chunks=p.slab_chunks, chunk_offsets=p.chunk_offsets, GROUP=p.group, BLOCK_N=block_n,
            BLOCK_R=block_r, KK_BLOCKS=kk_blocks, KV_BLOCKS=kv_blocks, OPERAND=_TRITON_DTYPES[p.operand],
            **slab.geometry(), **p.geometry, **p.values, **p.numerics, **p.config.state.launch_options(),
        )  # fmt: skip


def boundary_states(p: _Problem, want_kk: bool, saved: _Pair) -> _Pair:
    """The states at the start of every slab: as the forward saved them, or by a pass of their own."""
    kk, kv = (None if state is None or state.numel() == 0 else state for state in saved)
    kk = kk if want_kk else None
    if (kk is None and want_kk) or (kv is None and p.v is not None):
        saved = p.boundary_states(want_kk)
        chunk_states(p, p.whole, want_kk, _NO_STATES, _NO_STATES, boundaries=saved)
        return saved
    return _Pair(
        *(None if state is None else state.view(p.slab_count, p.side_by_side, p.H, p.D, -1) for state in (kk, kv))
    )


class _Solved(NamedTuple):
    """The solution as it is stored, and ‖H_t‖_F; nothing without a solve."""

    x: Tensor | None = None
    x_scale: Tensor | None = None
    x_query: Tensor | None = None
    fro: Tensor | None = None

    def stored_x(self) -> dict[str, Tensor | None]:
        return {"x": self.x, "x_scale": self.x_scale, "x_query": self.x_query}


def _on_hopper(p: _Problem) -> bool:
    """Whether the solve's products can run asynchronously: the configuration says so, and the card has the means."""
    return p.config.solve_async and p.q.is_cuda and torch.cuda.get_device_capability(p.q.device) == (9, 0)


def _aligned(tensor: Tensor | None) -> bool:
    """Whether the tensor's rows can be copied into shared memory 16 bytes at a time, if they are whole ones."""
    return tensor is not None and tensor.data_ptr() % POINTER_ALIGNMENT == 0


def _copied_asynchronously(p: _Problem, solved: _Solved) -> bool:
    """Whether the Gluon kernels form the token gradients: after a solve, of which x is stored beside q, and with v."""
    supported = p.config.token_gradients_async and p.solve and p.v is not None and p.block_d == p.D
    return supported and solved.x_scale is not None and _aligned(solved.x) and _on_hopper(p)


def new_solution(p: _Problem, x_dtype: torch.dtype) -> _Solved:
    """Room for x of every token and ‖H_t‖_F. ``x_dtype``: fp16 stores x as x_query·q + x_scale·x̂, fp32 as it is."""
    packed = x_dtype == torch.float16
    return _Solved(
        x=p.new(p.B, p.T, p.H, p.D, dtype=x_dtype), x_scale=p.per_token(packed), x_query=p.per_token(packed),
        fro=p.per_token(),
    )  # fmt: skip


def solve(p: _Problem, slab: _Slab, kk: _States, solved: _Solved, num_iter: int) -> None:
    """x and ‖H_t‖_F of the tokens of a slab."""
    if p.tokens == 0:
        return
    kernel, config = chunk_solve_kernel, p.config.solve
    if _on_hopper(p):
        kernel, config = chunk_solve_hopper_kernel, p.config.solve_hopper
    launch(with_modifier(kernel, p.ridge_mod), p.chunk_grid(slab),
        q=p.q, k=p.k, **p.gate, beta=p.beta, kk=kk.states, kk_units=kk.units, **solved.stored_x(), fro=solved.fro,
        GROUP=p.group, BLOCK_S=p.config.solve_block_s, FRO_MIN=FRO_MIN, OPERAND=_TRITON_DTYPES[p.operand],
        **slab.geometry(), **p.tables, **p.ridge | {"num_iter": num_iter}, **p.geometry, **p.numerics,
        **config.launch_options(),
    )  # fmt: skip


def unsolved(p: _Problem) -> Tensor:
    """x of ``chunk_solve`` without iterations: the query, normalised if asked for, in fp32."""
    q = p.q.float()
    return q / torch.linalg.vector_norm(q, dim=-1, keepdim=True).clamp(min=NORM_EPS) if p.qk_l2norm else q


def read_out(p: _Problem, solved: _Solved, kv: _States) -> Tensor:
    """The output of every token."""
    output = p.new(p.B, p.T, p.H, p.V, dtype=p.q.dtype)
    if p.tokens == 0:
        return output
    launch(chunk_readout_kernel, p.chunk_grid(p.whole),
        q=p.q, k=p.k, v=p.v, **p.gate, alpha=p.alpha, beta=p.beta, **solved.stored_x(), kv=kv.states,
        kv_units=kv.units, output=output, scale=p.scale, GROUP=p.group, OPERAND=_TRITON_DTYPES[p.operand],
        **p.whole.geometry(), **p.tables, **p.geometry, **p.values, **p.numerics, **p.config.readout.launch_options(),
    )  # fmt: skip
    return output


class _Gradients(NamedTuple):
    """Gradients of whole tensors, which the slabs fill in; the keys' and values' per query head, the ridge's per token,
    those of the gate's parameters as partial sums over chunks."""

    dq: Tensor
    dk: Tensor
    dv: Tensor | None
    d_log_decay: Tensor | None
    d_alpha: Tensor | None
    d_beta: Tensor | None
    d_ridge_scale: Tensor | None
    d_ridge_offset: Tensor | None
    d_A_log: Tensor | None
    d_dt_bias: Tensor | None
    d_initial_kk: Tensor | None
    d_initial_kv: Tensor | None

    def of_gate(self, chunks: slice) -> dict[str, Tensor | None]:
        """Stage C's parts, with the partial sums of a slab's chunks."""
        return {
            "d_beta": self.d_beta,
            "d_log_decay": self.d_log_decay,
            "d_A_log": None if self.d_A_log is None else self.d_A_log[chunks],
            "d_dt_bias": None if self.d_dt_bias is None else self.d_dt_bias[chunks],
        }


def new_gradients(p: _Problem, through_h: bool) -> _Gradients:
    dtype = p.q.dtype if p.group == 1 else torch.float32
    partial = p.A_log is not None
    chunks = p.chunks(p.whole)

    def like(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.empty_like(tensor)

    return _Gradients(
        dq=torch.empty_like(p.q),
        dk=p.new(p.B, p.T, p.H, p.D, dtype=dtype),
        dv=None if p.v is None else p.new(p.B, p.T, p.H, p.V, dtype=dtype),
        d_log_decay=like(p.log_decay),
        d_alpha=like(p.alpha),
        d_beta=like(p.beta),
        d_ridge_scale=p.per_token(p.solve and p.ridge_scale_tensor is not None and not p.ridge_mod),
        d_ridge_offset=p.per_token(
            p.solve and (p.ridge_scale_tensor if p.ridge_mod else p.ridge_offset_tensor) is not None
        ),
        d_A_log=p.new(chunks, p.H).zero_() if partial else None,
        d_dt_bias=p.new(chunks, p.H).zero_() if partial and p.dt_bias is not None else None,
        d_initial_kk=like(p.initial_kk) if through_h else None,
        d_initial_kv=like(p.initial_kv) if p.v is not None else None,
    )


class _Workspace(NamedTuple):
    """What the stages leave for one another: buffers of one slab after the other, and scalars of all tokens, which
    are too small to be worth a place in the slab."""

    kk: _States
    kv: _States
    dkk: _States
    dkv: _States
    increment_kk_units: Tensor | None
    increment_kv_units: Tensor | None
    decay: Tensor
    w_first: Tensor | None
    traces: _Pair  # <Ω⁺, H_c> and <Ξ⁺, U_c> of every chunk in pieces, which only the gate's gradient needs
    dm: Tensor | None
    y: Tensor | None
    dk_u: Tensor | None  # in the place of dk
    j_u: Tensor | None
    y_scale: Tensor | None
    w_local: Tensor | None
    dk_u_units: Tensor | None
    m_u: Tensor | None
    pi: Tensor


def new_workspace(p: _Problem, through_h: bool, dk: Tensor) -> _Workspace:
    """Room for a slab. All that comes through U is done before anything comes through H, so that U_c and Ξ⁺ leave
    their places to what is needed next: U_c to y, and Ξ⁺ to dMix and then to Ω⁺.

    y is stored like x: in the operand dtype where it comes through values, and so lies in the span of the keys; in
    fp32 for a solve alone, whose dx may be anything.
    """
    through_u = p.v is not None
    chunks = p.chunks(_Slab(0, p.slab_chunks))
    rows = (chunks, p.H, p.config.chunk, p.D)
    of_h = (p.kk_shape(chunks), p.operand) if through_h else None
    of_u = (p.kv_shape(chunks), p.operand) if through_u else None
    kv, y = p.in_one_place(of_u, (rows, p.operand if through_u else torch.float32) if p.solve else None)
    dkv, dm, dkk = p.in_one_place(of_u, (rows, torch.float32) if p.solve and through_u else None, of_h)
    _, kk_pieces = scan_pieces(p, p.block_d, p.block_d)
    _, kv_pieces = scan_pieces(p, p.config.block_v, p.v_pad)
    gated = p.log_decay is not None
    return _Workspace(
        kk=_States(p.new(*of_h[0], dtype=p.operand), p.kk_units(chunks), None) if of_h else _NO_STATES,
        kv=_States(kv, p.kv_units(chunks), None) if through_u else _NO_STATES,
        dkk=_States(dkk, p.kk_units(chunks), None) if through_h else _NO_STATES,
        dkv=_States(dkv, p.kv_units(chunks), None) if through_u else _NO_STATES,
        increment_kk_units=p.kk_units(chunks) if p.solve else None,
        increment_kv_units=p.kv_units(chunks) if through_u else None,
        decay=p.new(chunks, p.H),
        w_first=p.new(chunks, p.H) if p.solve else None,
        traces=_Pair(
            p.new(chunks, p.H, kk_pieces) if through_h and gated else None,
            p.new(chunks, p.H, kv_pieces) if through_u and gated else None,
        ),
        dm=dm,
        y=y,
        dk_u=dk.view(p.operand) if through_h and through_u else None,
        j_u=p.new(chunks, p.H) if through_h and through_u else None,
        y_scale=p.per_token(p.solve),
        w_local=p.per_token(p.solve),
        dk_u_units=p.per_token(through_h and through_u),
        m_u=p.per_token(through_h and through_u),
        pi=p.new(p.B, p.T, p.H),
    )


def read_out_gradient(p: _Problem, slab: _Slab, grad: Tensor, solved: _Solved, w: _Workspace, out: _Gradients) -> None:
    """Stage A1: through the read-out to dMix, or to dq without a solve."""
    launch(chunk_backward_readout_kernel, p.chunk_grid(slab),
        d_output=grad, q=p.q, k=p.k, v=p.v, **p.gate, alpha=p.alpha, beta=p.beta, **solved.stored_x(),
        kv=w.kv.states, kv_units=w.kv.units, dm=w.dm, dq=out.dq, d_alpha=out.d_alpha, pi=w.pi, scale=p.scale,
        GROUP=p.group, SOLVE=p.solve, OPERAND=_TRITON_DTYPES[p.operand], **slab.geometry(), **p.tables, **p.geometry,
        **p.values, **p.numerics, **p.config.backward_readout.launch_options(),
    )  # fmt: skip


def adjoint_solve(p: _Problem, slab: _Slab, grad: Tensor, solved: _Solved, w: _Workspace, out: _Gradients) -> None:
    """Stage A2: from dMix, or from dLoss/dx."""
    kernel, config = chunk_backward_solve_kernel, p.config.backward_solve
    if p.v is not None and _on_hopper(p):
        kernel, config = chunk_backward_solve_hopper_kernel, p.config.backward_solve_hopper
    launch(with_modifier(kernel, p.ridge_mod), p.chunk_grid(slab),
        dx=grad if p.v is None else w.dm, THROUGH_READOUT=p.v is not None, q=p.q, k=p.k, **p.gate, alpha=p.alpha,
        beta=p.beta, **solved.stored_x(), fro=solved.fro, kk=w.kk.states, kk_units=w.kk.units, dq=out.dq, y=w.y,
        y_scale=w.y_scale, d_ridge_scale=out.d_ridge_scale, d_ridge_offset=out.d_ridge_offset, w_local=w.w_local,
        pi=w.pi, GROUP=p.group, BLOCK_S=p.config.solve_block_s, FRO_MIN=FRO_MIN, OPERAND=_TRITON_DTYPES[p.operand],
        **slab.geometry(), **p.tables, **p.ridge, **p.geometry, **p.numerics,
        **config.launch_options(),
    )  # fmt: skip


def query_gradient(p: _Problem, dx: Tensor) -> Tensor:
    """dq of ``chunk_solve`` without a solve: x is the query, normalised if asked for (docs/math.md §4.5)."""
    if not p.qk_l2norm:
        return dx
    norm = torch.linalg.vector_norm(p.q.float(), dim=-1, keepdim=True)
    unit = unsolved(p)
    radial = torch.where(norm > NORM_EPS, (unit * dx).sum(-1, keepdim=True), 0.0)
    return (dx - unit * radial) / norm.clamp(min=NORM_EPS)


def increments(
    p: _Problem, slab: _Slab, d_output: Tensor | None, solved: _Solved, w: _Workspace, *, through_h: bool = False,
    through_u: bool = False,
) -> None:  # fmt: skip
    """Stage B1: what each chunk adds by itself to the gradient of H or of U; and its decay, whatever it adds."""
    config = p.config
    launch(chunk_backward_state_kernel, (*p.chunk_grid(slab), p.block_d // config.increment_columns),
        d_output=d_output, q=p.q, k=p.k, **solved.stored_x(), y=w.y, y_scale=w.y_scale, w_local=w.w_local, **p.gate,
        alpha=p.alpha, beta=p.beta, dkk=w.dkk.states, dkk_units=w.increment_kk_units, dkv=w.dkv.states,
        dkv_units=w.increment_kv_units, decay=w.decay, w_first=w.w_first, scale=p.scale, GROUP=p.group,
        BLOCK_N=config.increment_columns, THROUGH_H=through_h, THROUGH_U=through_u,
        OPERAND=_TRITON_DTYPES[p.operand], **slab.geometry(), **p.tables, **p.geometry, **p.values, **p.numerics,
        **config.backward_state.launch_options(),
    )  # fmt: skip


def through_values(
    p: _Problem, slab: _Slab, d_output: Tensor, solved: _Solved, d_final: _Pair, d_end: _Pair, d_start: _Pair,
    w: _Workspace, out: _Gradients,
) -> None:  # fmt: skip
    """Stages B and C through U: Ξ⁺, then dv, and dk as far as it comes this way. Where nothing comes through H, that is
    all of dk, and dβ and the gate's gradient follow."""
    increments(p, slab, d_output, solved, w, through_u=True)
    rows, pieces = scan_pieces(p, p.config.block_v, p.v_pad)
    launch(chunk_backward_scan_kernel, (pieces, p.N * p.H),
        states=w.dkv.states, units=w.dkv.units, increment_units=w.increment_kv_units,
        h=None if w.traces.kv is None else w.kv.states, h_units=w.kv.units, w_first=None, traces=w.traces.kv,
        d_final=d_final.kv, d_initial=out.d_initial_kv, d_end=d_end.kv, d_start=d_start.kv, R=p.V, ROWS=rows,
        BLOCK_R=p.config.block_v, R_PAD=p.v_pad, SYMMETRIC=False, **_of_scan(p, slab, w),
    )  # fmt: skip
    kernel, config = chunk_backward_value_kernel, p.config.backward_value
    if p.D == p.V and p.q.dtype == torch.bfloat16 and _aligned(d_output) and _copied_asynchronously(p, solved):
        kernel, config = chunk_backward_value_hopper_kernel, p.config.backward_value_hopper
    launch(kernel, p.chunk_grid(slab),
        d_output=d_output, v=p.v, alpha=p.alpha, dkv=w.dkv.states, dkv_units=w.dkv.units, dv=out.dv, scale=p.scale,
        traces=w.traces.kv, PIECES=pieces, **_of_tokens(p, slab, solved, w, out), **p.values,
        **config.launch_options(),
    )  # fmt: skip


def through_keys(
    p: _Problem, slab: _Slab, solved: _Solved, d_final: _Pair, d_end: _Pair, d_start: _Pair, w: _Workspace,
    out: _Gradients,
) -> None:  # fmt: skip
    """Stages B and C through H: Ω⁺, then the rest of dk, dβ and the gate's gradient. Without a solve Ω comes from the
    final state alone."""
    if p.solve or p.v is None:
        increments(p, slab, None, solved, w, through_h=p.solve)
    rows, pieces = scan_pieces(p, p.block_d, p.block_d)
    launch(chunk_backward_scan_kernel, (pieces, p.N * p.H),
        states=w.dkk.states, units=w.dkk.units, increment_units=w.increment_kk_units,
        h=w.kk.states if p.solve or w.traces.kk is not None else None, h_units=w.kk.units, w_first=w.w_first,
        traces=w.traces.kk, d_final=d_final.kk, d_initial=out.d_initial_kk, d_end=d_end.kk, d_start=d_start.kk, R=p.D,
        ROWS=rows, BLOCK_R=p.block_d, R_PAD=p.block_d, SYMMETRIC=True, **_of_scan(p, slab, w),
    )  # fmt: skip
    kernel, config = chunk_backward_key_kernel, p.config.backward_key
    if _copied_asynchronously(p, solved):
        kernel, config = chunk_backward_key_hopper_kernel, p.config.backward_key_hopper
    launch(kernel, p.chunk_grid(slab),
        y=w.y, y_scale=w.y_scale, w_local=w.w_local, kk=w.kk.states, kk_units=w.kk.units, dkk=w.dkk.states,
        dkk_units=w.dkk.units, BLOCK_S=p.config.block_s, traces=w.traces.kk, PIECES=pieces,
        **_of_tokens(p, slab, solved, w, out), **config.launch_options(),
    )  # fmt: skip


def scan_pieces(p: _Problem, columns: int, all_columns: int) -> tuple[int, int]:
    """How the scan over chunks divides a gradient of a state among programs: rows of a piece of so many columns, and
    the number of pieces."""
    rows = min(p.block_d, p.config.scan_entries // columns)
    return rows, all_columns // columns * (p.block_d // rows)


def _of_scan(p: _Problem, slab: _Slab, w: _Workspace) -> dict[str, Any]:
    """What the scans of stage B share."""
    return {
        "decay": w.decay, "chunk_offsets": p.chunk_offsets, **slab.geometry(), **p.geometry,
        **p.config.backward_scan.launch_options(),
    }  # fmt: skip


def _of_tokens(p: _Problem, slab: _Slab, solved: _Solved, w: _Workspace, out: _Gradients) -> dict[str, Any]:
    """What the two kernels of stage C share."""
    first = p.side_by_side * slab.first
    return {
        "q": p.q, "k": p.k, **p.gate, "beta": p.beta, **solved.stored_x(), "pi": w.pi, "dk_u": w.dk_u,
        "dk_u_units": w.dk_u_units, "ROW_U": 0 if w.dk_u is None else w.dk_u.shape[-1], "m_u": w.m_u, "j_u": w.j_u,
        "dk": out.dk, **out.of_gate(slice(first, first + p.chunks(slab))), "GROUP": p.group, "SOLVE": p.solve,
        "OPERAND": _TRITON_DTYPES[p.operand], **slab.geometry(), **p.tables, **p.geometry, **p.numerics,
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------- operators
def _or_empty(p: _Problem, tensor: Tensor | None) -> Tensor:
    return p.empty() if tensor is None else tensor


@replays(_configuration)
def chunk_solve(
    q, k, log_decay, beta, ridge_scale_tensor, ridge_offset_tensor, A_log, dt_bias, initial_kk, cu_seqlens,
    ridge_scale, ridge_offset, num_iter, qk_l2norm, output_final_state, ridge_mod,
):  # fmt: skip
    p = _Problem(
        q, k, None, log_decay, None, beta, ridge_scale_tensor, ridge_offset_tensor, A_log, dt_bias, initial_kk, None,
        cu_seqlens, ridge_scale, ridge_offset, num_iter, 1.0, qk_l2norm, ridge_mod, when="forward",
    )  # fmt: skip
    with _on_device(q):
        want_kk = p.solve or output_final_state
        kk, kv = new_states(p, p.chunks(p.whole), want_kk, output_final_state)
        chunk_states(p, p.whole, want_kk, kk, kv)
        if p.solve:
            solved = new_solution(p, torch.float32)
            solve(p, p.whole, kk, solved, num_iter)
        else:
            solved = _Solved(unsolved(p), fro=p.new(p.B, p.T, p.H).zero_())
    return solved.x, _or_empty(p, kk.final), solved.fro


@replays(_configuration)
def chunk_gka(
    q, k, v, log_decay, alpha, beta, ridge_scale_tensor, ridge_offset_tensor, A_log, dt_bias, initial_kk, initial_kv,
    cu_seqlens, ridge_scale, ridge_offset, num_iter, scale, qk_l2norm, output_final_state, save_x, ridge_mod,
):  # fmt: skip
    p = _Problem(
        q, k, v, log_decay, alpha, beta, ridge_scale_tensor, ridge_offset_tensor, A_log, dt_bias, initial_kk,
        initial_kv, cu_seqlens, ridge_scale, ridge_offset, num_iter, scale, qk_l2norm, ridge_mod, when="forward",
        training=save_x,
    )  # fmt: skip
    with _on_device(q):
        want_kk = p.solve or output_final_state
        kk, kv = new_states(p, p.chunks(p.whole), want_kk, output_final_state)
        boundaries = p.boundary_states(want_kk) if save_x else _NOTHING
        chunk_states(p, p.whole, want_kk, kk, kv, boundaries=boundaries)
        solved = _Solved()
        if p.solve:
            solved = new_solution(p, p.operand)
            solve(p, p.whole, kk, solved, num_iter)
        output = read_out(p, solved, kv)
    if not save_x:
        solved = _Solved()
    x = q.new_empty(0, dtype=p.operand) if solved.x is None else solved.x
    states = (None if state is None else state.flatten(0, 3) for state in boundaries)
    residuals = (x, *(_or_empty(p, t) for t in (solved.x_scale, solved.x_query, solved.fro, *states)))
    return output, _or_empty(p, kk.final), _or_empty(p, kv.final), *residuals


def _backward(
    p: _Problem, grad: Tensor, d_final: _Pair, solved: _Solved, boundaries: _Pair,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of q, k, v, log_decay, alpha, beta, ridge scale and offset, A_log, dt_bias, initial kk and kv.

    ``solved`` and ``boundaries`` are what the forward saved; what is missing of them is computed anew, x as the forward
    did.
    """
    grad, d_final = grad.contiguous(), _Pair(*map(_contiguous, d_final))
    through_h = p.solve or d_final.kk is not None
    with _on_device(p.q):
        out = new_gradients(p, through_h)
        if p.v is None and not p.solve:  # x = q
            out.dq.copy_(query_gradient(p, grad))
        if through_h or p.v is not None:
            w = new_workspace(p, through_h, out.dk)
            if p.v is None and not p.solve:
                w.pi.zero_()
            if not p.solve:
                solved = _Solved()
            solves_again = p.solve and (solved.x is None or solved.x.numel() == 0)
            if solves_again:
                solved = new_solution(p, p.operand)
            slabs = p.slabs()
            several = len(slabs) > 1
            boundaries = boundary_states(p, through_h, boundaries) if several else _NOTHING
            carried = [p.handed_over(through_h) if several else _NOTHING for _ in range(2)]  # gradients of states
            for i, slab in reversed(list(enumerate(slabs))):
                chunk_states(p, slab, through_h, w.kk, w.kv, carry=boundaries.at(i))
                if solves_again:
                    solve(p, slab, w.kk, solved, forward_iterations(p.num_iter))
                d_end, d_start = carried[i % 2], carried[(i + 1) % 2]
                if p.v is not None:
                    if not p.solve:  # dq itself, and π, which is needed at once where nothing comes through H
                        read_out_gradient(p, slab, grad, solved, w, out)
                    through_values(p, slab, grad, solved, d_final, d_end, d_start, w, out)
                    if p.solve:  # dMix, in the place of Ξ⁺
                        read_out_gradient(p, slab, grad, solved, w, out)
                if p.solve:
                    adjoint_solve(p, slab, grad, solved, w, out)
                if through_h:
                    through_keys(p, slab, solved, d_final, d_end, d_start, w, out)
        else:  # nothing flows into the state: keys and gates have no part in it
            for tensor in (out.dk, out.d_log_decay, out.d_beta):
                if tensor is not None:
                    tensor.zero_()

    def over_groups(per_query_head: Tensor | None, like: Tensor | None) -> Tensor:
        if per_query_head is None or like is None:
            return p.empty()
        if p.group == 1:
            return per_query_head
        return per_query_head.view(p.B, p.T, p.Hkv, p.group, -1).sum(3).to(like.dtype)

    def of_ridge(per_token: Tensor | None, tensor: Tensor | None) -> Tensor:
        if tensor is None:
            return p.empty()
        if p.ridge_mod:
            assert out.d_ridge_offset is not None and solved.fro is not None  # with leaves, and a solve
            return modifiers.leaf_gradients(p.ridge_mod, out.d_ridge_offset, solved.fro, tensor)
        if per_token is None:
            return torch.zeros_like(tensor)
        return (per_token if tensor.ndim == 3 else per_token.sum((0, 1))).to(tensor.dtype)

    def of_parameter(partial: Tensor | None, tensor: Tensor | None) -> Tensor:
        return p.empty() if partial is None or tensor is None else partial.sum(0).to(tensor.dtype)

    def of_state(d_initial: Tensor | None, initial: Tensor | None) -> Tensor:
        if initial is None:
            return p.empty()
        return torch.zeros_like(initial) if d_initial is None else d_initial

    return (
        out.dq,
        over_groups(out.dk, p.k),
        over_groups(out.dv, p.v),
        _or_empty(p, out.d_log_decay),
        _or_empty(p, out.d_alpha),
        _or_empty(p, out.d_beta),
        of_ridge(out.d_ridge_scale, p.ridge_scale_tensor),
        of_ridge(out.d_ridge_offset, p.ridge_offset_tensor),
        of_parameter(out.d_A_log, p.A_log),
        of_parameter(out.d_dt_bias, p.dt_bias),
        of_state(out.d_initial_kk, p.initial_kk),
        of_state(out.d_initial_kv, p.initial_kv),
    )


def _backward_of_nothing(
    inputs: tuple[Tensor | None, ...], d_final_kk: Tensor | None, d_final_kv: Tensor | None, like: Tensor
) -> tuple[Tensor, ...]:
    """No tokens: the states pass through, so do their gradients; everything else is zero."""
    *rest, initial_kk, initial_kv = inputs
    gradients = [like.new_empty(0, dtype=torch.float32) if t is None else torch.zeros_like(t) for t in rest]
    for initial, d_final, symmetric in ((initial_kk, d_final_kk, True), (initial_kv, d_final_kv, False)):
        if initial is None:
            gradients.append(like.new_empty(0, dtype=torch.float32))
        elif d_final is None:
            gradients.append(torch.zeros_like(initial))
        else:
            gradients.append(0.5 * (d_final + d_final.mT) if symmetric else d_final.clone())
    return tuple(gradients)


@replays(_configuration)
def chunk_solve_backward(
    dx, d_final_kk, q, k, log_decay, beta, ridge_scale_tensor, ridge_offset_tensor, A_log, dt_bias, initial_kk,
    cu_seqlens, x, fro, ridge_scale, ridge_offset, num_iter, qk_l2norm, ridge_mod,
):  # fmt: skip
    inputs = (
        q, k, None, log_decay, None, beta, ridge_scale_tensor, ridge_offset_tensor, A_log, dt_bias, initial_kk, None,
    )  # fmt: skip
    if q.numel() == 0:
        gradients = _backward_of_nothing(inputs, d_final_kk, None, q)
    else:
        scalars = ridge_scale, ridge_offset, num_iter, 1.0, qk_l2norm
        p = _Problem(*inputs, cu_seqlens, *scalars, ridge_mod, when="backward")
        gradients = _backward(p, dx, _Pair(d_final_kk), _Solved(x, fro=fro), _NOTHING)
    dq, dk, _, d_log_decay, _, d_beta, *rest, d_initial_kk, _ = gradients
    return dq, dk, d_log_decay, d_beta, *rest, d_initial_kk


@replays(_configuration)
def chunk_gka_backward(
    d_output, d_final_kk, d_final_kv, q, k, v, log_decay, alpha, beta, ridge_scale_tensor, ridge_offset_tensor, A_log,
    dt_bias, initial_kk, initial_kv, cu_seqlens, x, x_scale, x_query, fro, boundary_kk, boundary_kv, ridge_scale,
    ridge_offset, num_iter, scale, qk_l2norm, ridge_mod,
):  # fmt: skip
    inputs = (
        q, k, v, log_decay, alpha, beta, ridge_scale_tensor, ridge_offset_tensor, A_log, dt_bias, initial_kk,
        initial_kv,
    )  # fmt: skip
    if q.numel() == 0:
        return _backward_of_nothing(inputs, d_final_kk, d_final_kv, q)
    scalars = ridge_scale, ridge_offset, num_iter, scale, qk_l2norm
    p = _Problem(*inputs, cu_seqlens, *scalars, ridge_mod, when="backward")
    packed = x_scale.numel() > 0
    solved = _Solved(x, x_scale if packed else None, x_query if packed else None, fro)
    return _backward(p, d_output, _Pair(d_final_kk, d_final_kv), solved, _Pair(boundary_kk, boundary_kv))


@replays(_configuration)
def recurrent_gka(
    q, k, v, log_decay, alpha, beta, ridge_scale_tensor, ridge_offset_tensor, A_log, dt_bias, kk, kv, state_indices,
    ridge_scale, ridge_offset, num_iter, scale, qk_l2norm, ridge_mod,
):  # fmt: skip
    B, T, H, D = q.shape
    V = v.shape[-1]
    output = q.new_empty(B, T, H, V)
    if output.numel() == 0:
        return output
    block_d = padded(D)
    options = _options(
        log_decay, alpha, beta, A_log, ridge_scale_tensor, ridge_offset_tensor, None, ridge_offset, num_iter, qk_l2norm,
        H // k.shape[2], ridge_mod,
    )  # fmt: skip
    require_states(B, 1, D * max(D, V), 1)
    problem = Problem("decode", _DTYPE_NAMES[q.dtype], D, V, 1, bucket(T), bucket(B * H), options)
    config = choice.chosen(recurrent_config(block_d, padded(V), T == 1), problem, _autotune_device(q))
    with _on_device(q):
        launch(with_modifier(recurrent_kernel, ridge_mod), (H, B),
            q=q.contiguous(), k=k.contiguous(), v=v.contiguous(), log_decay=_contiguous(log_decay),
            A_log=_contiguous(A_log), dt_bias=_contiguous(dt_bias), alpha=_contiguous(alpha), beta=_contiguous(beta),
            ridge_scale_tensor=_contiguous(ridge_scale_tensor), ridge_offset_tensor=_contiguous(ridge_offset_tensor),
            kk=kk, kv=kv, state_indices=_contiguous(state_indices), output=output, ridge_scale=ridge_scale,
            ridge_offset=ridge_offset, scale=scale, num_iter=num_iter, T=T, H=H, GROUP=H // k.shape[2], D=D, V=V,
            BLOCK_D=block_d, BLOCK_V=config.block_v, V_PAD=triton.cdiv(V, config.block_v) * config.block_v,
            LANES=config.lanes(block_d), LANES_V=config.lanes(config.block_v), WIDTH=config.width,
            CHAINS=config.chains, SOLVE=num_iter > 0, **ridge_kind(ridge_scale_tensor, ridge_offset_tensor),
            QK_L2NORM=qk_l2norm, NORM_EPS=NORM_EPS, FRO_MIN=FRO_MIN, MIN_LOG_DECAY=MIN_LOG_DECAY,
            **config.kernel.launch_options(),
        )  # fmt: skip
    return output
