"""The figures to beat, measured: ``python -m gka_ops_perf.bars [--json FILE]`` on one card, random data larger than L2.

Times are medians of CUDA events between calls that are queued back to back, so that the host's own time does not
show; the host's time has its own rows. Errors are against fp64 on the same inputs, per token (p50, p99).
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from tabulate import tabulate

import gka_ops
from gka_ops.numerics import DEFAULT_RIDGE, iterations_for
from gka_ops_perf import providers
from gka_ops_perf.costs import Shape
from gka_ops_perf.machine import machine
from gka_ops_perf.providers import Inputs

ACCURATE_AS_AUTHORS = 19  # iterations: x p99 <= 7.9e-3 at ridge 0.02
WARM_UP, REPEATS = 3, 15


class Bar(NamedTuple):
    """A row: what, in which unit, what it must not exceed, and what we want; without either it only informs."""

    name: str
    unit: str
    must: float | None
    reach: float | None
    measure: Callable[[], float]

    def verdict(self, value: float) -> str:
        if self.must is None:
            return ""
        if self.reach is not None and value <= self.reach:
            return "reach"
        return "met" if value <= self.must else "missed"


def make_inputs(
    B: int, T: int, H: int = 32, Hkv: int | None = None, D: int = 128, grad: bool = False, dtype: str = "bf16"
) -> Inputs:
    """Unit random queries and keys, mean log decay -0.01 a token, sigmoid gates; gates in fp32."""
    return providers.make_inputs(Shape(B, T, H, H if Hkv is None else Hkv, D, D, dtype), grad=grad)


def milliseconds(run: Callable[[], Any], repeats: int = REPEATS) -> float:
    for _ in range(WARM_UP):
        run()
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda._sleep(20_000_000)  # the host queues ahead meanwhile
    for event in events[:-1]:
        event.record()
        run()
    events[-1].record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def host_microseconds(run: Callable[[], Any], calls: int = 200) -> float:
    """Wall time of a call that the card finishes sooner than the host can queue it."""
    for _ in range(20):
        run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / calls * 1e6


def host_microseconds_of_forward() -> float:
    return host_microseconds(forward(make_inputs(1, 64, 2)))


def host_microseconds_of_step() -> float:
    """Of decoding."""
    inputs = make_inputs(1, 1, 2)
    state = gka_ops.GKAState(*(torch.zeros(1, 2, 128, 128, device="cuda") for _ in range(2)))
    return host_microseconds(lambda: gka_ops.recurrent_gka(*inputs, state=state))


def forward(inputs: Inputs, **options: Any) -> Callable[[], Any]:
    @torch.no_grad()
    def run() -> Any:
        return gka_ops.chunk_gka(*inputs, **options)

    return run


def solve(inputs: Inputs, **options: Any) -> Callable[[], Any]:
    @torch.no_grad()
    def run() -> Any:
        return gka_ops.chunk_solve(inputs.q, inputs.k, inputs.log_decay, inputs.beta, **options)

    return run


def forward_backward(inputs: Inputs, **options: Any) -> Callable[[], Any]:
    upstream = torch.randn_like(inputs.q)

    def run() -> Any:
        return torch.autograd.grad(gka_ops.chunk_gka(*inputs, **options).output, inputs, upstream)

    return run


def peak_mebibytes(run: Callable[[], Any]) -> float:
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - base) / 2**20


def decode_microseconds(N: int) -> float:
    """One step of N sequences, 32 heads, 8 key/value heads, fp32 states, replayed from a CUDA graph."""
    kk = torch.randn(N, 32, 128, 128, device="cuda")
    state = gka_ops.GKAState(kk @ kk.mT / 128, torch.randn(N, 32, 128, 128, device="cuda"))
    inputs = make_inputs(N, 1, Hkv=8)

    def run() -> Any:
        return gka_ops.recurrent_gka(*inputs, state=state, num_iter=30)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return milliseconds(graph.replay, 50) * 1e3


def layer_ratio(training: bool) -> float:
    """``GatedKalmaNet`` (hidden 4096, 32 heads), compiled, over itself without a solve."""

    def timed(**options: Any) -> float:
        torch.manual_seed(0)
        layer = gka_ops.GatedKalmaNet(4096, 128, 32, device="cuda", dtype=torch.bfloat16, **options)
        compiled = torch.compile(layer, fullgraph=True)
        hidden = torch.randn(2, 8192, 4096, device="cuda", dtype=torch.bfloat16)
        if training:
            return milliseconds(lambda: compiled(hidden).sum().backward(), 8)
        with torch.no_grad():
            return milliseconds(lambda: compiled(hidden), 8)

    return timed() / timed(num_iter=0)


def packed_ratio() -> float:
    """Forward + backward of 16384 tokens in 16 uneven sequences over the same tokens as two of 8192."""
    lengths = [128 * n - (n % 7) for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)]
    bounds = torch.tensor([0, *itertools.accumulate(lengths), 16384], device="cuda", dtype=torch.int32)
    packed = milliseconds(forward_backward(make_inputs(1, 16384, grad=True), cu_seqlens=bounds))
    return packed / milliseconds(forward_backward(make_inputs(2, 8192, grad=True)))


def slower_than_reference() -> float:
    """Forward at D = 256 over the eager reference on the same card, at a length that the reference can hold."""
    inputs = make_inputs(1, 2048, 8, D=256)
    return milliseconds(forward(inputs)) / milliseconds(forward(inputs, impl="reference"), 3)


def small_batch_ratio() -> float:
    """Forward of B1 H8 T32768 over B2 H32 T8192, each per token and head (2^18 against 2^19 of them)."""
    return 2 * milliseconds(forward(make_inputs(1, 32768, 8))) / milliseconds(forward(make_inputs(2, 8192)))


def first_call_seconds(cache: str) -> float:
    """The first call, forward and backward, of a fresh process with a folder as its Triton cache; tables know it."""
    code = (
        "import time, torch, gka_ops\n"
        "q, k, v = (torch.randn(1, 256, 4, 128, device='cuda', dtype=torch.bfloat16, requires_grad=True)"
        " for _ in range(3))\n"
        "alpha, beta, decay = (torch.rand(1, 256, 4, device='cuda', requires_grad=True) for _ in range(3))\n"
        "torch.cuda.synchronize(); start = time.perf_counter()\n"
        "output = gka_ops.chunk_gka(q, k, v, log_decay=-decay, alpha=alpha, beta=beta).output\n"
        "output.sum().backward(); torch.cuda.synchronize()\n"
        "print(time.perf_counter() - start)\n"
    )
    environment = {**os.environ, "TRITON_CACHE_DIR": cache}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr)
    return float(result.stdout.split()[-1])


def cold_start_seconds() -> float:
    """That of a process with an empty Triton cache."""
    with tempfile.TemporaryDirectory() as cache:
        return first_call_seconds(cache)


def modifier_ratio() -> float:
    """A training step with a learned ``ridge_mod`` over one with the built-in ridge, both compiled, in turns."""
    inputs = make_inputs(2, 8192, grad=True)
    upstream = torch.randn_like(inputs.q)
    log_ratio = torch.linspace(-4, -3, 32, device="cuda", requires_grad=True)
    iterations = iterations_for(DEFAULT_RIDGE)

    def learned(*inputs: torch.Tensor) -> torch.Tensor:
        def ridge_mod(fro: Any, b: torch.Tensor, h: torch.Tensor, t: torch.Tensor) -> Any:
            return torch.maximum(log_ratio.exp()[h] * fro, DEFAULT_RIDGE * fro)

        return gka_ops.chunk_gka(*inputs, ridge_mod=ridge_mod, num_iter=iterations).output

    def built_in(*inputs: torch.Tensor) -> torch.Tensor:
        return gka_ops.chunk_gka(*inputs, num_iter=iterations).output

    def step(function: Callable[..., torch.Tensor], leaves: tuple[torch.Tensor, ...]) -> Callable[[], Any]:
        compiled = torch.compile(function, fullgraph=True)
        return lambda: torch.autograd.grad(compiled(*inputs), leaves, upstream)

    steps = step(learned, (*inputs, log_ratio)), step(built_in, inputs)
    rounds = [[milliseconds(run) for run in steps] for _ in range(3)]
    modified, plain = (statistics.median(times) for times in zip(*rounds, strict=True))
    return modified / plain


def bars() -> list[Bar]:
    training = make_inputs(2, 8192, grad=True)
    serving = make_inputs(1, 8192, Hkv=8)
    n = ACCURATE_AS_AUTHORS

    def long_ratio() -> float:
        times = [milliseconds(forward_backward(make_inputs(1, length, grad=True)), 3) for length in (32768, 131072)]
        return times[1] / times[0]

    return [
        Bar(f"chunk_gka forward, {n} iterations", "ms", 2.2, 1.5, lambda: milliseconds(forward(training, num_iter=n))),
        Bar("chunk_gka forward, default tolerance", "ms", 2.6, 1.8, lambda: milliseconds(forward(training))),
        Bar(
            f"chunk_gka forward + backward, {n} iterations", "ms", 7.0, 5.0,
            lambda: milliseconds(forward_backward(training, num_iter=n)),
        ),
        Bar("num_iter=0 forward", "ms", 0.55, 0.40, lambda: milliseconds(forward(training, num_iter=0))),
        Bar(
            "num_iter=0 forward + backward", "ms", 2.6, 1.8,
            lambda: milliseconds(forward_backward(training, num_iter=0)),
        ),
        Bar("chunk_solve forward, 30 iterations", "ms", 2.5, 1.7, lambda: milliseconds(solve(training, num_iter=30))),
        Bar(
            "peak extra memory, forward + backward", "MiB", 1150, 900,
            lambda: peak_mebibytes(forward_backward(training)),
        ),
        Bar(
            "prefill B1 T8192, 8 kv heads, state out", "ms", 1.3, 0.9,
            lambda: milliseconds(forward(serving, output_final_state=True)),
        ),
        Bar("decode N=64, 8 kv heads, 30 iterations", "µs", 230, 195, lambda: decode_microseconds(64)),
        Bar("decode N=256", "µs", 850, 760, lambda: decode_microseconds(256)),
        Bar("decode N=1", "µs", 16, 10, lambda: decode_microseconds(1)),
        Bar("B1 T131072 over T32768, forward + backward", "×", 4.2, 4.05, long_ratio),
        Bar("layer forward over num_iter=0", "×", 1.4, 1.2, lambda: layer_ratio(False)),
        Bar("layer training step over num_iter=0", "×", 1.6, 1.3, lambda: layer_ratio(True)),
        Bar("compiled training step with a learned ridge_mod over the built-in ridge", "×", 1.03, 1.01, modifier_ratio),
        Bar("first call, empty Triton cache", "s", 20, 10, cold_start_seconds),
        Bar("host time of a chunk_gka forward", "µs", 80, 40, host_microseconds_of_forward),
        Bar("host time of a decode step", "µs", 30, 15, host_microseconds_of_step),
        Bar("16 packed sequences over B2 T8192, forward + backward", "×", 1.1, 1.0, packed_ratio),
        Bar("D=256 forward over the eager reference (B1 T2048 H8)", "×", 0.05, 0.02, slower_than_reference),
        # Eight states on 132 multiprocessors: the state pass runs on a fraction of them, everything else on all.
        Bar("B1 H8 T32768 forward over the main shape, per token and head", "×", 2.0, 1.3, small_batch_ratio),
        Bar(
            "fp32 forward B1 T8192 H32", "ms", None, None,
            lambda: milliseconds(forward(make_inputs(1, 8192, dtype="fp32")), 5),
        ),
        Bar("D=64 forward B2 T8192 H32", "ms", None, None, lambda: milliseconds(forward(make_inputs(2, 8192, D=64)))),
    ]  # fmt: skip


WARM_UPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({"B": 2, "grad": True}, {}),
    "no solve": ({"B": 2, "grad": True}, {"num_iter": 0}),
    "one sequence": ({"B": 1, "grad": True}, {}),
    "packed": ({"B": 1, "T": 160, "grad": True}, {"lengths": 10}),
    "serving": ({"B": 1, "Hkv": 8}, {"output_final_state": True}),
    "D=256": ({"B": 1, "H": 8, "D": 256}, {}),
    "small batch": ({"B": 1, "H": 8}, {}),
    "fp32": ({"B": 1, "dtype": "fp32"}, {}),
    "D=64": ({"B": 2, "D": 64}, {}),
    "tiny": ({"B": 1, "H": 2}, {}),
    "errors": ({"B": 1, "H": 4, "grad": True}, {}),
}
"""Inputs and options that make one call compile what the rows run: a kernel depends on heads, head size, options and,
through the state pass's split, sequences, but not on T."""


