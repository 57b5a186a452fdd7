"""Operators on DTensors, in two real processes over gloo: outputs and gradients are those of one process."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

import gka_ops
import gka_ops.distributed
from gka_ops import GKAState
from tests.helpers.problems import (
    Outputs,
    Problem,
    cotangents,
    evaluate,
    make_problem,
    norm_error,
    run_gka,
    run_solve,
)
from tests.helpers.processes import run_together

WORLD = 2
SIZES: dict[str, Any] = {"B": 2, "T": 5, "H": 4, "D": 4, "V": 3}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"mean_decay": None, "alpha": False, "beta": False},
    "everything": {
        "Hkv": 2, "gate": True, "state": True, "ridge": "token", "ridge_offset": 0.1, "qk_l2norm": True,
    },
    "one key/value head": {"Hkv": 1, "ridge": "head", "ridge_offset": 0.1, "gate": True, "dt_bias": False},
    "packed": {"B": 1, "T": 5, "seq_lengths": [2, 0, 3], "state": True},
}  # fmt: skip
RUNS: dict[str, Callable[..., Outputs]] = {"chunk_gka": run_gka, "chunk_solve": run_solve}

ROUNDING = 1e-12
"""The same sums on fewer rows: what a CPU's matrix products may round otherwise, times the condition of the solve."""


FP32 = 1e-5
"""Likewise in fp32: sums over the batch in another order."""

FP16 = torch.finfo(torch.float16).eps
"""What differs by FP32, rounded."""


def problem(options: str, **changes: Any) -> Problem:
    return make_problem(**SIZES | OPTIONS[options] | changes, dtype=torch.float64)


def heads_dim(name: str, t: Tensor) -> int:
    return 0 if t.ndim == 1 else 1 if name.startswith("initial") or name in ("final_kk", "final_kv") else 2


def placements(name: str, t: Tensor, kinds: tuple[str, ...], p: Problem) -> list[Placement]:
    """Shard what can be: batch rows, or heads."""
    found: list[Placement] = []
    for kind in kinds:
        if kind == "batch" and t.ndim > 1:
            found.append(Shard(0))
        elif kind == "heads" and not (name in ("k", "v") and p.k.shape[2] == 1):
            found.append(Shard(heads_dim(name, t)))
        else:
            found.append(Replicate())
    return found


def distributed(p: Problem, mesh: Any, kinds: tuple[str, ...], only: tuple[str, ...] = ()) -> Problem:
    """``p`` on a mesh whose dimensions divide ``kinds``; all but ``only`` is on every rank, if given."""

    def place(name: str, t: Tensor) -> Tensor:
        wanted = placements(name, t, kinds, p) if not only or name in only else [Replicate()] * mesh.ndim
        return distribute_tensor(t, mesh, wanted)

    q = p.map(place)
    if p.cu_seqlens is not None:
        q = q.replace({"cu_seqlens": distribute_tensor(p.cu_seqlens, mesh, [Replicate()] * mesh.ndim)})
    return q


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def like_one_process(
    op: str, options: str, shape: tuple[int, ...], kinds: tuple[str, ...], only: tuple[str, ...] = ()
) -> None:
    p, run = problem(options), partial(RUNS[op], num_iter=6)
    upstream = cotangents(run(p))
    expected = evaluate(run, p, upstream)
    mesh = init_device_mesh("cpu", shape)

    p = distributed(p, mesh, kinds, only).requiring_grad()
    leaves, outputs = p.leaves(), run(p)
    for name, t in outputs.items():
        divided = [kind for kind in kinds if kind != "replicate"]
        assert isinstance(t, DTensor)
        assert t.to_local().numel() * (WORLD if divided else 1) == t.numel(), name  # nothing was gathered
        assert norm_error(whole(t), expected.outputs[name]) <= ROUNDING, name
    upstream = {n: distribute_tensor(t, mesh, outputs[n].placements) for n, t in upstream.items()}  # type: ignore[attr-defined]
    gradients = torch.autograd.grad(
        list(outputs.values()), list(leaves.values()), list(upstream.values()), materialize_grads=True
    )
    for name, gradient in zip(leaves, gradients, strict=True):
        got = whole(gradient)
        got = (got + got.mT) / 2 if name == "initial_kk" else got
        assert norm_error(got, expected.gradients[name]) <= ROUNDING, name


def upstream_elsewhere(op: str) -> None:
    """The gradient that comes in is divided along T, or a sum over ranks: it is redistributed, never an error."""
    p, run = problem("everything"), partial(RUNS[op], num_iter=6)
    upstream = cotangents(run(p))
    (first, *_) = upstream
    upstream = {first: upstream[first]}
    expected = evaluate(run, p, upstream)
    mesh = init_device_mesh("cpu", (WORLD,))
    for placement in (Shard(1), Shard(0), Replicate()):
        own = distributed(p, mesh, ("heads",)).requiring_grad()
        cotangent = distribute_tensor(upstream[first], mesh, [placement])
        gradient = torch.autograd.grad(run(own)[first], own.k, cotangent)
        assert norm_error(whole(gradient[0]), expected.gradients["k"]) <= ROUNDING


