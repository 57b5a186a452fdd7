"""Makes the calls that cases are about, on random data, and says how right ours are.

What is timed is what is checked: causality lets the first tokens of one batch entry and head group be compared with an
fp64 solve of those tokens alone, at any length, and so the gradients of a loss on those tokens alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gka_ops
from gka_ops.numerics import DEFAULT_RIDGE
from gka_ops_perf.cases import ATTENTION, CONTEXT, FLASH_LINEAR, Case
from gka_ops_perf.costs import Shape

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PREFIX = 192  # tokens that are compared: three chunks
EXACT_ITERATIONS = 160  # of the fp64 reference: its truncation is below fp64's rounding
LARGEST_ERROR = {"o": 2e-2, "gradient": 1e-2}
"""Of an output per token at p99, and of a gradient as a whole, for 16-bit inputs (docs/numerics.md)."""

HIDDEN = 4096  # of the layer and the model
LAYERS = 4  # of the model

Call = Callable[[], Any]


class UnavailableError(RuntimeError):
    """A peer that is not installed here, or that refuses to run here."""


class Job(NamedTuple):
    """A call, and what its results are off by: relative errors by name, and the largest that each may be."""

    run: Call
    errors: Callable[[], dict[str, float]]
    bars: Mapping[str, float]


class Inputs(NamedTuple):
    """Operands of ``chunk_gka``: q [B, T, H, D], k [B, T, Hkv, D], v [B, T, Hkv, V], gates [B, T, H] in fp32."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    alpha: Tensor
    beta: Tensor


def make_inputs(shape: Shape, *, grad: bool = False, device: str = "cuda") -> Inputs:
    """Unit random queries and keys, mean log decay −0.01 a token, sigmoid gates."""
    generator = torch.Generator(device=device).manual_seed(0)
    dtype = DTYPES[shape.dtype]

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=generator)

    B, T, H, Hkv, D, V, _ = shape
    q, k = (F.normalize(randn(B, T, heads, D), dim=-1).to(dtype) for heads in (H, Hkv))
    v = randn(B, T, Hkv, V).to(dtype)
    decay = -0.02 * torch.rand(B, T, H, device=device, generator=generator)
    inputs = Inputs(q, k, v, decay, torch.sigmoid(randn(B, T, H)), torch.sigmoid(randn(B, T, H)))
    return Inputs(*(tensor.requires_grad_(grad) for tensor in inputs))


def job(case: Case, device: str = "cuda") -> Job:
    """Raises ``UnavailableError`` where the case's provider cannot be used here."""
    if case.op == "layer":
        return _layer(case, device)
    if case.op == "model":
        return _model(case, device)
    if case.stage == "decode":
        return _decode_attention(case, device) if case.provider in ATTENTION else _decode(case, device)
    if case.op == "chunk_solve":
        return _solve(case, device)
    if case.provider in ATTENTION or case.provider in FLASH_LINEAR:
        return _peer(case, device)
    return _chunk(case, device)


def _options(case: Case) -> dict[str, Any]:
    return {} if case.num_iter is None and case.iterations else {"num_iter": case.iterations}


# ------------------------------------------------------------------------------------------------------------- ours
def truncation(num_iter: int) -> float:
    """The a-priori bound of x's relative error after ``num_iter`` applications at the default ridge (MATH.md §3.1)."""
    return 1 / math.cosh((num_iter + 1) * math.acosh(1 + 2 * DEFAULT_RIDGE))


def _bars(case: Case, *names: str) -> dict[str, float]:
    """Stopping early adds its own error: to x at most :func:`truncation`, to gradients up to five times as much."""
    early = truncation(case.iterations) if case.iterations else 0.0
    return {
        name: LARGEST_ERROR["o"] + early if name in ("o", "x") else LARGEST_ERROR["gradient"] + 5 * early
        for name in names
    }


