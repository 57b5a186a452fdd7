"""The registry's cases as benchmarks of pytest-benchmark: ``pytest perf/benchmarks.py``.

For those who keep their history with it: its JSON, ``--benchmark-compare`` and ``--benchmark-histogram`` work as ever.
Its timer is a :class:`~gka_ops_perf.timing.KernelClock`, so that what it reports is kernel time.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from gka_ops_perf import measure, providers, timing
from gka_ops_perf.cases import Case, cases

CLOCK = timing.KernelClock()

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]


@pytest.mark.benchmark(timer=CLOCK, warmup=False)
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in cases()])
def test_case(case: Case, benchmark: BenchmarkFixture) -> None:
    """Fails where the results are inaccurate; skips, with the reason, a peer that is not there."""
    benchmark.group = case.group
    benchmark.extra_info.update(case.parameters)
    try:
        job = providers.job(case)
        benchmark.extra_info["errors"] = measure.checked(job)
    except providers.UnavailableError as error:
        pytest.skip(str(error))
    prepared = timing.prepare(job.run)
    rounds = timing.rounds_for(timing.Timer().kernel(prepared))
    timing.check_clocks(timing.clocks())
    benchmark.pedantic(CLOCK.run, args=(prepared,), rounds=rounds, warmup_rounds=timing.WARM_UPS)
    del job, prepared
    measure.forget()
