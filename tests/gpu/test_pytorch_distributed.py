"""Several cards, streams and threads, graphs, sizes beyond 2³¹ elements, and DTensors, on the card."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

import gka_ops
import gka_ops.distributed
from gka_ops import GKAState
from tests.contract.test_dtensor import distributed, whole
from tests.helpers.graphs import captured
from tests.helpers.layers import gradients, make_input, make_layer
from tests.helpers.problems import (
    Problem,
    cotangents,
    evaluate,
    make_problem,
    norm_error,
    run_gka,
    run_solve,
    unit_roundoff,
)
from tests.helpers.processes import run_together

pytestmark = pytest.mark.gpu

SIZES: dict[str, Any] = {
    "B": 2, "T": 200, "H": 4, "Hkv": 2, "D": 64, "V": 64, "dtype": torch.bfloat16, "qk_l2norm": True, "gate": True,
    "state": True,
}  # fmt: skip
run = partial(run_gka, num_iter=20, impl="triton")

ROUNDING = unit_roundoff(torch.bfloat16)
"""Of a call whose programs are cut otherwise, which moves states to and from slab starts: less than this."""


def several_cards() -> pytest.MarkDecorator:
    return pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two cards")


def on(device: str, **options: Any) -> Problem:
    return make_problem(**SIZES | options, device=device)


def results(p: Problem) -> dict[str, Tensor]:
    upstream = cotangents({"output": torch.empty_like(p.q)})
    found = evaluate(run, p, upstream)
    return {**found.outputs, **{f"d_{name}": t for name, t in found.gradients.items()}}


def decode(p: Problem, state: GKAState, indices: Tensor | None = None) -> Tensor:
    return gka_ops.recurrent_gka(
        p.q, p.k, p.v, state=state, state_indices=indices, qk_l2norm=True, num_iter=20, impl="triton"
    )


# ------------------------------------------------------------------------------------------------------- several cards
@several_cards()
@pytest.mark.supports("multi-device")
def test_tensors_of_another_card_than_the_current_one() -> None:
    """Forward, backward, decode; first calls, recorded calls and replayed calls alike."""
    expected = results(on("cuda:0"))
    p = on("cuda:1")
    assert torch.cuda.current_device() == 0
    for _ in range(4):
        for name, t in results(p).items():
            assert t.device == p.q.device, name
            assert torch.equal(t.to("cuda:0"), expected[name]), name
        assert torch.cuda.current_device() == 0
    with torch.no_grad():
        for _ in range(4):
            outputs = []
            for device in ("cuda:0", "cuda:1"):
                one = on(device, T=1, gate=False, mean_decay=None, alpha=False, beta=False)
                state = GKAState(one.initial_kk.clone(), one.initial_kv.clone())  # type: ignore[union-attr]
                outputs.append([decode(one, state), *state])
            for a, b in zip(*outputs, strict=True):
                assert torch.equal(a, b.to("cuda:0"))


@several_cards()
@pytest.mark.supports("multi-device")
def test_the_current_stream_is_that_of_the_tensors_card() -> None:
    p = on("cuda:1")
    expected = results(p)
    for _ in range(3):
        with torch.cuda.device(1):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            torch.cuda.set_stream(stream)
        try:
            with torch.cuda.device(1):
                torch.cuda._sleep(10_000_000)
            q = p.q + 0  # behind the sleep on the same stream
            actual = results(p.replace({"q": q}))
        finally:
            with torch.cuda.device(1):
                torch.cuda.set_stream(torch.cuda.default_stream(1))
        stream.synchronize()
        for name, t in actual.items():
            assert torch.equal(t, expected[name]), name


@several_cards()
@pytest.mark.supports("multi-device")
def test_tensors_of_two_cards_are_refused() -> None:
    p = on("cuda:0")
    with pytest.raises(ValueError, match=r"expected k on the device of q, cuda:0, got cuda:1"):
        run(p.replace({"k": p.k.to("cuda:1")}))


# ------------------------------------------------------------------------------------------------- streams and threads
@pytest.mark.supports("multi-stream and multi-thread")
@pytest.mark.parametrize("recorded", [False, True], ids=["first calls", "known calls"])
def test_threads_with_streams_of_their_own(recorded: bool) -> None:
    """Forward and backward in several threads at once, with shapes that some of them share."""
    from gka_ops.triton import launcher

    threads = 4
    problems = [on("cuda", seed=i, T=(100, 200)[i % 2]) for i in range(threads)]
    for _ in range(3):
        expected = [results(p) for p in problems]
    if not recorded:
        launcher.forget()
    torch.cuda.synchronize()
    failures: list[str] = []
    start = threading.Barrier(threads)

    def work(i: int) -> None:
        start.wait()
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(10):
                    actual = results(problems[i])
                    torch.cuda.current_stream().synchronize()
                    failures.extend(n for n, t in actual.items() if not torch.equal(t, expected[i][n]))
        except Exception as error:
            failures.append(repr(error))

    running = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not failures


@pytest.mark.supports("multi-stream and multi-thread")
def test_streams_side_by_side() -> None:
    """Two streams in one thread: workspaces and outputs of one are not given to the other before it is done."""
    problems = [on("cuda", seed=i) for i in range(2)]
    for _ in range(3):
        expected = [results(p) for p in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    actual: list[dict[str, Tensor]] = []
    for _ in range(5):
        actual.clear()
        for p, stream in zip(problems, streams, strict=True):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(2_000_000)
                actual.append(results(p))
        torch.cuda.synchronize()
        for found, wanted in zip(actual, expected, strict=True):
            for name, t in found.items():
                assert torch.equal(t, wanted[name]), name


# --------------------------------------------------------------------------------------------------------------- graphs
@pytest.mark.supports("manual CUDA graph capture")
def test_capture_of_forward_and_backward_neither_waits_nor_allocates() -> None:
    """In the strict capture mode a wait for the device or a ``cudaMalloc`` is an error; a replay needs no memory."""
    p = on("cuda").requiring_grad()
    leaves = list(p.leaves().values())

    def step() -> list[Tensor]:
        output = run(p)["output"]
        return [output, *torch.autograd.grad(output, leaves, torch.ones_like(output))]

    expected = [t.clone() for t in step()]
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph, outputs = captured(step)
    for t in outputs:
        t.detach().zero_()
    before = torch.cuda.memory_stats()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    for counter in ("allocation.all.allocated", "num_alloc_retries", "segment.all.allocated"):
        assert after[counter] == before[counter], counter
    for t, wanted in zip(outputs, expected, strict=True):
        assert torch.equal(t, wanted)


@pytest.mark.supports("manual CUDA graph capture")
def test_capture_of_decode() -> None:
    p = on("cuda", T=1, gate=False, mean_decay=None, alpha=False, beta=False)
    assert p.initial_kk is not None and p.initial_kv is not None
    state = GKAState(p.initial_kk.clone(), p.initial_kv.clone())
    with torch.no_grad():
        expected = [decode(p, state).clone() for _ in range(3)]
        final = [part.clone() for part in state]
        graph, output = captured(lambda: decode(p, state))
        for part, first in zip(state, (p.initial_kk, p.initial_kv), strict=True):
            part.copy_(first)
        for wanted in expected:
            graph.replay()
            assert torch.equal(output, wanted)
    assert all(map(torch.equal, state, final))


# ---------------------------------------------------------------------------------------------- beyond 2^31 elements
def needs_memory(gib: int) -> None:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free memory, has {free / 2**30:.0f}")


@pytest.mark.supports("more than 2^31 elements")
def test_queries_beyond_int32() -> None:
    """The last batch row of a call with more than 2³¹ elements in q, x and dq is what it is alone."""
    needs_memory(70)
    B, T, H, Hkv, D, V = 8, 131136, 16, 2, 128, 64
    assert B * T * H * D > 2**31
    torch.manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype)

    q, k, v = random(B, T, H, D), random(B, T, Hkv, D), random(B, T, Hkv, V)
    log_decay = -0.02 * torch.rand(B, T, H, device="cuda")
    upstream = random(B, T, H, V)

    def row(i: slice) -> list[Tensor]:
        leaves = [t[i].detach().requires_grad_() for t in (q, k, v, log_decay)]
        output = gka_ops.chunk_gka(*leaves, num_iter=8, qk_l2norm=True, impl="triton").output
        found = torch.autograd.grad(output, leaves, upstream[i])
        return [t[-1].detach().cpu() for t in (output, *found)]

    together, alone = row(slice(0, B)), row(slice(B - 1, B))
    for name, a, b in zip(("output", "dq", "dk", "dv", "d_log_decay"), together, alone, strict=True):
        assert b.any(), name
        errors = (a.float() - b.float()).norm(dim=-1) / b.float().norm(dim=-1).mean()
        assert float(errors[-1024:].max()) <= 0.05, name  # the end, whose offsets are largest
        assert float(errors.mean()) <= ROUNDING, name


@pytest.mark.supports("more than 2^31 elements")
def test_a_pool_beyond_int32() -> None:
    """Decode in the last slots of a pool of more than 2³¹ elements equals decode in a pool of two."""
    needs_memory(24)
    p = on("cuda", T=1, H=16, Hkv=2, D=128, V=128, gate=False, mean_decay=None, alpha=False, beta=False)
    slots = 2**31 // (16 * 128 * 128) + 3
    assert p.initial_kk is not None and p.initial_kv is not None
    small = GKAState(p.initial_kk.clone(), p.initial_kv.clone())
    pool = GKAState(*(torch.zeros(slots, *t.shape[1:], device="cuda") for t in small))
    indices = torch.tensor([slots - 1, slots - 2], device="cuda")
    for part, first in zip(pool, small, strict=True):
        part[indices] = first
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(decode(p, pool, indices), decode(p, small))
    for part, wanted in zip(pool, small, strict=True):
        assert torch.equal(part[indices], wanted)
        assert not part[: slots - 2].any()


# -------------------------------------------------------------------------------------------------------------- DTensor
def sharded_like_one_card(op: Callable[..., Any], world: int, kind: str) -> None:
    """With the residuals at slab starts, whose number is that of the local problem."""
    single = partial(op, num_iter=20, impl="triton")
    p = on("cuda", B=4, T=4096, dtype=torch.float32, D=32, V=32)
    upstream = cotangents(single(p))
    expected = evaluate(single, p, upstream)
    mesh = init_device_mesh("cuda", (world,))
    own = distributed(p, mesh, (kind,)).requiring_grad()
    outputs = single(own)
    for name, t in outputs.items():
        assert isinstance(t, DTensor)
        assert norm_error(whole(t).detach(), expected.outputs[name]) <= 1e-4, name
    placed = [distribute_tensor(upstream[n], mesh, t.placements) for n, t in outputs.items()]  # type: ignore[attr-defined]
    found = torch.autograd.grad(list(outputs.values()), list(own.leaves().values()), placed, materialize_grads=True)
    for name, gradient in zip(own.leaves(), found, strict=True):
        got = whole(gradient)
        got = (got + got.mT) / 2 if name == "initial_kk" else got
        assert norm_error(got, expected.gradients[name]) <= 1e-3, name


def tensor_parallel(world: int) -> None:
    layer = make_layer(torch.float32, num_heads=4, num_kv_heads=2, num_iter=20, tol=1e-4).cuda()
    x = make_input(2, 100, torch.float32).cuda()
    expected, output = gradients_on_card(layer, x), layer(x).detach()
    mesh = init_device_mesh("cuda", (world,))
    parallelize_module(layer, mesh, gka_ops.distributed.tensor_parallel_plan(layer))
    assert norm_error(layer(x).detach(), output) <= 1e-4
    for name, gradient in gradients_on_card(layer, x).items():
        assert norm_error(whole(gradient), expected[name]) <= 1e-3, name


def gradients_on_card(layer: Any, x: Tensor) -> dict[str, Tensor]:
    return gradients(layer, x, lambda x: layer(x).cpu())


def check_together(world: int) -> None:
    functions: list[Callable[..., None]] = [
        partial(sharded_like_one_card, op, world, kind) for op in (run_gka, run_solve) for kind in ("batch", "heads")
    ]
    failures = run_together(world, [*functions, partial(tensor_parallel, world)], backend="nccl")
    assert not any(failures), "\n".join(filter(None, failures))


@pytest.mark.supports("DTensor")
def test_dtensor_on_one_card() -> None:
    check_together(1)


@several_cards()
@pytest.mark.supports("DTensor")
def test_dtensor_on_two_cards() -> None:
    check_together(2)
