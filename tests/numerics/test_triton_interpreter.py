"""The Triton kernels under Triton's interpreter: small shapes, fp16 and fp32; bf16 once (its rounding is not exact)."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import gka_ops
from tests.conftest import HAS_CUDA
from tests.helpers import contract
from tests.helpers.problems import make_problem, norm_error, run_gka, run_solve, summarise, token_errors

pytestmark = pytest.mark.skipif(HAS_CUDA, reason="on a machine with a card the kernels run on it: tests/gpu")

SMALL: dict[str, Any] = {"T": 70, "H": 2, "Hkv": 1, "D": 16, "V": 24, "qk_l2norm": True}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one_token": {"T": 1, "state": True},
    "batch_and_states": {"B": 2, "state": True},
    "no_gates": {"mean_decay": None, "alpha": False, "beta": False, "qk_l2norm": False},
    "small_beta": {"min_beta": 1e-3},
    "decay_gate": {"gate": True},
    "float_offset": {"ridge_offset": 0.05},
    "head_ridge": {"ridge": "head", "ridge_offset": 0.01},
    "token_ridge": {"ridge": "token", "ridge_offset": 0.01},
    "packed": {"seq_lengths": (5, 0, 64, 1, 20), "state": True},
    "short_memory": {"mean_decay": 0.5},
    "repeated": {"keys": "repeated"},
    "padded_head_dimensions": {"D": 20, "V": 7},
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_chunk_gka(name: str, dtype: torch.dtype) -> None:
    options = {**SMALL, "dtype": dtype, **OPTIONS[name]}
    bars = contract.bars_for(dtype, options.get("keys", "random"), options.get("mean_decay", 0.01))
    contract.check(contract.measure(run_gka, make_problem(**options), 30, "triton"), bars, dtype)


@pytest.mark.parametrize("num_iter", [0, 30])
@pytest.mark.parametrize("qk_l2norm", [True, False])
def test_bf16_operands(qk_l2norm: bool, num_iter: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 rows enter the read-out's gradient as they are. The interpreter would multiply their bit patterns."""
    from triton.runtime import interpreter

    exact_dot = interpreter.InterpreterBuilder.create_dot

    def as_fp32(handle: Any) -> Any:
        if handle.dtype.scalar != interpreter.tl.bfloat16:
            return handle
        bits = handle.data.astype("uint32") << 16
        return interpreter.TensorHandle(bits.view("float32"), interpreter.tl.float32)

    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: exact_dot(self, as_fp32(a), as_fp32(b), *rest),
    )
    problem = make_problem(**{**SMALL, "dtype": torch.bfloat16, "qk_l2norm": qk_l2norm})
    errors = contract.measure(run_gka, problem, num_iter, "triton")
    contract.check(errors, contract.SIXTEEN_BIT, torch.bfloat16)


@pytest.mark.parametrize("state", [False, True])
def test_chunk_gka_without_solve(state: bool) -> None:
    problem = make_problem(**SMALL, dtype=torch.float16, state=state)
    contract.check(contract.measure(run_gka, problem, 0, "triton"), contract.SIXTEEN_BIT, torch.float16)


def test_values_alone() -> None:
    """Neither a solve nor a final state: no key-key state is formed at all, forward or backward."""
    problem = make_problem(**SMALL, dtype=torch.float16).requiring_grad()
    arguments = (problem.q, problem.k, problem.v, problem.log_decay, problem.alpha, problem.beta)
    output = gka_ops.chunk_gka(*arguments, num_iter=0, qk_l2norm=True, impl="triton").output
    exact = problem.double().requiring_grad()
    expected = run_gka(exact, num_iter=0, impl="reference")["output"]
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    actual = torch.autograd.grad(output, [problem.q, problem.k, problem.v], upstream.to(output.dtype))
    wanted = torch.autograd.grad(expected, [exact.q, exact.k, exact.v], upstream.to(output.dtype).double())
    assert norm_error(output.detach(), expected.detach()) <= contract.SIXTEEN_BIT.gradient
    for gradient, reference in zip(actual, wanted, strict=True):
        assert norm_error(gradient, reference) <= contract.SIXTEEN_BIT.gradient


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("options", [{"state": True}, {"seq_lengths": (5, 0, 65)}, {"ridge": "token"}], ids=str)
def test_chunk_solve(options: dict[str, Any], dtype: torch.dtype) -> None:
    problem = make_problem(**SMALL, dtype=dtype, **options)
    contract.check(contract.measure(run_solve, problem, 30, "triton"), contract.bars_for(dtype), dtype)


@pytest.mark.parametrize("row", [row for row in contract.ROWS if row.keys in ("random", "silu")], ids=lambda r: r.name)
def test_contract_at_head_dimension_128(row: contract.Row) -> None:
    problem = row.problem(torch.float16, "cpu", T=128, H=1)
    bars = contract.bars_for(torch.float16, row.keys, row.mean_decay)
    contract.check(contract.measure(run_gka, problem, 30, "triton"), bars, torch.float16)


