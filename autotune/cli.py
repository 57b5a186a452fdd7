"""``gka-autotune``: tunes the kernels for a card, and shows and carries around what was found.

Shapes are texts like ``B2,T8192,H32,Hkv8,D128,V128,bf16``, or paths of a model's ``config.json``.

Exit codes: 0 all is well; 1 something is not (a stale or wrong entry, nothing known of a key, an unreadable file, no
worker); 2 the command line is not understood; 3 there is no card, and none was named.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gka_ops.autotune import choice, screen, space, table, tuner
from gka_ops.autotune.device import Device, current
from gka_ops.autotune.key import Key
from gka_ops.autotune.report import Rows, described, explain, gain
from gka_ops.autotune.table import Entry, Table
from gka_ops.autotune.worker import StartError, Worker, WorkerError

if TYPE_CHECKING:
    from gka_ops.autotune.shapes import Shape

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
    except StartError as error:
        print(f"nothing more can be compiled or run: {error}", file=sys.stderr)
        return 1
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gka-autotune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=globals()[f"_{name}"])
        return added

    tune = command("tune", "find the fastest configurations on this card; repeated, it goes on where it was stopped")
    _add_keys(tune, "by default those that tables are shipped for")
    tune.add_argument("--reach", action="store_true", help="try more values of every parameter, which takes longer")
    tune.add_argument("--time-budget", type=_positive, default=450, metavar="SECONDS", help="for all of it (450)")
    tune.add_argument("--workers", type=_positive, help="processes that compile; by default one a core")
    tune.add_argument("--into", type=Path, metavar="FILE", help="the table; by default this user's for the card")
    tune.add_argument("--ordinal", type=int, default=0, help="which of the cards here (0)")
    tune.add_argument("--verbose", action="store_true", help="a line for every candidate")

    show = command("show", "what runs and where that comes from: of some shapes, or of all that tables know")
    _add_keys(show, "by default all that tables know")
    _add_card(show)

    why = command("explain", "what was found when a key was tuned: times, registers, failures, what was left out")
    why.add_argument("key", type=_key, metavar="KEY")
    why.add_argument("--top", type=_positive, default=10, help="candidates to list (10)")
    _add_card(why)

    command("verify", "check accuracy and age of every entry for this card")

    export = command("export", "write what this user's tables say about a card into one file, without stale entries")
    export.add_argument("file", type=Path, metavar="FILE")
    _add_card(export)

    merge = command("merge", "put tables of one card into one file; of two entries for a key the newer one counts")
    merge.add_argument("file", type=Path, metavar="FILE", help="what it holds already takes part")
    merge.add_argument("tables", type=Path, nargs="+", metavar="TABLE")
    return parser


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


def _add_card(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--card", metavar="NAME", help="a card that some table is for; by default the current one")


def _add_keys(parser: argparse.ArgumentParser, otherwise: str) -> None:
    parser.add_argument(
        "--key", type=_key, action="append", default=[], help="a kernel, as warnings name it; repeatable"
    )
    parser.add_argument(
        "--shapes", type=_shapes, action="extend", default=[], metavar="SHAPE",
        help=f"all kernels of calls of this shape, or of a model's config.json; repeatable, {otherwise}",
    )  # fmt: skip


def _shapes(text: str) -> Sequence[Shape]:
    from gka_ops.autotune.shapes import Shape, from_model_config

    try:
        return from_model_config(Path(text)) if text.endswith(".json") else [Shape.parse(text)]
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


# ----------------------------------------------------------------------------------------------------------------------
def _card(name: str | None, ordinal: int = 0) -> Device:
    """The card that is named in a table, or the one of this ordinal, which becomes the current one."""
    if name is None:
        if not 0 <= ordinal < torch.cuda.device_count():
            raise _NoCardError(f"expected a CUDA card here, and there are {torch.cuda.device_count()} of them")
        torch.cuda.set_device(ordinal)
        return current(ordinal)
    known = {found.device for _, found in choice.read_all()}
    for device in sorted(known, key=lambda device: device.name):
        if name.lower() in device.name.lower():
            return device
    names = ", ".join(sorted(device.name for device in known)) or "none"
    raise _NoCardError(f"expected a card that there is a table for ({names}), got {name}")


def _keys(options: argparse.Namespace, device: Device, *, default: bool = False) -> list[Key]:
    """The keys and shapes that are named; where none is, and if wanted, those of the default shapes."""
    found = dict.fromkeys(options.key)
    if options.shapes or (default and not found):
        from gka_ops.autotune.shapes import DEFAULT, keys_of

        found |= dict.fromkeys(keys_of(options.shapes or DEFAULT, device))
    return list(found)


# ------------------------------------------------------------------------------------------------------------- commands
def _show(options: argparse.Namespace) -> int:
    device = _card(options.card)
    keys = _keys(options, device)
    if not keys:
        keys = list({key for _, found in choice.read_all() if found.device == device for key in found.entries})
    if not keys:
        looked = ", ".join(map(str, choice.folders(choice.mode())))
        print(f"no table has an entry for {device.name}; looked in {looked}")
        return 1
    rows = []
    for key in sorted(keys, key=str):
        found = choice.lookup(key, device)
        origin = f"{found.origin}{', stale entries skipped' if found.stale else ''}"
        rows.append((str(key), described(found.parameters), gain(found.entry), origin, str(found.file or "")))
    screen.show(f"{device.name}, tables: {choice.mode()}")
    screen.show(Rows(("key", "parameters", "time, gain", "origin", "file"), rows))
    return 0


def _explain(options: argparse.Namespace) -> int:
    found = explain(options.key, _card(options.card))
    for part in found.parts(options.top):
        screen.show(part)
    return 0 if found.timed or found.choice.entry is not None else 1


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
    for path in [*([options.file] if options.file.exists() else []), *options.tables]:
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
    device = _card(None, options.ordinal)
    if options.into is None and table.user_folder() is None:
        print(f"nothing is tuned: {table.NO_FOLDER}, or name a file with --into FILE", file=sys.stderr)
        return 1
    if not table.writable():
        print(
            "nothing is tuned: tables are written under a lock, for which filelock has to be installed", file=sys.stderr
        )
        return 1
    keys = _keys(options, device, default=True)
    known = {key: choice.lookup(key, device).origin for key in keys}
    with screen.progress() as progress:
        results = tuner.tune(
            keys, device, _bench(), seconds=options.time_budget, workers=options.workers, path=options.into,
            reach=options.reach, log=_log if options.verbose else lambda _: None, progress=progress,
        )  # fmt: skip
    rows = [
        (str(r.key), known[r.key], described(r.entry.parameters) if r.entry else "nothing that works", gain(r.entry))
        for r in results
    ]
    screen.show(Rows(("key", "until now", "parameters", "time, gain"), rows))
    return 0 if all(result.entry is not None for result in results) else 1


def _log(line: str) -> None:
    print(line, flush=True)


def _verify(options: argparse.Namespace) -> int:
    device = _card(None)
    entries = [
        (path, key, entry)
        for path, found in choice.read_all()
        if found.device == device
        for key, entry in found.entries.items()
    ]
    rows = []
    with Worker(_bench()) as worker, screen.progress() as progress:
        for i, (path, key, entry) in enumerate(entries, 1):
            reason = entry.stale(key.kernel)
            if reason is None:
                try:
                    reason = worker.call("check", key, entry.parameters, seconds=_VERIFY_SECONDS)
                except WorkerError as error:
                    reason = str(error)
            rows.append((str(key), described(entry.parameters), reason or "right", str(path)))
            progress("verify", i, len(entries), str(key))
    screen.show(Rows(("key", "parameters", "verdict", "file"), rows))
    return 0 if all(verdict == "right" for _, _, verdict, _ in rows) else 1


def _bench() -> partial[tuner.Bench]:
    return partial(tuner.bench_on, torch.cuda.current_device())


if __name__ == "__main__":
    sys.exit(main())
