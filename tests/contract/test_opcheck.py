"""The operators under PyTorch's transforms: ``opcheck``, derivatives of every kind, ``torch.func``.

An unsupported transform raises; none returns a wrong number (docs/adr/0004-autograd-boundary.md).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import opcheck

import gka_ops
from gka_ops import GKAState, Ridge
from gka_ops.numerics import DEFAULT_RIDGE
from tests.helpers.problems import (
    Outputs,
    Problem,
    cotangents,
    evaluate,
    exact_gka,
    exact_solve,
    gate_of,
    make_problem,
    norm_error,
    run_gka,
    run_solve,
)

Args = tuple[Any, ...]

ops = torch.ops.gka
OPERATORS = ("chunk_gka", "chunk_solve", "chunk_gka_backward", "chunk_solve_backward", "recurrent_gka")

SMALL: dict[str, Any] = {"B": 2, "T": 3, "H": 2, "D": 4, "V": 3}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"mean_decay": None, "alpha": False, "beta": False},
    "gates": {},
    "everything": {
        "Hkv": 1, "gate": True, "state": True, "ridge": "token", "ridge_offset": 0.1, "qk_l2norm": True,
    },
    "ridge of a head": {"ridge": "head", "ridge_offset": 0.1, "gate": True, "dt_bias": False},
    "packed": {"B": 1, "seq_lengths": [2, 0, 1], "state": True},
}  # fmt: skip
"""Every optional argument is there in one of the sets and absent in another."""

CONVERGED = 160
"""Iterations after which the truncation error, 1/T_161(1.04) = 4e-20, is below the rounding of fp64."""

FP64 = ((1 + DEFAULT_RIDGE) / DEFAULT_RIDGE) ** 2 * math.prod(SMALL.values()) * torch.finfo(torch.float64).eps
"""What rounding may cost a derivative of the solve in fp64: a derivative applies the inverse twice, so the condition
number (1 + r)/r enters squared; and no sum here is longer than all elements together."""


# ------------------------------------------------------------------------------------------------------------ arguments
def problem(options: str = "everything", dtype: torch.dtype = torch.float32, **changes: Any) -> Problem:
    return make_problem(**SMALL | OPTIONS[options] | changes, dtype=dtype)


def split(part: float | Tensor) -> tuple[float, Tensor | None]:
    return (0.0, part) if isinstance(part, Tensor) else (part, None)


def forward_args(op: str, p: Problem, num_iter: int = 3, final: bool = True, save_x: bool = True) -> Args:
    """The arguments of ``torch.ops.gka.chunk_gka`` or ``chunk_solve``."""
    (r, r_tensor), (b, b_tensor) = split(p.ridge_scale), split(p.ridge_offset)
    ridge_and_gate = (r_tensor, b_tensor, p.A_log, p.dt_bias)
    if op == "chunk_solve":
        tensors: Args = (p.q, p.k, p.log_decay, p.beta, *ridge_and_gate, p.initial_kk, p.cu_seqlens)
        return (*tensors, r, b, num_iter, p.qk_l2norm, final, "", "reference")
    tensors = (p.q, p.k, p.v, p.log_decay, p.alpha, p.beta, *ridge_and_gate, p.initial_kk, p.initial_kv, p.cu_seqlens)
    return (*tensors, r, b, num_iter, 0.5, p.qk_l2norm, final, save_x, "", "reference")


def backward_args(op: str, p: Problem, num_iter: int = 3) -> Args:
    """The arguments of ``torch.ops.gka.chunk_gka_backward`` or ``chunk_solve_backward``; only p's tensors need grad."""
    forward = forward_args(op, p, num_iter)
    with torch.no_grad():
        results = getattr(ops, op)(*forward)
    if op == "chunk_solve":
        x, final_kk, fro = results
        return (
            torch.randn_like(x),
            torch.randn_like(final_kk),
            *forward[:10],
            x,
            fro,
            *forward[10:14],
            "",
            "reference",
        )
    output, final_kk, final_kv, *residuals = results
    upstream = (torch.randn_like(output), torch.randn_like(final_kk), torch.randn_like(final_kv))
    return (*upstream, *forward[:13], *residuals, *forward[13:18], "", "reference")


