"""What PyTorch's subsystems do with the operators, on the card: the counterparts of tests in ``tests/contract``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import gka_ops
from gka_ops import GKAState
from gka_ops.activation_checkpoint import save_solve
from gka_ops.autotune.choice import UntunedWarning
from gka_ops.flops import backward_flops, forward_flops
from gka_ops.numerics import backward_iterations
from tests.helpers.problems import Problem, cotangents, evaluate, make_problem, norm_error, run_gka, run_solve

pytestmark = pytest.mark.gpu

SIZES: dict[str, Any] = {"B": 2, "T": 200, "H": 4, "Hkv": 2, "D": 64, "V": 64, "qk_l2norm": True, "device": "cuda"}
RUNS = {"chunk_gka": run_gka, "chunk_solve": run_solve}


def problem(dtype: torch.dtype = torch.float32, **changes: Any) -> Problem:
    return make_problem(**SIZES | {"gate": True, "state": True} | changes, dtype=dtype)


def cast(p: Problem, dtype: torch.dtype) -> Problem:
    return p.map(lambda name, t: t.to(dtype) if name in ("q", "k", "v") else t)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert torch.equal(actual[name], value), name


# ------------------------------------------------------------------------------------------------------------ autocast
@pytest.mark.supports("autocast")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", RUNS)
def test_autocast(op: str, dtype: torch.dtype) -> None:
    """Bit for bit the call with operands that were cast by hand, also where it is repeated beside the dispatcher."""
    p, run = problem(), RUNS[op]

    def under(p: Problem) -> dict[str, Tensor]:
        with torch.autocast("cuda", dtype):
            return run(p)

    upstream = cotangents(run(cast(p, dtype)))
    expected = evaluate(lambda p: run(cast(p, dtype)), p, upstream)
    for _ in range(3):
        actual = evaluate(under, p, upstream)
        assert_same(actual.outputs, expected.outputs)
        assert_same(actual.gradients, expected.gradients)
    for _ in range(4):
        with torch.no_grad():
            assert_same(under(p), expected.outputs)
            run(p)  # known in fp32 too


@pytest.mark.supports("autocast")
def test_autocast_of_decode_and_compiled() -> None:
    p, dtype = problem(T=1, gate=False), torch.bfloat16
    assert p.initial_kk is not None and p.initial_kv is not None
    start = p.initial_kk, p.initial_kv

    def decode(p: Problem, state: GKAState) -> Tensor:
        return gka_ops.recurrent_gka(p.q, p.k, p.v, p.log_decay, p.alpha, p.beta, state=state, qk_l2norm=True)

    state = GKAState(*(t.clone() for t in start))
    expected = {"output": decode(cast(p, dtype), state), **state._asdict()}
    compiled: Callable[..., Tensor] = torch.compile(decode, fullgraph=True)
    for function in (decode, decode, decode, compiled):
        state = GKAState(*(t.clone() for t in start))
        with torch.autocast("cuda", dtype):
            output = function(p, state)
        assert_same({"output": output, **state._asdict()}, expected)


# --------------------------------------------------------------------------------------------------------------- flops
@pytest.mark.supports("FLOP counter")
def test_flops_of_known_calls() -> None:
    p, n = problem(torch.bfloat16), 5
    rows, D, V = p.q.shape[0] * p.q.shape[1] * p.q.shape[2], p.q.shape[3], p.v.shape[3]

    def run(p: Problem) -> Tensor:
        return gka_ops.chunk_gka(p.q, p.k, p.v, None, p.alpha, p.beta, num_iter=n, qk_l2norm=True).output

    for _ in range(3):
        run(p)
    with FlopCounterMode(display=False) as counter:
        run(p)
    assert counter.get_total_flops() == rows * forward_flops(D, V, n)
    with FlopCounterMode(display=False) as counter:
        run(p.requiring_grad()).sum().backward()
    assert counter.get_total_flops() == rows * (forward_flops(D, V, n) + backward_flops(D, V, backward_iterations(n)))


# -------------------------------------------------------------------------------------- what a backward is given
@pytest.mark.supports("selective activation checkpointing")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_selective_checkpointing(compiled: bool) -> None:
    """The gradients of the layer without it, in less memory."""
    torch.manual_seed(0)
    layer = gka_ops.GatedKalmaNet(256, 64, 4, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(2, 2000, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return checkpoint(layer, x, use_reentrant=False, context_fn=save_solve)

    function = torch.compile(run, fullgraph=True) if compiled else run
    leaves = [x, *layer.parameters()]
    upstream = torch.randn_like(x)
    torch.autograd.grad(function(x), leaves, upstream)
    kept = []
    for candidate in (layer, function):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        output = candidate(x)
        kept.append(torch.cuda.memory_allocated() - before)
        del output
    assert compiled or kept[1] < kept[0] / 2
    expected = torch.autograd.grad(layer(x), leaves, upstream)
    for gradient, wanted in zip(torch.autograd.grad(function(x), leaves, upstream), expected, strict=True):
        assert norm_error(gradient, wanted) <= 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.supports("save_x=False")
@pytest.mark.parametrize("T", [200, 40000], ids=["one slab", "several"])
def test_without_saved_x(T: int) -> None:
    """The second solve has the heuristics' configuration, and the forward's iterations."""
    p = problem(torch.bfloat16, T=T)
    upstream = cotangents(run_gka(p))
    expected = evaluate(run_gka, p, upstream).gradients
    for name, gradient in evaluate(lambda p: run_gka(p, save_x=False), p, upstream).gradients.items():
        assert norm_error(gradient, expected[name]) <= torch.finfo(torch.bfloat16).eps, name


# --------------------------------------------------------------------------------------------------------- determinism
@pytest.mark.supports("deterministic algorithms")
@pytest.mark.parametrize("op", RUNS)
def test_deterministic_algorithms(op: str) -> None:
    """Nothing is refused or warned of, and runs agree bit for bit, recorded ones and replayed ones."""
    run = RUNS[op]
    p = problem(torch.bfloat16, ridge="head")
    upstream = cotangents(run(p))
    torch.use_deterministic_algorithms(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", UntunedWarning)
            runs = [evaluate(run, p, upstream) for _ in range(4)]
    finally:
        torch.use_deterministic_algorithms(False)
    for other in runs[1:]:
        assert_same(other.outputs, runs[0].outputs)
        assert_same(other.gradients, runs[0].gradients)
        assert all(bool(gradient.isfinite().all()) for gradient in other.gradients.values())
