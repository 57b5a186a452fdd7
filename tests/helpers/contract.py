"""The numerics contract: what is measured, on which inputs, and the bars (docs/numerics.md).

``python -m tests.helpers.contract`` measures every row on the CUDA card and prints the tables of docs/numerics.md;
``tests/gpu/test_numerics.py`` asserts the bars.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.helpers.problems import (
    Evaluation,
    Outputs,
    Problem,
    cotangents,
    evaluate,
    make_problem,
    run_gka,
    run_solve,
    summarise,
    token_errors,
)

ORACLE_ITERATIONS = 160  # 1/T_161(1.04) = 4e-20: the fp64 reference is then the exact solve to rounding

X_P99, O_P99, GRADIENT = 2e-3, 2e-2, 1e-2
"""Bars at 30 iterations: p99 over tokens for x and o, the norm over the whole tensor for every gradient."""

SHORT_MEMORY_O_P99, SHORT_MEMORY_GRADIENT = 5e-2, 2e-2
"""The same for a memory of a few tokens (mean decay 0.5 a token), where x is large outside the span of the keys."""


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

    @property
    def short_memory(self) -> bool:
        return self.mean_decay is not None and self.mean_decay >= 0.5

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


def oracle(problem: Problem, solves: bool) -> tuple[Evaluation, Outputs]:
    """Outputs, gradients and upstream gradients of the fp64 reference on the same, already rounded inputs."""
    exact = problem.double()
    run = run_solve if solves else run_gka
    n = ORACLE_ITERATIONS if solves or problem.q.numel() else 0
    with torch.no_grad():
        upstream = cotangents(run(problem, num_iter=1))
    upstream = {name: t for name, t in upstream.items() if name in ("output", "x")}
    return evaluate(lambda p: run(p, num_iter=n, impl="reference"), exact, upstream), upstream


def gradient_errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """‖Δ‖/‖·‖ of every gradient over the whole tensor."""
    return {
        name: float(token_errors(actual[name].flatten()[None], expected[name].flatten()[None])) for name in expected
    }


def measure(problem: Problem, num_iter: int | str, impl: str) -> Iterator[tuple[str, object]]:
    """(quantity, errors): quantiles for x and o, a norm for each gradient."""
    expected_x, _ = oracle(problem, solves=True)
    with torch.no_grad():
        actual_x = run_solve(problem, num_iter=num_iter, impl=impl)
    yield "x", summarise(token_errors(actual_x["x"], expected_x.outputs["x"]))
    expected, upstream = oracle(problem, solves=False)
    actual = evaluate(lambda p: run_gka(p, num_iter=num_iter, impl=impl), problem, upstream)
    yield "o", summarise(token_errors(actual.outputs["output"], expected.outputs["output"]))
    for name, error in gradient_errors(actual.gradients, expected.gradients).items():
        yield f"d{name}", error
    for name in ("q", "k", "v"):
        yield f"d{name} by token", summarise(token_errors(actual.gradients[name], expected.gradients[name]))


def main() -> None:
    from tabulate import tabulate

    device = "cuda" if torch.cuda.is_available() else sys.exit("the numerics contract is measured on a CUDA card")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, T=1024, H=4, D=V=128")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for num_iter in (30, "auto"):
            table = []
            for row in ROWS:
                errors = dict(measure(row.problem(dtype, device), num_iter, "triton"))
                quantiles = [f"{e.p50:.1e} / {e.p90:.1e} / {e.p99:.1e} / {e.max:.1e}" for e in (errors["x"], errors["o"])]
                gradients = [f"{errors[f'd{n}']:.1e}" for n in ("q", "k", "v", "log_decay", "alpha", "beta") if f"d{n}" in errors]
                if row.mean_decay is None:
                    gradients.insert(3, "")
                table.append([row.name, *quantiles, *gradients])
            print(f"\n{dtype}, num_iter={num_iter}\n")
            headers = ["keys, mean decay", "x p50/p90/p99/max", "o p50/p90/p99/max", "dq", "dk", "dv", "dg", "dα", "dβ"]
            print(tabulate(table, headers, tablefmt="github"), flush=True)


if __name__ == "__main__":
    main()
