"""Runs the kernels: buffers, grids and order. One function per operator, with the operator's own signature.

A forward is the state pass (H_c and U_c), the solve and the read-out. A backward recomputes the chunk-start states,
goes back through the read-out and solves for the incoming gradient (stage A), gathers the gradients of the states
(stage B) and forms those of keys, values and gates (stage C); docs/math.md §4.3.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from gka_ops.autotune.config import chunk_config, recurrent_config
from gka_ops.numerics import FRO_MIN, MIN_LOG_DECAY, NORM_EPS
from gka_ops.triton.kernels.chunk_backward_key import chunk_backward_key_kernel
from gka_ops.triton.kernels.chunk_backward_readout import chunk_backward_readout_kernel
from gka_ops.triton.kernels.chunk_backward_solve import chunk_backward_solve_kernel
from gka_ops.triton.kernels.chunk_backward_state import chunk_backward_scan_kernel, chunk_backward_state_kernel
from gka_ops.triton.kernels.chunk_backward_value import chunk_backward_value_kernel
from gka_ops.triton.kernels.chunk_readout import chunk_readout_kernel
from gka_ops.triton.kernels.chunk_solve import chunk_solve_kernel
from gka_ops.triton.kernels.chunk_state import chunk_state_kernel
from gka_ops.triton.kernels.recurrent import recurrent_kernel
from gka_ops.triton.launcher import launch, replays

_MIN_BLOCK = 16  # the least extent of a tensor-core operand
_TRITON_DTYPES = {torch.float16: triton.language.float16, torch.float32: triton.language.float32}


def _padded(size: int) -> int:
    return max(_MIN_BLOCK, triton.next_power_of_2(size))


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _on_device(tensor: Tensor) -> Any:
    """Kernels launch on the current device: make it the tensors' own."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


def _multiprocessors(tensor: Tensor) -> int:
    if tensor.device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


class _States(NamedTuple):
    """Chunk-level states in the operand dtype with their units, and the fp32 state after the last token."""

    states: Tensor | None
    units: Tensor | None
    final: Tensor | None


_NO_STATES = _States(None, None, None)


