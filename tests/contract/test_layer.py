"""``GatedKalmaNet`` against a token-by-token fp64 transcription, packed, compiled, saved and misused."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

import gka_ops
from gka_ops.nn import GatedKalmaNet
from gka_ops.numerics import BETA_EPS, DEFAULT_TOL, iterations_for
from tests.helpers.layers import (
    HEAD_DIM,
    HIDDEN,
    KINDS,
    TIGHT,
    definition,
    gradients,
    make_input,
    make_layer,
    published_norm,
)
from tests.helpers.problems import max_error, norm_error, unit_roundoff


# ------------------------------------------------------------------------------------------------------- definition
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_definition(kind: str) -> None:
    layer, x = make_layer(**KINDS[kind]), make_input(2, 70)
    with torch.no_grad():
        assert max_error(layer(x), definition(layer, x)) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_those_of_the_definition(kind: str) -> None:
    layer, x = make_layer(**KINDS[kind]), make_input(2, 20)
    expected = gradients(layer, x, lambda x: definition(layer, x))
    for name, gradient in gradients(layer, x, layer).items():
        assert norm_error(gradient, expected[name]) < 1e-8, name


def test_published_division_by_the_norm_differs_by_less_than_16_bits_resolve() -> None:
    """q/(‖q‖ + ε) there, q/max(‖q‖, ε) in the operator; the same layer otherwise."""
    layer, x = make_layer(), make_input(2, 40)
    bound = unit_roundoff(torch.bfloat16)
    published = lambda x: definition(layer, x, published_norm)  # noqa: E731
    with torch.no_grad():
        assert 0 < max_error(layer(x), published(x)) < bound
    expected = gradients(layer, x, published)
    for name, gradient in gradients(layer, x, layer).items():
        assert norm_error(gradient, expected[name]) < bound, name


def test_published_iterations() -> None:
    """The checkpoints' ``num_iter=30``: closer to the exact solve than the default tolerance asks for."""
    layer, x = make_layer(num_iter=30), make_input(2, 70)
    assert iterations_for(layer.ridge) < 30
    bound = 1 / math.cosh(31 * math.acosh(1 + 2 * layer.ridge))  # MATH.md §3.1, §4.6
    with torch.no_grad():
        assert 0 < norm_error(layer(x), definition(layer, x)) < bound


def test_training_and_evaluation_are_the_same() -> None:
    layer, x = make_layer(), make_input(1, 20)
    assert torch.equal(layer.train()(x), layer.eval()(x))


def test_default_tolerance_bounds_the_error() -> None:
    layer, x = make_layer(torch.float32, tol=DEFAULT_TOL), make_input(2, 70, torch.float32)
    with torch.no_grad():
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


def test_learned_ridge_starts_constant_and_stays_in_its_range() -> None:
    x = make_input(2, 30)
    options = {"num_heads": 3, "tol": TIGHT, "dtype": torch.float64}
    torch.manual_seed(0)
    constant = GatedKalmaNet(HIDDEN, HEAD_DIM, **options, ridge=0.05)
    learned = GatedKalmaNet(HIDDEN, HEAD_DIM, **options, ridge=0.05, ridge_range=(0.01, 0.4))
    learned.load_state_dict(constant.state_dict(), strict=False)
    assert max_error(learned(x), constant(x)) < 1e-10
    assert gradients(learned, x, learned)["ridge_proj.weight"].any()

    for bias, bound in ((-100.0, 0.01), (100.0, 0.4)):
        with torch.no_grad():
            learned.ridge_proj.bias.fill_(bias)
        ridge = learned.operands(x).ridge
        assert ridge.min_scale == 0.01  # from which the number of iterations follows
        assert ridge.scale.shape == (2, 30, 3)
        assert torch.allclose(ridge.scale, torch.full_like(ridge.scale, bound), rtol=1e-12)
    expected = GatedKalmaNet(HIDDEN, HEAD_DIM, **options, ridge=0.4)
    expected.load_state_dict(constant.state_dict())
    assert max_error(learned(x), expected(x)) < 1e-10


def test_saturated_beta_passes_the_checks_of_values() -> None:
    layer, x = make_layer(torch.float32, tol=DEFAULT_TOL), make_input(1, 5, torch.float32)
    with torch.no_grad():
        layer.b_proj.bias.fill_(100.0)
    assert layer.operands(x).beta.max() == torch.tensor(1 + BETA_EPS)
    with gka_ops.debug_mode():
        layer(x)


# ----------------------------------------------------------------------------------------------------------- packed
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_packed_sequences_equal_separate_ones(index_dtype: torch.dtype) -> None:
    layer, lengths = make_layer(**KINDS["grouped"]), [1, 30, 0, 2, 37]
    x = make_input(1, sum(lengths))
    cu_seqlens = torch.tensor([0, 1, 31, 31, 33, 70], dtype=index_dtype)
    expected = [layer(piece) for piece in x.split(lengths, dim=1) if piece.shape[1]]
    assert max_error(layer(x, cu_seqlens=cu_seqlens), torch.cat(expected, dim=1)) < 1e-12


