"""``GatedKalmaNetCache``: prefill in pieces, decoding, packed batches, pools of slots and speculative decoding."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from gka_ops.nn import GatedKalmaNet, GatedKalmaNetCache
from tests.helpers.layers import KINDS, make_input, make_layer
from tests.helpers.problems import max_error

CLOSE = 1e-10
"""Two orders of the same fp64 sums."""

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def run_in_pieces(layer: GatedKalmaNet, x: Tensor, lengths: list[int]) -> tuple[Tensor, GatedKalmaNetCache]:
    assert sum(lengths) == x.shape[1]
    cache = layer.init_cache(x.shape[0])
    return torch.cat([layer(piece, cache) for piece in x.split(lengths, dim=1)], dim=1), cache


def filled(cache: GatedKalmaNetCache, seed: int = 3) -> GatedKalmaNetCache:
    """The cache with what some sequences may have left in every slot."""
    generator = torch.Generator().manual_seed(seed)
    for buffer in cache.buffers:
        buffer.copy_(torch.randn(buffer.shape, generator=generator, dtype=buffer.dtype))
    kk = cache.state.kk
    kk.copy_(kk @ kk.mT)
    return cache


def clone(cache: GatedKalmaNetCache) -> list[Tensor]:
    return [buffer.clone() for buffer in cache.buffers]


def assert_slots(
    cache: GatedKalmaNetCache, slots: Sequence[int], expected: Sequence[Tensor], rows: Sequence[int]
) -> None:
    for buffer, other in zip(cache.buffers, expected, strict=True):
        assert max_error(buffer[list(slots)], other[list(rows)]) < CLOSE


def assert_untouched(cache: GatedKalmaNetCache, before: list[Tensor], slots: Sequence[int]) -> None:
    for buffer, old in zip(cache.buffers, before, strict=True):
        assert torch.equal(buffer[list(slots)], old[list(slots)])


# ------------------------------------------------------------------------------------------------ prefill and decoding
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [[36, 1, 1, 1, 1], [2, 1, 1, 30, 1, 5]], ids=str)
def test_prefill_and_decoding_equal_the_whole(kind: str, lengths: list[int]) -> None:
    layer, x = make_layer(**KINDS[kind]), make_input(2, 40)
    y, _ = run_in_pieces(layer, x, lengths)
    assert max_error(y, layer(x)) < CLOSE


@pytest.mark.parametrize("lengths", [[70], [1] * 6 + [64], [64, 6], [3, 67]], ids=str)
def test_prompt_may_come_in_pieces(lengths: list[int]) -> None:
    layer, x = make_layer(**KINDS["grouped"]), make_input(2, 70)
    y, cache = run_in_pieces(layer, x, lengths)
    assert max_error(y, layer(x)) < CLOSE
    _, whole = run_in_pieces(layer, x, [70])
    assert_slots(cache, range(2), whole.buffers, range(2))


def test_cache_is_advanced_in_place_and_is_the_same_by_either_way() -> None:
    layer, x = make_layer(), make_input(2, 12)
    cache = layer.init_cache(2)
    before = [buffer.data_ptr() for buffer in cache.buffers]
    layer(x, cache)
    assert before == [buffer.data_ptr() for buffer in cache.buffers]
    _, stepped = run_in_pieces(layer, x, [1] * 12)
    assert_slots(cache, range(2), stepped.buffers, range(2))


def test_16_bit_layer_keeps_its_state_in_fp32() -> None:
    layer = make_layer(torch.bfloat16)
    cache = layer.init_cache(2)
    assert [buffer.dtype for buffer in cache.buffers] == [torch.bfloat16] * 3 + [torch.float32] * 2
    x = make_input(2, 9, torch.bfloat16)
    y = torch.cat([layer(x[:, :8], cache), layer(x[:, 8:], cache)], dim=1)
    assert y.dtype == torch.bfloat16
    assert max_error(y, layer(x)) < 2e-2  # as far as bf16 outputs may lie from each other


# -------------------------------------------------------------------------------------------------------------- packed
@pytest.mark.parametrize("kind", ["grouped", "no convolution", "nothing optional"])
@pytest.mark.parametrize("pool", [False, True], ids=["batch", "pool"])
def test_packed_prefill_continues_and_fills_a_cache(kind: str, pool: bool) -> None:
    """Two packed calls and one decoded token, with sequences that are empty or shorter than the convolution."""
    layer, first, second = make_layer(**KINDS[kind]), [5, 0, 1, 20], [1, 2, 0, 9]
    sequences = [make_input(1, a + b + 1, seed=i) for i, (a, b) in enumerate(zip(first, second, strict=True))]
    cache, slots = layer.init_cache(4), None
    if pool:
        cache, slots = filled(layer.init_cache(7)), torch.tensor([6, 2, 0, 3], dtype=torch.int32)
        cache.reset(slots)
    before = clone(cache)
    for begin, lengths in (([0] * 4, first), (first, second)):
        pieces = [s[:, b : b + n] for s, b, n in zip(sequences, begin, lengths, strict=True)]
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        y = layer(torch.cat(pieces, dim=1), cache, cu_seqlens, slots)
        for s, b, n, part in zip(sequences, begin, lengths, y.split(lengths, dim=1), strict=True):
            if n:
                assert max_error(part, layer(s)[:, b : b + n]) < CLOSE
    decoded = layer(torch.cat([s[:, -1:] for s in sequences]), cache, state_indices=slots)
    for s, row in zip(sequences, decoded, strict=True):
        assert max_error(row, layer(s)[0, -1:]) < CLOSE
    if pool:
        assert_untouched(cache, before, [1, 4, 5])


def test_packed_padding_is_ignored() -> None:
    """As a server pads a packed batch to a fixed number of tokens and sequences."""
    layer, x = make_layer(), make_input(1, 20)
    cache = filled(layer.init_cache(3))
    slots, cu_seqlens = torch.tensor([2, -1, 0, -1]), torch.tensor([0, 6, 9, 14, 20])
    cache.reset(slots)
    before = clone(cache)
    padding = [*range(6, 9), *range(14, 20)]
    x[:, padding] = torch.nan
    y = layer(x, cache, cu_seqlens, slots)
    assert not y[:, padding].any()
    assert_untouched(cache, before, [1])
    for slot, (begin, end) in ((2, (0, 6)), (0, (9, 14))):
        expected, alone = run_in_pieces(layer, x[:, begin:end], [end - begin])
        assert max_error(y[:, begin:end], expected) < CLOSE
        assert_slots(cache, [slot], alone.buffers, [0])


# --------------------------------------------------------------------------------------------------------------- pools
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_pool_equals_a_cache_of_the_batch(kind: str, index_dtype: torch.dtype) -> None:
    """Prefill in pieces and decoding, among other slots and padding."""
    layer, x = make_layer(**KINDS[kind]), make_input(5, 16)
    slots, used = torch.tensor([4, -1, 0, 3, -7], dtype=index_dtype), [0, 2, 3]
    cache = filled(layer.init_cache(6))
    cache.reset(slots)
    before, addresses = clone(cache), [buffer.data_ptr() for buffer in cache.buffers]
    x[[1, 4]] = torch.nan
    expected, batch = run_in_pieces(layer, x[used], [9, 5, 1, 1])
    y = torch.cat([layer(piece, cache, state_indices=slots) for piece in x.split([9, 5, 1, 1], dim=1)], dim=1)
    assert max_error(y[used], expected) < CLOSE
    assert not y[[1, 4]].any()
    assert_slots(cache, [4, 0, 3], batch.buffers, range(3))
    assert_untouched(cache, before, [1, 2, 5])
    assert addresses == [buffer.data_ptr() for buffer in cache.buffers]


@pytest.mark.parametrize("T", [1, 3])
def test_all_padding_touches_nothing(T: int) -> None:
    layer = make_layer()
    cache, slots = filled(layer.init_cache(2)), torch.tensor([-1, -1, -1])
    cache.state.kv[0] = torch.inf  # whatever a slot holds
    before = clone(cache)
    assert not layer(make_input(3, T), cache, state_indices=slots).any()
    y, draft = layer.verify(make_input(3, T), cache, slots)
    assert not y.any()
    layer.accept(draft, torch.tensor([0, T, T]), cache, slots)
    cache.reset(slots)
    cache.copy_slots(torch.tensor([0, -1]), torch.tensor([-1, 1]))
    assert_untouched(cache, before, range(2))


def test_reset_starts_sequences_anew() -> None:
    layer, x = make_layer(), make_input(2, 6)
    cache = filled(layer.init_cache(4))
    before = clone(cache)
    cache.reset(torch.tensor([2, -1, 0], dtype=torch.int32))
    for buffer in cache.buffers:
        assert not buffer[[0, 2]].any()
    assert_untouched(cache, before, [1, 3])
    assert max_error(layer(x, cache, state_indices=torch.tensor([0, 2])), layer(x)) < CLOSE


def test_copy_slots_reads_before_it_writes() -> None:
    """A permutation, a fork and padding on either side."""
    cache = filled(make_layer().init_cache(6))
    before = clone(cache)
    cache.copy_slots(torch.tensor([1, 0, 3, 3, -1, 2]), torch.tensor([0, 1, 4, 5, 2, -1]))
    for buffer, old in zip(cache.buffers, before, strict=True):
        assert torch.equal(buffer, old[[1, 0, 2, 3, 3, 3]])


def test_forked_prefix_serves_several_continuations() -> None:
    """A cached prefix in slot 0, two beams, and their exchange in between."""
    layer = make_layer(**KINDS["grouped"])
    prefix, beams = make_input(1, 10), make_input(2, 4, seed=2)
    cache = layer.init_cache(3)
    layer(prefix, cache, state_indices=torch.tensor([0]))
    cache.copy_slots(torch.tensor([0, 0]), torch.tensor([1, 2]))
    slots = torch.tensor([1, 2])
    first = [layer(beams[:, t : t + 1], cache, state_indices=slots) for t in range(2)]
    cache.copy_slots(torch.tensor([2, 1]), torch.tensor([1, 2]))
    second = [layer(beams[:, t : t + 1], cache, state_indices=slots) for t in range(2, 4)]
    swapped = torch.cat([beams[[1, 0], :2], beams[:, 2:]], dim=1)
    for history, found, rows in ((beams, first, slice(0, 2)), (swapped, second, slice(2, 4))):
        whole = layer(torch.cat([prefix.expand(2, -1, -1), history], dim=1))
        assert max_error(torch.cat(found, dim=1), whole[:, 10:][:, rows]) < CLOSE
    _, alone = run_in_pieces(layer, prefix, [10])
    assert_slots(cache, [0], alone.buffers, [0])


# ------------------------------------------------------------------------------------------------ speculative decoding
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pool", [False, True], ids=["batch", "pool"])
def test_rejected_drafts_never_were(kind: str, pool: bool) -> None:
    """From 0 to all of 5 drafts are kept."""
    layer, prompt, drafts = make_layer(**KINDS[kind]), make_input(6, 7), make_input(6, 5, seed=2)
    slots = torch.tensor([7, 5, 0, 1, 2, 4], dtype=torch.int32) if pool else None
    cache = layer.init_cache(8 if pool else 6)
    layer(prompt, cache, state_indices=slots)
    before = clone(cache)
    accepted = torch.arange(6, dtype=torch.int32)
    y, draft = layer.verify(drafts, cache, slots)
    assert_untouched(cache, before, range(len(before[0])))
    assert max_error(y, layer(torch.cat([prompt, drafts], dim=1))[:, 7:]) < CLOSE
    layer.accept(draft, accepted, cache, slots)
    for row in range(6):
        kept = torch.cat([prompt[row : row + 1], drafts[row : row + 1, :row]], dim=1)
        _, expected = run_in_pieces(layer, kept, [1] * kept.shape[1])
        assert_slots(cache, [row if slots is None else int(slots[row])], expected.buffers, [0])
    if pool:
        assert_untouched(cache, before, [3, 6])


def test_rejected_drafts_leave_the_very_bits() -> None:
    layer = make_layer(torch.float32, tol=2e-3)
    cache = layer.init_cache(2)
    layer(make_input(2, 7, torch.float32), cache)
    before = clone(cache)
    _, draft = layer.verify(make_input(2, 4, torch.float32, seed=2) * 100, cache)
    layer.accept(draft, torch.tensor([0, 0]), cache)
    assert_untouched(cache, before, range(2))


def test_speculative_decoding_with_padding() -> None:
    """Rounds of three drafts, of which 1, none (padding), 3 and 2 are kept, continue each sequence where it stands."""
    layer, kept = make_layer(), [1, 0, 3, 2]
    slots, accepted = torch.tensor([3, -1, 0, 2]), torch.tensor([1, 3, 3, 2])
    sequences = make_input(4, 16)
    cache = layer.init_cache(4)
    layer(sequences[:, :4], cache, state_indices=slots)
    position = [4] * 4
    for _ in range(3):
        drafts = torch.stack([sequences[row, p : p + 3] for row, p in enumerate(position)])
        y, draft = layer.verify(drafts, cache, slots)
        layer.accept(draft, accepted, cache, slots)
        for row in (0, 2, 3):
            p = position[row]
            assert max_error(y[row], layer(sequences[row : row + 1])[0, p : p + 3]) < CLOSE
        position = [p + n for p, n in zip(position, kept, strict=True)]
    for buffer in cache.buffers:
        assert not buffer[1].any()


# ------------------------------------------------------------------------------------------------------------ compiled
def serve(layer: GatedKalmaNet, x: Tensor, cache: GatedKalmaNetCache, slots: Tensor) -> Tensor:
    return layer(x, cache, state_indices=slots)


def speculate(layer: GatedKalmaNet, x: Tensor, cache: GatedKalmaNetCache, slots: Tensor, accepted: Tensor) -> Tensor:
    y, draft = layer.verify(x, cache, slots)
    layer.accept(draft, accepted, cache, slots)
    return y


def prefill(layer: GatedKalmaNet, x: Tensor, cache: GatedKalmaNetCache, slots: Tensor, cu_seqlens: Tensor) -> Tensor:
    return layer(x.flatten(0, 1)[None], cache, cu_seqlens, slots)


CALLS: dict[str, tuple[Any, int, list[Tensor]]] = {
    "decode": (serve, 1, []),
    "chunked prefill": (serve, 6, []),
    "packed prefill": (prefill, 6, [torch.tensor([0, 5, 9, 18])]),
    "speculate": (speculate, 3, [torch.tensor([2, 3, 0])]),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("grouped", "aot_eager"),
        ("nothing optional", "aot_eager"),
        pytest.param("learned ridge", "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiles_into_one_graph_that_advances_the_pool_in_place(call: str, kind: str, backend: str) -> None:
    """Nothing in it depends on values: the compiled graph serves other slots, padding and counts without another."""
    run, T, more = CALLS[call]
    layer = make_layer(torch.float32, **KINDS[kind] | {"tol": 2e-3})
    eager_cache, compiled_cache = filled(layer.init_cache(5)), filled(layer.init_cache(5))
    addresses = [buffer.data_ptr() for buffer in compiled_cache.buffers]
    torch._dynamo.reset()
    counters.clear()
    step = torch.compile(run, fullgraph=True, backend=backend)
    for turn, slots in enumerate(([3, -1, 0], [0, 2, 4], [-1, -1, -1], [1, 3, -1])):
        x = make_input(3, T, torch.float32, seed=turn)
        indices = torch.tensor(slots, dtype=torch.int32)
        arguments = [(tensor - turn).clamp(min=0) if call == "speculate" else tensor for tensor in more]
        expected = run(layer, x, eager_cache, indices, *arguments)
        with torch._dynamo.config.patch(error_on_recompile=turn > 0):
            y = step(layer, x, compiled_cache, indices, *arguments)
        assert max_error(y, expected) < 1e-5
        for buffer, other in zip(compiled_cache.buffers, eager_cache.buffers, strict=True):
            assert max_error(buffer, other) < 1e-5
    assert counters["stats"]["unique_graphs"] == 1
    assert addresses == [buffer.data_ptr() for buffer in compiled_cache.buffers]


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_compiled_code_copies_no_pool(call: str) -> None:
    """Slots are read and written where they lie: no buffer of the generated code is as long as the pool."""
    run, T, more = CALLS[call]
    layer, slots = make_layer(torch.float32, tol=2e-3), torch.tensor([30, -1, 0])
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True)
    _, (code,) = run_and_get_code(compiled, layer, make_input(3, T, torch.float32), layer.init_cache(37), slots, *more)
    leading = re.findall(r"empty_strided_cpu\(\((\d+),", code)
    assert leading
    assert "37" not in leading


def test_compiled_decoding_advances_the_cache() -> None:
    layer, x = make_layer(**KINDS["grouped"]), make_input(2, 40)
    expected, expected_cache = run_in_pieces(layer, x, [36, 1, 1, 1, 1])
    torch._dynamo.reset()
    cache = layer.init_cache(2)
    step = torch.compile(layer, fullgraph=True, backend="aot_eager")
    layer(x[:, :36], cache)
    rows = []
    for t in range(36, 40):
        with torch._dynamo.config.patch(error_on_recompile=t > 36):
            rows.append(step(x[:, t : t + 1], cache))
    assert max_error(torch.cat(rows, dim=1), expected[:, 36:]) < 1e-12
    assert max_error(cache.state.kv, expected_cache.state.kv) < 1e-12


def test_copying_and_resetting_slots_compile() -> None:
    caches = [filled(make_layer().init_cache(4)) for _ in range(2)]
    source, target, slots = torch.tensor([1, 3, -1]), torch.tensor([3, 0, 2]), torch.tensor([-1, 2])

    def rearrange(cache: GatedKalmaNetCache) -> None:
        cache.copy_slots(source, target)
        cache.reset(slots)

    torch._dynamo.reset()
    rearrange(caches[0])
    torch.compile(rearrange, fullgraph=True, backend="aot_eager")(caches[1])
    for buffer, expected in zip(caches[1].buffers, caches[0].buffers, strict=True):
        assert torch.equal(buffer, expected)


# -------------------------------------------------------------------------------------------------------------- misuse
def test_says_what_it_expected() -> None:
    layer, x = make_layer(), make_input(2, 4)
    cache = layer.init_cache(2)
    indices = torch.tensor([0, 1])
    with torch.enable_grad(), pytest.raises(RuntimeError, match=r"expected torch\.no_grad"):
        layer(x, cache)
    with torch.enable_grad(), pytest.raises(RuntimeError, match=r"expected torch\.no_grad"):
        layer.verify(x, cache)
    with pytest.raises(ValueError, match=r"expected cache.q_tail of shape \[2, 32, 3\], got \[3, 32, 3\]"):
        layer(x, layer.init_cache(3))
    with pytest.raises(ValueError, match=r"expected cache.v_tail of shape \[2, 32, 3\], got \[2, 32, 0\]"):
        layer(x, make_layer(use_v_conv=False).init_cache(2))
    smaller = cache._replace(state=layer.init_cache(1).state)
    for state_indices in (None, indices):
        with pytest.raises(
            ValueError, match=r"expected cache.state.kk of shape \[2, 2, 16, 16\], got \[1, 2, 16, 16\]"
        ):
            layer(x, smaller, state_indices=state_indices)
    with pytest.raises(ValueError, match="expected a cache with state_indices, got None"):
        layer(x, state_indices=indices)
    for run in (lambda i: layer(x, cache, state_indices=i), lambda i: layer.verify(x, cache, i)):
        with pytest.raises(ValueError, match=r"expected state_indices of shape \[2\], got \[3\]"):
            run(torch.tensor([0, 1, -1]))
        with pytest.raises(TypeError, match=r"expected state_indices to be int32 or int64, got torch\.float32"):
            run(indices.float())
        with pytest.raises(TypeError, match=r"expected state_indices to be a torch\.Tensor, got list"):
            run([0, 1])
        with pytest.raises(ValueError, match="expected state_indices on cpu, got meta"):
            run(indices.to("meta"))
    with pytest.raises(ValueError, match=r"expected state_indices of shape \[1\], got \[2\]"):
        layer(x[:1], cache, torch.tensor([0, 4]), indices)
    _, draft = layer.verify(x, cache)
    with torch.enable_grad(), pytest.raises(RuntimeError, match=r"expected torch\.no_grad"):
        layer.accept(draft, indices, cache)
    with pytest.raises(ValueError, match=r"expected num_accepted of shape \[2\], got \[1\]"):
        layer.accept(draft, torch.tensor([1]), cache)
    with pytest.raises(TypeError, match=r"expected num_accepted to be int32 or int64, got torch\.bool"):
        layer.accept(draft, torch.tensor([True, False]), cache)
