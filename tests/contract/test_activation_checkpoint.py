"""Activation checkpointing, whole and selective, and calls that save nothing of the solve."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import gka_ops
from gka_ops import GatedKalmaNet
from gka_ops.activation_checkpoint import SOLVES, policy, save_solve
from gka_ops.flops import backward_flops, forward_flops
from gka_ops.numerics import backward_iterations
from gka_ops.reference import backend
from tests.helpers.problems import cotangents, evaluate, make_problem, run_gka

B, T, HIDDEN, HEADS, HEAD_DIM = 2, 70, 24, 3, 8
CHECKPOINTING = pytest.mark.supports("selective activation checkpointing")
SAVE_LESS = pytest.mark.supports("save_x=False")


class Calls:
    """How often the reference solved, forwards and backwards."""

    def __init__(self) -> None:
        self.forward = self.backward = 0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            setattr(calls, name, getattr(calls, name) + 1)
            return function(*args)

        return call

    monkeypatch.setattr(backend, "chunk_gka", counted("forward", backend.chunk_gka))
    monkeypatch.setattr(backend, "chunk_gka_backward", counted("backward", backend.chunk_gka_backward))
    return calls


def make_layer(**options: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layer = GatedKalmaNet(HIDDEN, HEAD_DIM, HEADS, num_iter=4, **options)
    return layer, torch.randn(B, T, HIDDEN, requires_grad=True)


def gradients(layer: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
    upstream = torch.linspace(-1, 1, x.numel()).view_as(x)
    return list(torch.autograd.grad(run(x), [x, *layer.parameters()], upstream))


class Live(TorchDispatchMode):
    """What operators allocated and is still alive, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not func.is_view:
                storage = tensor.untyped_storage()
                self.allocated[StorageWeakRef(storage)] = storage.nbytes()
        return result

    def bytes(self) -> int:
        return sum(size for storage, size in self.allocated.items() if not storage.expired())


def held(run: Callable[[], Tensor]) -> int:
    """Bytes that a forward keeps for its backward, the output included."""
    with Live() as live:
        output = run()
        assert output.requires_grad
        return live.bytes()


# -------------------------------------------------------------------------------------------------------- checkpointing
CONTEXTS: dict[str, tuple[Any, int]] = {
    "everything": (None, 2),
    "save_solve": (save_solve, 1),
    "a list": (functools.partial(create_selective_checkpoint_contexts, list(SOLVES)), 1),
    "a policy": (functools.partial(create_selective_checkpoint_contexts, policy), 1),
}
"""A context function of ``checkpoint``, and how often the operator's forward then runs."""


def checkpointed(layer: nn.Module, context_fn: Any) -> Callable[[Tensor], Tensor]:
    options = {} if context_fn is None else {"context_fn": context_fn}
    return lambda x: checkpoint(layer, x, use_reentrant=False, **options)


@CHECKPOINTING
@pytest.mark.parametrize("which", CONTEXTS)
def test_eager(which: str, calls: Calls) -> None:
    layer, x = make_layer()
    expected = gradients(layer, x, layer)
    assert (calls.forward, calls.backward) == (1, 1)
    context_fn, forwards = CONTEXTS[which]
    actual = gradients(layer, x, checkpointed(layer, context_fn))
    assert (calls.forward, calls.backward) == (1 + forwards, 2)
    for gradient, wanted in zip(actual, expected, strict=True):
        assert torch.equal(gradient, wanted)


@CHECKPOINTING
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("which", ["everything", "save_solve"])
def test_compiled(which: str, backend: str, calls: Calls) -> None:
    layer, x = make_layer()
    context_fn, forwards = CONTEXTS[which]
    run = checkpointed(layer, context_fn)
    expected = gradients(layer, x, run)
    torch._dynamo.reset()
    compiled = torch.compile(run, backend=backend, fullgraph=True)
    gradients(layer, x, compiled)
    calls.forward = calls.backward = 0
    actual = gradients(layer, x, compiled)
    assert (calls.forward, calls.backward) == (forwards, 1)
    for gradient, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


@CHECKPOINTING
def test_memory() -> None:
    """Kept are the operator's results, and nothing of the projections, convolutions and norms around it."""
    layer, x = make_layer()
    tokens = B * T * HEADS
    results = 4 * tokens * (HEAD_DIM + HEAD_DIM + 1)  # output, x and ‖H_t‖_F
    output = 4 * x.numel()
    assert held(lambda: checkpointed(layer, save_solve)(x)) == results + output
    assert held(lambda: checkpointed(layer, None)(x)) == output
    assert held(lambda: layer(x)) > 5 * (results + output)


