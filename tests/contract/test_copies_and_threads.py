"""Layers, caches and modifiers are copied, pickled and used by several threads at once."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gka_ops
from gka_ops.nn import GatedKalmaNet
from tests.helpers.layers import KINDS, gradients, make_input, make_layer
from tests.helpers.problems import cotangents, evaluate, make_problem, run_gka


class LearnedRidge(nn.Module):
    """A modifier with a parameter."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.02, 0.1, heads))

    def forward(self, fro: Tensor, b: Tensor, h: Tensor, t: Tensor) -> Tensor:
        return self.weight[h] * fro


def assert_same_layer(other: nn.Module, layer: GatedKalmaNet) -> None:
    """Same outputs and gradients, and no memory in common."""
    x = make_input(2, 5)
    assert torch.equal(other(x), layer(x))
    expected = gradients(layer, x, layer)
    own = [p for _, p in other.named_parameters()]
    upstream = torch.randn(2, 5, layer.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad((other(x) * upstream).sum(), own, materialize_grads=True)
    actual = dict(zip((name for name, _ in layer.named_parameters()), found, strict=True))
    for name, gradient in actual.items():
        assert torch.equal(gradient, expected[name]), name
    assert not {p.data_ptr() for p in own} & {p.data_ptr() for p in layer.parameters()}


@pytest.mark.supports("pickling and deepcopy")
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_copied_pickled_and_saved(kind: str, tmp_path: Path) -> None:
    layer = make_layer(**{"num_iter": 6} | KINDS[kind])
    layer(make_input(2, 5))  # nothing that a call leaves behind stands in the way
    assert_same_layer(copy.deepcopy(layer), layer)
    assert_same_layer(pickle.loads(pickle.dumps(layer)), layer)
    torch.save(layer, tmp_path / "layer.pt")
    assert_same_layer(torch.load(tmp_path / "layer.pt", weights_only=False), layer)
    torch.save(layer.state_dict(), tmp_path / "weights.pt")
    other = GatedKalmaNet(layer.hidden_size, layer.head_dim, **{"num_heads": 2, "num_iter": 6} | KINDS[kind])
    other.to(torch.float64).load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert_same_layer(other, layer)


@pytest.mark.supports("pickling and deepcopy")
def test_a_compiled_layer_is_copied() -> None:
    """The copy compiles for itself: its graphs hold its own parameters."""
    layer = make_layer(num_iter=6)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    expected = compiled(make_input(2, 5))
    other = copy.deepcopy(compiled)
    assert torch.equal(other(make_input(2, 5)), expected)
    assert_same_layer(other, layer)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert not other(make_input(2, 5)).any()
    assert torch.equal(compiled(make_input(2, 5)), expected)


@pytest.mark.supports("pickling and deepcopy")
def test_a_cache_is_copied_pickled_and_saved(tmp_path: Path) -> None:
    layer = make_layer(num_iter=6)
    x = make_input(2, 7)
    with torch.no_grad():
        cache = layer.init_cache(2)
        layer(x[:, :5], cache)
        torch.save(cache, tmp_path / "cache.pt")
        copies = [
            copy.deepcopy(cache),
            pickle.loads(pickle.dumps(cache)),
            torch.load(tmp_path / "cache.pt", weights_only=False),
        ]
        expected = [layer(x[:, t : t + 1], cache) for t in (5, 6)]
        for other in copies:
            assert type(other) is type(cache)
            for t, y in zip((5, 6), expected, strict=True):
                assert torch.equal(layer(x[:, t : t + 1], other), y)
            assert all(map(torch.equal, other.buffers, cache.buffers))
            assert not {b.data_ptr() for b in other.buffers} & {b.data_ptr() for b in cache.buffers}


@pytest.mark.supports("pickling and deepcopy")
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_modifier_is_copied_with_its_tensors(how: str) -> None:
    p = make_problem(B=2, T=5, H=2, D=4, dtype=torch.float32)
    mod = LearnedRidge(2)

    def run(mod: nn.Module) -> Tensor:
        return gka_ops.chunk_gka(p.q, p.k, p.v, p.log_decay, ridge_mod=mod, num_iter=6).output

    expected = run(mod)
    other = copy.deepcopy(mod) if how == "deepcopy" else pickle.loads(pickle.dumps(mod))
    assert torch.equal(run(other), expected)
    run(other).sum().backward()
    assert mod.weight.grad is None
    assert other.weight.grad.any()
    with torch.no_grad():
        other.weight.mul_(3)
    assert not torch.equal(run(other), expected)
    assert torch.equal(run(mod), expected)


@pytest.mark.supports("pickling and deepcopy")
@pytest.mark.parametrize(
    "value",
    [
        gka_ops.Ridge(0.1, 0.2, 0.1),
        gka_ops.DecayGate(torch.ones(2), torch.zeros(2)),
        gka_ops.GKAState(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 3)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_named_tuples_are_copied(value: tuple[object, ...]) -> None:
    for other in (copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
        assert type(other) is type(value)
        for a, b in zip(other, value, strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.supports("multi-stream and multi-thread")
@pytest.mark.parametrize("layer", [False, True], ids=["chunk_gka", "layer"])
def test_threads_at_once(layer: bool) -> None:
    """Each has inputs of its own, some of shapes that others have too, and gets its own results."""
    threads, rounds = 6, 4
    shared = make_layer(num_iter=6)

    def work(seed: int) -> list[Tensor]:
        T = (3, 5, 70)[seed % 3]
        if layer:
            return list(gradients(shared, make_input(2, T, seed=seed), shared).values())
        p = make_problem(B=2, T=T, H=2, Hkv=1, D=8, gate=True, state=True, qk_l2norm=True, seed=seed)
        upstream = cotangents({"output": torch.empty(2, T, 2, 8, dtype=torch.float64)}, seed)
        found = evaluate(lambda p: run_gka(p, num_iter=6), p, upstream)
        return [*found.outputs.values(), *found.gradients.values()]

    expected = [work(seed) for seed in range(threads)]
    failures: list[str] = []
    start = threading.Barrier(threads)

    def repeat(seed: int) -> None:
        start.wait()
        try:
            for _ in range(rounds):
                if not all(map(torch.equal, work(seed), expected[seed])):
                    failures.append(f"thread {seed}: other numbers")
        except Exception as error:
            failures.append(f"thread {seed}: {error!r}")

    running = [threading.Thread(target=repeat, args=(seed,)) for seed in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not failures
