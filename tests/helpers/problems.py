"""Inputs of every kind the operators meet, seeded, on any device and dtype; and how errors are measured.

Values are drawn in fp64 on the CPU and then rounded, so one seed means one problem on every device. A :class:`Problem`
holds all tensor arguments of one call; ``run_gka`` and ``run_solve`` give it to the operators, ``exact_gka`` and
``exact_solve`` to the fp64 specification, all returning outputs by name, and :func:`evaluate` adds gradients by name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gka_ops
from gka_ops.numerics import DEFAULT_RIDGE
from gka_ops.reference import chebyshev, exact

KEY_SETS = ("random", "clustered", "low_rank", "repeated", "silu")
"""random: isotropic. clustered: 8 centres with noise. low_rank: in a 4-dimensional subspace. repeated: one key all the
time. silu: behind a SiLU, so with a common positive mean."""

MEAN_DECAYS = (None, 1.0, 0.5, 0.1, 0.01, 0.003, 0.0005, 0.0001)
"""Mean −log decay a token, from a memory of one token to one of ten thousand; ``None`` is no decay at all."""

Outputs = dict[str, Tensor]


# --------------------------------------------------------------------------------------------------------- problems
@dataclasses.dataclass(frozen=True)
class Problem:
    """The arguments of one call, named as those of the operators (``gka_ops.ops.SCHEMAS``).

    Shapes: q [B, T, H, D], k [B, T, Hkv, D], v [B, T, Hkv, V], gates [B, T, H], ridge parts float, [H] or [B, T, H],
    A_log and dt_bias [H], initial_kk [N, H, D, D], initial_kv [N, H, D, V], cu_seqlens [N + 1].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None = None
    alpha: Tensor | None = None
    beta: Tensor | None = None
    ridge_scale: float | Tensor = 0.02
    ridge_offset: float | Tensor = 0.0
    A_log: Tensor | None = None
    dt_bias: Tensor | None = None
    initial_kk: Tensor | None = None
    initial_kv: Tensor | None = None
    cu_seqlens: Tensor | None = None
    qk_l2norm: bool = False

    def leaves(self) -> dict[str, Tensor]:
        """The floating-point tensors by name: all that can have a gradient."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {n: t for n, t in fields.items() if isinstance(t, Tensor) and t.is_floating_point()}

    def replace(self, fields: Mapping[str, Any]) -> Problem:
        """The problem with some fields replaced."""
        return dataclasses.replace(self, **fields)

    def map(self, function: Callable[[str, Tensor], Tensor]) -> Problem:
        """The problem with every floating-point tensor replaced by ``function(name, tensor)``."""
        return self.replace({name: function(name, tensor) for name, tensor in self.leaves().items()})

    def double(self) -> Problem:
        """The same values, already rounded, in fp64: what errors are measured against."""
        return self.map(lambda _, tensor: tensor.double())

    def requiring_grad(self) -> Problem:
        """Detached copies that ask for gradients."""
        return self.map(lambda _, tensor: tensor.detach().clone().requires_grad_())

    def tokens(self, start: int, end: int) -> Problem:
        """Tokens start..end − 1 of every per-token tensor; states stay as they are, ``cu_seqlens`` is dropped."""
        T = self.q.shape[1]
        per_token = ("q", "k", "v", "log_decay", "alpha", "beta", "ridge_scale", "ridge_offset")

        def cut(name: str, tensor: Tensor) -> Tensor:
            return tensor[:, start:end] if name in per_token and tensor.ndim >= 3 and tensor.shape[1] == T else tensor

        return dataclasses.replace(self.map(cut), cu_seqlens=None)

    @property
    def sequences(self) -> int:
        """N."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_keys(kind: str, B: int, T: int, H: int, D: int, generator: torch.Generator) -> Tensor:
    """Unit keys [B, T, H, D] in fp64 of one of ``KEY_SETS``."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    if kind == "random":
        k = normal(B, T, H, D)
    elif kind == "clustered":
        centres = normal(B, 8, H, D)
        chosen = torch.randint(8, (B, T, H, 1), generator=generator).expand(B, T, H, D)
        k = centres.gather(1, chosen) + 0.2 * normal(B, T, H, D)
    elif kind == "low_rank":
        k = torch.einsum("bthr,bhrd->bthd", normal(B, T, H, min(4, D)), normal(B, H, min(4, D), D))
    elif kind == "repeated":
        k = normal(B, 1, H, D).expand(B, T, H, D)
    elif kind == "silu":
        k = torch.nn.functional.silu(normal(B, T, H, D))
    else:
        raise ValueError(f"expected a key set of {KEY_SETS}, got {kind!r}")
    return torch.nn.functional.normalize(k, dim=-1)


def make_state(N: int, H: int, D: int, V: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A symmetric positive semidefinite H_0 [N, H, D, D] of ‖H_0‖_F of order 1, and U_0 [N, H, D, V], in fp64."""
    k = make_keys("random", N, 2 * D, H, D, generator)
    v = torch.randn(N, 2 * D, H, V, dtype=torch.float64, generator=generator)
    kk, kv = torch.einsum("nthd,nthe->nhde", k, k), torch.einsum("nthd,nthv->nhdv", k, v)
    return (kk + kk.mT) / (4 * D), kv / (2 * D)