class _Problem:
    """The arguments of one call, its sizes, its configuration and its chunk tables."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor | None, log_decay: Tensor | None, alpha: Tensor | None,
        beta: Tensor | None, ridge_scale_tensor: Tensor | None, ridge_offset_tensor: Tensor | None,
        A_log: Tensor | None, dt_bias: Tensor | None, initial_kk: Tensor | None, initial_kv: Tensor | None,
        cu_seqlens: Tensor | None, ridge_scale: float, ridge_offset: float, num_iter: int, scale: float,
        qk_l2norm: bool,
    ) -> None:  # fmt: skip
        self.q, self.k, self.v = q.contiguous(), k.contiguous(), _contiguous(v)
        self.log_decay, self.alpha, self.beta = _contiguous(log_decay), _contiguous(alpha), _contiguous(beta)
        self.A_log, self.dt_bias = _contiguous(A_log), _contiguous(dt_bias)
        self.ridge_scale_tensor = _contiguous(ridge_scale_tensor)
        self.ridge_offset_tensor = _contiguous(ridge_offset_tensor)
        self.initial_kk, self.initial_kv = _contiguous(initial_kk), _contiguous(initial_kv)
        self.scale, self.solve, self.qk_l2norm = scale, num_iter > 0, qk_l2norm

        self.B, self.T, self.H, self.D = q.shape
        self.V = self.D if v is None else v.shape[-1]
        self.Hkv = k.shape[2]
        self.tokens = self.B * self.T
        is_fp32 = q.dtype == torch.float32
        self.operand = torch.float32 if is_fp32 else torch.float16
        self.block_d = _padded(self.D)
        self.config = chunk_config(self.block_d, _padded(self.V), is_fp32)
        self.v_pad = triton.cdiv(self.V, self.config.block_v) * self.config.block_v
        chunk = self.config.chunk
        self.cu_seqlens: Tensor | None = None
        self.chunk_offsets: Tensor | None = None
        self.chunk_sequence: Tensor | None = None
        if cu_seqlens is None:
            self.N, self.chunks = self.B, self.B * triton.cdiv(self.T, chunk)
        else:
            self.N = cu_seqlens.shape[0] - 1
            self.chunks = self.tokens // chunk + self.N  # an upper bound that needs no read of the device
            self._chunk_tables(cu_seqlens, chunk)

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
            "CONSTANT_DELTA": ridge_scale_tensor is None and ridge_offset_tensor is None and ridge_offset == 0,
            **ridge_kind(ridge_scale_tensor, ridge_offset_tensor),
        }  # fmt: skip
        self.values = {"V": self.V, "BLOCK_V": self.config.block_v, "V_PAD": self.v_pad}

    def _chunk_tables(self, cu_seqlens: Tensor, chunk: int) -> None:
        """chunk -> sequence and sequence -> first chunk, on the device. Boundaries are made monotone from 0 to T, so
        that malformed ones cannot write out of bounds."""
        bounds = torch.cummax(cu_seqlens.long().clamp(0, self.tokens), dim=0).values
        bounds[0], bounds[-1] = 0, self.tokens
        counts = (bounds.diff() + (chunk - 1)) // chunk
        ends = counts.cumsum(0)
        index = torch.arange(self.chunks, device=cu_seqlens.device)
        sequence = torch.searchsorted(ends, index, right=True)
        self.cu_seqlens = bounds
        self.chunk_offsets = ends - counts
        self.chunk_sequence = torch.where(index < ends[-1], sequence, -1)

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.q.new_empty(shape, dtype=dtype)

    def per_token(self, wanted: bool = True) -> Tensor | None:
        return self.new(self.B, self.T, self.H) if wanted else None

    @property
    def group(self) -> int:
        return self.H // self.Hkv

    @property
    def chunk_grid(self) -> tuple[int]:
        return (self.chunks * self.H,)

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


def chunk_states(p: _Problem, want_kk: bool, want_final: bool) -> tuple[_States, _States]:
    """H_c (if wanted) and U_c (if there are values) of every chunk, in one pass."""
    kk = kv = _NO_STATES
    if want_kk:
        states = p.new(p.chunks, p.H, p.block_d, p.block_d, dtype=p.operand)
        kk = _States(states, p.new(p.chunks, p.H), p.new(p.N, p.H, p.D, p.D) if want_final else None)
    if p.v is not None:
        states = p.new(p.chunks, p.H, p.block_d, p.v_pad, dtype=p.operand)
        units = p.new(p.chunks, p.H, p.v_pad // p.config.block_v)
        kv = _States(states, units, p.new(p.N, p.H, p.D, p.V) if want_final else None)
    block_n, block_r = _state_widths(p, want_kk)
    kk_blocks = p.block_d // block_n if want_kk else 0
    kv_blocks = 0 if p.v is None else p.v_pad // block_r
    if kk_blocks + kv_blocks > 0 and p.N > 0:
        launch(chunk_state_kernel, (kk_blocks + kv_blocks, p.N * p.H),
            k=p.k, v=p.v, **p.gate, beta=p.beta, initial_kk=p.initial_kk, initial_kv=p.initial_kv, kk=kk.states,
            kk_units=kk.units, kv=kv.states, kv_units=kv.units, final_kk=kk.final, final_kv=kv.final,
            chunk_offsets=p.chunk_offsets, GROUP=p.group, BLOCK_N=block_n, BLOCK_R=block_r,
            KK_BLOCKS=kk_blocks, KV_BLOCKS=kv_blocks, **p.geometry, **p.values, **p.numerics,
            **p.config.state.launch_options(),
        )  # fmt: skip
    return kk, kv


class _Solved(NamedTuple):
    """The solution as it is stored, and ‖H_t‖_F; nothing without a solve."""

    x: Tensor | None = None
    x_scale: Tensor | None = None
    x_query: Tensor | None = None
    fro: Tensor | None = None

    def stored_x(self) -> dict[str, Tensor | None]:
        return {"x": self.x, "x_scale": self.x_scale, "x_query": self.x_query}


def solve(p: _Problem, kk: _States, x_dtype: torch.dtype) -> _Solved:
    """x of every token and ‖H_t‖_F. ``x_dtype``: fp16 stores x as x_query·q + x_scale·x̂, fp32 as it is."""
    packed = x_dtype == torch.float16
    solved = _Solved(
        x=p.new(p.B, p.T, p.H, p.D, dtype=x_dtype), x_scale=p.per_token(packed), x_query=p.per_token(packed),
        fro=p.per_token(),
    )  # fmt: skip
    if p.tokens == 0:
        return solved
    launch(chunk_solve_kernel, p.chunk_grid,
        q=p.q, k=p.k, **p.gate, beta=p.beta, kk=kk.states, kk_units=kk.units, **solved.stored_x(), fro=solved.fro,
        GROUP=p.group, FRO_MIN=FRO_MIN, OPERAND=_TRITON_DTYPES[p.operand], **p.tables, **p.ridge, **p.geometry,
        **p.numerics, **p.config.solve.launch_options(),
    )  # fmt: skip
    return solved


def unsolved(p: _Problem) -> Tensor:
    """x of ``chunk_solve`` without iterations: the query, normalised if asked for, in fp32."""
    q = p.q.float()
    return q / torch.linalg.vector_norm(q, dim=-1, keepdim=True).clamp(min=NORM_EPS) if p.qk_l2norm else q


def read_out(p: _Problem, solved: _Solved, kv: _States) -> Tensor:
    """The output of every token."""
    output = p.new(p.B, p.T, p.H, p.V, dtype=p.q.dtype)
    if p.tokens == 0:
        return output
    launch(chunk_readout_kernel, p.chunk_grid,
        q=p.q, k=p.k, v=p.v, **p.gate, alpha=p.alpha, beta=p.beta, **solved.stored_x(), kv=kv.states,
        kv_units=kv.units, output=output, scale=p.scale, GROUP=p.group, OPERAND=_TRITON_DTYPES[p.operand],
        **p.tables, **p.geometry, **p.values, **p.numerics, **p.config.readout.launch_options(),
    )  # fmt: skip
    return output


class _Adjoint(NamedTuple):
    """Stage A's results: gradients that are final, and what stages B and C read."""

    dq: Tensor
    d_alpha: Tensor | None
    d_ridge_scale: Tensor | None
    d_ridge_offset: Tensor | None
    y: Tensor | None
    y_scale: Tensor | None
    w_local: Tensor | None
    pi: Tensor


