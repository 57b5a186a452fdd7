"""The performance suite on a card, on shapes that take no time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from gka_ops_perf import cases, measure, providers, timing, trace
from gka_ops_perf.cases import GKA, VANILLA, Case
from gka_ops_perf.measure import EAGER, KERNEL

pytestmark = pytest.mark.gpu


def small(case: Case) -> Case:
    shape = case.shape._replace(B=2, T=1 if case.stage == "decode" else 256, H=4, Hkv=2, D=64, V=64)
    return dataclasses.replace(case, shape=shape)


@pytest.mark.parametrize("select", ["forward 7B T8192", "forward + backward 7B T8192", "decode 7B N64"])
def test_a_group_is_measured(select: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours are right, and faster replayed than called; attention runs beside them."""
    monkeypatch.setattr(timing, "MAX_SPREAD", 10.0)  # tests share the card
    group = [
        small(case)
        for case in cases.cases(select=select)
        if case.op != "layer" and case.provider in (GKA, VANILLA, "sdpa")
    ]
    found = {m.case: m for m in measure.measure(group, timing.Timer())}
    assert len(found) == len(group) >= 3
    for case in group:
        m = found[case.name]
        assert m.status == "measured", m.reason
        assert 0 < m.figures[KERNEL].median < m.figures[EAGER].median
        assert bool(m.errors) == (case.provider != "sdpa")


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk_gka = providers.gka_ops.chunk_gka

    def wrong(*inputs: Any, **options: Any) -> Any:
        found = chunk_gka(*inputs, **options)
        return found if options.get("impl") == "reference" else found._replace(output=1.1 * found.output)

    monkeypatch.setattr(providers.gka_ops, "chunk_gka", wrong)
    (case,) = cases.cases(select="chunk_gka forward 7B T8192 [gka]")
    (m,) = measure.measure([small(case)], timing.Timer())
    assert m.status == "inaccurate" and m.reason.startswith("o 1.0e-01") and not m.figures


def test_the_card_says_how_it_is() -> None:
    state = timing.clocks()
    assert state is not None and state.sm_mhz > 100 and 10 < state.celsius < 110
    speeds = timing.reference_speeds()
    assert speeds["bf16 product TFLOP/s"] > 1 and speeds["copy GB/s"] > 10 and speeds["read GB/s"] > 10


def test_trace(tmp_path: Path) -> None:
    (case,) = cases.cases(select="layer training step 7B T8192 [gka]")
    step = providers.job(small(case)).run
    hot = trace.record(step, tmp_path, "cuda")
    assert any("chunk_" in kernel.name for kernel in hot) and sum(kernel.share for kernel in hot) == pytest.approx(1)
    assert (tmp_path / "trace.json").stat().st_size > 1000
    torch._dynamo.reset()
