"""``gka-perf``: measures, compares, reports and traces.

Exit codes: 0 all is well; 1 something got slower, broke or is inaccurate; 2 the command line is not understood, or
there is nothing to do it with; 3 there is no card where one is needed, or it is in no state to be measured on.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gka_ops_perf import baseline, compare, records, suite, tables
from gka_ops_perf.records import RESULTS, Record, RecordError
from gka_ops_perf.timing import UnstableError


class _UsageError(Exception):
    pass


class _NoCardError(Exception):
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line. Returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except (_NoCardError, UnstableError) as error:
        print(f"gka-perf: {error}", file=sys.stderr)
        return 3
    except (_UsageError, RecordError, compare.CompareError, OSError) as error:
        print(f"gka-perf: {error}", file=sys.stderr)
        return 2
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gka-perf", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=globals()[f"_{name}"])
        return added

    def add_suite(parser: argparse.ArgumentParser, default: str) -> None:
        parser.add_argument(
            "--suite", choices=("quick", "full", "cpu"),
            help=f"by default {default} where there is a card, else cpu: ratios and counts",
        )  # fmt: skip
        parser.add_argument("--select", default="", metavar="TEXT", help="cases whose name has this in it")

    run = command("run", "measure the suite, print it and store it as JSON lines")
    add_suite(run, "full")
    run.add_argument("--results", type=Path, default=Path("build/perf"), metavar="FOLDER", help="(build/perf)")
    run.add_argument("--commit", help="what to store as the commit, where the checkout has no history")
    run.add_argument(
        "--check", action="store_true", help="on a CPU: fail where a figure grew far beyond the stored one"
    )

    pair = command("compare", "measure two commits in turns and say what got slower")
    pair.add_argument("base", metavar="BASE")
    pair.add_argument("head", metavar="HEAD")
    add_suite(pair, "quick")
    pair.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there as well, as Markdown")
    pair.add_argument("--accept", metavar="CASE", help="note in perf/accepted.json that this case may be slower")
    pair.add_argument("--reason", default="", help="why; --accept needs one")

    report = command("report", "write the newest run of a card, and its history, as Markdown and as an HTML page")
    report.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="(perf/results)")
    report.add_argument("--card", default="", metavar="NAME", help="part of a card's name, where there are several")
    report.add_argument("--out", type=Path, default=Path("build/perf/report"), metavar="FOLDER")

    trace = command("trace", "profile a compiled training step; the trace opens in Perfetto")
    trace.add_argument("--out", type=Path, default=Path("build/perf/trace"), metavar="FOLDER")
    trace.add_argument("--tensorboard", type=Path, metavar="FOLDER", help="write it for PyTorch's profiler plugin too")
    trace.add_argument("--top", type=int, default=15, help="kernels to print (15)")

    docs = command("docs", "fill the figures of README and docs in, from the stored runs")
    docs.add_argument("--check", action="store_true", help="change nothing; fail where a file says something else")
    return parser


@contextlib.contextmanager
def _progress() -> Iterator[suite.Progress]:
    """A bar on stderr, or a line a case where nobody looks on."""
    console = Console(stderr=True)
    if not console.is_terminal:
        start = time.monotonic()

        def line(name: str, done: int, total: int) -> None:
            print(f"{time.monotonic() - start:.0f} s: {done}/{total} {name}", file=sys.stderr, flush=True)

        yield line
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        task = bars.add_task("")
        yield lambda name, done, total: bars.update(task, description=name, completed=done, total=total)


def _suite(options: argparse.Namespace, default: suite.SuiteName) -> suite.SuiteName:
    chosen: suite.SuiteName = options.suite or (default if torch.cuda.is_available() else "cpu")
    if chosen != "cpu" and not torch.cuda.is_available():
        raise _NoCardError(f"suite {chosen} needs a CUDA card")
    return chosen


# ------------------------------------------------------------------------------------------------------------- commands
def _run(options: argparse.Namespace) -> int:
    chosen = _suite(options, "full")
    with _progress() as progress:
        try:
            record = suite.run(chosen, options.select, options.commit, progress)
        except ValueError as error:
            raise _UsageError(str(error)) from None
    print(tables.figures(record) if chosen == "cpu" else tables.run(record))
    print(records.write(record, options.results))
    bad = [m for m in record.measurements if m.status in ("failed", "inaccurate", "unstable")]
    if options.check and chosen == "cpu":
        return max(_check(record, options.select), 1 if bad else 0)
    return 1 if bad else 0


def _check(record: Record, select: str) -> int:
    stored = [found for found in records.read_all() if found.run.suite == "cpu"]
    if not stored:
        raise _UsageError(f"expected a stored run of suite cpu below {RESULTS}, found none")
    newest = max(stored, key=lambda found: found.run.machine.date)
    kept = tuple(m for m in newest.measurements if select in m.group)
    drifts = [drift for drift in baseline.compare(Record(newest.run, kept), record) if drift.bad]
    if drifts:
        print(f"\nagainst commit {newest.run.machine.commit}:\n{tables.drifts(drifts)}")
    return 1 if drifts else 0


def _compare(options: argparse.Namespace) -> int:
    chosen = _suite(options, "quick")
    names = compare.names(chosen, options.select)
    if not names:
        raise _UsageError(f"expected part of a case's name in suite {chosen}, got {options.select!r}")
    if options.accept and not options.reason.strip():
        raise _UsageError("expected a --reason with --accept, got none")
    base, head = (compare.resolve(commit) for commit in (options.base, options.head))
    with compare.both(base, head, chosen) as sides, _progress() as progress:
        rows = list(compare.compare(*sides, names, progress))
    accepted = compare.read_accepted()
    if options.accept:
        accepted += compare.accept(rows, options.accept, base, options.reason)
    rows = compare.judge(rows, accepted, base)
    print(tables.comparison(rows))
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        title = f"`{base[:9]}` → `{head[:9]}` on {_here()}"
        options.markdown.write_text(f"{title}\n\n{tables.comparison(rows, 'github')}\n", encoding="utf-8")
    return 1 if any(row.bad for row in rows) else 0


def _here() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"


def _report(options: argparse.Namespace) -> int:
    from gka_ops_perf import report

    found = [r for r in records.read_all(options.results) if r.run.machine.gpu and r.run.suite == "full"]
    found = [r for r in found if options.card.lower() in r.run.machine.gpu.lower()]
    if not found:
        raise _UsageError(f"expected runs of suite full on a card below {options.results}, found none")
    newest = max(found, key=lambda record: record.run.machine.date)
    history = [r for r in found if r.run.machine.gpu == newest.run.machine.gpu]
    for path in report.write(newest, history, options.out):
        print(path)
    return 0


def _docs(options: argparse.Namespace) -> int:
    from gka_ops_perf import docs

    stale = 0
    try:
        for path, (now, wanted) in docs.files().items():
            if now != wanted:
                stale += 1
                print(f"{path}: {'stale' if options.check else 'written'}")
                if not options.check:
                    path.write_text(wanted, encoding="utf-8")
    except docs.DocsError as error:
        raise _UsageError(str(error)) from None
    return 1 if stale and options.check else 0


def _trace(options: argparse.Namespace) -> int:
    from gka_ops_perf import trace

    device = "cuda" if torch.cuda.is_available() else "cpu"
    hot = trace.record(trace.training_step(device), options.out, device, options.tensorboard)
    print(tables.hot(hot[: options.top]))
    print(options.out / "trace.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
