"""Kernels with a modifier inside, on a card."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import gka_ops
from tests.helpers.modifiers import exact_gka

pytestmark = pytest.mark.gpu

B, T, H, HKV = 2, 200, 4, 2
DEVICE = "cuda"


def make_inputs(dtype: torch.dtype, D: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    q, k, v = (F.normalize(torch.randn(B, T, n, D, generator=generator), dim=-1) for n in (H, HKV, HKV))
    gates = -0.02 * rand(B, T, H), rand(B, T, H), rand(B, T, H)
    tensors = (*(t.to(dtype) for t in (q, k, v)), *gates)
    return [t.to(DEVICE).requires_grad_() for t in tensors]


class Layer(torch.nn.Module):
    """The three lines of a user's learned ridge."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-3.5, -2, H, device=DEVICE))

    def ridge_mod(self, fro: Any, b: Tensor, h: Tensor, t: Tensor) -> Any:
        return torch.maximum(0.02 * fro, self.weight.exp()[h] * fro.sqrt())

    def forward(self, *inputs: Tensor, **options: Any) -> Tensor:
        return gka_ops.chunk_gka(*inputs, ridge_mod=self.ridge_mod, **options).output


@pytest.mark.supports("modifiers")
@pytest.mark.parametrize(
    ("dtype", "D"), [(torch.bfloat16, 128), (torch.bfloat16, 64), (torch.float32, 128), (torch.bfloat16, 96)]
)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_learned_ridge_trains(dtype: torch.dtype, D: int, compiled: bool) -> None:
    """Values and gradients against the definition in fp64; bars as for the built-in ridge (docs/numerics.md)."""
    layer, inputs = Layer(), make_inputs(dtype, D)
    run = torch.compile(layer, fullgraph=True) if compiled else layer
    output = run(*inputs, num_iter=40)
    upstream = torch.randn_like(output)
    leaves = [*inputs, layer.weight]
    gradients = torch.autograd.grad(output, leaves, upstream)

    exact_inputs = [t.detach().double().cpu().requires_grad_() for t in inputs]
    exact_layer = Layer().double().cpu()
    exact, _, _ = exact_gka(*exact_inputs, exact_layer.ridge_mod, D**-0.5)
    expected = torch.autograd.grad(exact, [*exact_inputs, exact_layer.weight], upstream.double().cpu())
    names = ("output", "dq", "dk", "dv", "dlog_decay", "dalpha", "dbeta", "dweight")
    pairs = zip((output, *gradients), (exact, *expected), strict=True)
    errors = {
        name: float((found.detach().double().cpu() - right.detach()).norm() / right.detach().norm())
        for name, (found, right) in zip(names, pairs, strict=True)
    }
    assert max(errors.values()) < (1e-2 if dtype == torch.bfloat16 else 2e-3), errors
    torch._dynamo.reset()


def test_decoding_continues() -> None:
    layer, inputs = Layer(), [t.detach() for t in make_inputs(torch.bfloat16, 128)]
    with torch.no_grad():
        whole = layer(*inputs, num_iter=30)
        _, state = gka_ops.chunk_gka(
            *(t[:, :150] for t in inputs), ridge_mod=layer.ridge_mod, num_iter=30, output_final_state=True
        )
        assert state is not None
        rest = gka_ops.recurrent_gka(*(t[:, 150:] for t in inputs), state=state, ridge_mod=layer.ridge_mod, num_iter=30)
    assert float((rest - whole[:, 150:]).norm() / whole[:, 150:].norm()) < 1e-2


def test_the_built_in_ridge_as_a_modifier_gives_the_same() -> None:
    inputs = make_inputs(torch.bfloat16, 128)
    plain = gka_ops.chunk_gka(*inputs).output
    modified = gka_ops.chunk_gka(*inputs, ridge_mod=lambda fro, b, h, t: 0.02 * fro).output
    assert float((plain - modified).detach().norm() / plain.detach().norm()) < 1e-3
