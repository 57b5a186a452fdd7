"""Second derivatives, ``torch.func`` and forward mode through the Triton operators on the card."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import contract
from tests.helpers.problems import (
    Outputs,
    Problem,
    exact_gka,
    exact_solve,
    make_problem,
    norm_error,
    run_gka,
    run_solve,
)

pytestmark = pytest.mark.gpu

RUNS = {"gka": (run_gka, exact_gka, "output"), "solve": (run_solve, exact_solve, "x")}


def small(**options: Any) -> Problem:
    options = {"dtype": torch.bfloat16, "T": 70, "H": 4, "Hkv": 2, "D": 64, "V": 64, "device": "cuda", **options}
    return make_problem(qk_l2norm=True, **options)


def loss_of(run: Callable[..., Outputs], name: str, p: Problem, **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(q: Tensor, k: Tensor) -> Tensor:
        return run(p.replace({"q": q, "k": k}), **options)[name].to(torch.float64).square().sum()

    return loss


@pytest.mark.supports("second derivatives")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("which", RUNS)
def test_gradient_penalty(which: str, dtype: torch.dtype) -> None:
    """The gradient of a gradient's square: the kernels' output and first derivatives enter the second ones.

    Two of the operators' results, each within the contract, are multiplied: twice its bar.
    """
    run, specification, name = RUNS[which]
    p = small(dtype=dtype)

    def penalty_gradients(loss: Callable[[Tensor, Tensor], Tensor], p: Problem) -> tuple[Tensor, ...]:
        leaves = p.q.clone().requires_grad_(), p.k.clone().requires_grad_()
        first = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
        penalty = sum((g.double().square().sum() for g in first), torch.zeros((), device=p.q.device).double())
        return torch.autograd.grad(penalty, leaves)

    actual = penalty_gradients(loss_of(run, name, p, num_iter=30, impl="triton"), p)
    double = p.double()
    expected = penalty_gradients(loss_of(specification, name, double), double)
    for gradient, reference in zip(actual, expected, strict=True):
        assert gradient.dtype == dtype
        assert norm_error(gradient, reference) <= 2 * contract.bars_for(dtype).gradient


@pytest.mark.supports("torch.func.grad, vjp, vmap")
@pytest.mark.parametrize("which", RUNS)
def test_functional_gradients_equal_autograd(which: str) -> None:
    """Bit for bit: the same kernels run."""
    run, _, name = RUNS[which]
    p = small()
    loss = loss_of(run, name, p, num_iter=30, impl="triton")
    leaves = p.q.clone().requires_grad_(), p.k.clone().requires_grad_()
    expected = torch.autograd.grad(loss(*leaves), leaves)
    assert all(map(torch.equal, torch.func.grad(loss, argnums=(0, 1))(p.q, p.k), expected))
    value, vjp = torch.func.vjp(loss, p.q, p.k)
    assert all(map(torch.equal, vjp(torch.ones_like(value)), expected))


@pytest.mark.supports("torch.func.grad, vjp, vmap")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("which", RUNS)
def test_vmap(which: str) -> None:
    """PyTorch's fallback calls the operator once for each element."""
    run, _, name = RUNS[which]
    p = small()
    loss = loss_of(run, name, p, num_iter=30, impl="triton")
    q = torch.stack([p.q, -p.q.flip(1), 2 * p.q])
    expected = torch.stack([loss(each, p.k) for each in q])  # the losses' own sums, in fp64, may run in another order
    torch.testing.assert_close(torch.func.vmap(loss, in_dims=(0, None))(q, p.k), expected, rtol=1e-12, atol=0)
    gradient = torch.func.grad(loss)
    actual = torch.func.vmap(gradient, in_dims=(0, None))(q, p.k)
    assert torch.equal(actual, torch.stack([gradient(each, p.k) for each in q]))


@pytest.mark.supports("torch.func.jvp raises")
@pytest.mark.parametrize("which", RUNS)
def test_forward_mode_raises(which: str) -> None:
    """An error, never a silent zero tangent."""
    run, _, name = RUNS[which]
    p = small()
    loss = loss_of(run, name, p, num_iter=30, impl="triton")
    for transform in (
        lambda: torch.func.jvp(loss, (p.q, p.k), (p.q, p.k)),
        lambda: torch.func.jacfwd(loss)(p.q, p.k),
    ):
        with pytest.raises(NotImplementedError, match="forward mode"):
            transform()
