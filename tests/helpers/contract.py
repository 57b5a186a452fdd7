"""The numerics contract: what is measured, on which inputs, and the bars (docs/numerics.md).

``python -m tests.helpers.contract`` measures every row on the CUDA card and prints the tables of docs/numerics.md;
``tests/gpu/test_numerics.py`` asserts the bars.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tests.helpers.problems import (
    ErrorSummary,
    Outputs,
    Problem,
    cotangents,
    evaluate,
    guaranteed_factor,
    make_problem,
    norm_error,
    run_gka,
    run_solve,
    summarise,
    token_errors,
    unit_roundoff,
)

ORACLE_ITERATIONS = 160  # 1/T_161(1.04) = 4e-20: the fp64 reference is then the exact solve to rounding


@dataclass(frozen=True)
class Bars:
    """Largest relative errors at 30 iterations: of x (p99 over tokens), of o (a quantile), of a gradient as a whole."""

    x: float
    o: float
    gradient: float
    key_gradient: float
    o_quantile: str = "p99"


SIXTEEN_BIT = Bars(x=2e-3, o=2e-2, gradient=1e-2, key_gradient=1e-2)
"""bf16 and fp16 inputs (fp16 operands)."""

SHORT_MEMORY = Bars(x=2e-3, o=2e-2, gradient=1e-2, key_gradient=2e-2)
"""The same for a memory of a few tokens (mean decay 0.5 a token and more), where x is large outside the keys' span: an
exception for dk alone (docs/numerics.md, "Exceptions")."""

ONE_DIRECTION = Bars(x=2e-3, o=2e-2, gradient=1e-2, key_gradient=1e-2, o_quantile="p90")
"""The same for one key repeated, an exception for o alone: it is then proportional to k·q, which vanishes for some
tokens while the rounding of the operator's operands, of order u_16·|q|/ρ, does not. The relative error of those few
tokens has no bound."""

FP32 = Bars(
    x=1.1 * guaranteed_factor(0.02, 30),
    o=5 * guaranteed_factor(0.02, 30),
    gradient=5 * guaranteed_factor(0.02, 30),
    key_gradient=5 * guaranteed_factor(0.02, 30),
)
"""fp32 inputs: truncation alone, which reaches gradients up to five times the guaranteed factor (docs/math.md §4.6)."""


def bars_for(dtype: torch.dtype, keys: str = "random", mean_decay: float | None = 0.01) -> Bars:
    if dtype == torch.float32:
        return FP32
    if keys == "repeated":
        return ONE_DIRECTION
    return SHORT_MEMORY if mean_decay is not None and mean_decay >= 0.5 else SIXTEEN_BIT


@dataclass(frozen=True)
class Row:
    """One input distribution of the contract."""

    keys: str
    mean_decay: float | None
    min_beta: float | None = None

    @property
    def name(self) -> str:
        decay = "none" if self.mean_decay is None else f"{self.mean_decay:g}"
        return f"{self.keys}, {decay}" + ("" if self.min_beta is None else f", β ≥ {self.min_beta:g}")

    def problem(self, dtype: torch.dtype, device: str, T: int = 1024, H: int = 4, D: int = 128) -> Problem:
        return make_problem(
            T=T, H=H, D=D, keys=self.keys, mean_decay=self.mean_decay, min_beta=self.min_beta, dtype=dtype,
            device=device, seed=7,
        )  # fmt: skip


ROWS = (
    Row("random", 0.01),
    Row("clustered", 0.003),
    Row("silu", 0.0005),
    Row("random", 0.5),
    Row("random", 1.0),
    Row("low_rank", 0.003),
    Row("repeated", 0.01),
    Row("silu", 0.0001),
    Row("random", None),
    Row("random", 0.01, min_beta=1e-3),
)


def oracle_iterations(num_iter: int | str) -> int:
    return 0 if num_iter == 0 else ORACLE_ITERATIONS


class Errors(NamedTuple):
    """Errors against the fp64 reference on the same, already rounded inputs."""

    outputs: dict[str, ErrorSummary]  # by token: output or x
    states: dict[str, float]  # over the whole tensor
    gradients: dict[str, float]  # over the whole tensor
    token_gradients: dict[str, ErrorSummary]  # by token: q, k, v


def measure(run: Callable[..., Outputs], problem: Problem, num_iter: int | str, impl: str) -> Errors:
    """Runs forward and backward of ``run`` (``run_gka`` or ``run_solve``), also through the final states.

    Each output's gradient is measured with the others', from random upstream gradients of every output.
    """
    with torch.no_grad():
        upstream = cotangents(run(problem, num_iter=num_iter, impl=impl))
    actual = evaluate(lambda p: run(p, num_iter=num_iter, impl=impl), problem, upstream)
    expected = evaluate(
        lambda p: run(p, num_iter=oracle_iterations(num_iter), impl="reference"), problem.double(), upstream
    )
    outputs, states = {}, {}
    for name, value in actual.outputs.items():
        if name.startswith("final"):
            states[name] = norm_error(value, expected.outputs[name])
        else:
            outputs[name] = summarise(token_errors(value, expected.outputs[name]))
    gradients = {
        name: norm_error(gradient, expected.gradients[name])
        for name, gradient in actual.gradients.items()
        if float(expected.gradients[name].abs().max()) < torch.finfo(gradient.dtype).max  # else it has no such value
    }
    by_token = {
        name: summarise(token_errors(actual.gradients[name], expected.gradients[name]))
        for name in ("q", "k", "v")
        if name in gradients
    }
    return Errors(outputs, states, gradients, by_token)


def state_bar(dtype: torch.dtype) -> float:
    """Final states: fp32 sums of products of a key, exact, and a weighted key or value, rounded once."""
    return 1e-5 if dtype == torch.float32 else 2 * unit_roundoff(torch.float16)


def check(errors: Errors, bars: Bars, dtype: torch.dtype) -> None:
    """Asserts the bars."""
    for name, error in errors.outputs.items():
        bar, quantile = (bars.x, "p99") if name == "x" else (bars.o, bars.o_quantile)
        assert getattr(error, quantile) <= bar, (name, error, bar)
    for name, value in errors.states.items():
        assert value <= state_bar(dtype), (name, value)
    limits = {name: bars.key_gradient if name == "k" else bars.gradient for name in errors.gradients}
    over = {name: (value, limits[name]) for name, value in errors.gradients.items() if not value <= limits[name]}
    assert not over, over


def check_scaling(problem: Problem, magnitude: float, impl: str) -> None:
    """Asserts that queries, keys and values ``magnitude`` times as large, a power of two, change every result by the
    power of two that follows from it and by no bit more: operands are divided by powers of two.

    ``problem`` has no α, or the shares of the query and of the solution, whose unit is the inverse, would change; no
    states; and keys as they are.
    """

    def run(p: Problem) -> Outputs:
        return run_gka(p, num_iter=30, impl=impl)

    upstream = cotangents(run(problem))
    expected = evaluate(run, problem, upstream)
    upstream = {name: t if name == "output" else t / magnitude for name, t in upstream.items()}
    scaled = evaluate(run, problem.map(lambda name, t: t * magnitude if name in ("q", "k", "v") else t), upstream)
    for name, value in expected.outputs.items():
        unit = magnitude if name == "output" else magnitude**2
        assert torch.equal(scaled.outputs[name], value * unit), name
    for name, value in expected.gradients.items():
        unit = 1.0 if name in ("q", "k", "v") else magnitude
        assert torch.equal(scaled.gradients[name], value * unit), name


def main() -> None:
    from tabulate import tabulate

    device = "cuda" if torch.cuda.is_available() else sys.exit("the numerics contract is measured on a CUDA card")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, T=1024, H=4, D=V=128")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for num_iter in (30, "auto"):
            table = []
            for row in ROWS:
                problem = row.problem(dtype, device)
                gka, solve = (
                    measure(run_gka, problem, num_iter, "triton"),
                    measure(run_solve, problem, num_iter, "triton"),
                )
                quantiles = [
                    f"{e.p50:.1e} / {e.p90:.1e} / {e.p99:.1e} / {e.max:.1e}"
                    for e in (solve.outputs["x"], gka.outputs["output"])
                ]
                named = ("q", "k", "v", "log_decay", "alpha", "beta")
                gradients = [f"{gka.gradients[n]:.1e}" if n in gka.gradients else "" for n in named]
                by_token = [f"{gka.token_gradients[n].p99:.1e}" for n in ("q", "k", "v")]
                table.append([row.name, *quantiles, *gradients, *by_token])
            print(f"\n{dtype}, num_iter={num_iter}\n")
            headers = ["keys, mean decay", "x p50/p90/p99/max", "o p50/p90/p99/max", "dq", "dk", "dv", "dg", "dα", "dβ",
                "dq p99", "dk p99", "dv p99"]  # fmt: skip
            print(tabulate(table, headers, tablefmt="github"), flush=True)


if __name__ == "__main__":
    main()