def make_problem(
    *,
    B: int = 1,
    T: int = 128,
    H: int = 2,
    Hkv: int | None = None,
    D: int = 16,
    V: int | None = None,
    keys: str = "random",
    mean_decay: float | None = 0.01,
    alpha: bool = True,
    beta: bool = True,
    min_beta: float | None = None,
    ridge: str = "constant",
    ridge_scale: float = 0.02,
    ridge_offset: float = 0.0,
    gate: bool = False,
    dt_bias: bool = True,
    state: bool = False,
    seq_lengths: Sequence[int] | None = None,
    qk_l2norm: bool = False,
    dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Problem:
    """Draws a problem.

    Args:
        B: batch size; 1 with ``seq_lengths``.
        T: tokens; the sum of ``seq_lengths`` where given.
        H: query heads.
        Hkv: key/value heads, H by default.
        D: key dimension.
        V: value dimension, D by default.
        keys: one of ``KEY_SETS``; unit norms, or norms in [0.5, 2] when ``qk_l2norm`` asks the operator to normalise.
        mean_decay: mean of −g a token, uniform in [0, 2·mean]; ``None``: no log decay.
        alpha: α = sigmoid of a normal variable, or absent.
        beta: β likewise, or absent.
        min_beta: β log-uniform in [min_beta, 1] instead.
        ridge: ``"constant"`` floats, or tensors ``"head"`` [H] or ``"token"`` [B, T, H] of values at or above
            ``ridge_scale`` and ``ridge_offset``.
        ridge_scale: r.
        ridge_offset: b.
        gate: a raw projection with A_log instead of a log decay; its mean decay is about ``mean_decay``.
        dt_bias: with ``gate``, whether there is a bias.
        state: an initial state.
        seq_lengths: lengths of packed sequences; 0 is allowed.
        qk_l2norm: as for the operator.
        dtype: of q, k, v; everything else is fp32 (fp64 for fp64).
        device: where the tensors go.
        seed: of all draws.
    """
    generator = _generator(seed)
    H_kv, V = Hkv or H, D if V is None else V
    if seq_lengths is not None:
        B, T = 1, sum(seq_lengths)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=generator)

    k = make_keys(keys, B, T, H_kv, D, generator)
    q = torch.nn.functional.normalize(normal(B, T, H, D), dim=-1)
    v = normal(B, T, H_kv, V)
    if qk_l2norm:
        q, k = q * (0.5 + 1.5 * uniform(B, T, H, 1)), k * (0.5 + 1.5 * uniform(B, T, H_kv, 1))

    log_decay = A_log = bias = None
    if mean_decay is not None:
        log_decay = -2 * mean_decay * uniform(B, T, H)
        if gate:
            log_decay = normal(B, T, H)
            A_log = math.log(mean_decay) + 0.3 * normal(H)
            bias = 0.5 * normal(H) if dt_bias else None
    weight = None
    if beta:
        weight = torch.sigmoid(normal(B, T, H)) if min_beta is None else min_beta ** uniform(B, T, H)

    parts: list[float | Tensor] = [ridge_scale, ridge_offset]
    if ridge != "constant":
        shape = {"head": (H,), "token": (B, T, H)}[ridge]
        parts = [ridge_scale * (1 + uniform(*shape)), ridge_offset * (1 + uniform(*shape))]

    cu_seqlens = None
    if seq_lengths is not None:
        cu_seqlens = torch.tensor([0, *seq_lengths]).cumsum(0).to(device=device, dtype=torch.int32)
    kk, kv = make_state(B if seq_lengths is None else len(seq_lengths), H, D, V, generator) if state else (None, None)

    problem = Problem(
        q=q,
        k=k,
        v=v,
        log_decay=log_decay,
        alpha=torch.sigmoid(normal(B, T, H)) if alpha else None,
        beta=weight,
        ridge_scale=parts[0],
        ridge_offset=parts[1],
        A_log=A_log,
        dt_bias=bias,
        initial_kk=kk,
        initial_kv=kv,
        cu_seqlens=cu_seqlens,
        qk_l2norm=qk_l2norm,
    )
    return problem.map(lambda name, t: t.to(device=device, dtype=dtype if name in ("q", "k", "v") else wide))


