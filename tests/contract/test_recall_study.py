"""The recall study: its texts, scores, cores and its way of going on, in the smallest preset."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("matplotlib", reason="needs the extra `demo`")
pytest.importorskip("rich", reason="needs the extra `demo`")
pytest.importorskip("tabulate", reason="needs the extra `demo`")

from filelock import FileLock

from examples.recall import __main__ as command
from examples.recall import evaluate, mixers, report, study, tasks
from examples.recall import train as training
from examples.recall.model import RecallModel, build
from examples.recall.presets import PRESETS, Preset
from examples.stdlib_lm.model import parameter_count
from gka_ops import DecayGate, GatedKalmaNet
from gka_ops.nn import LayerOperands
from gka_ops.reference import exact, kalman

TINY = PRESETS["tiny"]
CPU = torch.device("cpu")
H, D = TINY.num_heads, TINY.head_dim


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def facts() -> tasks.Facts:
    return tasks.Facts(TINY.task("facts"))


@pytest.fixture(scope="module")
def mqar() -> tasks.AssociativeRecall:
    return tasks.AssociativeRecall(TINY.task("mqar"))


# -------------------------------------------------------------------------------------------------------------- texts
@pytest.mark.parametrize("size", [2, 8])
def test_mqar_asks_for_what_it_said(mqar: tasks.AssociativeRecall, size: int) -> None:
    batch = mqar.batch(size, 16, False, generator())
    assert batch.tokens.shape == (16, 8 * size) and batch.positions.shape == batch.answers.shape == (16, size, 1)
    for text, positions, answers in zip(*(x.tolist() for x in batch), strict=True):
        said = dict(zip(text[: 2 * size : 2], text[1 : 2 * size : 2], strict=True))
        assert len(said) == len(set(said.values())) == size
        assert 0 < min(said) <= max(said) < 32 <= min(said.values()) <= max(said.values()) < 64
        assert [said[text[p]] for [p] in positions] == [answer for [answer] in answers]
        assert {text[p] for [p] in positions} == set(said) and min(p for [p] in positions) >= 2 * size


@pytest.mark.parametrize("size", [128, 256, 1001])
@pytest.mark.parametrize("held_out", [False, True])
def test_facts_are_said_once_and_asked_once(facts: tasks.Facts, size: int, held_out: bool) -> None:
    batch = facts.batch(size, 8, held_out, generator())
    n = TINY.task("facts").items
    assert batch.tokens.shape == (8, size) and batch.positions.shape == batch.answers.shape == (8, n, 2)
    tokenizer = facts.tokenizer
    fact, question = (torch.tensor(tokenizer.template(parts)) for parts in (tasks.FACT, tasks.QUESTION))
    for text, positions, answers in zip(*batch, strict=True):
        body, asked = text[: size - n * len(question)], text[size - n * len(question) :].unflatten(0, (n, -1))
        windows = body.unfold(0, len(fact), 1)
        said = windows[((windows == fact) | (fact == 0)).all(1)]
        places = [tasks.FACT.index(name) for name in "ABCD"]
        told = {(a, b): [c, d] for a, b, c, d in said[:, places].tolist()}
        assert len(said) == len(told) == n
        places = [tasks.QUESTION.index(name) for name in "ABCD"]
        for (a, b, c, d), at, answer in zip(asked[:, places].tolist(), positions, answers.tolist(), strict=True):
            assert told[a, b] == answer == [c, d] == text[at + 1].tolist()
        # No made-up word stands in the filler: the answers are nowhere else.
        words = torch.isin(body, torch.tensor(tokenizer.words))
        assert words.sum() == 4 * n


def test_training_and_evaluation_share_neither_entities_nor_files(facts: tasks.Facts) -> None:
    train, held_out = ({tuple(pair) for pair in facts.entities[key].tolist()} for key in (False, True))
    assert train and held_out and not train & held_out
    assert len(train | held_out) == TINY.task("facts").words ** 2
    asked = {key: {tuple(e) for e in _entities(facts.batch(128, 64, key, generator()), facts)} for key in (False, True)}
    assert asked[False] <= train and asked[True] <= held_out
    corpus = tasks.data.load_corpus()
    for key, part in ((False, corpus.train), (True, corpus.held_out)):
        filler = facts._filler[key]
        assert facts.tokenizer.decode(filler) == bytes(part.numpy())  # lossless, and of these files alone


def _entities(batch: tasks.Batch, facts: tasks.Facts) -> list[list[int]]:
    back = tasks.QUESTION.index("C") - tasks.QUESTION.index("A")
    at = batch.positions[..., 0] + 1 - back
    pairs = torch.stack((batch.tokens.gather(1, at), batch.tokens.gather(1, at + 1)), -1)
    return (pairs.flatten(0, 1) - facts.tokenizer.words[0]).tolist()


def test_answers_do_not_follow_from_the_question(facts: tasks.Facts) -> None:
    """Over many texts with the same entity its answers are uniform: chi-squared of the first word, 63 degrees."""
    batch = facts.batch(128, 4000, False, generator())
    counts = torch.bincount(batch.answers[..., 0].flatten() - facts.tokenizer.words[0], minlength=64).double()
    expected = counts.sum() / 64
    assert ((counts - expected) ** 2 / expected).sum() < 120  # p < 2e-5
    entities = torch.tensor(_entities(batch, facts)).double()
    answers = batch.answers.flatten(0, 1).double()
    table = torch.corrcoef(torch.cat((entities, answers), 1).T)[:2, 2:]
    assert table.abs().max() < 5 / math.sqrt(len(answers))


def test_batches_are_functions_of_seed_and_step(mqar: tasks.AssociativeRecall) -> None:
    sizes = TINY.task("mqar")
    one, same, other = (tasks.training_batch(mqar, sizes, 0, step, CPU).tokens for step in (2, 2, 4))
    assert torch.equal(one, same) and one.shape == other.shape and not torch.equal(one, other)
    assert not torch.equal(one, tasks.training_batch(mqar, sizes, 1, 2, CPU).tokens)
    assert tasks.training_batch(mqar, sizes, 0, 1, CPU).tokens.shape == (4, 32)  # sizes in turns, 128 tokens a step
    batches = tasks.evaluation_batches(mqar, sizes, 8, 128, CPU)
    assert [len(batch.tokens) for batch in batches] == [2, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_sizes": (50,)}, "expected texts of more than 54 tokens for 3 facts, got 50"),
        ({"vocabulary": 300}, "expected a vocabulary of at least 323, got 300"),
        ({"words": 5000, "vocabulary": 10000}, "made-up words, got 5000"),
        ({"eval_sizes": (10**9,)}, "expected more than 1000000000 tokens of filler"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tasks.Facts(dataclasses.replace(TINY.task("facts"), **changes))
    with pytest.raises(ValueError, match="expected a vocabulary of more than 64 for 32 pairs, got 64"):
        tasks.AssociativeRecall(dataclasses.replace(TINY.task("mqar"), eval_sizes=(32,)))


# ------------------------------------------------------------------------------------------------------------- scores
def test_scores_by_hand() -> None:
    answers = torch.tensor([[1, 2], [1, 2], [1, 2], [3, 3]])
    predicted = torch.tensor([[1, 2], [2, 1], [1, 1], [4, 3]])
    assert evaluate.exact_match(predicted, answers) == 1 / 4
    assert evaluate.token_f1(predicted, answers) == (2 + 2 + 1 + 1) / 8


class Scripted(torch.nn.Module):
    """Predicts the token that it reads plus one: a model whose answers are known."""

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        read = tokens.gather(1, positions.flatten(1)).view_as(positions)
        return torch.nn.functional.one_hot(read + 1, 16).float()


def test_decoding_reads_its_own_tokens() -> None:
    tokens = torch.tensor([[5, 9, 9, 7, 9, 9]])
    batch = tasks.Batch(tokens, torch.tensor([[[0, 1], [3, 4]]]), torch.tensor([[[9, 9], [9, 9]]]))
    model: Any = Scripted()
    first = model(tokens, batch.positions).argmax(-1)[..., 0]
    assert evaluate.decode(model, batch, first).tolist() == [[[6, 7], [8, 9]]]
    assert tokens.tolist() == [[5, 9, 9, 7, 9, 9]]


# -------------------------------------------------------------------------------------------------------------- cores
def layer_and_input(T: int = 70) -> tuple[mixers.StudiedMixer, Tensor]:
    torch.manual_seed(1)
    layer = mixers.StudiedMixer(TINY.hidden_size, D, H, mixers.chebyshev, 30)
    return layer, torch.randn(2, T, TINY.hidden_size)


def operands(T: int = 70) -> tuple[LayerOperands, DecayGate]:
    layer, x = layer_and_input(T)
    gate = layer.gate
    assert gate is not None
    with torch.no_grad():
        return layer.operands(x), DecayGate(*(part.detach() for part in gate if part is not None))


def relative(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true).norm() / true.norm())


def exact_output(given: LayerOperands, gate: DecayGate | None, **options: Any) -> Tensor:
    gates = None if gate is None else tuple(gate)
    arguments = {"ridge": (given.ridge, 0.0), "gate": gates, "qk_l2norm": True} | options
    return exact.chunk_gka(*given[:6], **arguments)[0]


def test_the_studied_layer_is_the_layer() -> None:
    layer, x = layer_and_input()
    plain = GatedKalmaNet(TINY.hidden_size, D, H, num_iter=30)
    plain.load_state_dict(layer.state_dict())
    with torch.no_grad():
        assert torch.equal(layer(x), plain(x))
        with pytest.raises(ValueError, match="expected whole sequences without cache and packing"):
            layer(x, plain.init_cache(2))


@pytest.mark.parametrize(
    ("core", "count", "options"),
    [
        (mixers.chebyshev, 120, {}),
        (mixers.linear, 120, {"num_iter": 0}),
        (mixers.fixed_ridge, 120, {"ridge": (0.0, mixers.FIXED_RIDGE)}),
        (mixers.naive_cg, 20, {}),
    ],
)
def test_cores_equal_the_exact_solve(core: mixers.Core, count: int, options: dict[str, Any]) -> None:
    """In fp32, with so many iterations that rounding alone is left; CG ends after D = 16 but for rounding."""
    given, gate = operands()
    wanted = exact_output(given, gate, **options)
    assert relative(core(given, gate, count), wanted) < 1e-5
    if core is mixers.chebyshev:
        assert 1e-5 < relative(core(given, gate, 10), wanted) < 0.3


def test_without_gate_nothing_decays() -> None:
    given, gate = operands()
    wanted = exact_output(given._replace(log_decay=None), None)
    assert relative(mixers.no_gate(given, gate, 120), wanted) < 1e-5
    assert relative(mixers.chebyshev(given, gate, 120), wanted) > 1e-3


def test_gates_of_the_cores_are_the_operators() -> None:
    given, gate = operands()
    assert given.log_decay is not None and gate.dt_bias is not None
    wanted = -gate.A_log.double().exp() * torch.nn.functional.softplus(given.log_decay.double() + gate.dt_bias.double())
    assert relative(mixers.log_decay_of(given, gate), wanted) < 1e-6


def test_the_covariance_recursion_equals_the_filter_in_fp64() -> None:
    """Of the fp64 reference, whose last state is that of a decaying initial precision without another ridge."""
    given, gate = operands()
    q, k = (torch.nn.functional.normalize(x.double(), dim=-1) for x in given[:2])
    assert given.beta is not None and given.alpha is not None
    log_decay = mixers.log_decay_of(given, gate).double()
    states = kalman.kalman_filter(
        k, given.v.double(), log_decay, given.beta.double(), initial_precision=mixers.FIXED_RIDGE, dtype=torch.float64
    )
    filtered = (q[..., None, :] @ states.weights)[..., 0, :] * D**-0.5
    alpha = given.alpha.double()[..., None]
    wanted = (1 - alpha) * exact_output(given, gate, num_iter=0) + alpha * filtered
    assert relative(mixers.kalman(given, gate, 0), wanted) < 1e-4


def test_evaluation_in_bf16_rounds_what_it_says() -> None:
    """The recursion and CG work in the dtype of q: their errors are those of bf16, far above those of fp32."""
    given, gate = operands()
    rounded = given._replace(**{name: getattr(given, name).bfloat16() for name in ("q", "k", "v")})
    for core, bound in ((mixers.naive_cg, 0.2), (mixers.kalman, 1.0)):
        error = relative(core(rounded, gate, 30), core(given, gate, 30).double())
        assert 1e-3 < error < bound, core


def test_softmax_attention_by_hand() -> None:
    given, gate = operands(9)
    q, k, v = (x.double().transpose(1, 2) for x in given[:3])
    scores = (q @ k.mT * D**-0.5).masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf)
    assert relative(mixers.softmax(given, gate, 0).transpose(1, 2), scores.softmax(-1) @ v) < 1e-6


def test_all_variants_start_from_the_same_parameters() -> None:
    models = [build(TINY, 64, variant.core, 3, CPU) for variant in mixers.VARIANTS.values()]
    assert len({parameter_count(model) for model in models}) == 1
    for model in models[1:]:
        for name, value in models[0].state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name
    assert not torch.equal(build(TINY, 64, mixers.linear, 4, CPU).embedding.weight, models[0].embedding.weight)


def test_heads_remember_long_at_first() -> None:
    gate = mixers.StudiedMixer(32, 16, 2000, mixers.linear, 0).gate
    assert gate is not None and gate.dt_bias is not None
    memory = 1 / (gate.A_log.exp() * torch.nn.functional.softplus(gate.dt_bias))
    long, short = mixers.MEMORY
    assert short * 0.99 < memory.min() < 1.1 * short and 0.9 * long < memory.max() < 1.01 * long


def test_solving_puts_back_what_was() -> None:
    model = build(TINY, 64, mixers.chebyshev, 0, CPU)

    def cores() -> list[tuple[mixers.Core, object]]:
        return [(mixer.core, mixer.num_iter) for mixer in model.mixers]

    def fail() -> None:
        with model.solving(mixers.linear, 0):
            assert cores() == [(mixers.linear, 0)]
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert cores() == [(mixers.chebyshev, TINY.num_iter)]


# ----------------------------------------------------------------------------------------------------------- training
def train_tiny(
    mqar: tasks.AssociativeRecall, checkpoint: Path, deadline: training.Deadline, preset: Preset = TINY
) -> tuple[RecallModel, training.Training]:
    sizes = preset.task("mqar")
    model = build(preset, sizes.vocabulary, mixers.chebyshev, 0, CPU)
    seen: list[int] = []
    result = training.train(
        model, mqar, preset, sizes, 0, CPU, checkpoint, deadline, lambda step, _: seen.append(step)
    )  # fmt: skip
    assert seen == list(range(sizes.steps - len(seen) + 1, sizes.steps + 1))
    return model, result


class After(training.Deadline):
    """Spent at the n-th check."""

    def __init__(self, checks: int) -> None:
        self.left = checks

    def check(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise training.OutOfTimeError


def test_an_interrupted_training_ends_as_an_uninterrupted_one(mqar: tasks.AssociativeRecall, tmp_path: Path) -> None:
    model, whole = train_tiny(mqar, tmp_path / "whole.pt", training.Deadline())
    path = tmp_path / "parts.pt"
    for steps in (1, 2):
        with pytest.raises(training.OutOfTimeError):
            train_tiny(mqar, path, After(steps))
    assert len(torch.load(path, weights_only=True)["losses"]) == 3
    resumed, parts = train_tiny(mqar, path, training.Deadline())
    assert parts.losses == whole.losses and len(whole.losses) == 4 and parts.tokens == whole.tokens == 4 * 128
    for name, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert train_tiny(mqar, path, After(0))[1].losses == whole.losses  # finished: no step is left


def test_training_learns_and_stops_where_it_diverges(mqar: tasks.AssociativeRecall, tmp_path: Path) -> None:
    sizes = dataclasses.replace(TINY.task("mqar"), steps=60, train_sizes=(2,), learning_rate=2e-2)
    longer = dataclasses.replace(TINY, tasks=(sizes,))
    losses = train_tiny(mqar, tmp_path / "a.pt", training.Deadline(), longer)[1].losses
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    broken = dataclasses.replace(longer, tasks=(dataclasses.replace(sizes, learning_rate=math.inf),))
    with pytest.raises(training.StudyError, match="expected a finite loss, got nan"):
        train_tiny(mqar, tmp_path / "b.pt", training.Deadline(), broken)


# ---------------------------------------------------------------------------------------------------------- the study
ARGUMENTS = ["--preset", "tiny", "--device", "cpu"]


def run(out: Path, *more: str) -> int:
    return command.main([*ARGUMENTS, "--out", str(out), *more])


def without_times(results: list[dict[str, Any]]) -> str:
    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(part) for key, part in value.items() if key not in ("seconds", "date")}
        return [clean(part) for part in value] if isinstance(value, list) else value

    return json.dumps(clean(results), sort_keys=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recall")
    assert run(out, "--docs", str(out / "docs")) == 0
    return out


def test_the_tiny_study_stores_everything(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = {result["name"]: result for result in study.read_all(finished)}
    assert set(results) == {job.name for job in study.jobs(TINY, [0])} and len(results) == 12
    for name, result in results.items():
        assert result["finished"] and (finished / "weights" / f"{name}.pt").exists() == ("training" in result)
        if "refused" in result:  # flash-linear-attention, which is not installed or needs a card
            assert result["variant"] == "gated_deltanet"
            continue
        assert len(result["training"]["losses"]) == 4
        settings = [evaluate.setting_of(stored) for stored in result["evaluations"]]
        expected = {"facts-gka-0": 14, "mqar-gka-0": 16}.get(name, 4)  # Kalman: of short texts alone
        assert len(settings) == len(set(settings)) == expected
        for stored in result["evaluations"]:
            assert 0 <= stored["exact_match"] <= 1 and stored["questions"] > 0
            assert ("token_f1" in stored) == (stored["solver"] == "own")
    gka = results["mqar-gka-0"]["evaluations"]
    assert {(e["solver"], e["num_iter"]) for e in gka} == {("own", 6), ("chebyshev", 3), ("cg", 6), ("kalman", 0)}
    assert {e["precision"] for e in gka} == {"fp32", "bf16"}
    for name in ("facts.png", "mqar.png", "facts-iterations.png", "mqar-training.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG\r\n")
    assert "GKA, no forgetting gate" in (finished / "report.txt").read_text()
    assert len(json.loads((finished / "figures.json").read_text())) == 12

    before = without_times(study.read_all(finished))
    assert run(finished) == 0  # nothing is left to do
    assert without_times(study.read_all(finished)) == before
    assert "facts-gka-0: is finished" in capsys.readouterr().out


def test_a_study_in_pieces_finds_the_same(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every piece may check its budget so often, once a step and a few times an evaluation: the first cuts training."""
    monkeypatch.setattr(command, "Deadline", lambda seconds: After(int(seconds)))
    budgets = ["3", "15", "12", "100"]
    codes = [run(tmp_path, "--only", "facts-gka-0", "--time-budget", budget) for budget in budgets]
    assert codes == [command.LEFT] * 3 + [0]
    found = without_times(study.read_all(tmp_path))
    wanted = [result for result in study.read_all(finished) if result["name"] == "facts-gka-0"]
    assert found == without_times(wanted)


