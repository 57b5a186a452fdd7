"""The Triton kernels on the card against the fp64 reference: shapes, head groups and every option."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import gka_ops
from tests.helpers import contract
from tests.helpers.problems import (
    Evaluation,
    Outputs,
    Problem,
    cotangents,
    evaluate,
    make_problem,
    norm_error,
    run_gka,
    run_solve,
    summarise,
    token_errors,
)

pytestmark = pytest.mark.gpu


def problem_on_card(**options: Any) -> Problem:
    options = {"dtype": torch.bfloat16, "qk_l2norm": True, **options}
    return make_problem(device="cuda", **options)


def check(problem: Problem, num_iter: int = 30, bars: contract.Bars | None = None) -> None:
    """Forward, final states and every gradient, also through the final states, within the contract's bars."""
    dtype = problem.q.dtype
    contract.check(contract.measure(run_gka, problem, num_iter, "triton"), bars or contract.bars_for(dtype), dtype)


def run(problem: Problem) -> Outputs:
    return run_gka(problem, num_iter=30, impl="triton")


def check_near(actual: Evaluation, expected: Evaluation) -> None:
    """Results of different kernels for the same 16-bit inputs: nearer each other than either need be to exact."""
    for some, others in ((actual.outputs, expected.outputs), (actual.gradients, expected.gradients)):
        for name, value in others.items():
            assert norm_error(some[name], value) <= contract.SIXTEEN_BIT.gradient / 2, name


def is_hopper() -> bool:
    return torch.cuda.get_device_capability() == (9, 0)


# Of square problems with 16 bits, a Hopper card forms the token gradients of the second in Gluon.
plain_and_gluon = pytest.mark.parametrize("D", [64, 128])


@pytest.mark.parametrize("T", [1, 63, 64, 65, 1000, 8192])
@pytest.mark.parametrize("V", [64, 128, 256])
@pytest.mark.parametrize("D", [64, 128])
def test_shapes(D: int, V: int, T: int) -> None:
    check(problem_on_card(T=T, H=4, Hkv=2, D=D, V=V, state=True))