# ------------------------------------------------------------------------------------------------------------- runs
def ridge_of(problem: Problem) -> gka_ops.Ridge:
    """The ridge, with the true minimum of a tensor scale for ``num_iter="auto"``."""
    scale = problem.ridge_scale
    smallest = float(scale.detach().min()) if isinstance(scale, Tensor) and scale.numel() else DEFAULT_RIDGE
    return gka_ops.Ridge(scale, problem.ridge_offset, smallest)


def _plain_ridge(problem: Problem) -> tuple[float | Tensor, float | Tensor]:
    return problem.ridge_scale, problem.ridge_offset


def gate_of(problem: Problem) -> gka_ops.DecayGate | None:
    return None if problem.A_log is None else gka_ops.DecayGate(problem.A_log, problem.dt_bias)


def state_of(problem: Problem) -> gka_ops.GKAState | None:
    if problem.initial_kk is None or problem.initial_kv is None:
        return None
    return gka_ops.GKAState(problem.initial_kk, problem.initial_kv)


def reference_inputs(problem: Problem) -> chebyshev.Inputs:
    """The problem as the eager reference's own functions take it."""
    return chebyshev.Inputs(**{field.name: getattr(problem, field.name) for field in dataclasses.fields(problem)})


def run_gka(problem: Problem, **options: Any) -> Outputs:
    """``gka_ops.chunk_gka`` with ``options`` (num_iter, scale, impl, ...): output, final_kk, final_kv."""
    p = problem
    result = gka_ops.chunk_gka(
        p.q, p.k, p.v, p.log_decay, p.alpha, p.beta,
        ridge=ridge_of(p), qk_l2norm=p.qk_l2norm, gate=gate_of(p), initial_state=state_of(p), output_final_state=True,
        cu_seqlens=p.cu_seqlens, **options,
    )  # fmt: skip
    assert result.final_state is not None
    return {"output": result.output, "final_kk": result.final_state.kk, "final_kv": result.final_state.kv}


def run_solve(problem: Problem, **options: Any) -> Outputs:
    """``gka_ops.chunk_solve`` with ``options``: x, final_kk."""
    p = problem
    result = gka_ops.chunk_solve(
        p.q, p.k, p.log_decay, p.beta,
        ridge=ridge_of(p), qk_l2norm=p.qk_l2norm, gate=gate_of(p), initial_state=p.initial_kk, output_final_state=True,
        cu_seqlens=p.cu_seqlens, **options,
    )  # fmt: skip
    assert result.final_state is not None
    return {"x": result.x, "final_kk": result.final_state}


def exact_gka(problem: Problem, num_iter: int | str = "auto", scale: float | None = None) -> Outputs:
    """The specification of :func:`run_gka`, in fp64."""
    p = problem
    output, (kk, kv) = exact.chunk_gka(
        p.q, p.k, p.v, p.log_decay, p.alpha, p.beta,
        ridge=_plain_ridge(p), num_iter=num_iter, scale=scale, qk_l2norm=p.qk_l2norm, gate=gate_of(p),
        initial_state=state_of(p), cu_seqlens=p.cu_seqlens,
    )  # fmt: skip
    return {"output": output, "final_kk": kk, "final_kv": kv}