@pytest.mark.parametrize("cut", [1, 40, 64])
def test_a_cut_sequence_continues_from_its_state(cut: int) -> None:
    whole = make_problem(**SMALL, dtype=torch.float32, state=True)
    expected = run_gka(whole, num_iter=30, impl="triton")
    first = run_gka(whole.tokens(0, cut), num_iter=30, impl="triton")
    rest = dataclasses.replace(whole.tokens(cut, 70), initial_kk=first["final_kk"], initial_kv=first["final_kv"])
    second = run_gka(rest, num_iter=30, impl="triton")
    outputs = torch.cat([first["output"], second["output"]], dim=1)
    bar = 70 * torch.finfo(torch.float32).eps  # sums of at most 70 products in another order
    assert norm_error(outputs, expected["output"]) <= bar / 0.02  # the solve may magnify a difference by 1/ridge
    for name in ("final_kk", "final_kv"):
        assert norm_error(second[name], expected[name]) <= bar, name


@pytest.mark.parametrize("chunk", [16, 32])
def test_results_do_not_depend_on_the_chunk(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from gka_ops.triton import launch

    problem = make_problem(**SMALL, dtype=torch.float32, state=True)
    whole = run_gka(problem, num_iter=30, impl="triton")
    chosen = launch.chunk_config
    monkeypatch.setattr(launch, "chunk_config", lambda *key: dataclasses.replace(chosen(*key), chunk=chunk))
    other = run_gka(problem, num_iter=30, impl="triton")
    for name, value in whole.items():  # sums of at most 70 products in another order
        assert norm_error(other[name], value) <= 70 * torch.finfo(torch.float32).eps, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("qk_l2norm", [True, False])
def test_results_do_not_depend_on_the_width_of_the_state_pass(
    dtype: torch.dtype, qk_l2norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Column blocks of H must agree on its unit, and wide blocks of U serve several of the read-out's."""
    from gka_ops.triton import launch

    problem = make_problem(**{**SMALL, "D": 40, "V": 70, "qk_l2norm": qk_l2norm, "dtype": dtype, "state": True})
    chosen, results = launch.chunk_config, []
    for width in (16, 32, 64):
        monkeypatch.setattr(
            launch, "chunk_config", lambda *key, w=width: dataclasses.replace(chosen(*key), block_v=16, block_state=w)
        )
        results.append(run_gka(problem, num_iter=30, impl="triton"))
    # The same sums; in fp16 the units of U's rows, and so their rounding below 2^-14, differ.
    bar = 70 * torch.finfo(torch.float32).eps if dtype == torch.float32 else torch.finfo(torch.float16).eps
    for other in results[1:]:
        for name, value in results[0].items():
            assert norm_error(other[name], value) <= bar, name


@pytest.mark.parametrize("magnitude", [2.0**-14, 2.0**14])
def test_magnitudes_of_inputs(magnitude: float) -> None:
    problem = make_problem(**{**SMALL, "dtype": torch.float32, "alpha": False, "qk_l2norm": False})
    contract.check_scaling(problem, magnitude, "triton")


@pytest.mark.parametrize("rows", [16, 32])
@pytest.mark.parametrize("solve", [True, False], ids=["gka", "no_solve"])
def test_states_in_blocks_of_rows(solve: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a whole key-key state does not fit on the chip, the solves and the token gradients read blocks of it."""
    from gka_ops.triton import launch

    problem = make_problem(**{**SMALL, "D": 64, "dtype": torch.float32, "state": True})
    chosen = launch.chunk_config
    monkeypatch.setattr(
        launch,
        "chunk_config",
        lambda *key: dataclasses.replace(chosen(*key), solve_block_s=rows, block_s=rows),
    )
    contract.check(contract.measure(run_gka, problem, 30 if solve else 0, "triton"), contract.FP32, torch.float32)


def test_fp32_at_head_dimension_256() -> None:
    problem = make_problem(**{**SMALL, "T": 40, "H": 1, "D": 256, "dtype": torch.float32, "state": True})
    contract.check(contract.measure(run_gka, problem, 30, "triton"), contract.FP32, torch.float32)


@pytest.mark.parametrize("magnitude", [1e-4, 1e-2, 1e2])
def test_a_state_far_larger_or_smaller_than_the_updates(magnitude: float) -> None:
    problem = make_problem(**{**SMALL, "T": 130, "dtype": torch.float16, "state": True, "mean_decay": 0.001})
    problem = problem.map(lambda name, t: t * magnitude if name.startswith("initial") else t)
    contract.check(contract.measure(run_gka, problem, 30, "triton"), contract.SIXTEEN_BIT, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_gradients_of_states_in_pieces(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage B by column blocks of Ω and Ξ and by small pieces, as for large heads."""
    from gka_ops.triton import launch

    chosen = launch.chunk_config
    pieces = {"increment_columns": 16, "block_v": 16, "scan_entries": 64}
    monkeypatch.setattr(launch, "chunk_config", lambda *key: dataclasses.replace(chosen(*key), **pieces))
    problem = make_problem(**{**SMALL, "D": 32, "V": 40, "T": 130, "state": True, "dtype": dtype})
    contract.check(contract.measure(run_gka, problem, 30, "triton"), contract.bars_for(dtype), dtype)


def test_small_gradients_of_a_few_tokens() -> None:
    """A loss masked for most tokens and averaged over many: rows without a gradient must not set anyone's unit."""
    problem = make_problem(**{**SMALL, "T": 140, "dtype": torch.float16}).requiring_grad()
    exact = problem.double().requiring_grad()
    output = run_gka(problem, num_iter=30, impl="triton")["output"]
    expected = run_gka(exact, num_iter=contract.oracle_iterations(30), impl="reference")["output"]
    upstream = 1e-6 * torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output.dtype)
    upstream[:, :100] = 0
    names = ("log_decay", "alpha", "beta")  # in fp32: their gradients do not underflow
    actual = torch.autograd.grad(output, [getattr(problem, name) for name in names], upstream)
    wanted = torch.autograd.grad(expected, [getattr(exact, name) for name in names], upstream.double())
    for name, gradient, reference in zip(names, actual, wanted, strict=True):
        assert norm_error(gradient, reference) <= contract.SIXTEEN_BIT.gradient, name


def test_gradients_of_states_fade_into_zero() -> None:
    """A final state's gradient near the least normal fp32 number, and less in every chunk before."""
    problem = make_problem(**{**SMALL, "T": 200, "dtype": torch.float16, "state": True}).requiring_grad()
    outputs = run_gka(problem, num_iter=30, impl="triton")
    inputs = (problem.q, problem.k, problem.v, problem.log_decay, problem.beta, problem.initial_kk, problem.initial_kv)
    finals = [outputs["final_kk"], outputs["final_kv"]]
    for gradient in torch.autograd.grad(finals, inputs, [torch.full_like(final, 2.0**-125.5) for final in finals]):
        assert gradient.abs().max() <= 1e-30


@pytest.mark.parametrize(
    "options", [{"state": True, "gate": True}, {"seq_lengths": (5, 0, 65), "ridge": "token"}], ids=str
)
def test_nothing_is_left_unwritten(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer starts as NaN; none may reach an output or a gradient."""
    from gka_ops.triton import launch

    empty_like = torch.empty_like
    monkeypatch.setattr(
        launch._Problem, "new", lambda self, *shape, dtype=torch.float32: torch.full(shape, float("nan"), dtype=dtype)
    )
    monkeypatch.setattr(launch.torch, "empty_like", lambda t, **kwargs: empty_like(t, **kwargs).fill_(float("nan")))
    problem = make_problem(**{**SMALL, "dtype": torch.float32, **options})
    contract.check(contract.measure(run_gka, problem, 30, "triton"), contract.FP32, torch.float32)


@pytest.mark.parametrize("num_iter", [0, 30])
@pytest.mark.parametrize("D", [16, 64, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_recurrent_gka(dtype: torch.dtype, D: int, num_iter: int) -> None:
    """Three tokens of four sequences, one of them padding, in a pool of six slots."""
    p = make_problem(**{**SMALL, "B": 4, "T": 3, "D": D, "gate": True, "state": True, "dtype": dtype})
    assert p.initial_kk is not None and p.initial_kv is not None and p.A_log is not None
    slots = torch.tensor([4, -1, 0, 3])
    kept = slots >= 0
    kk = torch.full((6, *p.initial_kk.shape[1:]), float("nan"))
    kv = torch.full((6, *p.initial_kv.shape[1:]), float("nan"))
    kk[slots[kept]], kv[slots[kept]] = p.initial_kk[kept], p.initial_kv[kept]
    output = gka_ops.recurrent_gka(
        p.q, p.k, p.v, p.log_decay, p.alpha, p.beta, state=gka_ops.GKAState(kk, kv), state_indices=slots,
        num_iter=num_iter, qk_l2norm=True, gate=gka_ops.DecayGate(p.A_log, p.dt_bias), impl="triton",
    )  # fmt: skip
    expected = run_gka(p.double(), num_iter=contract.oracle_iterations(num_iter), impl="reference")
    assert output[1].eq(0).all()
    assert kk[[1, 2, 5]].isnan().all() and kv[[1, 2, 5]].isnan().all()
    bar = contract.bars_for(dtype).o
    assert summarise(token_errors(output[kept], expected["output"][kept])).p99 <= bar
    for pool, name in ((kk, "final_kk"), (kv, "final_kv")):  # a few fp32 roundings
        assert norm_error(pool[slots[kept]], expected[name][kept]) <= 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(("B", "T"), [(0, 5), (2, 0)])
def test_no_tokens(B: int, T: int) -> None:
    """States pass through, and so do their gradients."""
    p = make_problem(**{**SMALL, "B": B, "T": T, "dtype": torch.float32, "state": True}).requiring_grad()
    outputs = run_gka(p, num_iter=30, impl="triton")
    assert outputs["output"].shape == (B, T, 2, 24)
    for name, initial in (("final_kk", p.initial_kk), ("final_kv", p.initial_kv)):
        assert initial is not None
        assert torch.equal(outputs[name], initial)
        (gradient,) = torch.autograd.grad(outputs[name].sum(), initial, retain_graph=True)
        assert torch.equal(gradient, torch.ones_like(initial))