# ------------------------------------------------------------------------------------------------------------ save_x
@SAVE_LESS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("num_iter", [0, 1, 6])
def test_without_saved_x_gradients_are_the_same(dtype: torch.dtype, num_iter: int) -> None:
    p = make_problem(
        B=2, T=70, H=4, Hkv=2, D=16, V=8, gate=True, state=True, ridge="token", qk_l2norm=True, dtype=dtype
    )
    upstream = cotangents(run_gka(p, num_iter=num_iter))
    expected = evaluate(lambda p: run_gka(p, num_iter=num_iter), p, upstream)
    actual = evaluate(lambda p: run_gka(p, num_iter=num_iter, save_x=False), p, upstream)
    for name, gradient in expected.gradients.items():
        assert torch.equal(actual.gradients[name], gradient), name


def gka(p: Any, **options: Any) -> Tensor:
    return gka_ops.chunk_gka(p.q, p.k, p.v, p.log_decay, p.alpha, p.beta, num_iter=6, **options).output


@SAVE_LESS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_saved_x_nothing_of_the_solve_is_kept(dtype: torch.dtype) -> None:
    p = make_problem(B=2, T=70, H=4, D=16, V=8, dtype=dtype).requiring_grad()
    tokens = 2 * 70 * 4
    output = tokens * 8 * p.q.element_size()
    x = tokens * (16 * 4 + 4) if dtype == torch.float32 else tokens * (16 * 2 + 3 * 4)  # with ‖H_t‖_F; packed
    assert held(lambda: gka(p)) == output + x
    assert held(lambda: gka(p, save_x=False)) == output


@SAVE_LESS
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_without_saved_x_compiled(backend: str, calls: Calls) -> None:
    """The forward's graph saves no x: what it returns for the backward are its inputs. And it does not solve twice."""
    p = make_problem(B=2, T=70, H=4, D=16, V=8, dtype=torch.float32).requiring_grad()
    leaves = [p.q, p.k, p.v, p.log_decay, p.alpha, p.beta]
    expected = torch.autograd.grad(gka(p).square().sum(), leaves)
    torch._dynamo.reset()
    compiled = torch.compile(lambda: gka(p, save_x=False), backend=backend, fullgraph=True)
    compiled()
    calls.forward = calls.backward = 0
    saved: set[StorageWeakRef] = set()

    def pack(t: Tensor) -> Tensor:
        if t.numel() and not any(t is leaf for leaf in leaves):
            saved.add(StorageWeakRef(t.untyped_storage()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = compiled()
    known = {StorageWeakRef(leaf.untyped_storage()) for leaf in leaves}
    assert not saved - known
    for gradient, wanted in zip(torch.autograd.grad(output.square().sum(), leaves), expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-6)
    assert (calls.forward, calls.backward) == (1, 1)


@SAVE_LESS
def test_the_second_solve_counts() -> None:
    p = make_problem(B=2, T=70, H=4, D=16, V=8, dtype=torch.float32).requiring_grad()
    with FlopCounterMode(display=False) as counter:
        gka(p, save_x=False).sum().backward()
    once = forward_flops(16, 8, 6) + backward_flops(16, 8, backward_iterations(6))
    assert counter.get_total_flops() == 2 * 70 * 4 * (once + forward_flops(16, 0, 6))


@SAVE_LESS
def test_the_layer_hands_it_on(calls: Calls) -> None:
    layer, x = make_layer()
    expected = gradients(layer, x, layer)
    save_less, _ = make_layer(save_x=False)
    for gradient, wanted in zip(gradients(save_less, x, save_less), expected, strict=True):
        assert torch.equal(gradient, wanted)
    assert held(lambda: layer(x)) - held(lambda: save_less(x)) == 4 * B * T * HEADS * (HEAD_DIM + 1)


@SAVE_LESS
def test_save_x_is_a_flag() -> None:
    p = make_problem(B=1, T=5, H=1, D=4)
    for function in (lambda: gka(p, save_x=1), lambda: GatedKalmaNet(8, 4, 2, save_x="no")):  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="expected save_x to be a bool"):
            function()
