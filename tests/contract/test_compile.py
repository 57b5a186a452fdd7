"""The public functions under ``torch.compile`` and ``torch.export``: one graph, for every length, equal to eager."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule

import gka_ops
from gka_ops import GKAState, Ridge
from gka_ops.numerics import DEFAULT_RIDGE
from tests.helpers.problems import Problem, cotangents, gate_of, make_problem, norm_error

Outputs = dict[str, Tensor]

SIZES = ((3, 70), (2, 129), (4, 65))
"""(B, T). The first is compiled, all others must run in the same graph. PyTorch takes sizes that are equal in the first
call for one and the same, and specialises on 0 and 1: so B, T, H, D, V there all differ, and are larger."""

PACKINGS = ([30, 0, 40], [129, 3], [1, 2, 3, 4, 60])

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"mean_decay": None, "alpha": False, "beta": False},
    "gates": {},
    "decay gate": {"gate": True},
    "ridge of a head": {"ridge": "head", "ridge_offset": 0.1},
    "ridge of a token": {"ridge": "token", "ridge_offset": 0.1},
    "grouped and normalised": {"Hkv": 1, "qk_l2norm": True},
    "states": {"state": True},
    "packed": {"seq_lengths": PACKINGS[0], "state": True},
}


def problems(options: str, dtype: torch.dtype = torch.float32) -> list[Problem]:
    """One problem of each size."""
    given = {"H": 2, "D": 8, "V": 6} | OPTIONS[options]
    if "seq_lengths" in given:
        return [make_problem(**given | {"seq_lengths": lengths}, dtype=dtype) for lengths in PACKINGS]
    return [make_problem(**given, B=B, T=T, dtype=dtype) for B, T in SIZES]


def gka(p: Problem, num_iter: int | Literal["auto"] = "auto") -> Outputs:
    state = None if p.initial_kk is None or p.initial_kv is None else GKAState(p.initial_kk, p.initial_kv)
    result = gka_ops.chunk_gka(
        p.q, p.k, p.v, p.log_decay, p.alpha, p.beta,
        ridge=Ridge(p.ridge_scale, p.ridge_offset, DEFAULT_RIDGE), num_iter=num_iter, qk_l2norm=p.qk_l2norm,
        gate=gate_of(p), initial_state=state, output_final_state=state is not None, cu_seqlens=p.cu_seqlens,
    )  # fmt: skip
    outputs = {"output": 2 * result.output}
    return outputs if result.final_state is None else outputs | result.final_state._asdict()


def solve(p: Problem, num_iter: int | Literal["auto"] = "auto") -> Outputs:
    result = gka_ops.chunk_solve(
        p.q, p.k, p.log_decay, p.beta,
        ridge=Ridge(p.ridge_scale, p.ridge_offset, DEFAULT_RIDGE), num_iter=num_iter, qk_l2norm=p.qk_l2norm,
        gate=gate_of(p), initial_state=p.initial_kk, output_final_state=p.initial_kk is not None,
        cu_seqlens=p.cu_seqlens,
    )  # fmt: skip
    outputs = {"x": 2 * result.x}
    return outputs if result.final_state is None else outputs | {"final_kk": result.final_state}


RUNS: dict[str, Callable[..., Outputs]] = {"chunk_gka": gka, "chunk_solve": solve}


def forward_and_backward(run: Callable[[Problem], Outputs], p: Problem) -> dict[str, Tensor]:
    """Outputs, and the gradients of everything that the outputs depend on, by name."""
    p = p.requiring_grad()
    leaves, outputs = p.leaves(), run(p)
    gradients = torch.autograd.grad(
        list(outputs.values()), list(leaves.values()), list(cotangents(outputs).values()), allow_unused=True
    )
    named = {f"d{name}": d for name, d in zip(leaves, gradients, strict=True) if d is not None}
    return {name: output.detach() for name, output in outputs.items()} | named


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, t in expected.items():
        assert actual[name].dtype == t.dtype, name
        assert torch.equal(actual[name], t), name


def run_all_sizes(
    function: Callable[[Problem], Outputs],
    cases: Sequence[Problem],
    same: Callable[[dict[str, Tensor], dict[str, Tensor]], None] = assert_same,
    backend: str = "aot_eager",
) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=True)
    for i, p in enumerate(cases):
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            actual = forward_and_backward(compiled, p)
        same(actual, forward_and_backward(function, p))


# ------------------------------------------------------------------------------------------- one graph, every length
@pytest.mark.supports("one graph for every T and B")
@pytest.mark.supports("torch.compile(fullgraph=True)")
@pytest.mark.parametrize(
    ("op", "options"),
    [
        *(("chunk_gka", options) for options in OPTIONS),
        *(("chunk_solve", options) for options in ("decay gate", "ridge of a token", "packed")),
    ],
)
def test_one_graph_serves_every_length(op: str, options: str) -> None:
    """Bit for bit: the same operators run, and what is around them doubles numbers."""
    run_all_sizes(RUNS[op], problems(options))


@pytest.mark.supports("one graph for every T and B")
@pytest.mark.parametrize("num_iter", [0, 5])
@pytest.mark.parametrize("op", RUNS)
def test_one_graph_with_a_given_count(op: str, num_iter: int) -> None:
    run_all_sizes(lambda p: RUNS[op](p, num_iter), problems("gates"))


@pytest.mark.supports("one recompile for each option")
def test_another_count_or_ridge_is_another_graph() -> None:
    """Both are constants of a graph, which guards on them."""

    def function(p: Problem, num_iter: int, ridge: float) -> Tensor:
        return gka_ops.chunk_gka(p.q, p.k, p.v, p.log_decay, ridge=ridge, num_iter=num_iter).output

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    p = problems("gates")[0]
    outputs = []
    for num_iter, ridge in ((3, 0.02), (5, 0.02), (5, 0.1)):
        outputs.append(compiled(p, num_iter, ridge))
        assert torch.equal(outputs[-1], function(p, num_iter, ridge))
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    run_all_sizes(gka, problems("gates", dtype))


@pytest.mark.supports("torch.compile(fullgraph=True)")
def test_inductor() -> None:
    """Around the operator Inductor fuses pointwise code, which may round otherwise than eager code does.

    A few roundings of the operator's inputs change its outputs by the condition number (1 + r)/r of the solve, and its
    gradients by its square.
    """

    def function(p: Problem) -> Outputs:
        assert p.alpha is not None
        assert p.beta is not None
        changed = p.replace(
            {
                "q": torch.nn.functional.silu(p.q),
                "k": torch.nn.functional.normalize(p.k, dim=-1),
                "alpha": torch.sigmoid(p.alpha),
                "beta": torch.sigmoid(p.beta),
            }
        )
        return gka(changed)

    condition, eps, roundings = (1 + DEFAULT_RIDGE) / DEFAULT_RIDGE, torch.finfo(torch.float32).eps, 4

    def close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
        assert actual.keys() == expected.keys()
        for name, t in expected.items():
            power = 2 if name.startswith("d") else 1
            assert norm_error(actual[name], t) <= roundings * condition**power * eps, name

    run_all_sizes(function, problems("gates")[:2], close, backend="inductor")


# ----------------------------------------------------------------------------------------------- what is in the graph
def operators_of(graph: GraphModule) -> list[str]:
    """What is called in a graph, but for the unpacking of results, aliases, and arithmetic on sizes."""
    return [
        str(node.target)
        for node in graph.graph.nodes
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
        if str(node.target) not in ("aten.sym_size.int", "aten.detach.default")
    ]


@pytest.mark.supports("torch.compile(fullgraph=True)")
@pytest.mark.parametrize("op", RUNS)
def test_the_graph_holds_the_operators_alone(op: str) -> None:
    """The checks leave nothing behind, and what the forward saved is not computed again."""
    forwards: list[list[str]] = []
    backwards: list[list[str]] = []

    def recorder(graphs: list[list[str]]) -> Callable[[GraphModule, Any], GraphModule]:
        def compiler(graph: GraphModule, _: Any) -> GraphModule:
            graphs.append(operators_of(graph))
            return graph

        return compiler

    backend = aot_autograd(fw_compiler=recorder(forwards), bw_compiler=recorder(backwards))
    p = problems("grouped and normalised")[0]

    def plain(p: Problem) -> Tensor:
        return gka_ops.chunk_gka(p.q, p.k, p.v, p.log_decay, p.alpha, p.beta).output

    def plain_solve(p: Problem) -> Tensor:
        return gka_ops.chunk_solve(p.q, p.k, p.log_decay, p.beta).x

    function = plain if op == "chunk_gka" else plain_solve
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=True)
    compiled(p)
    assert (forwards, backwards) == ([[f"gka.{op}.default"]], [])
    forwards.clear()
    compiled(p.requiring_grad()).sum().backward()
    assert forwards == [[f"gka.{op}.default"]]
    assert [name for name in backwards[0] if name.startswith("gka")] == [f"gka.{op}_backward.default"]


# ------------------------------------------------------------------------------------------------------------- decode
@pytest.mark.supports("torch.compile(fullgraph=True)")
@pytest.mark.supports("one graph for every T and B")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("pool", [False, True], ids=["state of the batch", "pool"])
def test_decode_advances_the_state_in_place(pool: bool, backend: str) -> None:
    """Batch after batch in one graph; Inductor's generated code must not lose the mutation either."""

    def function(p: Problem, state: GKAState, indices: Tensor | None) -> Tensor:
        return 2 * gka_ops.recurrent_gka(
            p.q, p.k, p.v, p.log_decay, p.alpha, p.beta, state=state, state_indices=indices, qk_l2norm=True
        )

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=True)
    for i, B in enumerate((3, 7)):
        initial = make_problem(B=B + 2 if pool else B, T=2, H=2, D=8, V=6, state=True, dtype=torch.float32)
        assert initial.initial_kk is not None
        assert initial.initial_kv is not None
        indices = torch.randperm(B + 2, generator=torch.Generator().manual_seed(B))[:B] if pool else None
        if indices is not None:
            indices[0] = -1
        before = GKAState(initial.initial_kk, initial.initial_kv)
        states = [GKAState(before.kk.clone(), before.kv.clone()) for _ in range(2)]
        for step in range(3):
            p = make_problem(B=B, T=1, H=2, Hkv=1, D=8, V=6, dtype=torch.float32, seed=step)
            with torch._dynamo.config.patch(error_on_recompile=i + step > 0):
                actual = compiled(p, states[0], indices)
            expected = function(p, states[1], indices)
            assert torch.equal(actual, expected)
            assert all(map(torch.equal, states[0], states[1]))
        assert not torch.equal(states[0].kk, before.kk)