def recurrent_args(p: Problem, num_iter: int = 3, indices: Sequence[int] | None = None) -> Args:
    """The arguments of ``torch.ops.gka.recurrent_gka``; the pool is fresh."""
    forward = forward_args("chunk_gka", p, num_iter)
    slots, H, D = (p.q.shape[0] if indices is None else 4), p.q.shape[2], p.q.shape[3]
    dtype = torch.promote_types(p.q.dtype, torch.float32)
    pool = (torch.zeros(slots, H, D, D, dtype=dtype), torch.zeros(slots, H, D, p.v.shape[-1], dtype=dtype))
    state_indices = None if indices is None else torch.tensor(indices)
    return (*forward[:10], *pool, state_indices, *forward[13:18], "", "reference")


def args_of(op: str, p: Problem, num_iter: int = 3) -> Args:
    if op == "recurrent_gka":
        return recurrent_args(p, num_iter)
    if op.endswith("_backward"):
        return backward_args(op.removesuffix("_backward"), p, num_iter)
    return forward_args(op, p, num_iter)


def permuted(name: str, t: Tensor) -> Tensor:
    """The same values with the last two dimensions, or all, in another order in memory."""
    return t.transpose(1, 2).contiguous().transpose(1, 2) if t.ndim > 2 else t


def sliced(name: str, t: Tensor) -> Tensor:
    """The same values as every second element along each dimension of something larger, with an offset."""
    whole = t.new_full([2 * size for size in t.shape], torch.nan)
    part = whole[tuple(slice(1, None, 2) for _ in t.shape)]
    part.copy_(t)
    return part


def expanded(name: str, t: Tensor) -> Tensor:
    """The values of one head for all, without memory of their own."""
    heads = 1 if name.startswith("initial") else min(2, t.ndim - 1)
    return t.narrow(heads, 0, 1).expand(t.shape)


LAYOUTS: dict[str, Callable[[str, Tensor], Tensor]] = {"permuted": permuted, "sliced": sliced, "expanded": expanded}