@pytest.mark.parametrize("T", [65, 1000])
@pytest.mark.parametrize("group", [1, 4, 8])
def test_head_groups(group: int, T: int) -> None:
    check(problem_on_card(T=T, H=8, Hkv=8 // group, D=128, V=128))


OPTIONS: dict[str, dict[str, Any]] = {
    "batch": {"B": 3},
    "no_l2norm": {"qk_l2norm": False},
    "no_gates": {"mean_decay": None, "alpha": False, "beta": False},
    "no_beta": {"beta": False},
    "no_alpha": {"alpha": False},
    "small_beta": {"min_beta": 1e-3},
    "decay_gate": {"gate": True},
    "decay_gate_no_bias": {"gate": True, "dt_bias": False},
    "float_offset": {"ridge_offset": 0.05},
    "head_ridge": {"ridge": "head", "ridge_offset": 0.01},
    "token_ridge": {"ridge": "token", "ridge_offset": 0.01},
    "packed": {"seq_lengths": (5, 0, 64, 1, 200, 63), "state": True},
    "packed_no_state": {"seq_lengths": (130, 70)},
    "clustered": {"keys": "clustered"},
    "low_rank": {"keys": "low_rank"},
    "repeated": {"keys": "repeated"},
    "silu": {"keys": "silu", "mean_decay": 0.0005},
    "no_decay": {"mean_decay": None},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, dtype: torch.dtype) -> None:
    options = {"T": 200, "H": 4, "Hkv": 2, "D": 64, "V": 64, "dtype": dtype, **OPTIONS[name]}
    check(problem_on_card(**options), bars=contract.bars_for(dtype, options.get("keys", "random")))


@pytest.mark.parametrize("D", [80, 128])
@pytest.mark.parametrize("name", ["no_gates", "no_l2norm", "decay_gate", "token_ridge", "packed"])
def test_asynchronous_solves_are_the_plain_ones(name: str, D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Gluon says on Hopper (docs/adr/0009) is what Triton says."""
    from gka_ops.triton import launch

    if not is_hopper():
        pytest.skip("there is no other solve on this card")
    problem = problem_on_card(**{"T": 200, "H": 4, "Hkv": 2, "D": D, "V": 128, **OPTIONS[name]})
    upstream = cotangents(run(problem))
    result = evaluate(run, problem, upstream)
    chosen = launch.chunk_config
    monkeypatch.setattr(launch, "chunk_config", lambda *key: dataclasses.replace(chosen(*key), solve_async=False))
    check_near(result, evaluate(run, problem, upstream))


@pytest.mark.parametrize("options", [{}, {"seq_lengths": (130, 70)}], ids=["dense", "packed"])
def test_an_unaligned_gradient_of_the_output(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not begin at a multiple of 16 bytes cannot be copied asynchronously: the plain kernel loads it."""
    from gka_ops.triton import launch, launcher

    launched: list[Any] = []
    ordinary = launch.launch

    def noted(kernel: Any, grid: launcher.Grid, /, **arguments: Any) -> None:
        launched.append(kernel)
        ordinary(kernel, grid, **arguments)

    launcher.forget()  # a replayed call launches by itself
    monkeypatch.setattr(launch, "launch", noted)
    problem = problem_on_card(**{"T": 200, "H": 4, "Hkv": 2, "D": 128, "V": 128, **options})
    upstream = cotangents(run(problem))
    aligned = evaluate(run, problem, upstream)
    assert (launch.chunk_backward_value_hopper_kernel in launched) == is_hopper()

    buffer = upstream["output"].new_empty(upstream["output"].numel() + 1)
    d_output = buffer[1:].view_as(upstream["output"]).copy_(upstream["output"])
    assert d_output.data_ptr() % launcher.POINTER_ALIGNMENT == d_output.element_size()
    launched.clear()
    unaligned = evaluate(run, problem, {**upstream, "output": d_output})
    assert launch.chunk_backward_value_kernel in launched
    assert launch.chunk_backward_value_hopper_kernel not in launched
    check_near(unaligned, aligned)


@pytest.mark.parametrize("name", OPTIONS)
def test_options_at_head_dimension_128(name: str) -> None:
    """Where a Hopper card runs the Gluon kernels."""
    options = {"T": 200, "H": 4, "Hkv": 2, "D": 128, "V": 128, **OPTIONS[name]}
    check(problem_on_card(**options), bars=contract.bars_for(torch.bfloat16, options.get("keys", "random")))


@pytest.mark.parametrize("mean_decay", [0.5, 1.0])
def test_short_memory(mean_decay: float) -> None:
    check(problem_on_card(T=1000, H=4, D=128, V=128, mean_decay=mean_decay), bars=contract.SHORT_MEMORY)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("state", [False, True])
def test_without_solve(state: bool, dtype: torch.dtype) -> None:
    check(problem_on_card(T=200, H=4, Hkv=2, D=128, V=64, state=state, dtype=dtype), num_iter=0)


@pytest.mark.parametrize(
    ("D", "V"), [(16, 48), (16, 128), (32, 32), (32, 48), (32, 128), (80, 48), (192, 48), (256, 48)]
)
def test_other_head_dimensions(D: int, V: int) -> None:
    check(problem_on_card(T=100, H=2, D=D, V=V))


@pytest.mark.parametrize("num_iter", [0, 30])
@pytest.mark.parametrize("V", [16, 32])
@pytest.mark.parametrize("D", [32, 64, 128, 256])
def test_narrow_values(D: int, V: int, num_iter: int) -> None:
    """Blocks of so few columns came out as garbage: NOTE [Hopper miscompile] in autotune/config.py."""
    check(problem_on_card(T=100, H=2, D=D, V=V, state=True), num_iter=num_iter)


@pytest.mark.parametrize(("D", "V"), [(16, 48), (128, 128), (160, 48), (256, 256)])
@pytest.mark.parametrize("num_iter", [0, 30])
def test_fp32_at_other_head_dimensions(D: int, V: int, num_iter: int) -> None:
    check(problem_on_card(T=100, H=4, Hkv=2, D=D, V=V, state=True, dtype=torch.float32), num_iter=num_iter)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"seq_lengths": (5, 0, 64, 131)}, {"ridge": "token", "ridge_offset": 0.01}], ids=str
)
def test_chunk_solve(options: dict[str, Any], dtype: torch.dtype) -> None:
    problem = problem_on_card(**{"T": 200, "H": 4, "Hkv": 2, "D": 128, "state": True, "dtype": dtype, **options})
    contract.check(contract.measure(run_solve, problem, 30, "triton"), contract.bars_for(dtype), dtype)


