"""Keys, the space of configurations and fingerprints of kernels."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import shutil
from collections import defaultdict
from pathlib import Path

import pytest

from gka_ops.autotune import choice, fingerprint, space
from gka_ops.autotune.config import chunk_config, recurrent_config
from gka_ops.autotune.key import OPTIONS, Key, Problem, bucket
from tests.helpers.autotune import A100, BACKWARD, CONSUMER, DECODE, FORWARD, H100, H200, key_of

CARDS = (H100, H200, A100, CONSUMER)


def problems() -> list[Problem]:
    sizes = itertools.product(("forward", "backward"), ("bf16", "fp32"), (16, 40, 64, 128, 256), (0, 16, 100, 128, 256))
    options = [frozenset(), frozenset(OPTIONS)]
    return [
        Problem(when, dtype, D, V, chunk_config(space.padded(D), space.padded(V or D), dtype == "fp32").chunk, 64, 8, o)
        for when, dtype, D, V in sizes
        for o in options
    ] + [
        Problem("decode", "bf16", D, V, 1, T, 8, o)
        for D in (16, 128, 256)
        for V in (16, 200)
        for T in (1, 4)
        for o in options
    ]


# ----------------------------------------------------------------------------------------------------------------- keys
def test_a_key_is_what_was_written() -> None:
    for problem in problems():
        for kernel in space.KERNELS.values():
            key = kernel.key(problem)
            assert Key.parse(str(key)) == key


def test_a_kernel_is_looked_up_by_what_changes_its_code() -> None:
    other = FORWARD._replace(V=64, options=FORWARD.options | {"alpha"})
    assert key_of("solve", FORWARD) == key_of("solve", other)
    assert key_of("readout", FORWARD) != key_of("readout", other)
    assert key_of("solve", FORWARD) != key_of("solve", FORWARD._replace(options=FORWARD.options | {"varlen"}))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "readout",
        "readout/forward/bf16/D128/V128/C64/T8192/N64",
        "readout/sideways/bf16/D128/V128/C64/T8192/N64/",
        "readout/forward/fp8/D128/V128/C64/T8192/N64/",
        "readout/forward/bf16/D512/V128/C64/T8192/N64/",
        "readout/forward/bf16/D0/V128/C64/T8192/N64/",
        "readout/forward/bf16/D128/V128/C64/T8191/N64/",
        "readout/forward/bf16/D0128/V128/C64/T8192/N64/",
        "readout/forward/bf16/D-128/V128/C64/T8192/N64/",
        "readout/forward/bf16/D١٢٨/V128/C64/T8192/N64/",
        "readout/forward/bf16/D128/V128/C64/T8192/N64/beta+alpha",
        "readout/forward/bf16/D128/V128/C64/T8192/N64/beta+beta",
        "readout/forward/bf16/D128/V128/C64/T8192/N64/magic",
        "readout/forward/bf16/D128/V128/C64/T8192/N64/beta\n",
        "readout/forward/bf16/D128/V128/C64/T9999999999999/N64/",
        "../readout/forward/bf16/D128/V128/C64/T8192/N64/",
        "x" * 10**6,
    ],
)
def test_anything_else_is_no_key(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        Key.parse(text)


def test_buckets() -> None:
    assert [bucket(n) for n in (0, 1, 2, 3, 4, 5, 8191, 8192, 8193)] == [1, 1, 2, 4, 4, 8, 8192, 8192, 16384]
    key = key_of()
    assert key.distance(key) == (0, 0)
    assert key.distance(dataclasses.replace(key, T=1024, N=128)) == (1, 3)
    assert key.distance(dataclasses.replace(key, D=64)) is None
    assert key.distance(dataclasses.replace(key, options=())) is None


# ---------------------------------------------------------------------------------------------------------------- space
def test_every_tuned_kernel_has_a_configuration_and_a_source() -> None:
    fields = {field.name for field in dataclasses.fields(chunk_config(64, 64, False)) if field.type == "KernelConfig"}
    assert fields | {"recurrent"} == space.KERNELS.keys()
    for kernel in space.KERNELS.values():
        file = fingerprint._PACKAGE / "triton" / "kernels" / kernel.source[0]
        assert f"def {kernel.source[1]}(" in file.read_text()


def test_parameters_go_into_a_configuration_and_come_out() -> None:
    for problem in (FORWARD, BACKWARD, DECODE):
        config = choice.heuristic_config("recurrent" if problem is DECODE else "state", "bf16", 128, 128, 1)
        for kernel in space.kernels_of(problem, config, H100):
            tried, _ = space.candidates(kernel, key_of(kernel, problem), H100)
            for parameters in tried:
                changed = space.with_parameters(kernel, config, parameters)
                assert space.parameters_of(kernel, changed) == parameters
                assert space.with_parameters(kernel, changed, space.parameters_of(kernel, config)) == config


def test_the_heuristic_is_a_candidate_on_every_card() -> None:
    for problem, card in itertools.product(problems(), CARDS):
        decode = problem.when == "decode"
        config = choice.heuristic_config(
            "recurrent" if decode else "state", problem.dtype, problem.D, problem.V, problem.T
        )
        for kernel in space.kernels_of(problem, config, card):
            key = space.KERNELS[kernel].key(problem)
            parameters = choice.heuristic(key, card)
            assert space.outside(kernel, parameters) is None, key
            assert space.excluded(kernel, key, parameters, card) is None, key


def test_a_card_with_little_shared_memory_gets_fewer_stages() -> None:
    key = key_of("state")
    assert choice.heuristic(key, H100)["num_stages"] == 3
    fitted = choice.heuristic(key, CONSUMER)
    assert fitted["num_stages"] == 2 and fitted["block_state"] == 128
    assert space.shared_memory("state", key, fitted) <= CONSUMER.shared_memory
    tiny = dataclasses.replace(CONSUMER, shared_memory=49152)
    assert space.shared_memory("state", key, choice.heuristic(key, tiny)) <= tiny.shared_memory


def test_estimates_of_shared_memory_are_what_the_compiler_asked_for() -> None:
    """Triton 3.6, sm_90: bytes of chunk_state at three stages."""
    for dtype, D, C, asked in (("bf16", 128, 64, 132096), ("fp32", 128, 32, 131584), ("fp32", 64, 64, 132096)):
        key = key_of("state", FORWARD._replace(dtype=dtype, D=D, V=D, C=C))
        assert space.shared_memory("state", key, {"num_stages": 3, "block_state": 128}) == asked


def test_pruning_says_why() -> None:
    tried, pruned = space.candidates("state", key_of("state"), CONSUMER)
    assert tried and any("shared memory" in p.reason for p in pruned)
    assert all(
        "shared memory" not in p.reason
        for p in space.candidates("state", key_of("state"), H100)[1]
        if p.parameters["num_stages"] == 3
    )
    _, pruned = space.candidates("recurrent", key_of("recurrent", DECODE), H100)
    assert {"a state takes 512 registers a thread of 255"} <= {p.reason for p in pruned}
    total = len(list(space._combinations(space.KERNELS["state"])))
    tried, pruned = space.candidates("state", key_of("state"), H100)
    assert len(tried) + len(pruned) == total


def test_the_hopper_miscompile_is_excluded_where_it_was_found() -> None:
    key = key_of("backward_key", BACKWARD._replace(D=32, V=64))
    for card, found in ((H100, True), (H200, True), (A100, False)):
        _, pruned = space.candidates("backward_key", key, card)
        assert any("miscompile" in p.reason and p.parameters["num_warps"] == 4 for p in pruned) is found
        assert all(p.parameters["num_warps"] == 4 for p in pruned if "miscompile" in p.reason)


@pytest.mark.parametrize(
    "parameters",
    [
        None,
        [],
        {},
        {"num_warps": 4},
        {"num_warps": 4, "num_stages": 1, "max_registers": None, "grid": 1},
        {"num_warps": 1024, "num_stages": 1, "max_registers": None},
        {"num_warps": 3, "num_stages": 1, "max_registers": None},
        {"num_warps": True, "num_stages": True, "max_registers": None},
        {"num_warps": 4.0, "num_stages": 1, "max_registers": None},
        {"num_warps": "4", "num_stages": 1, "max_registers": None},
        {"num_warps": None, "num_stages": 1, "max_registers": None},
        {"num_warps": 4, "num_stages": 10**9, "max_registers": None},
        {"num_warps": 4, "num_stages": 1, "max_registers": 10**30},
        {"num_warps": [4], "num_stages": 1, "max_registers": None},
    ],
)
def test_parameters_outside_the_space(parameters: object) -> None:
    assert space.outside("readout", parameters) is not None


def test_kernels_of_a_call() -> None:
    config = chunk_config(128, 128, False)
    assert space.kernels_of(FORWARD, config, H100) == ("state", "solve_hopper", "readout")
    assert space.kernels_of(FORWARD, config, A100) == ("state", "solve", "readout")
    assert space.kernels_of(FORWARD._replace(V=0, options=frozenset()), config, H100) == ("state",)
    hopper = set(space.kernels_of(BACKWARD, config, H100))
    assert {"backward_solve_hopper", "backward_value_hopper", "backward_key_hopper"} <= hopper
    plain = set(space.kernels_of(BACKWARD._replace(dtype="fp16"), config, H100))
    assert {"backward_solve_hopper", "backward_value", "backward_key_hopper"} <= plain
    assert space.kernels_of(DECODE, recurrent_config(128, 128, True), H100) == ("recurrent",)


# --------------------------------------------------------------------------------------------------------- fingerprints
@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the kernels' source that can be changed."""
    shutil.copytree(fingerprint._PACKAGE / "triton", tmp_path / "triton")
    monkeypatch.setattr(fingerprint, "_PACKAGE", tmp_path)
    return tmp_path / "triton"