# --------------------------------------------------------------------------------------------------------- compiled
class Model(nn.Module):
    """A language model of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, HIDDEN)
        options: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2}
        self.norms = nn.ModuleList(nn.RMSNorm(HIDDEN) for _ in range(2))
        self.layers = nn.ModuleList(
            GatedKalmaNet(HIDDEN, HEAD_DIM, **options, **kind) for kind in ({}, {"ridge_range": (0.01, 0.1)})
        )
        self.head = nn.Linear(HIDDEN, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        logits: Tensor = self.head(x)
        return logits


@pytest.mark.slow
def test_whole_model_trains_compiled() -> None:
    """Five steps in one graph, with the eager losses and parameters."""
    torch.manual_seed(0)
    eager = Model()
    compiled = copy.deepcopy(eager)
    torch._dynamo.reset()
    counters.clear()
    losses: dict[str, list[float]] = {"eager": [], "compiled": []}
    for name, model, run in (
        ("eager", eager, eager),
        ("compiled", compiled, torch.compile(compiled, fullgraph=True)),
    ):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        generator = torch.Generator().manual_seed(1)
        for _ in range(5):
            tokens = torch.randint(50, (2, 41), generator=generator)
            loss = F.cross_entropy(run(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=1e-5)
    for (name, parameter), expected in zip(compiled.named_parameters(), eager.parameters(), strict=True):
        assert norm_error(parameter.detach(), expected.detach()) < 1e-4, name


@pytest.mark.supports("one graph for every T and B")
@pytest.mark.slow
def test_compiles_once_for_all_sequence_lengths() -> None:
    layer = make_layer(torch.float32, **KINDS["grouped"], tol=DEFAULT_TOL)
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


# ------------------------------------------------------------------------------------------------------- parameters
def test_parameters_have_the_published_names_and_shapes() -> None:
    layer = GatedKalmaNet(64, 16, 4, 2, head_v_dim=32)
    assert layer.A_log.dtype == layer.dt_bias.dtype == torch.float32
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


@pytest.mark.parametrize(
    ("options", "absent"),
    [
        ({"use_v_conv": False}, {"v_conv1d.weight"}),
        ({"use_forgetting_gate": False}, {"a_proj.weight", "A_log", "dt_bias"}),
        ({"use_beta_gate": False}, {"b_proj.weight", "b_proj.bias"}),
        ({"use_alpha_connection": False}, {"alpha_proj.weight", "alpha_proj.bias"}),
        ({"use_output_gate": False}, {"g_proj.weight"}),
    ],
)
def test_switches_leave_their_parameters_out(options: dict[str, Any], absent: set[str]) -> None:
    names = set(GatedKalmaNet(HIDDEN, HEAD_DIM, 2).state_dict())
    assert absent <= names
    assert set(GatedKalmaNet(HIDDEN, HEAD_DIM, 2, **options).state_dict()) == names - absent


def test_learned_ridge_adds_its_projection() -> None:
    added = GatedKalmaNet(HIDDEN, HEAD_DIM, 2, ridge_range=(0.01, 0.1)).state_dict().keys() - (
        GatedKalmaNet(HIDDEN, HEAD_DIM, 2).state_dict().keys()
    )
    assert added == {"ridge_proj.weight", "ridge_proj.bias"}


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_round_trip(kind: str) -> None:
    layer, x = make_layer(**KINDS[kind]), make_input(1, 20)
    torch.manual_seed(5)
    options = {"num_heads": 2, "tol": TIGHT} | KINDS[kind]
    other = GatedKalmaNet(HIDDEN, HEAD_DIM, **options, dtype=torch.float64)
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
    layer = GatedKalmaNet(HIDDEN, HEAD_DIM, 2, ridge_range=(0.01, 0.1), device="meta").to_empty(device="cpu")
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
        ({"num_heads": 4, "num_kv_heads": 3}, "expected num_kv_heads to divide the 4 heads of the state, got 3"),
        ({"num_heads": 3, "num_v_heads": 8}, "expected num_heads to divide the 8 heads of the state, got 3"),
        ({"num_v_heads": 0}, "expected num_v_heads >= 1, got 0"),
        ({"ridge": -1.0}, "expected a finite ridge >= 0, got -1.0"),
        ({"ridge_range": (0.03, 0.1)}, r"expected a ridge_range around ridge = 0.02, got \(0.03, 0.1\)"),
        ({"ridge_range": (0.0, 0.1)}, r"expected a ridge_range around ridge = 0.02, got \(0.0, 0.1\)"),
        ({"ridge_range": (0.01, math.inf)}, r"expected a ridge_range around ridge = 0.02, got \(0.01, inf\)"),
        ({"ridge_range": (1e-9, 0.1)}, r"ridge 1e-09 with tol 0.002 needs .* iterations"),
        ({"num_iter": -1}, "expected num_iter >= 0, got -1"),
        ({"tol": 2.0}, "expected 0 < tol < 1, got 2.0"),
        ({"impl": "cuda"}, "expected impl to be one of"),
    ],
)
def test_constructor_says_what_it_expected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GatedKalmaNet(HIDDEN, HEAD_DIM, **({"num_heads": 2} | options))


def test_forward_says_what_it_expected() -> None:
    layer = make_layer()
    with pytest.raises(ValueError, match=r"expected x of shape \[B, T, 24\], got \[1, 5, 3\]"):
        layer(torch.randn(1, 5, 3))
    with pytest.raises(ValueError, match=r"expected a packed batch of size 1 with cu_seqlens, got 2"):
        layer(make_input(2, 4), cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"expected cu_seqlens of shape \[N \+ 1\], got \[1, 2\]"):
        layer(make_input(1, 4), cu_seqlens=torch.tensor([[0, 4]]))


def test_is_public() -> None:
    assert gka_ops.GatedKalmaNet is GatedKalmaNet