def exact_solve(problem: Problem, num_iter: int | str = "auto") -> Outputs:
    """The specification of :func:`run_solve`, in fp64."""
    p = problem
    x, kk = exact.chunk_solve(
        p.q, p.k, p.log_decay, p.beta,
        ridge=_plain_ridge(p), num_iter=num_iter, qk_l2norm=p.qk_l2norm, gate=gate_of(p),
        initial_state=p.initial_kk, cu_seqlens=p.cu_seqlens,
    )  # fmt: skip
    return {"x": x, "final_kk": kk}


class Evaluation(NamedTuple):
    """Outputs and gradients by name, detached."""

    outputs: Outputs
    gradients: dict[str, Tensor]


def cotangents(outputs: Outputs, seed: int = 1) -> Outputs:
    """Random upstream gradients of ``outputs``, each in its dtype."""
    generator = _generator(seed)
    return {
        name: torch.randn(t.shape, dtype=torch.float64, generator=generator).to(device=t.device, dtype=t.dtype)
        for name, t in outputs.items()
    }


def evaluate(run: Callable[[Problem], Outputs], problem: Problem, upstream: Outputs) -> Evaluation:
    """Runs forward and backward.

    Args:
        run: from a problem to outputs by name.
        problem: its arguments; gradients are taken of every floating-point tensor in it.
        upstream: gradients of some or all outputs.

    Returns:
        Outputs, and a gradient for each leaf (zero where the outputs do not depend on it; the symmetric one of
        ``initial_kk``).
    """
    problem = problem.requiring_grad()
    leaves, outputs = problem.leaves(), run(problem)
    reached = [name for name in upstream if outputs[name].requires_grad]
    named = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    if reached:
        gradients = torch.autograd.grad(
            [outputs[name] for name in reached],
            list(leaves.values()),
            [upstream[name].to(outputs[name].dtype) for name in reached],
            allow_unused=True,
            materialize_grads=True,
        )
        named = dict(zip(leaves, gradients, strict=True))
    if "initial_kk" in named:
        named["initial_kk"] = (named["initial_kk"] + named["initial_kk"].mT) / 2
    return Evaluation({name: output.detach() for name, output in outputs.items()}, named)


# ----------------------------------------------------------------------------------------------------------- errors
class ErrorSummary(NamedTuple):
    """Quantiles over tokens and heads of a relative error."""

    p50: float
    p90: float
    p99: float
    max: float


def token_errors(actual: Tensor, expected: Tensor) -> Tensor:
    """‖actual − expected‖ / ‖expected‖ over the last dimension, in fp64; 0 where both are zero."""
    expected = expected.double()
    difference = torch.linalg.vector_norm(actual.double() - expected, dim=-1)
    return torch.where(difference == 0, 0.0, difference / torch.linalg.vector_norm(expected, dim=-1))


def summarise(errors: Tensor) -> ErrorSummary:
    """Quantiles of ``errors`` (any shape)."""
    levels = torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64, device=errors.device)
    p50, p90, p99 = torch.quantile(errors.double().flatten(), levels)
    return ErrorSummary(float(p50), float(p90), float(p99), float(errors.max()))


def relative_error(actual: Tensor, expected: Tensor) -> ErrorSummary:
    """Per-token errors of ``actual`` [..., D] as quantiles."""
    return summarise(token_errors(actual, expected))


def norm_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ over the whole tensor, in fp64; 0 where both are zero."""
    return float(token_errors(actual.reshape(1, -1), expected.reshape(1, -1)))


def max_error(actual: Tensor, expected: Tensor) -> float:
    """max|actual − expected| / max|expected| over the whole tensor, in fp64; 0 where they are equal."""
    if expected.numel() == 0:
        return 0.0
    difference = float((actual.double() - expected.double()).abs().max())
    return 0.0 if difference == 0 else difference / float(expected.double().abs().max())


def unit_roundoff(dtype: torch.dtype) -> float:
    """u: the largest relative error of rounding to ``dtype``."""
    return torch.finfo(dtype).eps / 2


def guaranteed_factor(ridge: float, num_iter: int) -> float:
    """1 / T_{n+1}(1 + 2ρ): the a-priori bound of ‖x − x_n‖/‖x‖ after n operator applications (docs/math.md §3.1)."""
    return 1.0 / math.cosh((num_iter + 1) * math.acosh(1.0 + 2.0 * ridge))
