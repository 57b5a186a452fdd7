"""``torch.autocast``: queries, keys and values are cast; gates, ridge and states are not; nothing else changes.

All of it bit for bit: under autocast a call is the same call with operands that were cast by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gka_ops
from gka_ops import GKAState, Ridge
from tests.helpers.problems import (
    Outputs,
    Problem,
    cotangents,
    evaluate,
    gate_of,
    make_problem,
    ridge_of,
    run_gka,
    run_solve,
)

pytestmark = pytest.mark.supports("autocast")

DTYPES = [torch.bfloat16, torch.float16]
RUNS: dict[str, Callable[..., Outputs]] = {"chunk_gka": run_gka, "chunk_solve": run_solve}


def problem(dtype: torch.dtype = torch.float32) -> Problem:
    return make_problem(
        B=2, T=70, H=4, Hkv=2, D=16, V=8, gate=True, state=True, ridge="token", ridge_offset=0.1, qk_l2norm=True,
        dtype=dtype,
    )  # fmt: skip


def cast(p: Problem, dtype: torch.dtype) -> Problem:
    return p.map(lambda name, t: t.to(dtype) if name in ("q", "k", "v") else t)


def under(dtype: torch.dtype, run: Callable[..., Any]) -> Callable[..., Any]:
    def autocast(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", dtype):
            return run(*args, **kwargs)

    return autocast


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("num_iter", [0, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", RUNS)
def test_forward_and_backward(op: str, dtype: torch.dtype, num_iter: int) -> None:
    """Gradients come back in the dtypes of what was given: fp32 for what was cast."""
    p, run = problem(), RUNS[op]

    def plain(p: Problem) -> Outputs:
        return run(p, num_iter=num_iter)

    expected = evaluate(lambda p: plain(cast(p, dtype)), p, upstream := cotangents(plain(cast(p, dtype))))
    actual = evaluate(under(dtype, plain), p, upstream)
    assert_same(actual.outputs, expected.outputs)
    assert_same(actual.gradients, expected.gradients)
    assert {t.dtype for t in actual.gradients.values()} == {torch.float32}
    if op == "chunk_gka":
        assert actual.outputs["output"].dtype == dtype
        assert actual.outputs["final_kk"].dtype == actual.outputs["final_kv"].dtype == torch.float32
    else:
        assert actual.outputs["x"].dtype == torch.float32


@pytest.mark.parametrize("op", RUNS)
def test_a_backward_within_autocast(op: str) -> None:
    """Of a forward within it, and of one outside, whose operands stay what they were."""
    dtype, run = torch.bfloat16, RUNS[op]
    p = problem()

    def plain(p: Problem) -> Outputs:
        return run(p, num_iter=5)

    for forward, operands in ((under(dtype, plain), cast(p, dtype)), (plain, p)):
        upstream = cotangents(plain(operands))
        expected = evaluate(forward, p, upstream)
        with torch.autocast("cpu", dtype):
            actual = evaluate(torch.autocast("cpu", enabled=forward is not plain)(plain), p, upstream)
        assert_same(actual.gradients, expected.gradients)


def test_a_recomputing_backward_within_autocast() -> None:
    """The operator's own forward runs once more in the backward, with the dtypes of the first time."""
    p = problem().requiring_grad()
    args = (
        p.q, p.k, p.v, p.log_decay, p.alpha, p.beta, *ridge_of(p)[:2], p.A_log, p.dt_bias, p.initial_kk, p.initial_kv,
        None, 0.0, 0.0, 3, 0.5, p.qk_l2norm, False, False, "", "reference",
    )  # fmt: skip
    gradients = []
    for within in (False, True):
        output, *_ = torch.ops.gka.chunk_gka(*args)
        with torch.autocast("cpu", torch.bfloat16, enabled=within):
            gradients.append(torch.autograd.grad(output.square().sum(), [p.q, p.k, p.v]))
    for actual, expected in zip(*gradients, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode(dtype: torch.dtype) -> None:
    p = make_problem(B=2, T=1, H=2, D=16, gate=True, state=True, dtype=torch.float32)

    def decode(p: Problem) -> dict[str, Tensor]:
        assert p.initial_kk is not None and p.initial_kv is not None
        state = GKAState(p.initial_kk.clone(), p.initial_kv.clone())
        output = gka_ops.recurrent_gka(
            p.q, p.k, p.v, p.log_decay, p.alpha, p.beta, state=state, gate=gate_of(p), num_iter=5
        )
        return {"output": output, **state._asdict()}

    actual = under(dtype, decode)(p)
    assert_same(actual, decode(cast(p, dtype)))
    assert [t.dtype for t in actual.values()] == [dtype, torch.float32, torch.float32]


@pytest.mark.parametrize("inside", [True, False], ids=["inside the graph", "around it"])
@pytest.mark.parametrize("op", RUNS)
def test_compiled(op: str, inside: bool) -> None:
    dtype, p = torch.bfloat16, problem()

    def plain(p: Problem) -> Outputs:
        ridge = Ridge(p.ridge_scale, p.ridge_offset)
        options: dict[str, Any] = {"ridge": ridge, "num_iter": 5, "gate": gate_of(p), "qk_l2norm": True}
        if op == "chunk_gka":
            return {"output": gka_ops.chunk_gka(p.q, p.k, p.v, p.log_decay, p.alpha, p.beta, **options).output}
        return {"x": gka_ops.chunk_solve(p.q, p.k, p.log_decay, p.beta, **options).x}

    torch._dynamo.reset()
    if inside:
        function = torch.compile(under(dtype, plain), backend="aot_eager", fullgraph=True)
    else:
        function = under(dtype, torch.compile(plain, backend="aot_eager", fullgraph=True))
    expected = evaluate(under(dtype, plain), p, upstream := cotangents(under(dtype, plain)(p)))
    actual = evaluate(function, p, upstream)
    assert_same(actual.outputs, expected.outputs)
    assert_same(actual.gradients, expected.gradients)


def test_mixed_dtypes_are_one_after_the_cast() -> None:
    p = problem()
    mixed = p.replace({"k": p.k.half(), "v": p.v.bfloat16()})
    with pytest.raises(TypeError, match="expected k to have the dtype of q"):
        run_gka(mixed)
    expected = run_gka(cast(mixed, torch.bfloat16), num_iter=5)
    assert_same(under(torch.bfloat16, run_gka)(mixed, num_iter=5), expected)


def test_fp64_is_not_cast() -> None:
    """As in PyTorch's own operators."""
    p = problem(torch.float64)
    assert_same(under(torch.bfloat16, run_gka)(p, num_iter=5), run_gka(p, num_iter=5))
    with pytest.raises(TypeError, match="expected k to have the dtype of q"):
        under(torch.bfloat16, run_gka)(p.replace({"k": p.k.float()}))


@pytest.mark.parametrize("op", ["chunk_gka", "chunk_solve", "recurrent_gka"])
def test_is_registered_for_cards(op: str) -> None:
    for key in ("AutocastCPU", "AutocastCUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"gka::{op}", key)