def test_a_spent_budget_stops_cleanly(tmp_path: Path) -> None:
    assert run(tmp_path, "--time-budget", "1e-9") == command.LEFT
    assert study.read_all(tmp_path) == []


def test_two_processes_do_not_meet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results").mkdir()
    with FileLock(tmp_path / "results" / "mqar-linear-0.lock"):
        assert run(tmp_path, "--only", "mqar-linear-0", "mqar-softmax-0") == command.LEFT
    assert "mqar-linear-0: another process is at it" in capsys.readouterr().out
    assert [result["name"] for result in study.read_all(tmp_path)] == ["mqar-softmax-0"]


def test_results_of_other_presets_are_not_mixed(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(finished, "--steps", "3") == 2
    assert "expected results of the same preset and options" in capsys.readouterr().out


def test_refusals_of_peers_are_rows_and_errors_of_ours_are_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Tensor:
        raise RuntimeError("no kernel\nfor this card")

    for name in ("gated_deltanet", "linear"):
        monkeypatch.setitem(mixers.VARIANTS, name, dataclasses.replace(mixers.VARIANTS[name], core=refuse))
    assert run(tmp_path, "--only", "mqar-gated_deltanet-0") == 0
    (result,) = study.read_all(tmp_path)
    assert result["finished"] and result["refused"] == "RuntimeError: no kernel"
    assert "RuntimeError: no kernel" in (tmp_path / "report.txt").read_text()
    with pytest.raises(RuntimeError, match="no kernel"):
        run(tmp_path, "--only", "mqar-linear-0")


def test_too_little_memory_is_a_result(mqar: tasks.AssociativeRecall) -> None:
    def refuse(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    model = build(TINY, 64, refuse, 0, CPU)
    setting = evaluate.Setting("own", 6, "fp32", 4)
    found = evaluate.evaluate(model, mqar, TINY, TINY.task("mqar"), setting, CPU, training.Deadline())
    assert found["refused"] == "out of memory: CUDA out of memory." and "exact_match" not in found


# ------------------------------------------------------------------------------------------------------------- report
def stored_result(variant: str, seed: int, exact_match: float) -> dict[str, Any]:
    setting = {"solver": "own", "num_iter": 6, "size": 128}
    scores = {"exact_match": exact_match, "token_f1": 0.5}
    evaluations = [{**setting, **scores, "precision": precision} for precision in evaluate.PRECISIONS]
    return {
        "name": f"facts-{variant}-{seed}", "task": "facts", "variant": variant, "seed": seed, "parameters": 1000,
        "preset": json.loads(json.dumps(dataclasses.asdict(TINY))), "evaluations": evaluations, "finished": True,
        "environment": {"device": "cpu", "torch": "2", "date": "2026-01-02T00:00:00"},
        "training": {"losses": [math.log(2)] * 250, "seconds": 1.0, "tokens": 5},
    }  # fmt: skip


def test_tables_are_means_and_deviations_over_seeds() -> None:
    results = [stored_result("gka", 0, 0.5), stored_result("gka", 1, 0.7), stored_result("linear", 0, 0.25)]
    table = report.tables(results)["facts"]
    assert table.header == ["", "evaluated in", "128 tokens", "256 tokens"]
    assert table.rows[0] == ["GKA", "fp32", "60.0 ± 14.1", "—"]
    assert table.rows[2] == ["num_iter=0 (vanilla SSM)", "fp32", "25.0", "—"]
    assert report.tables(results)["training"].rows[0] == ["facts", "GKA", "0", "1,000", "5", "1.000", "1"]
    refused = {**stored_result("gated_deltanet", 0, 0.0), "evaluations": [], "refused": "ImportError: no fla"}
    assert report.tables([*results, refused])["facts"].rows[-1] == [
        "Gated DeltaNet",
        "—",
        "—",
        "—",
        "ImportError: no fla",
    ]


def test_report_from_stored_results(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "Study", None)  # nothing may be trained
    assert run(finished, "--report", "--docs", str(tmp_path)) == 0
    table = json.loads((tmp_path / "facts.json").read_text())
    assert set(table) == {"origin", "header", "rows"} and all(len(row) == len(table["header"]) for row in table["rows"])
    assert (tmp_path / "facts.json").read_text() == (finished / "docs" / "facts.json").read_text()
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and {"losses", "seconds", "tokens"} == set(lines[2]["training"])
    assert run(tmp_path / "nothing", "--report") == 2


# ------------------------------------------------------------------------------------------------------------ command
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "expected --steps > 0, got 0"),
        (["--learning-rate", "-1"], "expected --learning-rate > 0, got -1.0"),
        (["--time-budget", "0"], "expected --time-budget > 0, got 0.0"),
        (["--seeds", "-1"], "expected --seeds >= 0, got -1"),
        (["--device", "abacus"], "expected --device cpu or cuda, got 'abacus'"),
        (["--device", "meta"], "expected --device cpu or cuda, got 'meta'"),
        (["--preset", "huge"], "invalid choice: 'huge'"),
        (["--only", "songs"], "expected --only TASK[-VARIANT[-SEED]] with a task of mqar, facts"),
        (["--only", "facts-lstm"], "got 'facts-lstm'"),
        (["--only", "facts-gka-x"], "got 'facts-gka-x'"),
    ],
)
def test_usage_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_what_only_and_seeds_choose() -> None:
    def names(*arguments: str) -> list[str]:
        return [job.name for job in command.parse_arguments([*ARGUMENTS, *arguments])[3]]

    assert names("--only", "facts-gka-7", "facts-gka-7") == ["facts-gka-7"]
    assert names("--only", "mqar-linear", "--seeds", "1", "2") == ["mqar-linear-1", "mqar-linear-2"]
    assert names("--only", "mqar") == [f"mqar-{variant}-0" for variant in mixers.VARIANTS]
    assert len(names("--seeds", "0", "1", "2")) == 36


@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
def test_presets_are_possible(preset: Preset) -> None:
    """Texts of every size of every preset can be made, and a model of its width reads them."""
    for sizes in preset.tasks:
        task = tasks.TASKS[sizes.name](sizes)
        for size in (*sizes.train_sizes, *sizes.eval_sizes):
            batch = task.batch(size, 1, size in sizes.eval_sizes, generator())
            assert batch.tokens.shape == (1, task.length(size)) and batch.tokens.max() < sizes.vocabulary
        short = task.batch(sizes.train_sizes[0], 1, False, generator())
        model = build(preset, sizes.vocabulary, mixers.linear, 0, CPU)
        with training.autocast(True, CPU):
            assert model(short.tokens, short.positions).shape == (*short.positions.shape, sizes.vocabulary)
