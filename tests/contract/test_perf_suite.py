"""The registry, what cases cost, what is checked before it is timed, and how samples are taken: without a card."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gka_ops_perf import cases, costs, cpu, measure, providers, records, timing
from gka_ops_perf import suite as suites
from gka_ops_perf.cases import GKA, VANILLA, Case
from gka_ops_perf.costs import Cost, Shape
from gka_ops_perf.measure import EAGER, KERNEL, InaccurateError
from gka_ops_perf.providers import Job, UnavailableError
from gka_ops_perf.records import Estimate, Measurement
from gka_ops_perf.timing import Clocks, Prepared, UnstableError

ONE = Shape(B=1, T=1, H=1, Hkv=1, D=128, V=128)


# ----------------------------------------------------------------------------------------------------- registry, costs
def test_the_registry() -> None:
    every = cases.cases()
    names = [case.name for case in every]
    assert len(set(names)) == len(names)
    assert {case.op for case in every} == {"chunk_gka", "chunk_solve", "recurrent_gka", "layer", "model"}
    lengths = {case.shape.T for case in every if case.op == "chunk_gka"}
    assert (min(lengths), max(lengths)) == (2048, 131072)
    assert {case.shape.B for case in every if case.stage == "decode"} >= {1, 64, 512}
    quick = cases.cases("quick")
    assert 0 < len(quick) < len(every) and set(quick) < set(every)
    assert [case.provider for case in cases.cases(select="decode 7B N64")] == [GKA, VANILLA, "sdpa"]
    grouped = cases.groups(every)
    assert sum(map(len, grouped.values())) == len(every)
    assert all(case.group == name for name, group in grouped.items() for case in group)


def test_iterations() -> None:
    def of(provider: str, num_iter: int | None = None) -> int:
        return Case("chunk_gka", "forward", "7B", ONE, provider, num_iter=num_iter).iterations

    assert (of(GKA), of(VANILLA), of(GKA, 7)) == (24, 0, 7)


def test_costs_are_those_of_the_mathematics() -> None:
    """MATH.md §6 gives them for D = V = 128 and chunks of 64 tokens."""
    assert [round(costs.gka_forward(ONE, n).flops / 1e6, 2) for n in (20, 30)] == [1.49, 2.15]
    backward = [costs.gka_forward_backward(ONE, n).flops - costs.gka_forward(ONE, n).flops for n in (16, 26)]
    assert [flops / 1e6 for flops in backward] == pytest.approx([1.77, 2.43], abs=0.006)  # four more applications
    assert [round(costs.gka_decode(ONE, n).flops / 1e6, 2) for n in (20, 30)] == [0.82, 1.15]
    assert costs.gka_decode(ONE, 30).bytes == pytest.approx(8 * 128 * 256, rel=0.01)
    assert costs.attention_forward(ONE._replace(T=1000)).flops == pytest.approx(2 * 1000**2 * 128, rel=0.01)
    assert Cost(8.0, 6.0).floor_seconds(2.0, 3.0) == 4.0


def test_bytes_are_operands_and_results() -> None:
    shape = Shape(B=2, T=300, H=4, Hkv=2, D=32, V=32)
    inputs = providers.make_inputs(shape, device="cpu")
    size = sum(t.nbytes for t in inputs) + inputs.q.nbytes
    assert costs.gka_forward(shape, 24).bytes == size
    assert costs.gka_forward_backward(shape, 24).bytes == 3 * size
    x = 4 * shape.rows * shape.D
    operands = sum(t.nbytes for t in (inputs.q, inputs.k, inputs.log_decay, inputs.beta))
    assert costs.solve_forward(shape, 24).bytes == operands + x


# ----------------------------------------------------------------------------------------------- what is right is timed
def small(case: Case) -> Case:
    T = 1 if case.stage == "decode" else 200
    return dataclasses.replace(case, shape=Shape(B=2, T=T, H=4, Hkv=2, D=16, V=16, dtype="fp32"))


OURS = [
    case
    for case in {(c.op, c.stage, c.provider, c.num_iter): c for c in cases.cases()}.values()
    if case.provider in (GKA, VANILLA) and case.op not in ("layer", "model")
]


@pytest.mark.parametrize("case", OURS, ids=lambda case: case.name)
def test_our_calls_are_within_their_bars(case: Case) -> None:
    job = providers.job(small(case), "cpu")
    found = measure.checked(job)
    assert found and found.keys() == job.bars.keys()
    assert all(0 <= error <= job.bars[name] <= 2.1 for name, error in found.items())


def test_errors_shrink_with_the_iterations() -> None:
    sweep = sorted((case for case in OURS if case.label), key=lambda case: case.iterations)
    errors = [measure.checked(providers.job(small(case), "cpu"))["o"] for case in sweep]
    assert all(a > b for a, b in itertools.pairwise(errors)) and errors[-1] < 1e-3


@pytest.mark.parametrize("part", ["first", "gradient"])
def test_a_wrong_result_is_not_timed(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token's output, or one input's gradient, off by a twentieth."""
    chunk_gka = providers.gka_ops.chunk_gka

    def wrong(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **options: Any) -> Any:
        if options.get("impl") == "reference":
            return chunk_gka(q, k, v, *rest, **options)
        if part == "gradient":
            return chunk_gka(q, k, 1.05 * v - 0.05 * v.detach(), *rest, **options)
        found = chunk_gka(q, k, v, *rest, **options)
        return found._replace(output=found.output * torch.linspace(1.1, 1, q.shape[1])[:, None, None])

    monkeypatch.setattr(providers.gka_ops, "chunk_gka", wrong)
    case = next(c for c in OURS if (c.op, c.stage, c.provider) == ("chunk_gka", "forward + backward", GKA))
    with pytest.raises(InaccurateError, match="dv 5" if part == "gradient" else "o "):
        measure.checked(providers.job(small(case), "cpu"))