def compile_ahead(name: str) -> None:
    """One call of ``WARM_UPS``, to fill Triton's cache; runs in a process of its own."""
    shape, options = WARM_UPS[name]
    inputs = make_inputs(**{"T": 128, **shape})
    if options.get("lengths"):
        options = {"cu_seqlens": torch.arange(17, device="cuda", dtype=torch.int32) * options["lengths"]}
    (forward_backward if inputs.q.requires_grad else forward)(inputs, **options)()
    torch.cuda.synchronize()


def warm_up() -> None:
    """Compiles what the rows run, side by side; a failure shows again, and is reported, where its row is measured."""
    workers = min(len(WARM_UPS), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending = [pool.submit(compile_ahead, name) for name in WARM_UPS]
        for _ in track(as_completed(pending), "compiling", total=len(pending), console=Console(stderr=True)):
            pass


AUTHORS_TIMES = {
    f"chunk_gka forward, {ACCURATE_AS_AUTHORS} iterations": "4.53 (30 iterations)",
    f"chunk_gka forward + backward, {ACCURATE_AS_AUTHORS} iterations": "15.07 (30 iterations)",
    "num_iter=0 forward": "simple-GLA 0.52",
    "num_iter=0 forward + backward": "simple-GLA 2.40",
    "chunk_solve forward, 30 iterations": "3.49",
    "peak extra memory, forward + backward": "1943",
    "prefill B1 T8192, 8 kv heads, state out": "4.92",
    "decode N=64, 8 kv heads, 30 iterations": "369",
    "decode N=256": "1299",
    "decode N=1": "28",
    "first call, empty Triton cache": "> 300",
}
"""What others take, in the row's unit: the paper's authors' kernels unless said, on an H100 80 GB (docs/design.md)."""

AUTHORS = {"x p50": 3.9e-3, "x p99": 8.4e-3, "o p50": 7.5e-3, "o p99": 4.2e-2, "dq": 7.7e-3, "dk": 1.2e-2,
           "dv": 1.0e-2, "dlog_decay": 2.1e-2}  # fmt: skip
"""The paper's authors' kernels, 30 iterations, same inputs' distribution, H100 (docs/numerics.md)."""


def at_least_the_authors(row: dict[str, float]) -> bool:
    """In what the bars name: x at p99 (fewer iterations move its median), o and every gradient."""
    return all(row[name] <= bar for name, bar in AUTHORS.items() if name != "x p50")


def errors() -> dict[str, dict[str, float]]:
    """Errors of x, of the output and of each gradient at the iteration counts timed, for bf16 and fp32 inputs."""
    few, default = {"num_iter": ACCURATE_AS_AUTHORS}, dict[str, Any]()
    of_bf16 = errors_of("bf16", {f"{ACCURATE_AS_AUTHORS} iterations": few, "default": default})
    return of_bf16 | errors_of("fp32", {"default, fp32": default})


def errors_of(dtype: str, calls: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The same for inputs of one dtype (B1 T1024 H4) and calls with some options."""
    inputs = make_inputs(1, 1024, 4, grad=True, dtype=dtype)
    exact = Inputs(*(t.detach().double().requires_grad_() for t in inputs))
    upstream = torch.randn_like(inputs.q)

    def results(inputs: Inputs, **options: Any) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            x = gka_ops.chunk_solve(inputs.q, inputs.k, inputs.log_decay, inputs.beta, **options).x
        output = gka_ops.chunk_gka(*inputs, **options).output
        gradients = torch.autograd.grad(output, inputs, upstream.to(output.dtype))
        return {"x": x, "o": output, **{f"d{name}": g for name, g in zip(Inputs._fields, gradients, strict=True)}}

    expected = results(exact, num_iter=160, impl="reference")
    table = {}
    for name, options in calls.items():
        row = {}
        for key, value in results(inputs, **options).items():
            difference = value.double() - expected[key]
            if key in ("x", "o"):
                error = difference.norm(dim=-1) / expected[key].norm(dim=-1)
                row[f"{key} p50"], row[f"{key} p99"] = error.quantile(0.5).item(), error.quantile(0.99).item()
            else:
                row[key] = (difference.norm() / expected[key].norm()).item()
        table[name] = row
    return table


def environment(commit: str | None = None) -> dict[str, str]:
    here = machine(commit)
    names = ("driver", "torch", "triton", "python", "commit", "date")
    return {"card": here.gpu, **{name: getattr(here, name) for name in names}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to store the figures")
    parser.add_argument("--only", default="", help="rows whose name contains one of these, separated by commas")
    parser.add_argument(
        "--warm-up", action=argparse.BooleanOptionalAction, default=True, help="compile first, in parallel"
    )
    parser.add_argument("--commit", help="what to store as the commit, where the checkout has no history")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gka_ops_perf.bars needs a CUDA card", file=sys.stderr)
        return 2

    if arguments.warm_up:
        warm_up()
    rows = []
    for bar in track(
        [bar for bar in bars() if any(part in bar.name for part in arguments.only.split(","))],
        "measuring",
        console=Console(stderr=True),
    ):
        try:
            value = bar.measure()
            verdict = bar.verdict(value)
        except Exception as error:  # one row must not cost the others
            value, verdict = float("nan"), f"failed: {error}"[:60]
        rows.append({"what": bar.name, "unit": bar.unit, "measured": value, "must": bar.must, "reach": bar.reach,
                     "verdict": verdict})  # fmt: skip
        torch.cuda.empty_cache()
    accuracy = errors()
    print(tabulate(rows, headers="keys", floatfmt=".4g"))
    measured = [{"": name, **row, "at least the authors'": at_least_the_authors(row)} for name, row in accuracy.items()]
    print(tabulate([*measured, {"": "authors, 30 iterations", **AUTHORS}], headers="keys", floatfmt=".1e"))
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        report = {**environment(arguments.commit), "rows": rows, "errors": accuracy}
        arguments.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return 0 if all(row["verdict"] in ("met", "reach", "") for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