def requiring_grad(args: Args) -> Args:
    """Every floating-point tensor requires a gradient; they keep their strides and are leaves."""
    return tuple(a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


# -------------------------------------------------------------------------------------------------------------- opcheck
def opcheck_cases() -> Iterator[Any]:
    for op in OPERATORS:
        for name in OPTIONS:
            if name == "gates" or (op == "recurrent_gka" and name == "packed"):
                continue
            yield pytest.param(op, name, torch.float32, 3, None, id=f"{op}: {name}")
        yield pytest.param(op, "everything", torch.float32, 0, None, id=f"{op}: no solve")
        yield pytest.param(op, "everything", torch.bfloat16, 3, None, id=f"{op}: bf16")
        for layout in LAYOUTS:
            if op != "recurrent_gka" or layout != "expanded":
                yield pytest.param(op, "everything", torch.float32, 3, layout, id=f"{op}: {layout}")


@pytest.mark.supports("opcheck")
@pytest.mark.supports("opcheck of permuted, sliced and expanded inputs")
@pytest.mark.supports("opcheck with optional arguments present and absent")
@pytest.mark.parametrize(("op", "options", "dtype", "num_iter", "layout"), list(opcheck_cases()))
def test_opcheck(op: str, options: str, dtype: torch.dtype, num_iter: int, layout: str | None) -> None:
    """Schema, fake, registration and AOT dispatch; the differentiable forwards with gradients, and also without."""
    p = problem(options, dtype)
    if layout is not None:
        p = p.map(LAYOUTS[layout])
        assert not p.q.is_contiguous()
        assert not p.k.is_contiguous() or p.k.shape[2] == 1
    args = args_of(op, p, num_iter)
    differentiable = op in ("chunk_gka", "chunk_solve")
    if differentiable:
        opcheck(getattr(ops, op).default, requiring_grad(args))
    if not differentiable or (dtype == torch.float32 and num_iter > 0 and layout is None):
        opcheck(getattr(ops, op).default, args)


@pytest.mark.supports("opcheck")
@pytest.mark.parametrize("op", ["chunk_gka", "chunk_solve"])
def test_opcheck_with_one_gradient_and_no_residuals(op: str) -> None:
    args = list(forward_args(op, problem("gates"), final=False, save_x=False))
    args[1] = args[1].detach().requires_grad_()
    opcheck(getattr(ops, op).default, tuple(args))


@pytest.mark.supports("opcheck")
@pytest.mark.parametrize("indices", [[3, 0], [-1, 2]], ids=["slots", "padding"])
def test_opcheck_of_decode_in_a_pool(indices: list[int]) -> None:
    opcheck(ops.recurrent_gka.default, recurrent_args(problem(), indices=indices))


@pytest.mark.supports("opcheck")
@pytest.mark.filterwarnings("ignore:Error detected in")
@pytest.mark.parametrize("options", ["plain", "everything", "packed"])
@pytest.mark.parametrize("op", ["chunk_gka_backward", "chunk_solve_backward"])
def test_opcheck_of_a_backward_with_gradients(op: str, options: str) -> None:
    """Second derivatives exist in eager mode only: a graph that would need them is refused while it is traced."""
    args = requiring_grad(args_of(op, problem(options)))
    overload = getattr(ops, op).default
    opcheck(overload, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    with pytest.raises(Exception, match="expected second derivatives in eager mode only, got a traced graph"):
        opcheck(overload, args, test_utils="test_aot_dispatch_dynamic")


@pytest.mark.supports("opcheck")
def test_opcheck_of_decode_with_gradients() -> None:
    """Refused before anything runs, so all that opcheck can confirm is the registration."""
    args = requiring_grad(args_of("recurrent_gka", problem()))
    opcheck(ops.recurrent_gka.default, args, test_utils="test_autograd_registration")
    for utility in ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"):
        with pytest.raises(Exception, match="decode is not differentiable"):
            opcheck(ops.recurrent_gka.default, args, test_utils=utility)


# ---------------------------------------------------------------------------------------------------- first derivatives
@pytest.mark.parametrize("which", [["output"], ["final_kk"], ["final_kv"], ["output", "final_kv"]], ids="+".join)
def test_gradients_through_some_outputs(which: list[str]) -> None:
    p = problem(dtype=torch.float64)
    upstream = {name: t for name, t in cotangents(run_gka(p, num_iter=1)).items() if name in which}
    actual = evaluate(lambda p: run_gka(p, num_iter=CONVERGED), p, upstream).gradients
    expected = evaluate(exact_gka, p, upstream).gradients
    for name, gradient in expected.items():
        if bool(gradient.any()):
            assert norm_error(actual[name], gradient) <= FP64, name
        else:
            assert not actual[name].any(), name


@pytest.mark.parametrize("which", [["x"], ["final_kk"]], ids="+".join)
def test_gradients_through_some_outputs_of_the_solve(which: list[str]) -> None:
    p = problem(dtype=torch.float64)
    upstream = {name: t for name, t in cotangents(run_solve(p, num_iter=1)).items() if name in which}
    actual = evaluate(lambda p: run_solve(p, num_iter=CONVERGED), p, upstream).gradients
    expected = evaluate(exact_solve, p, upstream).gradients
    for name, gradient in expected.items():
        if bool(gradient.any()):
            assert norm_error(actual[name], gradient) <= FP64, name
        else:
            assert not actual[name].any(), name


@pytest.mark.parametrize("run", [run_gka, run_solve], ids=["chunk_gka", "chunk_solve"])
def test_gradient_of_one_input_alone(run: Callable[..., Outputs]) -> None:
    p = problem(dtype=torch.float64)
    upstream = cotangents(run(p, num_iter=1))
    every = evaluate(lambda p: run(p, num_iter=3), p, upstream).gradients
    for name, leaf in p.leaves().items():
        if run is run_solve and name in ("v", "alpha", "initial_kv"):
            continue
        alone = leaf.clone().requires_grad_()
        outputs = run(p.replace({name: alone}), num_iter=3)
        reached = [n for n in outputs if outputs[n].requires_grad]
        torch.autograd.backward([outputs[n] for n in reached], [upstream[n] for n in reached])
        assert alone.grad is not None
        gradient = (alone.grad + alone.grad.mT) / 2 if name == "initial_kk" else alone.grad
        assert torch.equal(gradient, every[name]), name


@pytest.mark.parametrize("run", [run_gka, run_solve], ids=["chunk_gka", "chunk_solve"])
@pytest.mark.parametrize("layout", ["permuted", "sliced"])
def test_upstream_gradients_of_any_layout(run: Callable[..., Outputs], layout: str) -> None:
    p = problem()
    upstream = cotangents(run(p, num_iter=1))
    changed = {name: LAYOUTS[layout](name, t) for name, t in upstream.items()}
    assert not any(t.is_contiguous() for t in changed.values())
    actual = evaluate(lambda p: run(p, num_iter=3), p, changed).gradients
    for name, expected in evaluate(lambda p: run(p, num_iter=3), p, upstream).gradients.items():
        assert torch.equal(actual[name], expected), name


def test_upstream_gradient_without_memory_of_its_own() -> None:
    p = problem("gates").requiring_grad()
    leaves = [t for t in p.leaves().values() if t.requires_grad]
    output = run_gka(p, num_iter=3)["output"]
    expanded_upstream = torch.autograd.grad(output.sum(), leaves, retain_graph=True)
    dense = torch.autograd.grad(output, leaves, torch.ones_like(output))
    for actual, expected in zip(expanded_upstream, dense, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("num_iter", [0, 3])
def test_recomputed_residuals_give_the_same_gradients(dtype: torch.dtype, num_iter: int) -> None:
    gradients = []
    for save_x in (True, False):
        args = requiring_grad(forward_args("chunk_gka", problem(dtype=dtype), num_iter, save_x=save_x))
        output, final_kk, final_kv, x, *_ = ops.chunk_gka(*args)
        assert (x.numel() > 0) == (save_x and num_iter > 0)
        upstream = cotangents({"output": output, "kk": final_kk, "kv": final_kv})
        leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
        gradients.append(torch.autograd.grad([output, final_kk, final_kv], leaves, list(upstream.values())))
    for saved, recomputed in zip(*gradients, strict=True):
        assert torch.equal(saved, recomputed)


def test_residuals_are_not_differentiable() -> None:
    args = requiring_grad(forward_args("chunk_gka", problem(dtype=torch.bfloat16)))
    _, _, _, *residuals = ops.chunk_gka(*args)
    assert not any(t.requires_grad for t in residuals)
    x, final_kk, fro = ops.chunk_solve(*requiring_grad(forward_args("chunk_solve", problem())))
    assert (x.requires_grad, final_kk.requires_grad, fro.requires_grad) == (True, True, False)


# --------------------------------------------------------------------------------------------------- second derivatives
def second_derivatives(run: Callable[[Problem], Outputs], p: Problem) -> dict[str, Tensor]:
    """Gradients of a random combination of all gradients and outputs."""
    p = p.requiring_grad()
    leaves, outputs = p.leaves(), run(p)
    outputs = {name: t for name, t in outputs.items() if t.requires_grad}
    upstream = {name: t.requires_grad_() for name, t in cotangents(outputs).items()}
    variables = {**leaves, **upstream}
    first = torch.autograd.grad(
        list(outputs.values()),
        list(leaves.values()),
        list(upstream.values()),
        create_graph=True,
        materialize_grads=True,
    )
    named = dict(zip(leaves, first, strict=True))
    total = sum((t * named[name]).sum() for name, t in cotangents(named, seed=2).items())
    second = torch.autograd.grad(total, list(variables.values()), materialize_grads=True)  # type: ignore[arg-type]
    return dict(zip(variables, second, strict=True))


def with_symmetric_state(run: Callable[..., Outputs]) -> Callable[..., Outputs]:
    """The specification as a function of the symmetric part of H_0, which is how the operators differentiate."""

    def function(p: Problem, **options: Any) -> Outputs:
        if p.initial_kk is not None:
            p = p.replace({"initial_kk": (p.initial_kk + p.initial_kk.mT) / 2})
        return run(p, **options)

    return function


@pytest.mark.supports("second derivatives")
@pytest.mark.parametrize("num_iter", [0, CONVERGED], ids=["no solve", "solve"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("op", ["chunk_gka", "chunk_solve"])
def test_second_derivatives_are_those_of_the_specification(op: str, options: str, num_iter: int) -> None:
    run, specification = (run_gka, exact_gka) if op == "chunk_gka" else (run_solve, exact_solve)
    p = problem(options, torch.float64)
    actual = second_derivatives(lambda p: run(p, num_iter=num_iter), p)
    expected = second_derivatives(lambda p: with_symmetric_state(specification)(p, num_iter=num_iter), p)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert norm_error(actual[name], gradient) <= FP64, name


@pytest.mark.supports("second derivatives")
@pytest.mark.parametrize("op", ["chunk_gka", "chunk_solve"])
def test_gradgradcheck(op: str) -> None:
    """Second derivatives against differences of the first, which are another code."""
    run = run_gka if op == "chunk_gka" else run_solve
    p = problem(dtype=torch.float64, B=1, T=2, D=3, V=2)
    unused = ("v", "alpha", "initial_kv") if op == "chunk_solve" else ()
    leaves = {n: t for n, t in p.requiring_grad().leaves().items() if n not in unused}

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(leaves, tensors, strict=True))
        named["initial_kk"] = (named["initial_kk"] + named["initial_kk"].mT) / 2
        return tuple(t for t in run(p.replace(named), num_iter=CONVERGED).values() if t.requires_grad)

    assert torch.autograd.gradgradcheck(function, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("qk_l2norm", [False, True])
@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_second_derivatives_at_zero_keys(qk_l2norm: bool, offset: float) -> None:
    """Rows that have seen only zero keys have zero derivatives of every order by policy, and spoil no others."""
    p = problem("gates", torch.float64, T=5, ridge_offset=offset, qk_l2norm=qk_l2norm)
    k = p.k.clone()
    k[:, :2] = 0
    for name, gradient in second_derivatives(lambda p: run_gka(p, num_iter=CONVERGED), p.replace({"k": k})).items():
        assert gradient.isfinite().all(), name


def test_third_derivatives() -> None:
    p = problem("gates", torch.float64, B=1)
    q = p.q.clone().requires_grad_()

    def third(run: Callable[[Problem], Outputs]) -> Tensor:
        value = run(p.replace({"q": q}))["output"].pow(3).sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, q, create_graph=True)
            value = gradient.square().sum()
        return gradient.detach()

    assert norm_error(third(lambda p: run_gka(p, num_iter=CONVERGED)), third(exact_gka)) <= FP64


@pytest.mark.supports("second derivatives")
def test_a_compiled_graph_refuses_second_derivatives() -> None:
    p = problem("gates", torch.float64)

    def penalty(q: Tensor) -> Tensor:
        return torch.func.grad(lambda q: run_gka(p.replace({"q": q}), num_iter=3)["output"].sum())(q).square().sum()

    torch._dynamo.reset()
    with pytest.raises(Exception, match="expected second derivatives in eager mode only, got a traced graph"):
        torch.compile(torch.func.grad(penalty), backend="aot_eager", fullgraph=True)(p.q)


# --------------------------------------------------------------------------------------------------------- forward mode
def every_operator() -> Iterator[Any]:
    for op in OPERATORS:
        yield pytest.param(op, args_of(op, problem("gates", torch.float64)), id=op)


@pytest.mark.supports("torch.func.jvp raises")
@pytest.mark.parametrize(("op", "args"), list(every_operator()))
def test_forward_mode_raises(op: str, args: Args) -> None:
    overload = getattr(ops, op)
    message = f"{op}: expected reverse-mode differentiation, got forward mode \\(jvp\\)"

    def function(first: Tensor) -> Any:
        return overload(first, *args[1:])

    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(function, (args[0],), (torch.ones_like(args[0]),))
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jacfwd(function)(args[0])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(args[0], torch.ones_like(args[0]))
        with pytest.raises(NotImplementedError, match=message):
            function(dual)
        with pytest.raises(NotImplementedError, match=message):
            function(forward_ad.make_dual(args[0].clone().requires_grad_(), torch.ones_like(args[0])))


@pytest.mark.supports("torch.func.jvp raises")
@pytest.mark.parametrize(("op", "args"), list(every_operator()))
def test_compiled_forward_mode_raises(op: str, args: Args) -> None:
    overload = getattr(ops, op)
    message = "expected reverse-mode differentiation, got forward mode"

    def function(first: Tensor) -> Any:
        return overload(first, *args[1:])

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    compiled(args[0])
    with forward_ad.dual_level(), pytest.raises(Exception, match=message):
        compiled(forward_ad.make_dual(args[0], torch.ones_like(args[0])))

    def jvp(first: Tensor) -> Any:
        return torch.func.jvp(function, (first,), (torch.ones_like(first),))

    with pytest.raises(Exception, match=message):
        torch.compile(jvp, backend="aot_eager", fullgraph=True)(args[0])


@pytest.mark.supports("torch.func.jvp raises")
def test_forward_over_reverse_raises() -> None:
    p = problem("gates", torch.float64)
    with pytest.raises(NotImplementedError, match="expected reverse-mode differentiation, got forward mode"):
        torch.func.hessian(lambda q: run_gka(p.replace({"q": q}), num_iter=3)["output"].sum())(p.q)


# ----------------------------------------------------------------------------------------------------------- torch.func
def loss_of(op: str, p: Problem) -> Callable[[Tensor, Tensor], Tensor]:
    """From (q, k) to a number, through the public function."""
    options: dict[str, Any] = {"ridge": Ridge(p.ridge_scale, p.ridge_offset), "gate": gate_of(p), "num_iter": 3}

    def loss(q: Tensor, k: Tensor) -> Tensor:
        if op == "chunk_solve":
            return gka_ops.chunk_solve(q, k, p.log_decay, p.beta, **options).x.square().sum()
        return gka_ops.chunk_gka(q, k, p.v, p.log_decay, p.alpha, p.beta, **options).output.square().sum()

    return loss


def transformed(function: Callable[..., Any], how: str) -> Callable[..., Any]:
    torch._dynamo.reset()
    return function if how == "eager" else torch.compile(function, backend=how, fullgraph=True)


@pytest.mark.supports("torch.func.grad, vjp, vmap")
@pytest.mark.parametrize(
    ("op", "how"),
    [
        ("chunk_gka", "eager"),
        ("chunk_gka", "aot_eager"),
        ("chunk_gka", "inductor"),
        ("chunk_solve", "eager"),
        ("chunk_solve", "aot_eager"),
    ],
)
def test_functional_gradients(op: str, how: str) -> None:
    """``torch.func.grad`` and ``vjp`` equal autograd bit for bit: the same operators run."""
    p = problem(dtype=torch.float64)
    loss = loss_of(op, p)
    leaves = p.q.clone().requires_grad_(), p.k.clone().requires_grad_()
    expected = torch.autograd.grad(loss(*leaves), leaves)

    actual = transformed(torch.func.grad(loss, argnums=(0, 1)), how)(p.q, p.k)
    assert all(map(torch.equal, actual, expected))

    def through_vjp(q: Tensor, k: Tensor) -> Any:
        result: Any = torch.func.vjp(loss, q, k)
        value, vjp = result
        return vjp(torch.ones_like(value))

    assert all(map(torch.equal, transformed(through_vjp, how)(p.q, p.k), expected))


@pytest.mark.supports("torch.func.grad, vjp, vmap")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_functional_gradients_nest() -> None:
    """Reverse over reverse, in every mixture of ``torch.func`` and autograd; and no graph where none is wanted."""
    p = problem("gates", torch.float64, B=1, T=2)
    loss = loss_of("chunk_gka", p)

    def penalty(q: Tensor) -> Tensor:
        return torch.func.grad(loss)(q, p.k).square().sum()

    q = p.q.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(q, p.k), q, create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), q)
    assert expected.any()
    assert norm_error(torch.func.grad(penalty)(p.q), expected) <= FP64
    assert norm_error(torch.autograd.grad(penalty(q), q)[0], expected) <= FP64

    hessian = torch.func.jacrev(torch.func.jacrev(loss))(p.q, p.k)
    reference = torch.autograd.functional.hessian(lambda q: loss(q, p.k), p.q)
    assert norm_error(hessian, reference) <= FP64

    with torch.no_grad():
        assert not torch.func.grad(loss)(q, p.k).requires_grad
    assert torch.func.grad(loss)(q, p.k).requires_grad


@pytest.mark.supports("torch.func.grad, vjp, vmap")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(("op", "how"), [("chunk_gka", "eager"), ("chunk_gka", "aot_eager"), ("chunk_solve", "eager")])
def test_vmap(op: str, how: str) -> None:
    """PyTorch's fallback calls the operator once for each element: right, if not fast."""
    p = problem("gates", torch.float64)
    loss = loss_of(op, p)
    q = torch.stack([p.q, -p.q.flip(1), 2 * p.q])

    values = transformed(torch.func.vmap(loss, in_dims=(0, None)), how)(q, p.k)
    assert torch.equal(values, torch.stack([loss(each, p.k) for each in q]))

    gradient = torch.func.grad(loss, argnums=(0, 1))
    of_each = [gradient(each, p.k) for each in q]
    actual = transformed(torch.func.vmap(gradient, in_dims=(0, None)), how)(q, p.k)
    for i, t in enumerate(actual):
        assert torch.equal(t, torch.stack([each[i] for each in of_each]))

    def total(q: Tensor, k: Tensor) -> Tensor:
        return torch.func.vmap(loss, in_dims=(0, None))(q, k).sum()

    dq, dk = transformed(torch.func.grad(total, argnums=(0, 1)), how)(q, p.k)
    assert torch.equal(dq, actual[0])
    # Three gradients are added in another order.
    assert norm_error(dk, actual[1].sum(0)) <= 3 * torch.finfo(torch.float64).eps


@pytest.mark.supports("torch.func.grad, vjp, vmap")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_over_options() -> None:
    """Also over tensors that only some elements of the batch share, and over boundaries of packed sequences."""
    p = problem("packed", torch.float64, T=4, seq_lengths=[2, 0, 2], state=False)
    boundaries = torch.tensor([[0, 2, 2, 4], [0, 1, 3, 4]])

    def function(cu_seqlens: Tensor) -> Tensor:
        return run_gka(p.replace({"cu_seqlens": cu_seqlens}), num_iter=3)["output"]

    expected = torch.stack([function(each) for each in boundaries])
    assert not torch.equal(expected[0], expected[1])
    assert torch.equal(torch.func.vmap(function)(boundaries), expected)


# --------------------------------------------------------------------------------------------------------------- decode
REFUSED = "recurrent_gka: expected inputs that require no gradient, or torch.no_grad.*: decode is not differentiable"


def decode(p: Problem, state: GKAState, raw: bool) -> Tensor:
    if raw:
        args = recurrent_args(p)
        return ops.recurrent_gka(*args[:10], *state, *args[12:])
    options: dict[str, Any] = {"state": state, "num_iter": 3, "scale": 0.5, "impl": "reference"}
    return gka_ops.recurrent_gka(p.q, p.k, p.v, p.log_decay, p.alpha, p.beta, **options)


def fresh_state(p: Problem) -> GKAState:
    return GKAState(*recurrent_args(p)[10:12])


@pytest.mark.parametrize("raw", [False, True], ids=["api", "torch.ops"])
@pytest.mark.parametrize("name", ["q", "k", "v", "log_decay", "alpha", "beta", "kk", "kv"])
def test_decode_refuses_gradients(name: str, raw: bool) -> None:
    p = problem("gates")
    state = fresh_state(p)
    if name in ("kk", "kv"):
        getattr(state, name).requires_grad_()
    else:
        p = p.replace({name: getattr(p, name).requires_grad_()})
    with pytest.raises(RuntimeError, match=REFUSED):
        decode(p, state, raw)
    assert not any(bool(part.any()) for part in state)

    with torch.no_grad():
        output = decode(p, state, raw)
    assert not output.requires_grad
    plain = problem("gates")
    expected_state = fresh_state(plain)
    assert torch.equal(output, decode(plain, expected_state, raw))
    assert all(map(torch.equal, state, expected_state))


@pytest.mark.parametrize("raw", [False, True], ids=["api", "torch.ops"])
def test_decode_refuses_gradients_when_compiled(raw: bool) -> None:
    p = problem("gates")
    torch._dynamo.reset()
    compiled = torch.compile(decode, backend="aot_eager", fullgraph=True)
    state = fresh_state(p)
    with pytest.raises(Exception, match="decode is not differentiable"):
        compiled(p.replace({"v": p.v.clone().requires_grad_()}), state, raw)
    assert not any(bool(part.any()) for part in state)


def test_decode_refuses_transforms() -> None:
    p = problem("gates")
    state = fresh_state(p)
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.func.grad(lambda q: decode(p.replace({"q": q}), state, True).sum())(p.q)
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        torch.func.vmap(lambda q: decode(p.replace({"q": q}), state, True))(p.q[None])
    assert not any(bool(part.any()) for part in state)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_decode_marks_the_state_as_changed(impl: str) -> None:
    """Autograd notices that a state which it saved has been advanced since, whatever wrote to it."""
    if impl == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs Triton's interpreter, which tests/conftest.py sets where there is no card")
    p = problem("gates")
    args = recurrent_args(p)
    kk = args[10]
    product = (torch.ones_like(kk).requires_grad_() * kk).sum()
    ops.recurrent_gka(*args[:-1], impl)
    assert kk.any()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():  # where tensors have no version
        ops.recurrent_gka(*recurrent_args(p)[:-1], impl)