def test_nan_is_inaccurate() -> None:
    job = Job(lambda: None, lambda: {"o": float("nan")}, {"o": 1.0})
    with pytest.raises(InaccurateError):
        measure.checked(job)


def test_attention_is_causal() -> None:
    case = next(c for c in cases.cases() if (c.op, c.stage, c.provider) == ("chunk_gka", "forward", "sdpa"))
    output = providers.job(small(case), "cpu").run()
    q, k, v = (t.transpose(1, 2) for t in providers.make_inputs(small(case).shape, device="cpu")[:3])
    assert torch.allclose(output[:, :2, 0], v[:, :1, 0], atol=1e-6)  # the first token sees itself alone
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    last = (q[:, :, -1:] @ k.mT * 16**-0.5).softmax(-1) @ v
    assert torch.allclose(output[:, :, -1:], last, atol=1e-5)


def test_a_peer_that_is_not_installed() -> None:
    case = next(c for c in cases.cases() if c.provider == "fla simple_gla")
    try:
        import fla.ops.simple_gla  # noqa: F401
    except ImportError:
        with pytest.raises(UnavailableError, match="flash-linear-attention: No module named"):
            providers.job(small(case), "cpu")


# ------------------------------------------------------------------------------------------------------------- samples
def test_what_is_compared_takes_turns() -> None:
    seen: list[str] = []

    def measures(name: str) -> Callable[[], float]:
        def take() -> float:
            seen.append(name)
            return float(len(seen))

        return take

    samples = timing.in_turns({name: measures(name) for name in "abc"}, 2)
    assert "".join(seen) == "abccba" and samples == {"a": [1, 6], "b": [2, 5], "c": [3, 4]}


def test_rounds() -> None:
    assert timing.rounds_for(1e-9) == timing.rounds_for(1.0) == timing.ROUNDS.stop - 1
    assert timing.rounds_for(1e9) == timing.ROUNDS.start
    assert timing.rounds_for(timing.SECONDS * 1e3 / 10) == 10