def fresh(kernel: str) -> str:
    for cached in (fingerprint.fingerprint, fingerprint._module, fingerprint._definition):
        cached.cache_clear()
    try:
        return fingerprint.fingerprint(kernel)
    finally:
        fingerprint.fingerprint.cache_clear()


def change(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


def test_comments_do_not_make_an_entry_stale(sources: Path) -> None:
    before = fresh("state")
    assert before == fresh("state")
    change(sources / "kernels" / "chunk_state.py", "@triton.jit\n", "# Not code.\n\n\n@triton.jit\n")
    change(sources / "kernels" / "chunk_state.py", '"""Column block', '"""A column block')
    assert fresh("state") == before


def test_a_change_of_a_kernel_or_of_what_it_calls_does(sources: Path) -> None:
    kernels = ("state", "solve", "solve_hopper", "backward_scan", "recurrent")
    before = {kernel: fresh(kernel) for kernel in kernels}
    change(sources / "kernels" / "chunk_state.py", "i_col, i_nh = tl.program_id(0)", "i_col, i_nh = tl.program_id(2)")
    assert [kernel for kernel in kernels if fresh(kernel) != before[kernel]] == ["state"]
    change(sources / "kernels" / "chunk_state.py", "2.0**-11", "2.0**-10")  # a constant of the file
    changed = fresh("state")
    assert changed != before["state"]
    change(sources / "primitives.py", "def state_unit(", "@triton.jit  # twice\n@triton.jit\ndef state_unit(")
    assert fresh("state") != changed
    assert fresh("recurrent") == before["recurrent"]


def test_a_change_of_the_space_does(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fresh("readout")
    wider = dataclasses.replace(space.KERNELS["readout"], axes=(("num_warps", (4,)),))
    monkeypatch.setitem(space.KERNELS, "readout", wider)
    assert fresh("readout") != before


def test_nothing_that_a_kernel_uses_is_missed() -> None:
    """Whatever a file imports from the package is used by one of its kernels, so it must be found there."""
    reached: dict[Path, set[tuple[str, str]]] = defaultdict(set)
    for kernel in space.KERNELS.values():
        path = fingerprint._PACKAGE / "triton" / "kernels" / kernel.source[0]
        reached[path] |= fingerprint._closure(path, kernel.source[1]).keys()
    for path, found in reached.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("gka_ops"):
                file = f"{str(node.module).rsplit('.', 1)[-1]}.py"
                assert {(file, alias.name) for alias in node.names} <= found, path


def test_a_formatted_string_is_one_token_in_every_python() -> None:
    """From 3.12 on, tokenize takes it apart; then entries that were tuned with one Python were stale in another."""
    source = [
        "def f(x):\n",
        '    """Says x."""\n',
        '    return f"{x!r:>{8}} {{}}" + "a"  # no more\n',
        'g = rf"""{f"{f(1)}"}\n',
        'end"""\n',
    ]
    function, assignment = ast.parse("".join(source)).body
    expected = 'def f ( x ) : \n > \n return f"{x!r:>{8}} {{}}" + "a" \n <'
    assert fingerprint._normalised(source, function) == expected
    assert fingerprint._normalised(source, assignment) == 'g = rf"""{f"{f(1)}"}\nend""" \n'


def test_an_installed_package_has_the_fingerprints_of_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Installed, autotune lies in gka_ops; in a checkout, beside it."""
    before = {kernel: fresh(kernel) for kernel in space.KERNELS}
    installed = tmp_path / "gka_ops"
    shutil.copytree(fingerprint._PACKAGE, installed, ignore=shutil.ignore_patterns("autotune", "reference"))
    shutil.copytree(fingerprint._AUTOTUNE, installed / "autotune")
    monkeypatch.setattr(fingerprint, "_PACKAGE", installed)
    monkeypatch.setattr(fingerprint, "_AUTOTUNE", installed / "autotune")
    assert {kernel: fresh(kernel) for kernel in space.KERNELS} == before


def test_the_rules_of_the_space_count_with_what_they_call() -> None:
    found = {name for _, name in fingerprint._closure(fingerprint._AUTOTUNE / "space.py", "excluded")}
    assert {"_misfit", "RecurrentConfig", "bucket"} <= found
    assert not {"Key", "Device"} & found, "annotations alone name them"


def test_a_missing_source_fits_no_entry(sources: Path) -> None:
    shutil.rmtree(sources)
    assert fresh("state") != fresh("solve")  # and neither raises
