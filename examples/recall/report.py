"""Tables, plots and figures of what is stored of a study."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import matplotlib
from matplotlib import pyplot
from rich.console import Console
from rich.text import Text
from tabulate import tabulate

from examples.recall.evaluate import PRECISIONS
from examples.recall.mixers import VARIANTS

matplotlib.use("Agg")

Stored = dict[str, Any]

METRICS = {"exact_match": "exact match", "token_f1": "token F1"}
SIZES = {"mqar": "pairs", "facts": "tokens"}

CURVE_POINTS = 100
"""Of a training's losses, in the folder for documentation: means over equal parts."""


class Table(NamedTuple):
    """A table with a title. Cells are text."""

    title: str
    header: list[str]
    rows: list[list[str]]


def _tasks(results: list[Stored]) -> list[str]:
    return [name for name in SIZES if any(result["task"] == name for result in results)]


def _values(results: list[Stored], task: str, variant: str, metric: str, **setting: Any) -> list[float]:
    """One number a seed that has it. ``setting`` are fields of an evaluation."""
    return [
        evaluation[metric]
        for result in results
        if (result["task"], result["variant"]) == (task, variant)
        for evaluation in result["evaluations"]
        if metric in evaluation and all(evaluation[key] == value for key, value in setting.items())
    ]


def _cell(values: list[float]) -> str:
    """Mean in per cent, ± the standard deviation over seeds where there are several."""
    if not values:
        return "—"
    mean = f"{100 * fmean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * stdev(values):.1f}"


def _eval_sizes(results: list[Stored], task: str) -> list[int]:
    preset = results[0]["preset"]
    return next(list(sizes["eval_sizes"]) for sizes in preset["tasks"] if sizes["name"] == task)


def _counts(results: list[Stored]) -> list[tuple[str, int]]:
    """(solver, iterations) of every evaluation by Chebyshev iteration; as trained, it is the model's own."""
    preset = results[0]["preset"]
    counts = sorted({*preset["iterations"], preset["num_iter"]})
    return [("own" if count == preset["num_iter"] else "chebyshev", count) for count in counts]