def test_a_quick_call_beside_a_slow_one_is_replayed_more_often() -> None:
    slow, quick = timing.ROUNDS.start, timing.ROUNDS.stop - 1
    assert timing.replays_for(1e9, slow) == 1 and timing.replays_for(1.0, quick) == 1
    assert timing.replays_for(1.0, slow) == -(-quick // slow)


def test_samples_that_spread_are_refused() -> None:
    timing.check_spread([1.0, 1.01, 1.02], "a", 0.1)
    with pytest.raises(UnstableError, match="a: samples spread by 20% of their median, more than 10%"):
        timing.check_spread([0.8, 1.0, 1.2], "a", 0.1)


def test_the_card_s_state() -> None:
    state = timing.clocks(lambda fields: "1980, 2619, 54, 401.2, 0x0000000000000004")
    assert state == Clocks(1980, 2619, 54, 401.2, ())  # the power cap is no fault
    timing.check_clocks(state)
    timing.check_clocks(None)
    hot = timing.clocks(lambda fields: "1200, 2619, 91, 401.2, 0x0000000000000044")
    with pytest.raises(UnstableError, match="the card is throttling: hw_thermal_slowdown, 91 °C"):
        timing.check_clocks(hot)

    def absent(fields: str) -> str:
        raise FileNotFoundError("nvidia-smi")

    assert timing.clocks(absent) is None and timing.clocks(lambda fields: "[N/A], 1, 2, 3, 0x0") is None


class FakeTimer:
    """Takes the times, in ms, that a call returns."""

    def kernel(self, prepared: Prepared, replays: int = 1) -> float:
        return float(prepared.replay())

    def eager(self, prepared: Prepared) -> float:
        return 2 * float(prepared.eager())


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "clocks", lambda: None)
    monkeypatch.setattr(timing, "prepare", lambda run: Prepared(run, run, True))


GROUP = [Case("chunk_gka", "forward", "7B", ONE, provider) for provider in (GKA, VANILLA, "sdpa")]


def measured(monkeypatch: pytest.MonkeyPatch, job: Callable[[Case], Job]) -> dict[str, Any]:
    monkeypatch.setattr(measure, "job", job)
    timer: Any = FakeTimer()
    return {m.provider: m for m in measure.measure(GROUP, timer)}