def decode(kinds: tuple[str, ...], shape: tuple[int, ...]) -> None:
    p = problem("everything", T=1, state=False)

    def run(p: Problem, state: GKAState) -> Tensor:
        return gka_ops.recurrent_gka(
            p.q, p.k, p.v, p.log_decay, p.alpha, p.beta, state=state, qk_l2norm=True, num_iter=6
        )

    B, _, H, D = p.q.shape
    parts = [torch.randn(B, H, D, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (D, 3)]
    kk, kv = parts[0] @ parts[0].mT, parts[1]
    state = GKAState(kk.clone(), kv.clone())
    expected = run(p, state)
    mesh = init_device_mesh("cpu", shape)
    p = distributed(p, mesh, kinds)
    own = GKAState(*(distribute_tensor(t, mesh, placements("final_kk", t, kinds, p)) for t in (kk, kv)))
    assert norm_error(whole(run(p, own)), expected) <= ROUNDING
    for part, advanced in zip(own, state, strict=True):
        assert norm_error(whole(part), advanced) <= ROUNDING

    moved = GKAState(*(distribute_tensor(t, mesh, [Replicate()] * mesh.ndim) for t in (kk, kv)))
    refused(lambda: run(p, moved), "expected q to be sharded as kk is, over nothing")
    mixed = GKAState(own.kk, moved.kv)
    refused(lambda: run(p, mixed), "expected state.kk and state.kv with the same placements|sharded as kk is")


def refused(function: Callable[[], Any], message: str) -> None:
    """PyTorch wraps what a sharding rule raises in a RuntimeError, with its text."""
    with pytest.raises((ValueError, RuntimeError), match=message):
        function()


def impossible() -> None:
    mesh = init_device_mesh("cpu", (WORLD,))

    def run(p: Problem, **where: Placement) -> Any:
        def place(name: str, t: Tensor) -> Tensor:
            return distribute_tensor(t, mesh, [where.get(name, Replicate())])

        moved = p.map(place)
        if p.cu_seqlens is not None:
            moved = moved.replace({"cu_seqlens": distribute_tensor(p.cu_seqlens, mesh, [Replicate()])})
        return run_gka(moved, num_iter=2)

    p = problem("everything")
    tokens = r"chunk_gka: expected q \[2, 5, 4, 4\] to be Shard\(0\) \(batch\) or Shard\(2\) \(heads\) or Replicate\(\)"
    refused(lambda: run(p, q=Shard(1)), tokens + r", got Shard\(1\); call q.redistribute")
    refused(lambda: run(p, q=Shard(3)), tokens + r", got Shard\(3\)")
    refused(lambda: run(p, log_decay=Shard(1)), r"expected log_decay .* got Shard\(1\)")
    refused(lambda: run(p, initial_kk=Shard(2)), r"expected initial_kk .* got Shard\(2\)")
    odd = problem("everything", H=6, Hkv=3)
    groups = r"expected a number of key/value heads \(of 6 query heads\) that the 2 ranks can share evenly"
    refused(lambda: run(odd, q=Shard(2)), groups)
    refused(lambda: run(odd, A_log=Shard(0)), groups)
    refused(lambda: run(problem("everything", B=3), q=Shard(0)), "number of batch rows that the 2 ranks can share")
    refused(lambda: run(problem("packed"), initial_kk=Shard(0)), "no argument sharded over the batch with cu_seqlens")
    one = problem("one key/value head")
    refused(lambda: run(one, k=Shard(2)), r"expected k .* to be Shard\(0\) \(batch\) or Replicate\(\), got Shard\(2\)")


def optional_tensors_apart() -> None:
    """Calls that differ by nothing but which of two like tensors is absent."""
    mesh, run = init_device_mesh("cpu", (WORLD,)), partial(run_gka, num_iter=6)
    for absent in ("alpha", "beta", "log_decay"):
        p = problem("everything", gate=False).replace({absent: None})
        upstream = {"output": cotangents(run(p))["output"]}
        expected = evaluate(run, p, upstream)
        own = distributed(p, mesh, ("heads",)).requiring_grad()
        output = run(own)["output"]
        output.backward(distribute_tensor(upstream["output"], mesh, [Shard(2)]))
        for name in ("alpha", "beta", "log_decay"):
            leaf = getattr(own, name)
            assert leaf is None or norm_error(whole(leaf.grad), expected.gradients[name]) <= ROUNDING, (absent, name)


def sixteen_bits(impl: str, kind: str) -> None:
    """With every residual: x̂ and its scales, and the kernels' states at slab starts (under Triton's interpreter)."""
    p = make_problem(
        B=2, T=20, H=2, D=16, V=16, gate=True, state=True, ridge="head", qk_l2norm=True, dtype=torch.float16
    )
    run = partial(run_gka, num_iter=3, impl=impl)
    upstream = cotangents(run(p))
    expected = evaluate(run, p, upstream)
    mesh = init_device_mesh("cpu", (WORLD,))
    own = distributed(p, mesh, (kind,)).requiring_grad()
    leaves, outputs = own.leaves(), run(own)
    placed = [distribute_tensor(upstream[n], mesh, t.placements) for n, t in outputs.items()]  # type: ignore[attr-defined]
    found = torch.autograd.grad(list(outputs.values()), list(leaves.values()), placed, materialize_grads=True)
    for name, t in outputs.items():
        assert norm_error(whole(t).detach(), expected.outputs[name]) <= FP32, name
    for name, gradient in zip(leaves, found, strict=True):
        got = whole(gradient)
        got = (got + got.mT) / 2 if name == "initial_kk" else got
        assert norm_error(got, expected.gradients[name]) <= (FP32 if got.dtype == torch.float32 else FP16), name


def modifiers() -> None:
    """Of numbers alone; with indices or tensors of its own, a modifier raises."""
    p = problem("plain")
    mesh = init_device_mesh("cpu", (WORLD,))
    own, bias = distributed(p, mesh, ("heads",)), torch.full((4,), 0.1)

    def run(p: Problem, **mods: Any) -> Tensor:
        return gka_ops.chunk_gka(p.q, p.k, p.v, num_iter=6, **mods).output

    mods = {"ridge_mod": lambda fro, b, h, t: 0.1 * fro + 0.2, "query_mod": lambda q, b, h, t: torch.sin(q)}
    assert norm_error(whole(run(own, **mods)), run(p, **mods)) <= ROUNDING
    refused(lambda: run(own, ridge_mod=lambda fro, b, h, t: bias[h] * fro), "mixed torch.Tensor and DTensor")
    refused(lambda: run(own, query_mod=lambda q, b, h, t: q * bias[h]), "mixed torch.Tensor and DTensor")


def compiled() -> None:
    """A graph of DTensors, forward and backward, without a break."""
    p, run = problem("everything", ridge="constant"), partial(run_gka, num_iter=6)  # a tensor's minimum breaks graphs
    upstream = {"output": cotangents(run(p))["output"]}
    expected = evaluate(run, p, upstream)
    mesh = init_device_mesh("cpu", (WORLD,))
    own = distributed(p, mesh, ("heads",)).requiring_grad()

    @partial(torch.compile, backend="aot_eager", fullgraph=True)
    def function(*tensors: Tensor) -> Tensor:
        return run(own.replace(dict(zip(own.leaves(), tensors, strict=True))))["output"]

    output = function(*own.leaves().values())
    assert norm_error(whole(output), expected.outputs["output"]) <= ROUNDING
    output.backward(distribute_tensor(upstream["output"], mesh, output.placements))  # type: ignore[attr-defined]
    for name, leaf in own.leaves().items():
        got = whole(leaf.grad)  # type: ignore[arg-type]
        got = (got + got.mT) / 2 if name == "initial_kk" else got
        assert norm_error(got, expected.gradients[name]) <= ROUNDING, name


CASES: dict[str, Callable[..., None]] = {
    "impossible": impossible,
    "optional tensors apart": optional_tensors_apart,
    "modifiers": modifiers,
    "compiled": compiled,
}
for _op in RUNS:
    for _options in OPTIONS:
        for _kind in ("replicate", "batch", "heads"):
            if (_options, _kind) != ("packed", "batch"):
                CASES[f"{_op}, {_options}, {_kind}"] = partial(like_one_process, _op, _options, (WORLD,), (_kind,))
    for _shape in ((WORLD, 1), (1, WORLD)):
        CASES[f"{_op}, mesh {_shape}"] = partial(like_one_process, _op, "everything", _shape, ("batch", "heads"))
    CASES[f"{_op}, only q is divided"] = partial(like_one_process, _op, "everything", (WORLD,), ("heads",), ("q",))
    CASES[f"{_op}, only a gate is"] = partial(like_one_process, _op, "everything", (WORLD,), ("heads",), ("A_log",))
    CASES[f"{_op}, upstream elsewhere"] = partial(upstream_elsewhere, _op)
for _impl in ("reference", "triton"):
    for _kind in ("batch", "heads"):
        CASES[f"16 bits, {_impl}, {_kind}"] = partial(sixteen_bits, _impl, _kind)
for _kinds, _mesh in ((("heads",), (WORLD,)), (("batch",), (WORLD,)), (("batch", "heads"), (1, WORLD))):
    CASES[f"decode, {' and '.join(_kinds)}"] = partial(decode, _kinds, _mesh)


@pytest.fixture(scope="module")
def failures() -> dict[str, str | None]:
    """All cases in one group of processes: to start them takes longer than the cases."""
    return dict(zip(CASES, run_together(WORLD, list(CASES.values())), strict=True))


@pytest.mark.supports("DTensor")
@pytest.mark.parametrize("case", CASES)
def test_in_two_processes(failures: dict[str, str | None], case: str) -> None:
    if "triton" in case and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs Triton's interpreter, which tests/conftest.py sets where there is no card")
    assert failures[case] is None, failures[case]
