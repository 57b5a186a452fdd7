"""``GatedKalmaNet`` against a token-by-token fp64 transcription, in decoding, packed, compiled, saved and misused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import gka_ops
from gka_ops.nn import GatedKalmaNet, GatedKalmaNetCache
from gka_ops.numerics import DEFAULT_TOL, NORM_EPS
from gka_ops.reference import exact
from tests.helpers.problems import max_error, norm_error

HIDDEN = 24
TIGHT = 1e-12
"""Tolerance of the solve with which an fp64 layer is compared with the exact one."""

SHAPES: dict[str, dict[str, Any]] = {
    "heads": {"num_heads": 3},
    "grouped": {"num_heads": 4, "num_kv_heads": 2},
    "wide values": {"num_heads": 2, "num_kv_heads": 1, "head_v_dim": 24},
    "no convolution": {"num_heads": 2, "conv_size": 1},
    "no solve": {"num_heads": 2, "num_iter": 0},
}


def make_layer(dtype: torch.dtype = torch.float64, **options: Any) -> GatedKalmaNet:
    """A layer whose every parameter is away from its neutral value."""
    torch.manual_seed(0)
    layer = GatedKalmaNet(HIDDEN, 16, **({"num_heads": 2, "tol": TIGHT} | options), dtype=dtype)
    with torch.no_grad():
        layer.A_log.uniform_(-3, 0)  # remembers tens of tokens, unlike the initial values
        layer.o_norm.weight.uniform_(0.5, 1.5)
    return layer


def make_input(B: int, T: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(B, T, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def definition(layer: GatedKalmaNet, x: Tensor) -> Tensor:
    """The layer for x [B, T, hidden], written out in fp64 from the definitions, one token and tap at a time."""
    p = {name: parameter.double() for name, parameter in layer.named_parameters()}
    x = x.double()
    B, T, _ = x.shape
    H, Hkv, D, V = layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.head_v_dim

    def heads(name: str, count: int, size: int) -> Tensor:
        projected = x @ p[f"{name}_proj.weight"].T
        weight = p[f"{name}_conv1d.weight"]
        K = weight.shape[2]
        rows = []
        for t in range(T):
            row = torch.zeros_like(projected[:, 0])
            for i in range(K):
                source = t - (K - 1) + i
                if source >= 0:
                    row = row + weight[:, 0, i] * projected[:, source]
            rows.append(row / (1 + torch.exp(-row)))
        return torch.stack(rows, dim=1).reshape(B, T, count, size)

    q, k, v = heads("q", H, D), heads("k", Hkv, D), heads("v", Hkv, V)
    beta = 1 / (1 + torch.exp(-(x @ p["b_proj.weight"].T + p["b_proj.bias"])))
    alpha = 1 / (1 + torch.exp(-(x @ p["alpha_proj.weight"].T + p["alpha_proj.bias"])))
    log_decay = -p["A_log"].exp() * torch.log1p(torch.exp(x @ p["a_proj.weight"].T + p["dt_bias"]))
    q = q / q.norm(dim=-1, keepdim=True).clamp(min=NORM_EPS)
    k = k / k.norm(dim=-1, keepdim=True).clamp(min=NORM_EPS)
    o, _ = exact.chunk_gka(q, k, v, log_decay, alpha, beta, ridge=(layer.ridge, 0.0), num_iter=layer.num_iter)
    o = o / torch.sqrt((o * o).mean(-1, keepdim=True) + layer.o_norm.eps) * p["o_norm.weight"]
    gate = (x @ p["g_proj.weight"].T).reshape(B, T, H, V)
    return (o * gate / (1 + torch.exp(-gate))).reshape(B, T, H * V) @ p["o_proj.weight"].T


def gradients(layer: GatedKalmaNet, x: Tensor, run: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Gradients of a random projection of ``run(x)`` with respect to x and every parameter."""
    x = x.detach().requires_grad_()
    y = run(x)
    upstream = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    names, parameters = zip(*layer.named_parameters(), strict=True)
    found = torch.autograd.grad((y * upstream).sum(), (x, *parameters), materialize_grads=True)
    return dict(zip(("x", *names), found, strict=True))