def test_a_group_is_measured(no_card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(monkeypatch, lambda case: Job(lambda: 1 + case.iterations, lambda: {"o": 0.1}, {"o": 0.2}))
    assert [m.status for m in found.values()] == ["measured"] * 3
    assert found[GKA].figures[KERNEL].median == 25 and found[VANILLA].figures[EAGER].median == 2
    assert found[GKA].errors == {"o": 0.1} and found[GKA].tokens == 1 and found[GKA].flops > found[VANILLA].flops > 0


def test_a_case_does_not_cost_the_others(no_card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    times = itertools.cycle([1.0, 2.0, 3.0])

    def job(case: Case) -> Job:
        if case.provider == VANILLA:
            raise UnavailableError("refuses")
        if case.provider == "sdpa":
            return Job(lambda: 1.0, lambda: {"o": 0.3}, {"o": 0.2})
        return Job(lambda: next(times), dict, {})

    found = measured(monkeypatch, job)
    assert {name: m.status for name, m in found.items()} == {
        GKA: "unstable",
        VANILLA: "unavailable",
        "sdpa": "inaccurate",
    }
    assert found[VANILLA].reason == "refuses" and found["sdpa"].reason == "o 3.0e-01 > 2.0e-01"
    assert found["sdpa"].errors == {"o": 0.3} and "spread by" in found[GKA].reason

    def broken(case: Case) -> Job:
        raise RuntimeError("no kernel\nimage")

    assert measured(monkeypatch, broken)[GKA].reason == "RuntimeError: no kernel"


def test_nothing_is_measured_on_a_card_that_throttles(no_card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    hot = Clocks(1000, 1, 95, 400, ("hw_thermal_slowdown",))
    monkeypatch.setattr(timing, "clocks", lambda: hot)
    found = measured(monkeypatch, lambda case: Job(lambda: 1.0, dict, {}))
    assert {m.status for m in found.values()} == {"unstable"} and not found[GKA].figures


def test_pytest_benchmark_gets_kernel_times(monkeypatch: pytest.MonkeyPatch) -> None:
    fixture = pytest.importorskip("pytest_benchmark.fixture")
    assert fixture
    clock = timing.KernelClock()
    times = iter([0.1, 0.2, 0.4])
    clock._timer = FakeTimer()  # type: ignore[assignment]
    before = clock()
    clock.run(Prepared(lambda: next(times), lambda: None, True))
    assert clock() - before == pytest.approx(1e-4)
    clock.run(Prepared(lambda: next(times), lambda: None, True))
    assert clock() - before == pytest.approx(3e-4) and clock() == clock()


def test_what_is_measured_survives_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(group: list[Case], timer: Any) -> list[Measurement]:
        if group[0].shape.B == 2:
            raise KeyboardInterrupt
        return [
            Measurement(c.name, c.group, c.provider, "measured", figures={KERNEL: Estimate(1, 1, 1, 1)}) for c in group
        ]

    chosen = [Case("recurrent_gka", "decode", "7B", ONE._replace(B=B), GKA) for B in (1, 2, 3)]
    monkeypatch.setattr(suites, "cases", lambda suite, select: chosen)
    monkeypatch.setattr(suites, "compile_ahead", lambda *_: None)
    monkeypatch.setattr(timing, "Timer", FakeTimer)
    monkeypatch.setattr(measure, "measure", interrupted)
    found = list(suites._on_card("full", "", lambda *_: None))
    assert [m.status for m in found] == ["measured", "failed", "failed"]
    assert found[2].reason == "RuntimeError: interrupted" and found[2].case == chosen[2].name


def test_compiling_ahead_survives_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here nothing can be compiled, as there is no card: every case fails, in its process."""
    monkeypatch.setattr(suites, "AHEAD", 2)
    seen: list[tuple[str, int, int]] = []
    chosen = [Case("chunk_gka", "forward", "7B", ONE, provider) for provider in (GKA, VANILLA, "sdpa")]
    suites.compile_ahead(chosen, lambda *told: seen.append(told))
    assert seen == [("compiling", 0, 2), ("compiling", 1, 2)]
    suites.compile_ahead(chosen[:1], lambda *told: seen.append(told))
    assert len(seen) == 2


def test_what_runs_the_same_code_is_compiled_once() -> None:
    long = ONE._replace(T=4 * ONE.T)
    assert len({suites._code(Case("chunk_gka", "forward", "7B", shape, GKA)) for shape in (ONE, long)}) == 1
    assert (
        len({suites._code(Case("chunk_gka", "forward", "7B", shape, "flex_attention")) for shape in (ONE, long)}) == 2
    )
    assert len({suites._code(case) for case in cases.cases()}) < len(cases.cases()) / 2


# ------------------------------------------------------------------------------------------------------------- the CPU
def test_the_cpu_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise RuntimeError("no compiler\nhere")

    whole = cpu.CpuCase("one", lambda: {"": {"ratio": [1.0, 3.0, 2.0]}})
    parts = cpu.CpuCase("two", lambda: {"a": {"calls": [5.0]}, "b": {"calls": [6.0]}})
    monkeypatch.setattr(cpu, "cases", lambda select: [whole, parts, cpu.CpuCase("three", broken)])
    seen: list[tuple[str, int, int]] = []
    record = suites.run("cpu", commit="abc", progress=lambda *told: seen.append(told))
    assert [(m.case, m.status) for m in record.measurements] == [
        ("one", "measured"), ("two a", "measured"), ("two b", "measured"), ("three", "failed"),
    ]  # fmt: skip
    assert record.measurements[0].figures["ratio"].median == 2.0
    assert record.measurements[3].reason == "RuntimeError: no compiler"
    assert (record.run.machine.gpu, record.run.machine.commit) == ("", "abc")
    assert seen == [("one", 0, 3), ("two", 1, 3), ("three", 2, 3), ("", 3, 3)]


def test_counts_do_not_change_from_call_to_call() -> None:
    assert cpu.calls_of_operators() == cpu.calls_of_operators()
    assert cpu.python_calls(lambda: len([1])) < cpu.python_calls(lambda: [len([1]) for _ in range(9)])


def test_ratios_over_attention() -> None:
    for grad in (False, True):
        (figures,) = cpu.over_dense_attention(grad).values()
        assert len(figures["ratio"]) == cpu.ROUNDS and min(figures["ratio"]) > 0


@pytest.mark.slow
@pytest.mark.supports("compile time of 24 layers against SDPA")
def test_a_model_compiles_in_the_time_of_one_with_sdpa() -> None:
    """In the stored run, which every run of the suite with ``--check`` is held against; here it is seen to work."""
    (ratio,) = cpu.compiling_a_model(layers=2, rounds=1)[""]["ratio"]
    assert ratio > 0
    stored = max((r for r in records.read_all() if r.run.suite == "cpu"), key=lambda r: r.run.machine.date)
    assert stored.by_case()[cpu.COMPILED_MODEL].figures["ratio"].median <= cpu.COMPILED_MODEL_BAR


def test_machine_code_of_a_kernel() -> None:
    pytest.importorskip("triton")
    found = cpu.machine_code(D=64, V=64, kernels="chunk_state")
    assert set(found) == {"chunk_state"}
    (instructions,), (registers,), (stack,) = (
        found["chunk_state"][name] for name in ("instructions", "registers", "stack")
    )
    assert instructions > 200 and 16 < registers <= 255 and stack >= 0
