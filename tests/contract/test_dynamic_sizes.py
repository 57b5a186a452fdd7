"""Sizes that nobody knows while a graph is traced: unbacked ones, and ones that are read from data.

A check of sizes that cannot be decided then is made by the graph. And options, which are another graph each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.decorators import mark_unbacked
from torch._dynamo.testing import CompileCounterWithBackend

import gka_ops
from gka_ops import DecayGate, GKAState, Ridge

H, HKV, D, V = 2, 1, 8, 6
UNBACKED = pytest.mark.supports("fakes with symbolic and unbacked sizes")

Tokens = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tokens(B: int, T: int, grad: bool = False) -> Tokens:
    """q, k, v and the log decay."""
    generator = torch.Generator().manual_seed(100 * B + T)
    q, k, v = (torch.randn(B, T, heads, n, generator=generator) for heads, n in ((H, D), (HKV, D), (HKV, V)))
    g = -torch.rand(B, T, H, generator=generator)
    return q.requires_grad_(grad), k.requires_grad_(grad), v.requires_grad_(grad), g.requires_grad_(grad)


def gka(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    result = gka_ops.chunk_gka(q, k, v, g, qk_l2norm=True, output_final_state=True)
    assert result.final_state is not None
    return result.output, *result.final_state


def solve(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    result = gka_ops.chunk_solve(q, k, g, qk_l2norm=True, output_final_state=True)
    assert result.final_state is not None
    return result.x, result.final_state


def check(compiled: Callable[..., Any], function: Callable[..., Any], tensors: Tokens, *others: Any) -> None:
    """The same outputs, bit for bit, and the same gradients."""
    actual, expected = compiled(*tensors, *others), function(*tensors, *others)
    assert all(map(torch.equal, actual, expected))
    leaves = [t for t in tensors if t.requires_grad]
    if leaves:
        found = [
            torch.autograd.grad(sum(t.sum() for t in outputs), leaves, allow_unused=True)
            for outputs in (actual, expected)
        ]
        for one, other in zip(*found, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)


# ------------------------------------------------------------------------------------------------------ unbacked sizes
@UNBACKED
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("function", [gka, solve])
def test_unbacked_sizes(function: Callable[..., Any], grad: bool) -> None:
    """One graph, also for sizes of 1, on which PyTorch specialises otherwise."""
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    first = tokens(2, 70, grad)
    for t in first:
        mark_unbacked(t, (0, 1))
    check(compiled, function, first)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for B, T in ((1, 1), (3, 129), (1, 64)):
            check(compiled, function, tokens(B, T, grad))


@UNBACKED
def test_unbacked_numbers_of_tokens_and_sequences() -> None:
    def packed(q: Tensor, k: Tensor, v: Tensor, g: Tensor, boundaries: Tensor) -> tuple[Tensor, ...]:
        result = gka_ops.chunk_gka(q, k, v, g, cu_seqlens=boundaries, output_final_state=True)
        assert result.final_state is not None
        return result.output, *result.final_state

    compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
    for i, ends in enumerate(([30, 70], [70], [0, 1], [1, 1, 2, 9])):
        given, boundaries = tokens(1, ends[-1], grad=True), torch.tensor([0, *ends])
        if i == 0:
            for t in given:
                mark_unbacked(t, 1)
            mark_unbacked(boundaries, 0)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            check(compiled, packed, given, boundaries)


@UNBACKED
@pytest.mark.parametrize("pool", [False, True], ids=["state of the batch", "pool"])
def test_decode_with_an_unbacked_batch(pool: bool) -> None:
    def decode(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: GKAState, indices: Tensor | None) -> Tensor:
        return gka_ops.recurrent_gka(q, k, v, g, state=state, state_indices=indices)

    compiled = torch.compile(decode, backend="aot_eager", fullgraph=True)
    for i, B in enumerate((3, 1, 5)):
        slots = B + 2 if pool else B
        states = [GKAState(torch.zeros(slots, H, D, D), torch.zeros(slots, H, D, V)) for _ in range(2)]
        given, indices = tokens(B, 1), torch.arange(B) if pool else None
        if i == 0:
            for t in (*given, *states[0], *([] if indices is None else [indices])):
                mark_unbacked(t, 0)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            assert torch.equal(compiled(*given, states[0], indices), decode(*given, states[1], indices))
        assert states[0].kk.any() and all(map(torch.equal, *states))


@UNBACKED
def test_what_a_trace_cannot_check_its_graph_does() -> None:
    """Sizes that do not fit are an error of the run, never a result."""
    compiled = torch.compile(gka, backend="aot_eager", fullgraph=True)
    first = tokens(2, 70)
    for t in first:
        mark_unbacked(t, 1)
    compiled(*first)
    q, k, v, g = tokens(2, 50)
    for wrong in ((q, k[:, :40], v, g), (q, k, v[:, :40], g), (q, k, v, g[:, :40])):
        with pytest.raises((RuntimeError, AssertionError), match=r"[Ee]xpected|assert"):
            compiled(*wrong)


# ------------------------------------------------------------------------------------------------ sizes read from data
@UNBACKED
def test_sizes_from_data() -> None:
    """The first n tokens, and those of a mask, in one graph each."""

    def first(q: Tensor, k: Tensor, v: Tensor, g: Tensor, n: Tensor) -> tuple[Tensor, ...]:
        length: Any = n.item()
        return gka(q[:, :length], k[:, :length], v[:, :length], g[:, :length])

    def chosen(q: Tensor, k: Tensor, v: Tensor, g: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        rows = mask.nonzero()[:, 0]
        return gka(q[:, rows], k[:, rows], v[:, rows], g[:, rows])

    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        for function, choices in (
            (first, [torch.tensor(n) for n in (50, 70, 2)]),
            (chosen, [torch.arange(70) % 3 == 0, torch.arange(70) == 5, torch.ones(70, dtype=torch.bool)]),
        ):
            compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
            for i, choice in enumerate(choices):
                with torch._dynamo.config.patch(error_on_recompile=i > 0):
                    check(compiled, function, tokens(2, 70, grad=True), choice)


@UNBACKED
@pytest.mark.supports("torch.export")
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_exports_sizes_from_data(strict: bool) -> None:
    class Prefix(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, n: Tensor) -> tuple[Tensor, ...]:
            length: Any = n.item()
            return gka(q[:, :length], k[:, :length], v[:, :length], g[:, :length])

    program = torch.export.export(Prefix(), (*tokens(2, 70), torch.tensor(50)), strict=strict).module()
    for n in (50, 1, 70):
        actual = program(*tokens(2, 70), torch.tensor(n))
        assert all(map(torch.equal, actual, Prefix()(*tokens(2, 70), torch.tensor(n))))


# -------------------------------------------------------------------------------------------------------------- options
def per_head(value: float) -> Tensor:
    return torch.full((H,), value)


OPTIONS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "no log decay": lambda B, T: {"log_decay": None},
    "alpha": lambda B, T: {"alpha": torch.rand(B, T, H)},
    "beta": lambda B, T: {"beta": torch.rand(B, T, H)},
    "gate": lambda B, T: {"gate": DecayGate(per_head(0.0))},
    "gate with bias": lambda B, T: {"gate": DecayGate(per_head(0.0), per_head(0.1))},
    "qk_l2norm": lambda B, T: {"qk_l2norm": True},
    "num_iter": lambda B, T: {"num_iter": 7},
    "no solve": lambda B, T: {"num_iter": 0},
    "tol": lambda B, T: {"tol": 1e-2},
    "scale": lambda B, T: {"scale": 0.5},
    "ridge": lambda B, T: {"ridge": 0.1},
    "ridge of a head": lambda B, T: {"ridge": Ridge(per_head(0.1), min_scale=0.02)},
    "ridge of a token": lambda B, T: {"ridge": Ridge(0.1 + torch.rand(B, T, H), min_scale=0.02)},
    "initial state": lambda B, T: {"initial_state": GKAState(torch.eye(D).expand(B, H, D, D), torch.ones(B, H, D, V))},
    "final state": lambda B, T: {"output_final_state": True},
    "implementation": lambda B, T: {"impl": "reference"},
}


@pytest.mark.supports("one recompile for each option")
def test_each_option_is_one_graph() -> None:
    """The first call with an option compiles once, for every B and T; going back to one that is known does not."""

    def function(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        return gka_ops.chunk_gka(q, k, v, **options).output

    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)

    def graphs(name: str | None) -> int:
        before = counter.frame_count
        for B, T in ((3, 70), (2, 129), (4, 65)):
            q, k, v, g = tokens(B, T)
            options = {"log_decay": g} | ({} if name is None else OPTIONS[name](B, T))
            assert torch.equal(compiled(q, k, v, options), function(q, k, v, options))
        return counter.frame_count - before

    with torch._dynamo.config.patch(recompile_limit=len(OPTIONS) + 2):
        assert graphs(None) == 1
        for name in OPTIONS:
            assert graphs(name) == 1, name
            assert graphs(None) == 0, name