@pytest.mark.parametrize("num_iter", [0, 30])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(("D", "V"), [(64, 64), (128, 64), (128, 128), (256, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_decode_under_load(dtype: torch.dtype, D: int, V: int, tokens: int, num_iter: int) -> None:
    """128 sequences of 8 heads fill the card; slots are permuted and some rows are padding."""
    B, H = 128, 8
    p = problem_on_card(B=B, T=tokens, H=H, Hkv=2, D=D, V=V, gate=True, state=True, dtype=dtype)
    assert p.initial_kk is not None and p.initial_kv is not None
    slots = torch.randperm(B, generator=torch.Generator().manual_seed(3)).to("cuda")
    slots[::16] = -1
    kept = slots >= 0
    kk, kv = torch.empty_like(p.initial_kk), torch.empty_like(p.initial_kv)
    free = torch.tensor(sorted(set(range(B)) - set(slots[kept].tolist())), device="cuda")
    for pool, initial in ((kk, p.initial_kk), (kv, p.initial_kv)):
        pool[slots[kept]] = initial[kept]
        pool[free] = float("nan")  # untouched slots
    output = gka_ops.recurrent_gka(
        p.q, p.k, p.v, p.log_decay, p.alpha, p.beta, state=gka_ops.GKAState(kk, kv), state_indices=slots,
        num_iter=num_iter, qk_l2norm=True, gate=gka_ops.DecayGate(p.A_log, p.dt_bias), impl="triton",
    )  # fmt: skip
    expected = run_gka(p.double(), num_iter=contract.oracle_iterations(num_iter), impl="reference")
    assert output[~kept].eq(0).all()
    assert kk[free].isnan().all() and kv[free].isnan().all()
    assert summarise(token_errors(output[kept], expected["output"][kept])).p99 <= contract.SIXTEEN_BIT.o
    # The states advance in fp32 from operands that are exact but for the normalisation: a few roundings each.
    assert norm_error(kk[slots[kept]], expected["final_kk"][kept]) <= 1e-6
    assert norm_error(kv[slots[kept]], expected["final_kv"][kept]) <= 1e-6


def test_decode_continues_a_prefill() -> None:
    p = problem_on_card(B=4, T=70, H=4, Hkv=2, D=128, V=128)
    whole = run_gka(p, num_iter=30)
    first = p.tokens(0, 65)
    prefill = gka_ops.chunk_gka(
        first.q, first.k, first.v, first.log_decay, first.alpha, first.beta, num_iter=30, qk_l2norm=True,
        output_final_state=True,
    )  # fmt: skip
    assert prefill.final_state is not None
    for t in range(65, 70):
        now = p.tokens(t, t + 1)
        output = gka_ops.recurrent_gka(
            now.q, now.k, now.v, now.log_decay, now.alpha, now.beta, state=prefill.final_state, num_iter=30,
            qk_l2norm=True,
        )  # fmt: skip
        assert summarise(token_errors(output, whole["output"][:, t : t + 1])).p99 <= contract.SIXTEEN_BIT.o


@plain_and_gluon
def test_nothing_is_left_unwritten(D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer starts as NaN; no NaN may reach an output or a gradient."""
    from gka_ops.triton import launch, launcher

    launcher.forget()  # a replayed call allocates by itself
    empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(
        launch._Problem, "new",
        lambda self, *shape, dtype=torch.float32: empty(self.q, shape, dtype=dtype).fill_(float("nan")),
    )  # fmt: skip
    monkeypatch.setattr(launch.torch, "empty_like", lambda t, **k: empty_like(t, **k).fill_(float("nan")))
    for options in ({"T": 100}, {"seq_lengths": (70, 0, 30)}):
        check(problem_on_card(**{"H": 4, "Hkv": 2, "D": D, "V": D, "gate": True, "state": True, **options}))
    launcher.forget()


def test_results_repeat_bit_for_bit_and_ignore_the_rest_of_the_batch() -> None:
    p = problem_on_card(B=4, T=300, H=4, Hkv=2, D=128, V=128, state=True)
    upstream = cotangents(run_gka(p, num_iter=30))
    first, second = evaluate(run, p, upstream), evaluate(run, p, upstream)
    alone = evaluate(run, p.map(lambda _, t: t[2:3]), {n: t[2:3] for n, t in upstream.items()})
    for kind in ("outputs", "gradients"):
        for name, value in getattr(first, kind).items():
            assert torch.equal(value, getattr(second, kind)[name]), name
            assert torch.equal(value[2:3], getattr(alone, kind)[name]), name


def test_nan_stays_in_its_sequence_and_head() -> None:
    p = problem_on_card(B=2, T=200, H=4, D=64, V=64)
    clean = run_gka(p, num_iter=30)["output"]
    p.k[0, 100, 1] = float("nan")
    dirty = run_gka(p, num_iter=30)["output"]
    assert dirty[0, 100:, 1].isnan().all()
    dirty[0, 64:, 1] = clean[0, 64:, 1]
    assert torch.equal(dirty, clean)


@plain_and_gluon
def test_extreme_inputs(D: int) -> None:
    """Zero keys, zero β, zero queries and a total decay give finite, right results."""
    p = problem_on_card(T=200, H=2, D=D, V=D, state=False)
    assert p.beta is not None and p.log_decay is not None
    p.k[:, :10] = 0
    p.beta[:, 20:30] = 0
    p.q[:, 40:50] = 0
    p.log_decay[:, 70] = -1e4
    p.log_decay[:, 130] = float("-inf")
    out = run(p)
    expected = run_gka(p.double(), num_iter=contract.ORACLE_ITERATIONS, impl="reference")
    assert out["output"].isfinite().all()
    assert norm_error(out["output"], expected["output"]) <= contract.SIXTEEN_BIT.o
    assert out["output"][:, :10].eq(0).all() and out["output"][:, 40:50].eq(0).all()


@pytest.mark.parametrize("magnitude", [2.0**-14, 2.0**14])
@plain_and_gluon
def test_magnitudes_of_inputs(D: int, magnitude: float) -> None:
    problem = problem_on_card(T=100, H=2, D=D, V=D, alpha=False, qk_l2norm=False)
    contract.check_scaling(problem, magnitude, "triton")
