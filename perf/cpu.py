"""What can be said of performance without a card, and on machines that others use: ratios and counts.

Ratios are of times that were taken in turns. Counts do not depend on the machine: Python calls that an operator makes,
nodes of a compiled layer's graph, and the machine code that Triton makes of the kernels for a Hopper card.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import gka_ops
from gka_ops_perf.costs import Shape
from gka_ops_perf.providers import make_inputs

ROUNDS = 9
MACHINE_CODE = "machine code"
COMPILED_MODEL = "compiled model of 24 layers over SDPA"
COMPILED_MODEL_BAR = 1.3
"""The largest ratio that the design allows."""

Figures = Mapping[str, list[float]]


@dataclass(frozen=True)
class CpuCase:
    """Figures by name, smaller being better. Samples of a ratio may lie far apart, a count has one."""

    name: str
    measure: Callable[[], dict[str, Figures]]
    """Figures by part: the case's own under ``""``, others under names that are added to the case's."""


SMALL = Shape(B=1, T=512, H=4, Hkv=4, D=64, V=64, dtype="fp32")
TINY = SMALL._replace(T=1, H=1, Hkv=1, D=16, V=16)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _ratio(call: Callable[[], Any], baseline: Callable[[], Any], rounds: int = ROUNDS) -> list[float]:
    """Process time of ``call`` over that of ``baseline``, each after the other."""

    def seconds(run: Callable[[], Any]) -> float:
        start = time.process_time()
        run()
        return time.process_time() - start

    with _one_thread():
        call(), baseline()
        return [seconds(call) / max(seconds(baseline), 1e-9) for _ in range(rounds)]


def over_dense_attention(grad: bool) -> dict[str, Figures]:
    """The reference implementation over softmax attention that writes its scores out, same tokens and heads."""
    inputs = make_inputs(SMALL, grad=grad, device="cpu")
    heads = [t.detach().transpose(1, 2).contiguous().requires_grad_(grad) for t in inputs[:3]]
    mask = torch.ones(SMALL.T, SMALL.T, dtype=torch.bool).tril()
    with torch.no_grad():
        upstream = torch.randn_like(inputs.v)

    def op() -> Tensor:
        return gka_ops.chunk_gka(*inputs).output

    def dense() -> Tensor:
        q, k, v = heads
        scores = (q @ k.mT * SMALL.D**-0.5).masked_fill(~mask, float("-inf"))
        return scores.softmax(-1) @ v

    def forward(run: Callable[[], Tensor]) -> Callable[[], Any]:
        return torch.no_grad()(run)

    def backward(run: Callable[[], Tensor], leaves: Any, upstream: Tensor) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(run(), leaves, upstream)

    if grad:
        pair = backward(op, inputs, upstream), backward(dense, heads, upstream.transpose(1, 2))
    else:
        pair = forward(op), forward(dense)
    return {"": {"ratio": _ratio(*pair)}}


def python_calls(run: Callable[[], Any]) -> int:
    """Calls of functions, Python's and C's, that a warm ``run`` makes: the fewest of a few."""
    for _ in range(10):
        run()
    found = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal found
        found += event in ("call", "c_call")

    counts = []
    previous = sys.getprofile()
    for _ in range(3):
        found = 0
        sys.setprofile(count)
        try:
            run()
        finally:
            sys.setprofile(previous)
        counts.append(found)
    return min(counts)


def calls_of_operators() -> dict[str, Figures]:
    """What the host does for a call, on operands so small that an implementation has next to nothing to do."""
    inputs = make_inputs(TINY, device="cpu")
    grad = make_inputs(TINY, grad=True, device="cpu")
    state = gka_ops.GKAState(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16))
    options: dict[str, Any] = {"num_iter": 1}

    def training() -> None:
        gka_ops.chunk_gka(*grad, **options).output.sum().backward()

    with torch.no_grad():
        forward = python_calls(lambda: gka_ops.chunk_gka(*inputs, **options))
        decode = python_calls(lambda: gka_ops.recurrent_gka(*inputs, state=state, **options))
    found = {"chunk_gka": forward, "chunk_gka and backward": python_calls(training), "recurrent_gka": decode}
    return {name: {"Python calls": [float(calls)]} for name, calls in found.items()}


class _Attention(nn.Module):
    """The plain counterpart of the layer, with SDPA or with ``chunk_gka`` in its place."""

    def __init__(self, hidden: int, heads: int, solve: bool = False) -> None:
        super().__init__()
        self.heads, self.solve = heads, solve
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        if self.solve:
            return self.out(gka_ops.chunk_gka(q, k, v, qk_l2norm=True).output.flatten(2))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class _Block(nn.Module):
    """A layer of a transformer."""

    def __init__(self, hidden: int, heads: int, solve: bool) -> None:
        super().__init__()
        self.mixer = _Attention(hidden, heads, solve)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
        self.norms = nn.ModuleList([nn.RMSNorm(hidden), nn.RMSNorm(hidden)])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norms[0](x))
        return x + self.down(F.silu(self.up(self.norms[1](x))))


def _compiling(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    """Tracing and differentiating, from nothing."""

    def run() -> None:
        torch._dynamo.reset()
        torch.compile(model, backend="aot_eager", fullgraph=True)(x).sum().backward()

    return run


def compiling_a_model(layers: int = 24, rounds: int = 3) -> dict[str, Figures]:
    """Tracing and differentiating a transformer with ``chunk_gka`` over the same with SDPA in its place."""
    x = torch.randn(2, 48, 64)
    models = (nn.Sequential(*(_Block(64, 4, solve) for _ in range(layers))) for solve in (True, False))
    solving, attending = (_compiling(model, x) for model in models)
    times = _ratio(solving, attending, rounds)
    torch._dynamo.reset()
    return {"": {"ratio": times}}


def compiling_a_layer(rounds: int = 5) -> dict[str, Figures]:
    """Tracing and differentiating a layer over the same for attention, and the nodes of its graph.

    The code that Inductor's compiler would make of it is left out: on a CPU that is another one than on a card.
    """
    x = torch.randn(1, 64, 64)
    layers = gka_ops.GatedKalmaNet(64, 16, 4), _Attention(64, 4)
    nodes = 0

    def count(graph: fx.GraphModule, inputs: Any) -> Any:
        nonlocal nodes
        nodes += len(graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(layers[0], backend=count, fullgraph=True)(x)
    times = _ratio(_compiling(layers[0], x), _compiling(layers[1], x), rounds)
    torch._dynamo.reset()
    return {"": {"ratio": times, "graph nodes": [float(nodes)]}}


def machine_code(D: int = 128, V: int = 128, dtype: str = "bf16", kernels: str = "") -> dict[str, Figures]:
    """Counts for every kernel of a forward and a backward (:mod:`gka_ops_perf.offline`), in a process of its own:
    here kernels may be interpreted."""
    code = (
        "import json, sys\n"
        "from gka_ops_perf import offline\n"
        f"found = {{}}\n"
        f"for kernel, given in offline.launches({D}, {V}, {dtype!r}, 30):\n"
        f"    if {kernels!r} in kernel.fn.__name__:\n"
        "        made = offline.compile_for_hopper(kernel, given)\n"
        "        found[made.name] = offline.machine_code(made.cubin)._asdict()\n"
        "json.dump(found, sys.stdout)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    if result.returncode:
        raise RuntimeError(result.stderr.strip().splitlines()[-1])
    return {
        name.removesuffix("_kernel"): {figure: [float(value)] for figure, value in figures.items()}
        for name, figures in json.loads(result.stdout).items()
    }


def cases(select: str = "") -> list[CpuCase]:
    every = [
        CpuCase("forward over dense attention", lambda: over_dense_attention(False)),
        CpuCase("forward + backward over dense attention", lambda: over_dense_attention(True)),
        CpuCase("host", calls_of_operators),
        CpuCase("compiled layer over attention", compiling_a_layer),
        CpuCase(COMPILED_MODEL, compiling_a_model),
        CpuCase(MACHINE_CODE, machine_code),
    ]
    return [case for case in every if select in case.name]