# ------------------------------------------------------------------------------------------------------- definition
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition(shape: str) -> None:
    layer, x = make_layer(**SHAPES[shape]), make_input(2, 70)
    with torch.no_grad():
        assert max_error(layer(x), definition(layer, x)) < 1e-10


@pytest.mark.parametrize("shape", ["grouped", "no solve"])
def test_gradients_equal_those_of_the_definition(shape: str) -> None:
    layer, x = make_layer(**SHAPES[shape]), make_input(2, 40)
    expected = gradients(layer, x, lambda x: definition(layer, x))
    for name, gradient in gradients(layer, x, layer).items():
        assert norm_error(gradient, expected[name]) < 1e-8, name


def test_default_tolerance_bounds_the_error() -> None:
    layer, x = make_layer(torch.float32, tol=DEFAULT_TOL), make_input(2, 70, torch.float32)
    assert norm_error(layer(x), definition(layer, x)) < DEFAULT_TOL


def test_bf16_layer() -> None:
    layer, x = make_layer(torch.bfloat16), make_input(2, 70, torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    assert layer.A_log.dtype == layer.dt_bias.dtype == torch.float32
    assert norm_error(y, definition(layer, x)) < 2e-2  # a few roundings of 2⁻⁸ on the way


def test_autocast_runs_the_operator_in_bf16() -> None:
    layer, x = make_layer(torch.float32), make_input(2, 70, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.operands(x).q.dtype == torch.bfloat16
        assert layer.operands(x).beta.dtype == torch.float32
        y = layer(x)
    assert norm_error(y, definition(layer, x)) < 2e-2


def test_without_solve_alpha_has_no_effect() -> None:
    layer, x = make_layer(num_iter=0), make_input(1, 20)
    found = gradients(layer, x, layer)
    assert not found["alpha_proj.weight"].any()
    assert not found["alpha_proj.bias"].any()
    expected = layer(x)
    with torch.no_grad():
        layer.alpha_proj.bias.fill_(3.0)
    assert torch.equal(layer(x), expected)


# --------------------------------------------------------------------------------------------------------- decoding
def run_in_pieces(layer: GatedKalmaNet, x: Tensor, lengths: list[int]) -> tuple[Tensor, GatedKalmaNetCache]:
    assert sum(lengths) == x.shape[1]
    cache = layer.init_cache(x.shape[0])
    with torch.no_grad():
        pieces = [layer(piece, cache) for piece in x.split(lengths, dim=1)]
    return torch.cat(pieces, dim=1), cache


@pytest.mark.parametrize("shape", ["grouped", "wide values", "no convolution", "no solve"])
@pytest.mark.parametrize("lengths", [[66, 1, 1, 1, 1], [1] * 6 + [64], [2, 1, 1, 30, 1, 35], [70]], ids=str)
def test_prefill_and_decoding_equal_the_whole(shape: str, lengths: list[int]) -> None:
    layer, x = make_layer(**SHAPES[shape]), make_input(2, 70)
    y, _ = run_in_pieces(layer, x, lengths)
    assert max_error(y, layer(x)) < 1e-10


def test_cache_is_advanced_in_place_and_is_the_same_by_either_way() -> None:
    layer, x = make_layer(), make_input(2, 12)
    cache = layer.init_cache(2)
    before = [part.data_ptr() for part in (*cache[:3], *cache.state)]
    with torch.no_grad():
        layer(x, cache)
    assert before == [part.data_ptr() for part in (*cache[:3], *cache.state)]
    _, stepped = run_in_pieces(layer, x, [1] * 12)
    for one, other in zip((*cache[:3], *cache.state), (*stepped[:3], *stepped.state), strict=True):
        assert max_error(one, other) < 1e-12


# ----------------------------------------------------------------------------------------------------------- packed
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_packed_sequences_equal_separate_ones(index_dtype: torch.dtype) -> None:
    layer, lengths = make_layer(**SHAPES["grouped"]), [1, 30, 0, 2, 37]
    x = make_input(1, sum(lengths))
    cu_seqlens = torch.tensor([0, 1, 31, 31, 33, 70], dtype=index_dtype)
    expected = [layer(piece) for piece in x.split(lengths, dim=1) if piece.shape[1]]
    assert max_error(layer(x, cu_seqlens=cu_seqlens), torch.cat(expected, dim=1)) < 1e-12


@pytest.mark.parametrize("shape", ["grouped", "no convolution"])
def test_packed_prefill_continues_and_fills_a_cache(shape: str) -> None:
    """Two packed calls and one decoded token, with sequences that are empty or shorter than the convolution."""
    layer, first, second = make_layer(**SHAPES[shape]), [5, 0, 1, 20], [1, 2, 0, 9]
    sequences = [make_input(1, a + b + 1, seed=i) for i, (a, b) in enumerate(zip(first, second, strict=True))]
    cache = layer.init_cache(4)
    with torch.no_grad():
        for begin, lengths in (([0] * 4, first), (first, second)):
            pieces = [s[:, b : b + n] for s, b, n in zip(sequences, begin, lengths, strict=True)]
            cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
            y = layer(torch.cat(pieces, dim=1), cache, cu_seqlens)
            for s, b, n, part in zip(sequences, begin, lengths, y.split(lengths, dim=1), strict=True):
                if n:
                    assert max_error(part, layer(s)[:, b : b + n]) < 1e-10
        decoded = layer(torch.cat([s[:, -1:] for s in sequences]), cache)
        for s, row in zip(sequences, decoded, strict=True):
            assert max_error(row, layer(s)[0, -1:]) < 1e-10


# --------------------------------------------------------------------------------------------------------- compiled
@pytest.mark.slow
def test_compiles_once_for_all_sequence_lengths() -> None:
    layer = make_layer(torch.float32, **SHAPES["grouped"], tol=DEFAULT_TOL)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    run = lambda x: compiled(x).double()  # noqa: E731
    for length in (70, 33, 128, 9):
        with torch._dynamo.config.patch(error_on_recompile=length != 70):
            found = gradients(layer, make_input(2, length, torch.float32), run)
        expected = gradients(layer, make_input(2, length, torch.float32), lambda x: layer(x).double())
        for name, gradient in found.items():
            assert norm_error(gradient, expected[name]) < 1e-4, (length, name)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_traces_without_a_graph_break_and_becomes_dynamic_by_itself() -> None:
    """The default ``dynamic=None``: static first, dynamic from the second length on, then compiled no more."""
    layer = make_layer(torch.float32)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for step, length in enumerate((32, 70, 33, 128)):
        with torch._dynamo.config.patch(error_on_recompile=step >= 2):
            compiled(make_input(2, length, torch.float32)).sum().backward()
    assert counters["stats"]["unique_graphs"] == 2


def test_compiled_decoding_advances_the_cache() -> None:
    layer, x = make_layer(**SHAPES["grouped"]), make_input(2, 40)
    expected, expected_cache = run_in_pieces(layer, x, [36, 1, 1, 1, 1])
    torch._dynamo.reset()
    cache = layer.init_cache(2)
    step = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        layer(x[:, :36], cache)
        rows = []
        for t in range(36, 40):
            with torch._dynamo.config.patch(error_on_recompile=t > 36):
                rows.append(step(x[:, t : t + 1], cache))
    assert max_error(torch.cat(rows, dim=1), expected[:, 36:]) < 1e-12
    assert max_error(cache.state.kv, expected_cache.state.kv) < 1e-12


# ------------------------------------------------------------------------------------------------------- parameters
def test_parameters_have_the_published_names_and_shapes() -> None:
    layer = GatedKalmaNet(64, 16, 4, 2, head_v_dim=32)
    assert {name: tuple(p.shape) for name, p in layer.state_dict().items()} == {
        "A_log": (4,),
        "dt_bias": (4,),
        "q_proj.weight": (64, 64),
        "k_proj.weight": (32, 64),
        "v_proj.weight": (64, 64),
        "a_proj.weight": (4, 64),
        "b_proj.weight": (4, 64),
        "b_proj.bias": (4,),
        "alpha_proj.weight": (4, 64),
        "alpha_proj.bias": (4,),
        "q_conv1d.weight": (64, 1, 4),
        "k_conv1d.weight": (32, 1, 4),
        "v_conv1d.weight": (64, 1, 4),
        "g_proj.weight": (128, 64),
        "o_norm.weight": (32,),
        "o_proj.weight": (64, 128),
    }


def test_state_dict_round_trip() -> None:
    layer, x = make_layer(**SHAPES["grouped"]), make_input(1, 20)
    torch.manual_seed(5)
    other = GatedKalmaNet(HIDDEN, 16, 4, 2, tol=TIGHT, dtype=torch.float64)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_initial_decay() -> None:
    torch.manual_seed(0)
    layer = GatedKalmaNet(16, 16, 4096, 1)
    A = layer.A_log.exp()
    assert 0 < A.min() < 0.1
    assert 15.9 < A.max() <= 16
    assert abs(A.mean() - 8) < 0.3
    log_dt = torch.nn.functional.softplus(layer.dt_bias).log()
    assert math.log(1e-3) - 1e-3 < log_dt.min()
    assert log_dt.max() < math.log(0.1) + 1e-3
    assert abs(log_dt.mean() - math.log(1e-2)) < 0.1


def test_reset_parameters_after_the_meta_device() -> None:
    layer = GatedKalmaNet(HIDDEN, 16, 2, device="meta").to_empty(device="cpu")
    for parameter in layer.parameters():
        torch.nn.init.constant_(parameter, math.nan)
    layer.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in layer.parameters())
    assert layer(make_input(1, 10, torch.float32)).isfinite().all()


# ----------------------------------------------------------------------------------------------------------- misuse
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 0}, "expected num_heads >= 1, got 0"),
        ({"conv_size": 0}, "expected conv_size >= 1, got 0"),
        ({"num_heads": 4, "num_kv_heads": 3}, "expected num_kv_heads to divide num_heads = 4, got 3"),
        ({"ridge": -1.0}, "expected a finite ridge >= 0, got -1.0"),
        ({"num_iter": -1}, "expected num_iter >= 0, got -1"),
        ({"tol": 2.0}, "expected 0 < tol < 1, got 2.0"),
        ({"impl": "cuda"}, "expected impl to be one of"),
    ],
)
def test_constructor_says_what_it_expected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GatedKalmaNet(HIDDEN, 16, **({"num_heads": 2} | options))


def test_forward_says_what_it_expected() -> None:
    layer = make_layer()
    with pytest.raises(ValueError, match=r"expected x of shape \[B, T, 24\], got \[1, 5, 3\]"):
        layer(torch.randn(1, 5, 3))
    with pytest.raises(ValueError, match=r"expected a packed batch of size 1 with cu_seqlens, got 2"):
        layer(make_input(2, 4), cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"expected cu_seqlens of shape \[N \+ 1\], got \[1, 2\]"):
        layer(make_input(1, 4), cu_seqlens=torch.tensor([[0, 4]]))
    with pytest.raises(RuntimeError, match=r"expected torch\.no_grad"):
        layer(make_input(2, 4), layer.init_cache(2))
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"expected cache.q_tail of shape \[2, 32, 3\], got \[3, 32, 3\]"):
            layer(make_input(2, 4), layer.init_cache(3))
        with pytest.raises(ValueError, match=r"expected initial_state.kk of shape .* = \[2, 2, 16, 16\]"):
            layer(make_input(2, 4), layer.init_cache(2)._replace(state=layer.init_cache(3).state))


def test_is_public() -> None:
    assert gka_ops.GatedKalmaNet is GatedKalmaNet
