"""The standard-library language model: its smallest preset runs as a user runs it, and reports its measurements."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib", reason="needs the extra `demo`")
pytest.importorskip("rich", reason="needs the extra `demo`")
pytest.importorskip("tabulate", reason="needs the extra `demo`")

from examples.stdlib_lm import __main__ as demo
from examples.stdlib_lm import data, evaluate, report, train
from examples.stdlib_lm.presets import PRESETS

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4


# -------------------------------------------------------------------------------------------------------- whole runs
@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "examples.stdlib_lm", "--preset", "tiny", "--device", "cpu", "--out", str(out)]
    return (
        subprocess.run(
            [*command, "--steps", str(STEPS), "--seed", "3", "--backend", "aot_eager"],
            cwd=ROOT,
            env=os.environ | {"COLUMNS": "120"},
            text=True,
            capture_output=True,
            timeout=500,
            check=False,
        ),
        out,
    )


@pytest.mark.slow
def test_tiny_preset_meets_every_expectation(
    finished: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    process, out = finished
    assert process.returncode == 0, process.stdout + process.stderr
    found: dict[str, Any] = json.loads((out / "figures.json").read_text())
    assert found.keys() == {
        "preset", "seed", "device", "torch", "threads", "corpus", "models", "saved_bits", "saved_bits_error",
        "operator_errors", "decoding", "wall_seconds", "failures",
    }  # fmt: skip
    assert (found["seed"], found["preset"]["steps"], found["failures"]) == (3, STEPS, [])
    for label, _ in demo.MODELS.values():  # no terminal: a line instead of a bar
        assert f"{label}: step {STEPS} of {STEPS}, " in process.stdout

    models = found["models"]
    assert [models[name]["num_iter"] for name in ("gka", "linear")] == [24, 0]
    assert models["gka"]["parameters"] == models["linear"]["parameters"] > 0
    for model in models.values():
        assert 0 < model["bits_per_byte"] < 16
        losses = model["training"]["losses"]
        assert len(losses) == STEPS
        assert all(0 < loss < 16 for loss in losses)
        assert model["training"]["tokens_per_second"] > 0
        compilation = model["training"]["compilation"]
        assert (compilation["graph_breaks"], compilation["training_graphs"], compilation["recompiles"]) == (0, 1, 0)
        assert len(set(compilation["lengths"])) == 3
    saved = models["linear"]["bits_per_byte"] - models["gka"]["bits_per_byte"]
    assert abs(found["saved_bits"] - saved) < 1e-9
    assert 0 < found["saved_bits_error"] < 8
    first = [model["training"]["losses"][0] for model in models.values()]
    assert abs(first[0] - first[1]) < 1.0  # the same initial values and the same first batch

    assert {error["tensor"] for error in found["operator_errors"]} == {"x", "output"}
    for error in found["operator_errors"]:
        assert 0 < error["p50"] <= error["p99"] <= error["max"] < math.inf
    decoding = found["decoding"]
    assert decoding["matching"] == decoding["tokens"] == PRESETS["tiny"].generated_bytes
    assert 0 <= decoding["largest_logit_difference"] < 1e-3
    assert data.is_held_out(decoding["file"])
    assert decoding["file"] in found["corpus"]["held_out_files"]

    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")
    text = (out / "report.txt").read_text()
    for figure in (f"{models['gka']['bits_per_byte']:.4f}", f"{models['gka']['parameters']:,}"):
        assert figure in text
        assert figure in process.stdout


def test_usage_error_says_what_it_expected(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        demo.parse_arguments(["--steps", "1"])
    assert caught.value.code == 2
    assert "expected --steps of at least 2, got 1" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ expectations
def met() -> tuple[dict[str, report.ModelResult], list[evaluate.OperatorError], evaluate.Decoding]:
    """Results that meet every expectation."""
    training = train.Training([2.0], 1.0, 1.0, train.Compilation(0, 1, [1, 2, 3], 0))
    models = {name: report.ModelResult(name, 24, 100, training, 2.0) for name in ("gka", "linear")}
    errors = [evaluate.OperatorError(0, tensor, 1e-3, 2e-3, 3e-3) for tensor in ("x", "output")]
    return models, errors, evaluate.Decoding("a", "b", 8, 8, 1e-6, 1e-3, 0.0, 1.0)


def test_nothing_fails_where_everything_is_met() -> None:
    assert demo.find_failures(PRESETS["cpu"], *met()) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"graph_breaks": 1}, "gka: expected no graph break, got 1"),
        ({"recompiles": 2}, "gka: expected no recompilation for sequence lengths [1, 2, 3], got 2"),
    ],
)
def test_compilation_failures_are_named(changed: dict[str, int], message: str) -> None:
    models, errors, decoding = met()
    training = models["gka"].training
    training = dataclasses.replace(training, compilation=dataclasses.replace(training.compilation, **changed))
    models["gka"] = dataclasses.replace(models["gka"], training=training)
    assert demo.find_failures(PRESETS["cpu"], models, errors, decoding) == [message]


@pytest.mark.parametrize("p99", [1.0, math.nan])
def test_operator_errors_beyond_their_bar_fail(p99: float) -> None:
    models, errors, decoding = met()
    errors[0] = dataclasses.replace(errors[0], p99=p99)
    assert len(demo.find_failures(PRESETS["cpu"], models, errors, decoding)) == 1


def test_unequal_parameters_and_decoded_bytes_fail() -> None:
    models, errors, decoding = met()
    models["gka"] = dataclasses.replace(models["gka"], parameters=101)
    assert demo.find_failures(PRESETS["cpu"], models, errors, decoding) == [
        "expected equal numbers of parameters, got [100, 101]"
    ]
    models, errors, decoding = met()
    decoding = dataclasses.replace(decoding, matching=7, largest_mismatch_margin=1e-3)
    assert len(demo.find_failures(PRESETS["cpu"], models, errors, decoding)) == 1  # fp32: equality, whatever the margin
    assert demo.find_failures(PRESETS["cuda"], models, errors, decoding) == []  # 16-bit operands: a near tie
    decoding = dataclasses.replace(decoding, largest_mismatch_margin=1.0)
    assert len(demo.find_failures(PRESETS["cuda"], models, errors, decoding)) == 1


# ------------------------------------------------------------------------------------------------------------ corpus
def test_corpus_splits_whole_files_by_name(tmp_path: Path) -> None:
    contents = {f"package/module_{i}.py": f"x = {i}\n" * (i + 1) for i in range(40)}
    skipped = {
        "test/a.py": "skipped",
        "package/tests/b.py": "skipped",
        "site-packages/c.py": "skipped",
        "d.txt": "skipped",
    }
    for name, content in (contents | skipped).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    corpus = data.load_corpus(tmp_path)
    held_out = [name for name in sorted(contents) if data.is_held_out(name)]
    assert corpus.held_out_files == held_out
    assert corpus.train_files == len(contents) - len(held_out) > 0
    assert bytes(corpus.held_out.tolist()) == b"".join(contents[n].encode() + data.SEPARATOR for n in held_out)
    assert corpus.train.numel() == sum(len(c) + 2 for n, c in contents.items() if n not in held_out)
    name, prompt = data.held_out_prompt(corpus, 20)
    assert bytes(prompt[0].tolist()) == contents[name].encode()[:20]


def test_corpus_without_sources_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected Python sources for training and for evaluation"):
        data.load_corpus(tmp_path)


def test_batches_depend_on_the_seed_alone() -> None:
    source = torch.arange(200, dtype=torch.uint8)
    first, again, other = (data.Batches(source, 16, 3, seed, torch.device("cpu")) for seed in (0, 0, 1))
    for _ in range(3):
        inputs, targets = first.next()
        assert torch.equal(targets, inputs + 1)
        assert torch.equal(inputs, again.next()[0])
        assert not torch.equal(inputs, other.next()[0])