# ------------------------------------------------------------------------------------------------------------- export
class Mixer(torch.nn.Module):
    """What a model's layer does with the operator."""

    def __init__(self) -> None:
        super().__init__()
        self.A_log = torch.nn.Parameter(torch.zeros(2))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        result = gka_ops.chunk_gka(
            q, k, v, a, qk_l2norm=True, gate=gka_ops.DecayGate(self.A_log), output_final_state=True
        )
        assert result.final_state is not None
        return result.output, result.final_state.kv


@pytest.mark.supports("torch.export")
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_round_trip(strict: bool) -> None:
    """An exported program keeps the operator by name, serves every length, and survives saving."""

    def inputs(B: int, T: int) -> tuple[Tensor, ...]:
        p = make_problem(B=B, T=T, H=2, D=8, V=6, gate=True, dtype=torch.float32, seed=T)
        assert p.log_decay is not None
        return p.q, p.k, p.v, p.log_decay

    model, dynamic = Mixer(), {0: torch.export.Dim("B"), 1: torch.export.Dim("T")}
    with torch.no_grad():
        program = torch.export.export(model, inputs(2, 70), dynamic_shapes=(dynamic,) * 4, strict=strict)
    assert operators_of(program.graph_module) == ["gka.chunk_gka.default"]
    assert operators_of(program.run_decompositions().graph_module) == ["gka.chunk_gka.default"]

    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for B, T in SIZES:
        with torch.no_grad():
            for actual, expected in zip(loaded(*inputs(B, T)), model(*inputs(B, T)), strict=True):
                assert torch.equal(actual, expected)