def adjoint_solve(p: _Problem, grad: Tensor, solved: _Solved, kk: _States, kv: _States) -> _Adjoint:
    """Stage A: through the read-out to dMix (A1), then the adjoint solve (A2).

    y is stored like x: in the operand dtype where it comes through values, and so lies in the span of the keys; in
    fp32 for a solve alone, whose dx may be anything.
    """
    y_dtype = torch.float32 if p.v is None else p.operand
    result = _Adjoint(
        dq=torch.empty_like(p.q),
        d_alpha=None if p.alpha is None else torch.empty_like(p.alpha),
        d_ridge_scale=p.per_token(p.solve and p.ridge_scale_tensor is not None),
        d_ridge_offset=p.per_token(p.solve and p.ridge_offset_tensor is not None),
        y=p.new(p.B, p.T, p.H, p.D, dtype=y_dtype) if p.solve else None,
        y_scale=p.per_token(p.solve),
        w_local=p.per_token(p.solve),
        pi=p.new(p.B, p.T, p.H),
    )
    x = solved.stored_x()
    dx: Tensor | None = grad
    if p.v is not None:
        dx = p.new(p.B, p.T, p.H, p.D) if p.solve else None
        launch(chunk_backward_readout_kernel, p.chunk_grid,
            d_output=grad, q=p.q, k=p.k, v=p.v, **p.gate, alpha=p.alpha, beta=p.beta, **x, kv=kv.states,
            kv_units=kv.units, dm=dx, dq=result.dq, d_alpha=result.d_alpha, pi=result.pi,
            scale=p.scale, GROUP=p.group, SOLVE=p.solve, OPERAND=_TRITON_DTYPES[p.operand], **p.tables, **p.geometry,
            **p.values, **p.numerics, **p.config.backward_readout.launch_options(),
        )  # fmt: skip
    elif not p.solve:  # x = q
        result.pi.zero_()
        result.dq.copy_(query_gradient(p, grad))
    if p.solve:
        launch(chunk_backward_solve_kernel, p.chunk_grid,
            dx=dx, THROUGH_READOUT=p.v is not None, q=p.q, k=p.k, **p.gate, alpha=p.alpha, beta=p.beta, **x,
            fro=solved.fro, kk=kk.states, kk_units=kk.units, dq=result.dq, y=result.y, y_scale=result.y_scale,
            d_ridge_scale=result.d_ridge_scale, d_ridge_offset=result.d_ridge_offset, w_local=result.w_local,
            pi=result.pi, GROUP=p.group, FRO_MIN=FRO_MIN, OPERAND=_TRITON_DTYPES[p.operand],
            **p.tables, **p.ridge, **p.geometry, **p.numerics, **p.config.backward_solve.launch_options(),
        )  # fmt: skip
    return result


