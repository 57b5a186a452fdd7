"""``GatedKalmaNet`` on a card: what a server captures in CUDA graphs, and the whole model compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from gka_ops.nn import GatedKalmaNet, GatedKalmaNetCache
from tests.helpers import graphs
from tests.helpers.problems import norm_error

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("no_gradients")]

HIDDEN, SLOTS = 256, 9
CLOSE = 2e-2
"""A few roundings of bf16 in two layers."""


@pytest.fixture
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def make_layers() -> list[GatedKalmaNet]:
    """Two layers, one with a learned ridge, that remember for tens of tokens."""
    torch.manual_seed(0)
    layers = [
        GatedKalmaNet(HIDDEN, 64, 4, 2, ridge_range=ridge_range, device="cuda", dtype=torch.bfloat16)
        for ridge_range in (None, (0.01, 0.1))
    ]
    for layer in layers:
        layer.A_log.uniform_(-3, 0)
    return layers


def make_input(B: int, T: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, T, HIDDEN, generator=generator).to("cuda", torch.bfloat16)


def make_pools(layers: list[GatedKalmaNet]) -> list[GatedKalmaNetCache]:
    return [layer.init_cache(SLOTS) for layer in layers]


def captured(run: Callable[[], Tensor], caches: list[GatedKalmaNetCache]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """``run`` as a CUDA graph and where it puts its result; ``caches`` are as they were."""
    before = [[buffer.clone() for buffer in cache.buffers] for cache in caches]
    graph, output = graphs.captured(run)
    for cache, old in zip(caches, before, strict=True):
        for buffer, value in zip(cache.buffers, old, strict=True):
            buffer.copy_(value)
    return graph, output


@pytest.mark.supports("manual CUDA graph capture")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_captured_decoding_of_a_pool(compiled: bool) -> None:
    """One graph serves every set of slots, with padding, and continues what eager calls began."""
    layers = make_layers()
    pools, expected = make_pools(layers), make_pools(layers)
    tokens, slots = make_input(4, 1, 0), torch.full((4,), -1, dtype=torch.int32, device="cuda")

    def model(x: Tensor, slots: Tensor, caches: list[GatedKalmaNetCache]) -> Tensor:
        for layer, cache in zip(layers, caches, strict=True):
            x = x + layer(x, cache, state_indices=slots)
        return x

    used = torch.tensor([0, 2, 5, 8], device="cuda")
    for caches in (pools, expected):
        model(make_input(4, 70, 1), used, caches)
    step = torch.compile(model, fullgraph=True) if compiled else model
    graph, output = captured(lambda: step(tokens, slots, pools), pools)
    for turn, indices in enumerate(([0, 2, 5, 8], [5, -1, 0, -1], [-1, -1, -1, -1], [8, 7, -1, 2])):
        slots.copy_(torch.tensor(indices))
        tokens.copy_(make_input(4, 1, 2 + turn))
        graph.replay()
        assert norm_error(output, model(tokens, slots, expected)) < CLOSE
        padding = slots < 0
        assert torch.equal(output[padding], tokens[padding])
    for cache, other in zip(pools, expected, strict=True):
        for buffer, reference in zip(cache.buffers, other.buffers, strict=True):
            assert norm_error(buffer, reference) < CLOSE
            assert not buffer[[1, 3, 4, 6]].any()


@pytest.mark.supports("manual CUDA graph capture")
def test_captured_speculation() -> None:
    """Drafts are verified and accepted in one graph; the pool then holds what decoding one by one leaves."""
    layer = make_layers()[0]
    pool, expected = layer.init_cache(SLOTS), layer.init_cache(SLOTS)
    slots = torch.tensor([4, -1, 7], dtype=torch.int32, device="cuda")
    for cache in (pool, expected):
        layer(make_input(3, 70, 1), cache, state_indices=slots)
    drafts, accepted = make_input(3, 4, 2), torch.zeros(3, dtype=torch.int32, device="cuda")

    def run() -> Tensor:
        y, draft = layer.verify(drafts, pool, slots)
        layer.accept(draft, accepted, pool, slots)
        return y

    graph, output = captured(run, [pool])
    for turn, counts in enumerate(([1, 2, 4], [0, 4, 3], [4, 0, 1])):
        accepted.copy_(torch.tensor(counts))
        drafts.copy_(make_input(3, 4, 3 + turn))
        graph.replay()
        for row in (0, 2):
            for t in range(counts[row]):
                y = layer(drafts[row : row + 1, t : t + 1], expected, state_indices=slots[row : row + 1])
                assert norm_error(output[row : row + 1, t : t + 1], y) < CLOSE
    assert not output[1].any()
    for buffer, reference in zip(pool.buffers, expected.buffers, strict=True):
        assert norm_error(buffer, reference) < CLOSE


def test_captured_reordering_of_slots() -> None:
    cache = make_layers()[0].init_cache(SLOTS)
    for buffer in cache.buffers:
        buffer.normal_()
    source, target = (torch.zeros(3, dtype=torch.int64, device="cuda") for _ in range(2))

    def run() -> Tensor:
        cache.copy_slots(source, target)
        cache.reset(target[2:])
        return target

    graph, _ = captured(run, [cache])
    before = [buffer.clone() for buffer in cache.buffers]
    source.copy_(torch.tensor([1, 0, 3]))
    target.copy_(torch.tensor([0, 1, 5]))
    graph.replay()
    for buffer, old in zip(cache.buffers, before, strict=True):
        assert torch.equal(buffer[:5], old[[1, 0, 2, 3, 4]])
        assert not buffer[5].any()
        assert torch.equal(buffer[6:], old[6:])


@pytest.mark.parametrize("T", [64, 200])
def test_compiled_prefill_of_packed_sequences_fills_a_pool(T: int) -> None:
    layer = make_layers()[1]
    slots = torch.tensor([3, -1, 6], device="cuda")
    cu_seqlens = torch.tensor([0, T // 2, T // 2 + 5, T], dtype=torch.int32, device="cuda")
    x, results = make_input(1, T, 1), []
    for run in (layer, torch.compile(layer, fullgraph=True, dynamic=True)):
        cache = layer.init_cache(SLOTS)
        results.append((run(x, cache, cu_seqlens, slots), run(x, cache, cu_seqlens, slots), *cache.buffers))
    for eager, compiled in zip(*results, strict=True):
        assert norm_error(compiled, eager) < CLOSE


def test_compiled_packed_sequences_stay_apart() -> None:
    """Without a cache, and with an empty sequence at the end: what PyTorch 2.11 would get wrong without an error."""
    layer = make_layers()[0]
    cu_seqlens = torch.tensor([0, 30, 35, 64, 64], dtype=torch.int32, device="cuda")
    x = make_input(1, 64, 1)
    expected = layer(x, cu_seqlens=cu_seqlens)
    assert norm_error(torch.compile(layer, fullgraph=True)(x, cu_seqlens=cu_seqlens), expected) < CLOSE
    for begin, end in ((0, 30), (30, 35), (35, 64)):
        assert norm_error(layer(x[:, begin:end]), expected[:, begin:end]) < CLOSE
