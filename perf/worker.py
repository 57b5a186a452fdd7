"""One side of a comparison: a process with one version of the library, told what to measure by another.

Requests and answers are lines of JSON, on stdin and on what was stdout; what others print goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import IO, Any, Literal

from gka_ops_perf.suite import SuiteName


class Subject:
    """Prepares one case at a time and takes samples of its figures."""

    def __init__(self, suite: SuiteName) -> None:
        self._suite = suite
        self._sample: Callable[[], dict[str, float]] | None = None

    def prepare(self, case: str) -> dict[str, float]:
        """Makes ``case`` the one that is sampled. Returns its errors. Raises where it cannot be measured."""
        self.release()
        errors: dict[str, float] = {}
        if self._suite == "cpu":
            self._sample = self._on_cpu(case)
        else:
            self._sample, errors = self._on_card(case)
        return errors

    def sample(self) -> dict[str, float]:
        if self._sample is None:
            raise RuntimeError("expected a case to have been prepared")
        return self._sample()

    def release(self) -> None:
        self._sample = None
        if self._suite != "cpu":
            from gka_ops_perf.measure import forget

            forget()

    @staticmethod
    def _on_cpu(name: str) -> Callable[[], dict[str, float]]:
        import statistics

        from gka_ops_perf import cpu

        case = {case.name: case for case in cpu.cases()}[name]

        def sample() -> dict[str, float]:
            return {
                f"{part} {figure}".lstrip(): statistics.median(values)
                for part, figures in case.measure().items()
                for figure, values in figures.items()
            }

        return sample

    @staticmethod
    def _on_card(name: str) -> tuple[Callable[[], dict[str, float]], dict[str, float]]:
        from gka_ops_perf import measure, providers, timing
        from gka_ops_perf.cases import cases

        case = {case.name: case for case in cases()}[name]
        job = providers.job(case)
        errors = measure.checked(job)
        prepared, timer = timing.prepare(job.run), timing.Timer()
        return lambda: {measure.KERNEL: timer.kernel(prepared)}, errors


def serve(subject: Subject, requests: IO[str], answers: IO[str]) -> None:
    """Answers one request after the other until there is none."""
    for line in requests:
        request = json.loads(line)
        try:
            action: Literal["prepare", "sample", "release"] = request["do"]
            value: Any = getattr(subject, action)(*request.get("with", []))
            answer = {"value": value}
        except Exception as error:  # told to the other side
            answer = {"error": f"{type(error).__name__}: {error}".split("\n")[0][:300]}
        print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(Subject(sys.argv[1]), sys.stdin, answers)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