def query_gradient(p: _Problem, dx: Tensor) -> Tensor:
    """dq of ``chunk_solve`` without a solve: x is the query, normalised if asked for (docs/math.md §4.5)."""
    if not p.qk_l2norm:
        return dx
    norm = torch.linalg.vector_norm(p.q.float(), dim=-1, keepdim=True)
    unit = unsolved(p)
    radial = torch.where(norm > NORM_EPS, (unit * dx).sum(-1, keepdim=True), 0.0)
    return (dx - unit * radial) / norm.clamp(min=NORM_EPS)


class _StateGradients(NamedTuple):
    """Stage B's results: Ω⁺ and Ξ⁺ of every chunk, and the gradients of the initial states."""

    kk: _States
    kv: _States


def state_gradients(
    p: _Problem, d_output: Tensor | None, solved: _Solved, adjoint: _Adjoint, kk: _States, d_final_kk: Tensor | None,
    d_final_kv: Tensor | None,
) -> _StateGradients:  # fmt: skip
    """Stage B: what each chunk adds by itself (B1), then the scan over chunks, in place (B2)."""
    want_kk, want_kv = p.solve or d_final_kk is not None, p.v is not None
    if not want_kk and not want_kv:
        return _StateGradients(_NO_STATES, _NO_STATES)
    config = p.config
    v_blocks = p.v_pad // config.block_v
    dkk = dkv = _NO_STATES
    increment_kk_units = increment_kv_units = None
    if want_kk:
        states = p.new(p.chunks, p.H, p.block_d, p.block_d, dtype=p.operand)
        d_initial = None if p.initial_kk is None else torch.empty_like(p.initial_kk)
        dkk = _States(states, p.new(p.chunks, p.H), d_initial)
        increment_kk_units = p.new(p.chunks, p.H) if p.solve else None
    if want_kv:
        states = p.new(p.chunks, p.H, p.block_d, p.v_pad, dtype=p.operand)
        d_initial = None if p.initial_kv is None else torch.empty_like(p.initial_kv)
        dkv = _States(states, p.new(p.chunks, p.H, v_blocks), d_initial)
        increment_kv_units = p.new(p.chunks, p.H, v_blocks)
    decay, w_first = p.new(p.chunks, p.H), p.new(p.chunks, p.H) if p.solve else None
    launch(chunk_backward_state_kernel, (*p.chunk_grid, p.block_d // config.increment_columns),
        d_output=d_output, q=p.q, k=p.k, **solved.stored_x(), y=adjoint.y, y_scale=adjoint.y_scale,
        w_local=adjoint.w_local, **p.gate, alpha=p.alpha, beta=p.beta, dkk=dkk.states, dkk_units=increment_kk_units,
        dkv=dkv.states, dkv_units=increment_kv_units, decay=decay, w_first=w_first, scale=p.scale, GROUP=p.group,
        BLOCK_N=config.increment_columns, THROUGH_H=p.solve, THROUGH_U=want_kv, OPERAND=_TRITON_DTYPES[p.operand],
        **p.tables, **p.geometry, **p.values, **p.numerics, **config.backward_state.launch_options(),
    )  # fmt: skip
    kk_rows = min(p.block_d, config.scan_entries // p.block_d)
    kv_rows = min(p.block_d, config.scan_entries // config.block_v)
    kk_pieces = p.block_d // kk_rows if want_kk else 0
    kv_pieces = v_blocks * (p.block_d // kv_rows) if want_kv else 0
    launch(chunk_backward_scan_kernel, (kk_pieces + kv_pieces, p.N * p.H),
        dkk=dkk.states, dkk_units=dkk.units, dkv=dkv.states, dkv_units=dkv.units,
        increment_kk_units=increment_kk_units, increment_kv_units=increment_kv_units, decay=decay, w_first=w_first,
        kk=kk.states if p.solve else None, kk_units=kk.units, d_final_kk=d_final_kk, d_final_kv=d_final_kv,
        d_initial_kk=dkk.final, d_initial_kv=dkv.final, chunk_offsets=p.chunk_offsets, KK_ROWS=kk_rows,
        KV_ROWS=kv_rows, KK_PIECES=kk_pieces, KV_PIECES=kv_pieces, **p.geometry, **p.values,
        **config.backward_scan.launch_options(),
    )  # fmt: skip
    return _StateGradients(dkk, dkv)


class _TokenGradients(NamedTuple):
    """Stage C's results; the keys' and values' per query head, the gate's as partial sums over chunks."""

    dk: Tensor
    dv: Tensor | None
    d_beta: Tensor | None
    d_log_decay: Tensor | None
    d_A_log: Tensor | None
    d_dt_bias: Tensor | None


def token_gradients(
    p: _Problem, d_output: Tensor | None, solved: _Solved, adjoint: _Adjoint, kk: _States, kv: _States,
    incoming: _StateGradients,
) -> _TokenGradients:  # fmt: skip
    """Stage C: through U (C1), then through H (C2). Whichever runs last finishes dk, dβ and the gate's gradient."""
    dtype = p.q.dtype if p.group == 1 else torch.float32
    through_h, through_u = incoming.kk.states is not None, p.v is not None
    partial = p.A_log is not None
    dk = p.new(p.B, p.T, p.H, p.D, dtype=dtype)
    finished: dict[str, Tensor | None] = {
        "d_beta": None if p.beta is None else torch.empty_like(p.beta),
        "d_log_decay": None if p.log_decay is None else torch.empty_like(p.log_decay),
        "d_A_log": p.new(p.chunks, p.H).zero_() if partial else None,
        "d_dt_bias": p.new(p.chunks, p.H).zero_() if partial and p.dt_bias is not None else None,
    }
    if not through_h and not through_u:  # x = q, and nothing flows into the state: keys and gates have no part in it
        for tensor in finished.values():
            if tensor is not None:
                tensor.zero_()
        return _TokenGradients(dk.zero_(), None, **finished)
    shared = {
        "q": p.q, "k": p.k, **p.gate, "beta": p.beta, **solved.stored_x(), "pi": adjoint.pi, "dk": dk,
        **finished, "GROUP": p.group, "SOLVE": p.solve,
        "OPERAND": _TRITON_DTYPES[p.operand], **p.tables, **p.geometry, **p.numerics,
    }  # fmt: skip
    dv = None
    part: dict[str, Tensor | None] = {"dk_u": None, "m_u": None, "j_u": None}
    if through_u:
        dv = p.new(p.B, p.T, p.H, p.V, dtype=dtype)
        if through_h:
            part = {"dk_u": p.new(p.B, p.T, p.H, p.D), "m_u": p.per_token(), "j_u": p.new(p.chunks, p.H)}
        launch(chunk_backward_value_kernel, p.chunk_grid,
            d_output=d_output, v=p.v, alpha=p.alpha, kv=kv.states, kv_units=kv.units, dkv=incoming.kv.states,
            dkv_units=incoming.kv.units, dv=dv, scale=p.scale, **part, **shared, **p.values,
            **p.config.backward_value.launch_options(),
        )  # fmt: skip
    if through_h:
        launch(chunk_backward_key_kernel, p.chunk_grid,
            y=adjoint.y, y_scale=adjoint.y_scale, w_local=adjoint.w_local, kk=kk.states, kk_units=kk.units,
            dkk=incoming.kk.states, dkk_units=incoming.kk.units, BLOCK_N=p.config.block_n, BLOCK_S=p.config.block_s,
            **part, **shared, **p.config.backward_key.launch_options(),
        )  # fmt: skip
    return _TokenGradients(dk, dv, **finished)


# --------------------------------------------------------------------------------------------------------- operators
def _or_empty(p: _Problem, tensor: Tensor | None) -> Tensor:
    return p.empty() if tensor is None else tensor


@replays(lambda: chunk_config)
def chunk_solve(
    q, k, log_decay, beta, ridge_scale_tensor, ridge_offset_tensor, A_log, dt_bias, initial_kk, cu_seqlens,
    ridge_scale, ridge_offset, num_iter, qk_l2norm, output_final_state,
):  # fmt: skip
    p = _Problem(
        q, k, None, log_decay, None, beta, ridge_scale_tensor, ridge_offset_tensor, A_log, dt_bias, initial_kk, None,
        cu_seqlens, ridge_scale, ridge_offset, num_iter, 1.0, qk_l2norm,
    )  # fmt: skip
    with _on_device(q):
        kk, _ = chunk_states(p, p.solve or output_final_state, output_final_state)
        solved = solve(p, kk, torch.float32) if p.solve else _Solved(unsolved(p), fro=p.new(p.B, p.T, p.H).zero_())
    return solved.x, _or_empty(p, kk.final), solved.fro


@replays(lambda: chunk_config)
def chunk_gka(
    q, k, v, log_decay, alpha, beta, ridge_scale_tensor, ridge_offset_tensor, A_log, dt_bias, initial_kk, initial_kv,
    cu_seqlens, ridge_scale, ridge_offset, num_iter, scale, qk_l2norm, output_final_state, save_x,
):  # fmt: skip
    p = _Problem(
        q, k, v, log_decay, alpha, beta, ridge_scale_tensor, ridge_offset_tensor, A_log, dt_bias, initial_kk,
        initial_kv, cu_seqlens, ridge_scale, ridge_offset, num_iter, scale, qk_l2norm,
    )  # fmt: skip
    with _on_device(q):
        kk, kv = chunk_states(p, p.solve or output_final_state, output_final_state)
        solved = solve(p, kk, p.operand) if p.solve else _Solved()
        output = read_out(p, solved, kv)
    if not save_x:
        solved = _Solved()
    x = q.new_empty(0, dtype=p.operand) if solved.x is None else solved.x
    residuals = (x, _or_empty(p, solved.x_scale), _or_empty(p, solved.x_query), _or_empty(p, solved.fro))
    return output, _or_empty(p, kk.final), _or_empty(p, kv.final), *residuals


def _backward(
    p: _Problem, grad: Tensor, d_final_kk: Tensor | None, d_final_kv: Tensor | None, solved: _Solved,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of q, k, v, log_decay, alpha, beta, ridge scale and offset, A_log, dt_bias, initial kk and kv."""
    grad, d_final_kk, d_final_kv = grad.contiguous(), _contiguous(d_final_kk), _contiguous(d_final_kv)
    d_output = None if p.v is None else grad
    with _on_device(p.q):
        kk, kv = chunk_states(p, p.solve or d_final_kk is not None, False)
        if not p.solve:
            solved = _Solved()
        elif solved.x is None or solved.x.numel() == 0:
            solved = solve(p, kk, p.operand)
        adjoint = adjoint_solve(p, grad, solved, kk, kv)
        incoming = state_gradients(p, d_output, solved, adjoint, kk, d_final_kk, d_final_kv)
        tokens = token_gradients(p, d_output, solved, adjoint, kk, kv, incoming)

    def over_groups(per_query_head: Tensor | None, like: Tensor | None) -> Tensor:
        if per_query_head is None or like is None:
            return p.empty()
        if p.group == 1:
            return per_query_head
        return per_query_head.view(p.B, p.T, p.Hkv, p.group, -1).sum(3).to(like.dtype)

    def of_ridge(per_token: Tensor | None, tensor: Tensor | None) -> Tensor:
        if tensor is None:
            return p.empty()
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
        adjoint.dq,
        over_groups(tokens.dk, p.k),
        over_groups(tokens.dv, p.v),
        _or_empty(p, tokens.d_log_decay),
        _or_empty(p, adjoint.d_alpha),
        _or_empty(p, tokens.d_beta),
        of_ridge(adjoint.d_ridge_scale, p.ridge_scale_tensor),
        of_ridge(adjoint.d_ridge_offset, p.ridge_offset_tensor),
        of_parameter(tokens.d_A_log, p.A_log),
        of_parameter(tokens.d_dt_bias, p.dt_bias),
        of_state(incoming.kk.final, p.initial_kk),
        of_state(incoming.kv.final, p.initial_kv),
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


@replays(lambda: chunk_config)
def chunk_solve_backward(
    dx, d_final_kk, q, k, log_decay, beta, ridge_scale_tensor, ridge_offset_tensor, A_log, dt_bias, initial_kk,
    cu_seqlens, x, fro, ridge_scale, ridge_offset, num_iter, qk_l2norm,
):  # fmt: skip
    inputs = (
        q, k, None, log_decay, None, beta, ridge_scale_tensor, ridge_offset_tensor, A_log, dt_bias, initial_kk, None,
    )  # fmt: skip
    if q.numel() == 0:
        gradients = _backward_of_nothing(inputs, d_final_kk, None, q)
    else:
        p = _Problem(*inputs, cu_seqlens, ridge_scale, ridge_offset, num_iter, 1.0, qk_l2norm)
        gradients = _backward(p, dx, d_final_kk, None, _Solved(x, fro=fro))
    dq, dk, _, d_log_decay, _, d_beta, *rest, d_initial_kk, _ = gradients
    return dq, dk, d_log_decay, d_beta, *rest, d_initial_kk


@replays(lambda: chunk_config)
def chunk_gka_backward(
    d_output, d_final_kk, d_final_kv, q, k, v, log_decay, alpha, beta, ridge_scale_tensor, ridge_offset_tensor, A_log,
    dt_bias, initial_kk, initial_kv, cu_seqlens, x, x_scale, x_query, fro, ridge_scale, ridge_offset, num_iter, scale,
    qk_l2norm,
):  # fmt: skip
    inputs = (
        q, k, v, log_decay, alpha, beta, ridge_scale_tensor, ridge_offset_tensor, A_log, dt_bias, initial_kk,
        initial_kv,
    )  # fmt: skip
    if q.numel() == 0:
        return _backward_of_nothing(inputs, d_final_kk, d_final_kv, q)
    p = _Problem(*inputs, cu_seqlens, ridge_scale, ridge_offset, num_iter, scale, qk_l2norm)
    packed = x_scale.numel() > 0
    solved = _Solved(x, x_scale if packed else None, x_query if packed else None, fro)
    return _backward(p, d_output, d_final_kk, d_final_kv, solved)


@replays(lambda: recurrent_config)
def recurrent_gka(
    q, k, v, log_decay, alpha, beta, ridge_scale_tensor, ridge_offset_tensor, A_log, dt_bias, kk, kv, state_indices,
    ridge_scale, ridge_offset, num_iter, scale, qk_l2norm,
):  # fmt: skip
    B, T, H, D = q.shape
    V = v.shape[-1]
    output = q.new_empty(B, T, H, V)
    if output.numel() == 0:
        return output
    is_fp32 = q.dtype == torch.float32
    block_d = _padded(D)
    config = recurrent_config(block_d, _padded(V), is_fp32)
    operand = torch.float32 if is_fp32 else torch.float16
    with _on_device(q):
        launch(recurrent_kernel, (H, B),
            q=q.contiguous(), k=k.contiguous(), v=v.contiguous(), log_decay=_contiguous(log_decay),
            A_log=_contiguous(A_log), dt_bias=_contiguous(dt_bias), alpha=_contiguous(alpha), beta=_contiguous(beta),
            ridge_scale_tensor=_contiguous(ridge_scale_tensor), ridge_offset_tensor=_contiguous(ridge_offset_tensor),
            kk=kk, kv=kv, state_indices=_contiguous(state_indices), output=output, ridge_scale=ridge_scale,
            ridge_offset=ridge_offset, scale=scale, num_iter=num_iter, T=T, H=H, GROUP=H // k.shape[2], D=D, V=V,
            BLOCK_D=block_d, BLOCK_V=config.block_v, V_PAD=triton.cdiv(V, config.block_v) * config.block_v,
            ROWS=config.rows, SOLVE=num_iter > 0,
            **ridge_kind(ridge_scale_tensor, ridge_offset_tensor),
            TENSOR_CORES=config.tensor_cores,
            QK_L2NORM=qk_l2norm, NORM_EPS=NORM_EPS, FRO_MIN=FRO_MIN, MIN_LOG_DECAY=MIN_LOG_DECAY,
            OPERAND=_TRITON_DTYPES[operand], PRECISION=config.precision, **config.kernel.launch_options(),
        )  # fmt: skip
    return output
