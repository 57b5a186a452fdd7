"""``gka-autotune``: tunes the kernels for a card, and shows and carries around what was found.

Exit codes: 0 all is well; 1 something is not (a stale or wrong entry, nothing known of a key, an unreadable file);
2 the command line is not understood; 3 there is no card, and none was named.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from gka_ops.autotune import choice, space, table, tuner
from gka_ops.autotune.device import Device, current
from gka_ops.autotune.key import DTYPES, OPTIONS, PASSES, Key, Problem, bucket
from gka_ops.autotune.table import Entry, Table
from gka_ops.autotune.worker import Worker, WorkerError

_VERIFY_SECONDS = 300.0


class _NoCardError(Exception):
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line. Returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except _NoCardError as error:
        print(error, file=sys.stderr)
        return 3
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gka-autotune", description=__doc__, formatter_class=_Formatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=globals()[f"_{name}"])
        return added

    tune = command("tune", "find the fastest configurations on this card; repeated, it goes on where it was stopped")
    _add_shape(tune)
    tune.add_argument("--time-budget", type=_positive, default=480, metavar="SECONDS", help="for all of it (480)")
    tune.add_argument("--workers", type=_positive, help="processes that compile; by default one a core")
    tune.add_argument("--into", type=Path, metavar="FILE", help="the table; by default this user's for the card")

    show = command("show", "what runs and where that comes from: of some shapes, or of all that tables know")
    _add_shape(show)
    _add_card(show)

    explain = command("explain", "what was found when a key was tuned: times, registers, failures, what was left out")
    explain.add_argument("key", type=_key, metavar="KEY")
    explain.add_argument("--top", type=_positive, default=10, help="candidates to list (10)")
    _add_card(explain)

    command("verify", "check accuracy and age of every entry for this card")

    export = command("export", "write what this user's tables say about a card into one file, without stale entries")
    export.add_argument("file", type=Path, metavar="FILE")
    _add_card(export)

    merge = command("merge", "put tables of one card into one file; of two entries for a key the newer one counts")
    merge.add_argument("file", type=Path, metavar="FILE")
    merge.add_argument("tables", type=Path, nargs="+", metavar="TABLE")
    return parser


class _Formatter(argparse.RawDescriptionHelpFormatter):
    pass


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def _key(text: str) -> Key:
    try:
        key = Key.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if key.kernel not in space.KERNELS or key.when not in space.KERNELS[key.kernel].when:
        raise argparse.ArgumentTypeError(f"expected a kernel among {', '.join(space.KERNELS)}, in one of its passes")
    return key


def _options(text: str) -> frozenset[str]:
    given = frozenset(option for option in text.split(",") if option)
    if not given <= set(OPTIONS):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(OPTIONS)}, got {text}")
    return given


def _add_card(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--card", metavar="NAME", help="a card that some table is for; by default the current one")


def _add_shape(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--key", type=_key, action="append", default=[], help="a kernel, as warnings name it; repeatable"
    )
    shape = parser.add_argument_group("all kernels of a call")
    shape.add_argument("--pass", dest="passes", choices=PASSES, nargs="+", default=["forward", "backward"])
    shape.add_argument("--batch", type=_positive, default=1, help="sequences (1)")
    shape.add_argument("--tokens", type=_positive, nargs="+", default=[], help="of a sequence, or of a packed batch")
    shape.add_argument("--heads", type=_positive, default=32, help="query heads (32)")
    shape.add_argument("--head-dim", type=_positive, default=128, help="D (128)")
    shape.add_argument("--value-dim", type=int, help="V, by default D; 0 for chunk_solve")
    shape.add_argument("--dtype", choices=DTYPES, default="bf16")
    shape.add_argument(
        "--options", type=_options, default=_options("alpha,beta,decay,l2norm,solve"),
        help=f"of {','.join(OPTIONS)}; by default alpha,beta,decay,l2norm,solve",
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
def _card(name: str | None) -> Device:
    """The card that is named in a table, or the current one."""
    if name is None:
        if not torch.cuda.is_available():
            raise _NoCardError("expected a CUDA card here, or the name of one that there is a table for (--card)")
        return current(torch.cuda.current_device())
    known = {found.device for _, found in choice.read_all()}
    for device in sorted(known, key=lambda device: device.name):
        if name.lower() in device.name.lower():
            return device
    names = ", ".join(sorted(device.name for device in known)) or "none"
    raise _NoCardError(f"expected a card that there is a table for ({names}), got {name}")


def _keys(options: argparse.Namespace, device: Device) -> list[Key]:
    found = dict.fromkeys(options.key)
    V = options.head_dim if options.value_dim is None else options.value_dim
    for when in options.passes:
        for T in options.tokens:
            kernel = "recurrent" if when == "decode" else "state"
            config = choice.heuristic_config(kernel, options.dtype, options.head_dim, V, T)
            C = getattr(config, "chunk", 1)
            N = bucket(options.batch * options.heads)
            problem = Problem(when, options.dtype, options.head_dim, V, C, bucket(T), N, options.options)
            found |= {space.KERNELS[k].key(problem): None for k in space.kernels_of(problem, config, device)}
    return list(found)


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, ["-" * width for width in widths], *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _described(parameters: space.Parameters) -> str:
    return " ".join(f"{name}={value}" for name, value in parameters.items() if value is not None)


def _gain(entry: Entry | None) -> str:
    if entry is None or not entry.microseconds:
        return ""
    return f"{entry.microseconds:.1f} µs, {entry.heuristic_microseconds / entry.microseconds:.2f}x"


# ------------------------------------------------------------------------------------------------------------- commands
def _show(options: argparse.Namespace) -> int:
    device = _card(options.card)
    keys = _keys(options, device)
    if not keys:
        known = (key for _, found in choice.read_all() if found.device == device for key in found.entries)
        keys = list(dict.fromkeys(known))
    if not keys:
        looked = ", ".join(map(str, choice.folders(choice.mode())))
        print(f"no table has an entry for {device.name}; looked in {looked}")
        return 1
    rows = []
    for key in sorted(keys, key=str):
        found = choice.lookup(key, device)
        origin = f"{found.origin}{', stale entries skipped' if found.stale else ''}"
        rows.append((str(key), _described(found.parameters), _gain(found.entry), origin, str(found.file or "")))
    print(f"{device.name}, tables: {choice.mode()}")
    _print_table(("key", "parameters", "time, gain", "origin", "file"), rows)
    return 0


def _explain(options: argparse.Namespace) -> int:
    device, key = _card(options.card), options.key
    found = choice.lookup(key, device)
    tried, pruned = space.candidates(key.kernel, key, device)
    print(f"{key} on {device.name}")
    print(f"runs with {_described(found.parameters)} ({found.origin}{f', {found.file}' if found.file else ''})")
    for reason in found.stale:
        print(f"stale: {reason}")
    outcomes = tuner.outcomes(key, device)
    timed = sorted((o for o in outcomes if o.times and o.failure is None), key=lambda o: o.microseconds)
    failed = [o for o in outcomes if o.failure is not None]
    print(f"\n{len(tried)} candidates: {len(timed)} timed, {len(failed)} failed, {len(pruned)} combinations left out")
    if timed:
        rows = [
            (f"{o.microseconds:.1f}", *(str(o.resources.get(n, "")) for n in ("registers", "spills", "shared_memory")),
             _described(o.parameters))
            for o in timed[: options.top]
        ]  # fmt: skip
        _print_table(("µs", "registers", "spills", "shared memory", "parameters"), rows)
    for title, reasons in (
        ("failed", [(_described(o.parameters), o.failure or "") for o in failed]),
        ("left out", [(_described(p.parameters), p.reason) for p in pruned]),
    ):
        if reasons:
            print()
            _print_table((title, "why"), reasons)
    return 0 if timed or found.entry is not None else 1


def _export(options: argparse.Namespace) -> int:
    device, folder = _card(options.card), table.user_folder()
    own = [found for path, found in choice.read_all("cached") if found.device == device and path.parent == folder]
    entries = {key: entry for found in own for key, entry in found.entries.items() if not entry.stale(key.kernel)}
    if not entries:
        print(f"nothing to export: no entry for {device.name} in {folder} that counts", file=sys.stderr)
        return 1
    return _write(options.file, device, entries)


def _merge(options: argparse.Namespace) -> int:
    found: list[Table] = []
    for path in options.tables:
        content = table.read(path)
        if content is None:
            print(f"{path}: no table", file=sys.stderr)
            return 1
        found.append(content)
    devices = {content.device for content in found}
    if len(devices) > 1:
        print(f"expected tables of one card, got {', '.join(sorted(d.name for d in devices))}", file=sys.stderr)
        return 1
    entries: dict[Key, Entry] = {}
    for content in found:
        for key, entry in content.entries.items():
            if key not in entries or _newer(key, entry, entries[key]):
                entries[key] = entry
    return _write(options.file, found[0].device, entries)


def _newer(key: Key, entry: Entry, other: Entry) -> bool:
    def rank(entry: Entry) -> tuple[bool, str, float]:
        return entry.stale(key.kernel) is None, entry.tuned, -entry.microseconds

    return rank(entry) > rank(other)


def _write(path: Path, device: Device, entries: dict[Key, Entry]) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        table.write(path, Table(device, entries).to_json())
    except OSError as error:
        print(f"{path} could not be written: {error}", file=sys.stderr)
        return 1
    print(f"{path}: {len(entries)} entries for {device.name}")
    return 0


def _tune(options: argparse.Namespace) -> int:
    device = _card(None)
    keys = _keys(options, device)
    if not keys:
        print("nothing to tune: name a --key, or the --tokens of a shape", file=sys.stderr)
        return 2
    known = {key: choice.lookup(key, device).origin for key in keys}
    results = tuner.tune(
        keys, device, _bench(), seconds=options.time_budget, workers=options.workers, path=options.into,
        log=lambda line: print(line, flush=True),
    )  # fmt: skip
    rows = [
        (str(r.key), known[r.key], _described(r.entry.parameters) if r.entry else "nothing that works", _gain(r.entry))
        for r in results
    ]
    _print_table(("key", "until now", "parameters", "time, gain"), rows)
    return 0 if all(result.entry is not None for result in results) else 1


def _verify(options: argparse.Namespace) -> int:
    device = _card(None)
    rows = []
    with Worker(_bench()) as worker:
        for path, found in choice.read_all():
            for key, entry in found.entries.items() if found.device == device else ():
                reason = entry.stale(key.kernel)
                if reason is None:
                    try:
                        reason = worker.call("check", key, entry.parameters, seconds=_VERIFY_SECONDS)
                    except WorkerError as error:
                        reason = str(error)
                rows.append((str(key), _described(entry.parameters), reason or "right", str(path)))
    _print_table(("key", "parameters", "verdict", "file"), rows)
    return 0 if all(verdict == "right" for _, _, verdict, _ in rows) else 1


def _bench() -> partial[tuner.Bench]:
    return partial(_make_bench, torch.cuda.current_device())


def _make_bench(index: int) -> tuner.Bench:
    from gka_ops.autotune.measure import Bench

    torch.cuda.set_device(index)
    os.environ["GKA_OPS_AUTOTUNE"] = "shipped"  # the other kernels of a call run as they do everywhere
    return Bench()


if __name__ == "__main__":
    sys.exit(main())