def variants_table(results: list[Stored], task: str, metric: str) -> Table:
    """Trained models, a row for each variant and precision."""
    sizes = _eval_sizes(results, task)
    rows = []
    for variant, known in VARIANTS.items():
        of_variant = [result for result in results if (result["task"], result["variant"]) == (task, variant)]
        if not of_variant:
            continue
        refused = next((result["refused"] for result in of_variant if "refused" in result), None)
        if refused is not None:
            rows.append([known.label, "—", *("—" for _ in sizes), refused])
            continue
        for precision in PRECISIONS:
            found = [
                _values(results, task, variant, metric, solver="own", precision=precision, size=size) for size in sizes
            ]
            notes = {
                e["refused"]
                for result in of_variant
                for e in result["evaluations"]
                if "refused" in e and e["solver"] == "own" and e["precision"] == precision
            }
            rows.append([known.label, precision, *map(_cell, found), "; ".join(sorted(notes))])
    seeds = sorted({result["seed"] for result in results if result["task"] == task})
    header = ["", "evaluated in", *(f"{size} {SIZES[task]}" for size in sizes), ""]
    if all(not row[-1] for row in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return Table(f"{task}: {METRICS[metric]}, %, seeds {', '.join(map(str, seeds))}", header, rows)


def solvers_table(results: list[Stored], task: str) -> Table:
    """The trained GKA model, solved in other ways: exact match."""
    sizes = _eval_sizes(results, task)
    trained = results[0]["preset"]["num_iter"]
    wanted = [(solver, count, f"Chebyshev, {count} iterations") for solver, count in _counts(results)]
    wanted += [("cg", trained, f"naive CG, {trained} iterations"), ("kalman", 0, "Kalman recursion, fixed ridge")]
    rows = []
    for solver, count, label in wanted:
        for precision in PRECISIONS:
            setting = {"solver": solver, "num_iter": count, "precision": precision}
            found = [_values(results, task, "gka", "exact_match", **setting, size=size) for size in sizes]
            rows.append([label, precision, *map(_cell, found)])
    header = ["solve", "evaluated in", *(f"{size} {SIZES[task]}" for size in sizes)]
    return Table(f"{task}: the trained GKA model, solved in other ways: exact match, %", header, rows)


def training_table(results: list[Stored]) -> Table:
    """How trainings went, seed by seed."""
    rows = []
    for result in results:
        row = [result["task"], VARIANTS[result["variant"]].label, str(result["seed"]), f"{result['parameters']:,}"]
        if "training" in result:
            training = result["training"]
            last = training["losses"][-max(1, len(training["losses"]) // 20) :]
            row += [f"{training['tokens']:,}", f"{fmean(last) / math.log(2):.3f}", f"{training['seconds']:.0f}"]
        else:
            row += ["—", "—", "—"]
        rows.append(row)
    header = ["task", "", "seed", "parameters", "tokens read", "loss at the end, bits a token of an answer", "seconds"]
    return Table("Trainings", header, rows)


def tables(results: list[Stored]) -> dict[str, Table]:
    """Every table by the name of its file."""
    found = {}
    for task in _tasks(results):
        found[task] = variants_table(results, task, "exact_match")
        if task == "facts":  # an answer of mqar is one token: F1 is the exact match
            found[f"{task}-f1"] = variants_table(results, task, "token_f1")
        if any((result["task"], result["variant"]) == (task, "gka") for result in results):
            found[f"{task}-solvers"] = solvers_table(results, task)
    found["training"] = training_table(results)
    return found


def origin(results: list[Stored]) -> str:
    """What the results were found with."""
    found = {(r["environment"]["device"], r["environment"]["torch"]) for r in results}
    devices = "; ".join(f"{device}, torch {version}" for device, version in sorted(found))
    last = max(r["environment"]["date"] for r in results)[:10]
    return f"`python -m examples.recall --preset {results[0]['preset']['name']}` on {devices}, {last}."


# -------------------------------------------------------------------------------------------------------------- plots
def _line(axes: Any, points: list[tuple[float, list[float]]], label: str, **style: Any) -> None:
    points = [(x, values) for x, values in points if values]
    if not points:
        return
    means = [100 * fmean(values) for _, values in points]
    spread = [100 * stdev(values) if len(values) > 1 else 0.0 for _, values in points]
    axes.errorbar([x for x, _ in points], means, spread, label=label, marker="o", capsize=2, **style)


def plot(results: list[Stored], out: Path) -> list[Path]:
    """Writes the plots below ``out``; returns them."""
    written = []

    def write(name: str, axes: Any, title: str, xlabel: str, ylabel: str = "exact match, %") -> None:
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
        axes.figure.savefig(out / name, dpi=120)
        pyplot.close(axes.figure)
        written.append(out / name)

    def new() -> Any:
        return pyplot.subplots(figsize=(7, 4.2), layout="constrained")[1]

    for task in _tasks(results):
        sizes, unit = _eval_sizes(results, task), SIZES[task]
        exact = partial(_values, results, task, metric="exact_match")

        axes = new()  # fp32 is drawn through, bf16 dashed
        for i, (variant, known) in enumerate(VARIANTS.items()):
            for precision, style in zip(PRECISIONS, ("-", "--"), strict=True):
                points = [(n, exact(variant=variant, solver="own", precision=precision, size=n)) for n in sizes]
                _line(axes, points, f"{known.label}, {precision}", color=f"C{i}", linestyle=style)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        write(f"{task}.png", axes, f"{task}: recall of trained models", unit)

        axes = new()
        for i, size in enumerate(sizes):
            for precision, style in zip(PRECISIONS, ("-", "--"), strict=True):
                setting = {"variant": "gka", "size": size, "precision": precision}
                points = [(n, exact(**setting, num_iter=n, solver=solver)) for solver, n in _counts(results)]
                _line(axes, points, f"{size} {unit}, {precision}", color=f"C{i}", linestyle=style)
        title = f"{task}: GKA, trained with {results[0]['preset']['num_iter']} iterations"
        write(f"{task}-iterations.png", axes, title, "Chebyshev iterations at evaluation")

        axes = new()
        for i, (variant, known) in enumerate(VARIANTS.items()):
            curves = [
                _curve(result["training"]["losses"])
                for result in results
                if (result["task"], result["variant"]) == (task, variant) and "training" in result
            ]
            for curve in curves:
                label = known.label if curve is curves[0] else None
                axes.plot([step for step, _ in curve], [loss for _, loss in curve], color=f"C{i}", label=label)
        write(f"{task}-training.png", axes, f"{task}: training", "step", "loss, bits a token of an answer")
    return written


def _curve(losses: list[float]) -> list[tuple[int, float]]:
    """(last step, mean loss in bits) of at most ``CURVE_POINTS`` equal parts."""
    width = max(1, math.ceil(len(losses) / CURVE_POINTS))
    parts = [losses[i : i + width] for i in range(0, len(losses), width)]
    return [(min(len(losses), (i + 1) * width), fmean(part) / math.log(2)) for i, part in enumerate(parts)]


# ---------------------------------------------------------------------------------------------------------- publishing
def publish(results: list[Stored], out: Path, console: Console) -> None:
    """Prints the tables; writes them, the plots and all figures below ``out``."""
    found = tables(results)
    text = origin(results) + "".join(
        f"\n\n{table.title}\n{tabulate(table.rows, table.header, disable_numparse=True)}" for table in found.values()
    )
    (out / "report.txt").write_text(text + "\n", encoding="utf-8")
    (out / "figures.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    plots = plot(results, out)
    console.print(Text(text), soft_wrap=True)
    console.print(Text(f"report.txt, figures.json, {', '.join(path.name for path in plots)} are in {out}"))


def publish_docs(results: list[Stored], folder: Path) -> None:
    """Writes tables as ``gka-perf docs`` reads them, and the results with shortened curves, into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables(results).items():
        stored = {"origin": f"{table.title}. {origin(results)}", "header": table.header, "rows": table.rows}
        (folder / f"{name}.json").write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    short = []
    for result in results:
        training = result.get("training")
        if training is not None:
            training = {**training, "losses": [[step, round(loss, 4)] for step, loss in _curve(training["losses"])]}
            result = {**result, "training": training}
        short.append(json.dumps(result))
    (folder / "results.jsonl").write_text("\n".join(short) + "\n", encoding="utf-8")
