"""Results that are the same bit for bit: from run to run, on any stream, in any company, and in a CUDA graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gka_ops
from tests.helpers.graphs import captured
from tests.helpers.problems import (
    Evaluation,
    Outputs,
    Problem,
    cotangents,
    evaluate,
    make_problem,
    norm_error,
    run_gka,
    unit_roundoff,
)

pytestmark = pytest.mark.gpu

LENGTHS = (130, 64, 1, 75)


def problem(**options: Any) -> Problem:
    options = {"T": 200, "H": 4, "Hkv": 2, "D": 64, "V": 64, "dtype": torch.bfloat16, "device": "cuda", **options}
    return make_problem(qk_l2norm=True, **options)


def run(p: Problem) -> Outputs:
    return run_gka(p, num_iter=30, impl="triton")


def upstream_of(p: Problem) -> Outputs:
    with torch.no_grad():
        return cotangents(run(p))


def named(result: Evaluation) -> dict[str, Tensor]:
    return result.outputs | {f"d_{name}": gradient for name, gradient in result.gradients.items()}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def disturb(seed: int) -> None:
    """Other work, still running when this returns, and memory of another past: freed blocks full of NaN."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
        for _ in range(10):
            a = a @ a
    blocks = [torch.full((1 + 4099 * (i + seed) % 100_000,), float("nan"), device="cuda") for i in range(50)]
    del blocks[seed % 2 :: 2]


@pytest.mark.parametrize(
    "options", [{}, {"seq_lengths": LENGTHS, "state": True}, {"ridge": "token", "ridge_offset": 0.01, "gate": True}],
    ids=["dense", "packed", "gates"],
)  # fmt: skip
def test_runs_repeat(options: dict[str, Any]) -> None:
    p = problem(**options)
    upstream = upstream_of(p)
    expected = named(evaluate(run, p, upstream))
    assert all(bool(t.isfinite().all()) for t in expected.values())
    for seed in range(4):
        disturb(seed)
        assert_equal(named(evaluate(run, p, upstream)), expected)


def decode(p: Problem, state: gka_ops.GKAState) -> Tensor:
    return gka_ops.recurrent_gka(
        p.q, p.k, p.v, p.log_decay, p.alpha, p.beta, state=state, num_iter=30, qk_l2norm=True,
        gate=None if p.A_log is None else gka_ops.DecayGate(p.A_log, p.dt_bias), impl="triton",
    )  # fmt: skip


def fresh_state(p: Problem) -> gka_ops.GKAState:
    assert p.initial_kk is not None and p.initial_kv is not None
    return gka_ops.GKAState(p.initial_kk.clone(), p.initial_kv.clone())


def decoding_problem(B: int = 128) -> Problem:
    return problem(B=B, T=1, H=8, gate=True, state=True)


def test_decode_repeats_and_ignores_the_rest_of_the_batch() -> None:
    p = decoding_problem()
    state = fresh_state(p)
    expected = decode(p, state)
    for seed in range(4):
        disturb(seed)
        again = fresh_state(p)
        assert torch.equal(decode(p, again), expected)
        assert_equal(again._asdict(), state._asdict())
    one = p.map(lambda _, t: t[77:78] if t.ndim >= 3 else t)
    alone = fresh_state(one)
    assert torch.equal(decode(one, alone), expected[77:78])
    for part, whole in zip(alone, state, strict=True):
        assert torch.equal(part, whole[77:78])


def test_a_sequence_alone_equals_itself_in_a_batch() -> None:
    p = problem(B=4, state=True)
    upstream = upstream_of(p)
    whole = named(evaluate(run, p, upstream))
    one = p.map(lambda _, t: t[2:3])
    alone = named(evaluate(run, one, {name: t[2:3] for name, t in upstream.items()}))
    assert_equal(alone, {name: t[2:3] for name, t in whole.items()})


