"""Two commits, measured in turns on the same machine: what got slower.

Each is installed into a folder of its own and runs in a process of its own; cases and clocks are this checkout's, so
that both are measured by the same rules.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from gka_ops_perf import cpu, timing
from gka_ops_perf.cases import GKA, VANILLA, cases
from gka_ops_perf.estimates import TOLERANCE, estimate, ratio, verdict
from gka_ops_perf.measure import KERNEL
from gka_ops_perf.records import Estimate
from gka_ops_perf.suite import Progress, SuiteName

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
ACCEPTED = HERE / "accepted.json"
CPU_ROUNDS = 5
CONFIRMATIONS = 2  # times that a change is measured again before it is believed


class CompareError(RuntimeError):
    """Nothing could be compared, and why."""


class Side(Protocol):
    """One commit; see :mod:`gka_ops_perf.worker`. Methods raise ``CaseError`` where a case cannot be measured."""

    def prepare(self, case: str) -> Mapping[str, float]: ...
    def sample(self) -> Mapping[str, float]: ...
    def release(self) -> None: ...


class CaseError(RuntimeError):
    """A case that one side cannot measure."""


class Row(NamedTuple):
    """A figure of a case on both sides; the verdict may also be "accepted", "broken" or "not compared"."""

    case: str
    figure: str
    base: float | None
    head: float | None
    ratio: Estimate | None
    verdict: str
    reason: str = ""

    @property
    def bad(self) -> bool:
        return self.verdict in ("slower", "broken")


@dataclass(frozen=True)
class Accepted:
    """A regression that is wanted, or borne: of one figure of a case against one base, up to a ratio."""

    case: str
    figure: str
    base: str
    ratio: float
    reason: str
    date: str

    def covers(self, row: Row, base: str) -> bool:
        return (
            (row.case, row.figure, base) == (self.case, self.figure, self.base)
            and row.ratio is not None
            and row.ratio.median <= self.ratio * (1 + TOLERANCE)
        )


# ------------------------------------------------------------------------------------------------------- measurements
def compare(base: Side, head: Side, names: Sequence[str], progress: Progress = lambda *_: None) -> Iterator[Row]:
    """The rows of every case, which both sides prepare and then sample in turns."""
    for done, name in enumerate(names):
        progress(name, done, len(names))
        yield from _case(base, head, name)
    progress("", len(names), len(names))


def _case(base: Side, head: Side, name: str) -> Iterator[Row]:
    try:
        base.prepare(name)
    except CaseError as error:
        yield Row(name, "", None, None, None, "not compared", f"base: {error}")
        return
    try:
        head.prepare(name)
        taken = _samples(base, head)
    except CaseError as error:
        yield Row(name, "", None, None, None, "broken", f"head: {error}")
        return
    finally:
        base.release()
        head.release()
    for figure, (before, after) in taken.items():
        found = ratio(before, after)
        medians = estimate(before).median, estimate(after).median
        yield Row(name, figure, *medians, found, verdict(found))


def _samples(base: Side, head: Side) -> dict[str, tuple[list[float], list[float]]]:
    """Samples of both by figure. While a figure seems to have changed, more are taken, a few times."""
    first = base.sample()
    rounds = timing.rounds_for(first[KERNEL]) if KERNEL in first else CPU_ROUNDS
    taken: dict[str, tuple[list[float], list[float]]] = {}
    for attempt in range(1 + CONFIRMATIONS):
        sides = {"base": base, "head": head}
        for i in range(rounds * 2**attempt):
            drawn = {name: sides[name].sample() for name in (sides if i % 2 == 0 else reversed(sides))}
            for figure in drawn["base"].keys() & drawn["head"].keys():
                before, after = taken.setdefault(figure, ([], []))
                before.append(_positive(drawn["base"][figure]))
                after.append(_positive(drawn["head"][figure]))
        if all(verdict(ratio(*pair)) == "same" for pair in taken.values()) or KERNEL not in first:
            break
    return taken


def _positive(value: float) -> float:
    """Counts may be zero, and are compared by their ratio all the same."""
    return max(value, 1e-9)


def judge(rows: Sequence[Row], accepted: Sequence[Accepted], base: str) -> list[Row]:
    """The rows, those that are accepted for this base being called so."""
    judged = []
    for row in rows:
        reasons = [exception.reason for exception in accepted if row.bad and exception.covers(row, base)]
        judged.append(row._replace(verdict="accepted", reason=reasons[0]) if reasons else row)
    return judged


def read_accepted(path: Path = ACCEPTED) -> list[Accepted]:
    if not path.exists():
        return []
    return [Accepted(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]


def accept(rows: Sequence[Row], case: str, base: str, reason: str, path: Path = ACCEPTED) -> list[Accepted]:
    """Notes that the regressions of ``case`` against ``base`` are accepted. Returns what was noted.

    Raises:
        CompareError: there is no regression of that name, or no reason.
    """
    if not reason.strip():
        raise CompareError("expected a reason with --accept, got none")
    date = datetime.now(UTC).date().isoformat()
    noted = [
        Accepted(row.case, row.figure, base, round(row.ratio.median, 4), reason, date)
        for row in rows
        if row.case == case and row.verdict == "slower" and row.ratio is not None
    ]
    if not noted:
        raise CompareError(f"expected a case that got slower, got {case!r}")
    entries = [asdict(entry) for entry in (*read_accepted(path), *noted)]
    temporary = path.with_suffix(f".{os.getpid()}.part")
    temporary.write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)
    return noted


def names(suite: SuiteName, select: str = "") -> list[str]:
    """What is compared: of the registry our own cases."""
    if suite == "cpu":
        return [case.name for case in cpu.cases(select)]
    return [case.name for case in cases(suite, select) if case.provider in (GKA, VANILLA)]


# ---------------------------------------------------------------------------------------------------- two installations
class Process:
    """A side that is a process with its own installation of the library."""

    def __init__(self, suite: SuiteName, path: Sequence[Path]) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONNOUSERSITE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gka_ops_perf.worker", suite], env=environment, cwd=path[0], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def _ask(self, action: str, *arguments: str) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps({"do": action, "with": arguments}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise CompareError(f"a worker ended with code {self._process.wait()} when asked to {action}")
        answer = json.loads(line)
        if "error" in answer:
            raise CaseError(answer["error"])
        return answer["value"]

    def prepare(self, case: str) -> Mapping[str, float]:
        found: Mapping[str, float] = self._ask("prepare", case)
        return found

    def sample(self) -> Mapping[str, float]:
        found: Mapping[str, float] = self._ask("sample")
        return found

    def release(self) -> None:
        self._ask("release")

    def close(self) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it has ended already
                self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def resolve(commit: str, root: Path = ROOT) -> str:
    """The full hash of a commit. Raises ``CompareError`` where git knows none."""
    result = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}"],
        capture_output=True, text=True,
    )  # fmt: skip
    if result.returncode:
        raise CompareError(f"expected a commit of {root}, got {commit!r}")
    return result.stdout.strip()


@contextlib.contextmanager
def installed(commit: str, folder: Path, root: Path = ROOT) -> Iterator[list[Path]]:
    """Installs a commit below ``folder``. Yields what has to be on the path: this suite and that library."""
    tree, site, own = folder / "tree", folder / "site", folder / "suite"
    own.mkdir(parents=True)
    (own / "gka_ops_perf").symlink_to(HERE, target_is_directory=True)
    _run("git", "-C", str(root), "worktree", "add", "--quiet", "--detach", str(tree), commit)
    try:
        options = ("--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--target", str(site))
        _run(sys.executable, "-m", "pip", "install", *options, str(tree))
        yield [own, site]
    finally:
        _run("git", "-C", str(root), "worktree", "remove", "--force", str(tree))


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise CompareError(f"{' '.join(command)}: {result.stderr.strip()[-500:]}")


@contextlib.contextmanager
def both(base: str, head: str, suite: SuiteName) -> Iterator[tuple[Process, Process]]:
    """Processes with the two commits."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        sides = []
        for name, commit in (("base", base), ("head", head)):
            path = stack.enter_context(installed(commit, Path(folder) / name))
            process = Process(suite, path)
            stack.callback(process.close)
            sides.append(process)
        yield sides[0], sides[1]