class _Part(NamedTuple):
    """The tokens, batch entry and heads that are compared."""

    tokens: int
    heads: int
    shape: Shape

    @classmethod
    def of(cls, shape: Shape) -> _Part:
        return cls(min(PREFIX, shape.T), shape.H // shape.Hkv, shape)

    def cut(self, tensor: Tensor) -> Tensor:
        """Of [B, T, H or Hkv, ...]: key/value head 0 and the query heads that share it."""
        grouped = self.shape.Hkv != self.shape.H and tensor.shape[2] == self.shape.Hkv
        return tensor[:1, : self.tokens, : 1 if grouped else self.heads]

    def exact(self, inputs: Inputs, grad: bool) -> Inputs:
        return Inputs(*(self.cut(tensor).detach().double().requires_grad_(grad) for tensor in inputs))


def _token_error(found: Tensor, exact: Tensor) -> float:
    """Per token, at p99."""
    error = (found.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    return float(error.flatten().quantile(0.99))


def _chunk(case: Case, device: str) -> Job:
    grad = case.stage == "forward + backward"
    inputs = make_inputs(case.shape, grad=grad, device=device)
    options = _options(case)
    part = _Part.of(case.shape)
    upstream = torch.randn_like(inputs.v[:, :, :1]).expand(-1, -1, case.shape.H, -1).contiguous()

    def forward() -> Tensor:
        return gka_ops.chunk_gka(*inputs, **options).output

    def gradients(upstream: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), inputs, upstream)

    def run() -> Any:
        if grad:
            return gradients(upstream)
        with torch.no_grad():
            return forward()

    def errors() -> dict[str, float]:
        exact = part.exact(inputs, grad)
        expected = gka_ops.chunk_gka(*exact, num_iter=case.iterations and EXACT_ITERATIONS, impl="reference").output
        with torch.no_grad():
            found = {"o": _token_error(part.cut(forward()), expected.detach())}
        if grad:
            alone = torch.zeros_like(upstream)
            part.cut(alone).copy_(part.cut(upstream))
            wanted = torch.autograd.grad(expected, exact, part.cut(upstream).double())
            given = gradients(alone)
            for name, gradient, right in zip(Inputs._fields, given, wanted, strict=True):
                off = (part.cut(gradient).double() - right).norm()
                size = right.norm()
                found[f"d{name}"] = float(off / size if size else off)  # α has no effect without a solve
        return found

    names = ["o", *(f"d{name}" for name in Inputs._fields)] if grad else ["o"]
    return Job(run, errors, _bars(case, *names))


def _solve(case: Case, device: str) -> Job:
    inputs = make_inputs(case.shape, device=device)
    part = _Part.of(case.shape)

    @torch.no_grad()
    def run() -> Tensor:
        return gka_ops.chunk_solve(inputs.q, inputs.k, inputs.log_decay, inputs.beta, **_options(case)).x

    def errors() -> dict[str, float]:
        q, k, _, decay, _, beta = part.exact(inputs, False)
        exact = gka_ops.chunk_solve(q, k, decay, beta, num_iter=EXACT_ITERATIONS, impl="reference").x
        return {"x": _token_error(part.cut(run()), exact)}

    return Job(run, errors, _bars(case, "x"))


def _decode(case: Case, device: str) -> Job:
    """States of many tokens, advanced by every call."""
    shape = case.shape
    inputs = make_inputs(shape, device=device)
    factors = torch.randn(shape.B, shape.H, 2 * shape.D, shape.D, device=device)
    kk = factors.mT @ factors / shape.D
    del factors
    state = gka_ops.GKAState(kk, torch.randn(shape.B, shape.H, shape.D, shape.V, device=device))
    part = _Part.of(shape)

    @torch.no_grad()
    def run() -> Tensor:
        return gka_ops.recurrent_gka(*inputs, state=state, **_options(case))

    def errors() -> dict[str, float]:
        before = gka_ops.GKAState(*(tensor[:1, : part.heads].double() for tensor in state))
        exact = gka_ops.recurrent_gka(
            *part.exact(inputs, False), state=before, num_iter=case.iterations and EXACT_ITERATIONS, impl="reference"
        )
        return {"o": _token_error(part.cut(run()), exact)}

    return Job(run, errors, _bars(case, "o"))


# ------------------------------------------------------------------------------------------------------------- peers
def _peer(case: Case, device: str) -> Job:
    grad = case.stage == "forward + backward"
    inputs = make_inputs(case.shape, grad=grad, device=device)
    forward, leaves = _peer_forward(case, inputs, grad)
    with torch.no_grad():
        upstream = torch.randn_like(forward())

    def run() -> Any:
        if grad:
            return torch.autograd.grad(forward(), leaves, upstream)
        with torch.no_grad():
            return forward()

    def errors() -> dict[str, float]:
        with torch.no_grad():
            if not forward().isfinite().all():
                raise UnavailableError("results are not finite")
        return {}

    return Job(run, errors, {})


def _peer_forward(case: Case, inputs: Inputs, grad: bool) -> tuple[Callable[[], Tensor], list[Tensor]]:
    if case.provider in ATTENTION:
        q, k, v = (t.detach().transpose(1, 2).contiguous().requires_grad_(grad) for t in inputs[:3])
        return _attention(case.provider, q, k, v), [q, k, v]
    shape = case.shape
    q = inputs.q
    k, v = (
        t.detach().repeat_interleave(shape.H // shape.Hkv, dim=2).contiguous().requires_grad_(grad)
        for t in (inputs.k, inputs.v)
    )
    g, beta = inputs.log_decay, inputs.beta.detach().to(q.dtype).requires_grad_(grad)
    try:
        if case.provider == "fla simple_gla":
            from fla.ops.simple_gla import chunk_simple_gla

            return lambda: chunk_simple_gla(q, k, v, g=g)[0], [q, k, v, g]
        if case.provider == "fla gated_delta_rule":
            from fla.ops.gated_delta_rule import chunk_gated_delta_rule

            return lambda: chunk_gated_delta_rule(q, k, v, g=g, beta=beta)[0], [q, k, v, g, beta]
        from fla.ops.mesa_net import chunk_mesa_net
    except ImportError as error:
        raise UnavailableError(f"flash-linear-attention: {error}") from None
    lamb = torch.full((shape.H, shape.D), 0.25, device=q.device).requires_grad_(grad)
    run = lambda: chunk_mesa_net(q, k, v, g=g, beta=beta, lamb=lamb, max_CG_iteration=30)[0]  # noqa: E731
    return run, [q, k, v, g, beta, lamb]


def _attention(provider: str, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """Causal, on [B, H, T, D]."""
    if provider == "sdpa":
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def causal(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    T = q.shape[2]
    mask = torch.compile(create_block_mask)(causal, None, None, T, T, device=q.device)
    compiled = torch.compile(flex_attention)
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True)


def _decode_attention(case: Case, device: str) -> Job:
    """One query a sequence over a cache of ``CONTEXT`` tokens."""
    shape = case.shape
    dtype = DTYPES[shape.dtype]
    q = torch.randn(shape.B, shape.H, 1, shape.D, device=device, dtype=dtype)
    k, v = (torch.randn(shape.B, shape.Hkv, CONTEXT, d, device=device, dtype=dtype) for d in (shape.D, shape.V))

    @torch.no_grad()
    def run() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return Job(run, dict, {})


# -------------------------------------------------------------------------------------------------- layers and models
class _Attention(nn.Module):
    """Causal softmax attention with the heads of a family, without positions."""

    def __init__(self, shape: Shape, **factory: Any) -> None:
        super().__init__()
        self.shape = shape
        self.q_proj = nn.Linear(HIDDEN, shape.H * shape.D, bias=False, **factory)
        self.k_proj = nn.Linear(HIDDEN, shape.Hkv * shape.D, bias=False, **factory)
        self.v_proj = nn.Linear(HIDDEN, shape.Hkv * shape.V, bias=False, **factory)
        self.o_proj = nn.Linear(shape.H * shape.V, HIDDEN, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.shape.D)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class _Block(nn.Module):
    """A pre-norm block: token mixer and gated MLP."""

    def __init__(self, mixer: nn.Module, **factory: Any) -> None:
        super().__init__()
        self.mixer = mixer
        self.norms = nn.ModuleList(nn.RMSNorm(HIDDEN, **factory) for _ in range(2))
        self.up = nn.Linear(HIDDEN, 6 * HIDDEN, bias=False, **factory)
        self.down = nn.Linear(3 * HIDDEN, HIDDEN, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norms[0](x))
        gate, value = self.up(self.norms[1](x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * value)


def _mixer(case: Case, **factory: Any) -> nn.Module:
    shape = case.shape
    if case.provider == "sdpa":
        return _Attention(shape, **factory)
    return gka_ops.GatedKalmaNet(HIDDEN, shape.D, shape.H, shape.Hkv, **_options(case), **factory)


def _module(case: Case, module: nn.Module, device: str) -> Job:
    compiled = torch.compile(module, fullgraph=True)
    training = case.stage == "training step"
    shape = (case.shape.B, case.shape.T, HIDDEN)
    hidden = torch.randn(shape, device=device, dtype=DTYPES[case.shape.dtype])
    parameters = [*module.parameters()]

    def run() -> Any:
        if training:
            return torch.autograd.grad(compiled(hidden).sum(), parameters)
        with torch.no_grad():
            return compiled(hidden)

    def errors() -> dict[str, float]:
        with torch.no_grad():
            if not compiled(hidden).isfinite().all():
                raise UnavailableError("results are not finite")
        return {}

    return Job(run, errors, {})


def _layer(case: Case, device: str) -> Job:
    torch.manual_seed(0)
    return _module(case, _mixer(case, device=device, dtype=DTYPES[case.shape.dtype]), device)


def _model(case: Case, device: str) -> Job:
    torch.manual_seed(0)
    factory = {"device": device, "dtype": DTYPES[case.shape.dtype]}
    return _module(case, nn.Sequential(*(_Block(_mixer(case, **factory), **factory) for _ in range(LAYERS))), device)