def test_a_head_ignores_the_other_heads() -> None:
    p = problem(state=True)
    upstream = upstream_of(p)
    other = problem(state=True, seed=5)
    # Query heads 0 and 1 read key and value head 0, the first half of every tensor along its heads.
    axis = {"initial_kk": 1, "initial_kv": 1, "final_kk": 1, "final_kv": 1}

    def first_half(name: str, t: Tensor) -> Tensor:
        dim = axis.get(name.removeprefix("d_"), 2)
        return t.narrow(dim, 0, t.shape[dim] // 2)

    second = {n: t.narrow(axis.get(n, 2), t.shape[axis.get(n, 2)] // 2, t.shape[axis.get(n, 2)] // 2)
              for n, t in other.leaves().items()}  # fmt: skip
    mixed = p.map(lambda n, t: torch.cat([first_half(n, t), second[n]], axis.get(n, 2)))
    expected, actual = named(evaluate(run, p, upstream)), named(evaluate(run, mixed, upstream))
    assert_equal({n: first_half(n, t) for n, t in actual.items()}, {n: first_half(n, t) for n, t in expected.items()})
    assert not torch.equal(actual["output"], expected["output"])


def piece_of(p: Problem, upstream: Outputs, n: int) -> tuple[Problem, Outputs, slice]:
    """Sequence n of a packed problem by itself, its upstream gradients, and its tokens."""
    tokens = slice(sum(LENGTHS[:n]), sum(LENGTHS[: n + 1]))
    piece = p.tokens(tokens.start, tokens.stop).map(lambda name, t: t[n : n + 1] if name.startswith("initial") else t)
    return piece, {k: t[:, tokens] if k == "output" else t[n : n + 1] for k, t in upstream.items()}, tokens


def of_piece(whole: dict[str, Tensor], n: int, tokens: slice) -> dict[str, Tensor]:
    return {k: t[n : n + 1] if "final" in k or "initial" in k else t[:, tokens] for k, t in whole.items()}


@pytest.mark.parametrize("n", range(len(LENGTHS)))
def test_a_packed_sequence_alone_equals_itself_in_a_pack(n: int) -> None:
    p = problem(seq_lengths=LENGTHS, state=True)
    upstream = upstream_of(p)
    whole = named(evaluate(run, p, upstream))
    piece, piece_upstream, tokens = piece_of(p, upstream, n)
    packed = piece.replace({"cu_seqlens": torch.tensor([0, LENGTHS[n]], device=p.q.device, dtype=torch.int32)})
    expected = of_piece(whole, n, tokens)
    assert_equal(named(evaluate(run, packed, piece_upstream)), expected)
    # Without boundaries another kernel is compiled: the same arithmetic, which a compiler may order otherwise.
    dense = named(evaluate(run, piece, piece_upstream))
    for name, value in expected.items():
        if name == "d_log_decay":  # of a first token, and with one token of all, 0 in exact arithmetic without a state
            continue
        assert norm_error(dense[name], value) <= unit_roundoff(torch.bfloat16), name


def test_another_split_of_the_states_is_no_more_than_a_rounding() -> None:
    """The state pass cuts a state into as many column blocks as fill the card. What enters a column is the same; a
    block of U has a power of two of its own as its unit, so entries that fp16 underflows beside it differ."""
    p = problem(B=64, state=True)
    upstream = upstream_of(p)
    whole = named(evaluate(run, p, upstream))
    one = p.map(lambda _, t: t[2:3])
    alone = named(evaluate(run, one, {name: t[2:3] for name, t in upstream.items()}))
    for name, value in alone.items():
        assert norm_error(value, whole[name][2:3]) <= unit_roundoff(torch.bfloat16), name


def test_a_side_stream() -> None:
    p = problem(seq_lengths=LENGTHS, state=True)
    upstream = upstream_of(p)
    expected = named(evaluate(run, p, upstream))
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    scaled = p.map(lambda name, t: t * 2 if name == "v" else t)
    for _ in range(3):
        disturb(0)
        restored = scaled.map(lambda name, t: t / 2 if name == "v" else t)  # pending on the main stream
        side.wait_stream(main)
        with torch.cuda.stream(side):
            result = named(evaluate(run, restored, upstream))
        main.wait_stream(side)
        assert_equal(result, expected)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["dense", "packed"])
def test_a_graph_of_the_forward_replays(lengths: tuple[int, ...] | None) -> None:
    p, other = (problem(T=sum(LENGTHS), seq_lengths=lengths, state=True, seed=seed) for seed in (0, 1))
    if lengths is not None:
        assert other.cu_seqlens is not None
        other.cu_seqlens.copy_(torch.tensor([0, 3, 70, 200, sum(LENGTHS)]))
    with torch.no_grad():
        expected = run(other)
        graph, result = captured(lambda: run(p))
        for name, leaf in p.leaves().items():
            leaf.copy_(other.leaves()[name])
        if p.cu_seqlens is not None and other.cu_seqlens is not None:
            p.cu_seqlens.copy_(other.cu_seqlens)
        for _ in range(2):
            graph.replay()
            assert_equal(result, expected)


def test_a_graph_of_the_decode_step_replays() -> None:
    p = decoding_problem()
    eager, static = fresh_state(p), fresh_state(p)
    steps = [decoding_problem().replace({"q": p.q.flip(i), "k": p.k.roll(i + 1, 0)}) for i in range(3)]
    graph, output = captured(lambda: decode(p, static))
    for part, initial in zip(static, fresh_state(p), strict=True):
        part.copy_(initial)
    for step in steps:
        p.q.copy_(step.q)
        p.k.copy_(step.k)
        graph.replay()
        assert torch.equal(output, decode(step, eager))
        assert_equal(static._asdict(), eager._asdict())
