"""``torch.func`` over the layer and under ``torch.compile``: right, or an error. ``test_opcheck`` has the operators."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

from gka_ops import chunk_gka, chunk_solve
from tests.helpers.layers import make_input, make_layer
from tests.helpers.problems import Problem, make_problem, norm_error, run_gka, run_solve

FORWARD_MODE = "expected reverse-mode differentiation, got forward mode"
EPS = torch.finfo(torch.float64).eps


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def how_to_run(how: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return (lambda f: f) if how == "eager" else partial(torch.compile, backend=how, fullgraph=True)


def everything(**options: Any) -> Problem:
    settings = {"B": 2, "T": 3, "H": 2, "Hkv": 1, "D": 4, "V": 3, "gate": True, "state": True, "qk_l2norm": True}
    return make_problem(**settings | options, dtype=torch.float64)


@pytest.mark.supports("torch.func.grad, vjp, vmap")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("how", ["aot_eager", "inductor"])
@pytest.mark.parametrize("op", ["chunk_gka", "chunk_solve"])
def test_compiled_gradients_of_every_input(op: str, how: str) -> None:
    """Through ``grad``, ``vjp`` and ``jacrev`` in one graph each, as autograd says in eager mode."""
    run, output = (run_gka, "output") if op == "chunk_gka" else (run_solve, "x")
    p = everything()
    unused = ("v", "alpha", "initial_kv") if op == "chunk_solve" else ()
    leaves = {n: t for n, t in p.leaves().items() if n not in unused}

    def loss(tensors: dict[str, Tensor]) -> Tensor:
        return run(p.replace(tensors), num_iter=3)[output].square().sum()

    own = {n: t.clone().requires_grad_() for n, t in leaves.items()}
    expected = dict(zip(own, torch.autograd.grad(loss(own), list(own.values())), strict=True))
    assert all(g.any() for g in expected.values())

    def through_vjp(tensors: dict[str, Tensor]) -> Any:
        result: Any = vjp(loss, tensors)
        value, backward = result
        return backward(2 * torch.ones_like(value))[0]

    compile = how_to_run(how)
    for factor, function in ((1, grad(loss)), (1, jacrev(loss)), (2, through_vjp)):
        actual = compile(function)(leaves)
        for name, gradient in expected.items():
            assert norm_error(actual[name], factor * gradient) <= 100 * EPS, name


@pytest.mark.supports("torch.func.jvp raises")
@pytest.mark.parametrize("how", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("op", [chunk_gka, chunk_solve], ids=["chunk_gka", "chunk_solve"])
def test_forward_mode_raises_wherever_the_tangent_enters(op: Callable[..., Any], how: str) -> None:
    """Through the public functions, for a tangent of any argument; also beneath, above and beside reverse mode."""
    p = everything(gate=False, state=False)
    values = () if op is chunk_solve else (p.v,)
    gates = (p.log_decay, p.beta) if op is chunk_solve else (p.log_decay, p.alpha, p.beta)
    inputs: tuple[Any, ...] = (p.q, p.k, *values, *gates)
    compile = how_to_run(how)

    def function(i: int, t: Tensor) -> Tensor:
        return op(*inputs[:i], t, *inputs[i + 1 :], num_iter=3)[0].square().sum()

    for i, t in enumerate(inputs):
        f = partial(function, i)
        with pytest.raises(Exception, match=FORWARD_MODE):
            compile(lambda t, f=f: jvp(f, (t,), (torch.ones_like(t),)))(t)
    f = partial(function, 0)
    for transform in (jacfwd(f), hessian(f), jacfwd(grad(f)), grad(lambda t: jvp(f, (t,), (t,))[1])):
        with pytest.raises(Exception, match=FORWARD_MODE):
            compile(transform)(p.q)


@pytest.mark.supports("torch.func.grad, vjp, vmap")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("how", ["eager", "aot_eager"])
def test_gradients_of_each_sample(how: str) -> None:
    """``vmap(grad)`` over the layer, as differential privacy and influence functions take them."""
    layer, x = make_layer(num_iter=6), make_input(3, 5)
    weights = {n: p.detach() for n, p in layer.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, weights, (x[None],)).square().sum()

    actual = how_to_run(how)(vmap(grad(loss), in_dims=(None, 0)))(weights, x)
    for i, row in enumerate(x):
        own = {n: t.clone().requires_grad_() for n, t in weights.items()}
        expected = torch.autograd.grad(loss(own, row), list(own.values()))
        for name, gradient in zip(own, expected, strict=True):
            assert norm_error(actual[name][i], gradient) <= 1000 * EPS, name


@pytest.mark.supports("torch.func.grad, vjp, vmap")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_an_ensemble_of_layers() -> None:
    layers = [make_layer(num_iter=6) for _ in range(2)]
    with torch.no_grad():
        for p in layers[1].parameters():
            p.mul_(1.1)
    weights, buffers = stack_module_state(layers)  # type: ignore[arg-type]
    x = make_input(2, 5)

    def call(weights: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(layers[0], (weights, buffers), (x,))

    together = vmap(call)(weights, buffers)
    for y, layer in zip(together, layers, strict=True):
        assert norm_error(y.detach(), layer(x).detach()) <= 1000 * EPS
