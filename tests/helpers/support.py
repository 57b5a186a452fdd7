"""The support table of docs/torch.md: which of PyTorch's features are proved, and by which tests.

A test proves a feature where it carries the marker ``supports(feature)``. Markers are read from the sources, so that
those of tests for a card are found without one. ``python -m tests.helpers.support`` writes the table; with ``--check``
it fails where the table is not what the markers say.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "torch.md"
TESTS = ("tests/contract", "tests/numerics", "tests/gpu")
CARD = "tests/gpu"

CPU, CUDA = "CPU", "CUDA"
BOTH = (CPU, CUDA)

FEATURES: dict[str, tuple[str, ...]] = {
    "opcheck": (CPU,),
    "opcheck of permuted, sliced and expanded inputs": (CPU,),
    "opcheck with optional arguments present and absent": (CPU,),
    "fakes with symbolic and unbacked sizes": (CPU,),
    "torch.compile(fullgraph=True)": BOTH,
    "one graph for every T and B": BOTH,
    "one recompile for each option": (CPU,),
    "compile time of 24 layers against SDPA": (CPU,),
    "torch.export": BOTH,
    "AOTInductor": BOTH,
    "manual CUDA graph capture": (CUDA,),
    "CUDA graphs of mode=reduce-overhead": (CUDA,),
    "no allocation or synchronisation in a call": (CUDA,),
    "torch.func.grad, vjp, vmap": BOTH,
    "torch.func.jvp raises": BOTH,
    "second derivatives": BOTH,
    "multi-stream and multi-thread": BOTH,
    "multi-device": (CUDA,),
    "more than 2^31 elements": (CUDA,),
    "pickling and deepcopy": (CPU,),
    "DTensor": BOTH,
    "FSDP2": (CPU,),
    "tensor parallel": (CPU,),
    "profiler and NVTX ranges": BOTH,
    "autocast": BOTH,
    "selective activation checkpointing": BOTH,
    "save_x=False": BOTH,
    "FLOP counter": BOTH,
    "deterministic algorithms": BOTH,
    "modifiers": BOTH,
    "kernel_options": BOTH,
}
"""Every row of the table, in order, and where a test has to prove it. Features that a card alone has are of ``CUDA``;
those of schemas, fakes and graphs, which are the same everywhere, of ``CPU``."""

_BLOCK = re.compile(r"(?P<begin><!-- support: [^>]*-->\n)(?P<text>.*?)(?P<end><!-- end of support -->)", re.S)


class SupportError(ValueError):
    """Markers, features and the page do not fit together."""


class Proof(NamedTuple):
    """A test that carries the marker."""

    path: str
    """From the root of the repository."""
    test: str
    features: tuple[str, ...]

    @property
    def where(self) -> str:
        return CUDA if self.path.startswith(CARD) else CPU


# ------------------------------------------------------------------------------------------------------------- markers
def _features(node: ast.AST, path: str) -> tuple[str, ...]:
    """Those of a ``pytest.mark.supports(...)``: a text, or either of two where an expression chooses."""
    if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.supports"):
        return ()
    arguments: list[ast.expr] = node.args
    if len(arguments) == 1 and isinstance(arguments[0], ast.IfExp):
        arguments = [arguments[0].body, arguments[0].orelse]
    texts = tuple(a.value for a in arguments if isinstance(a, ast.Constant) and isinstance(a.value, str))
    if len(node.args) != 1 or len(texts) != len(arguments):
        raise SupportError(f"{path}:{node.lineno}: expected supports('a feature'), got {ast.unparse(node)}")
    return texts


def _features_in(node: ast.expr, named: Mapping[str, tuple[str, ...]], path: str) -> Iterator[str]:
    """Those of a decorator, also where it gives markers to parameters, and of names that stand for markers."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name):
            yield from named.get(inner.id, ())
        yield from _features(inner, path)


def proofs_in(source: str, path: str) -> list[Proof]:
    """The marked tests of a module. Raises ``SupportError`` where a marker stands where this does not look for it."""
    module = ast.parse(source)
    named: dict[str, tuple[str, ...]] = {}
    common: tuple[str, ...] = ()
    for statement in module.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            name = statement.targets[0].id
            if name == "pytestmark":
                common = tuple(_features_in(statement.value, named, path))
            elif features := _features(statement.value, path):
                named[name] = features
    proofs = []
    for statement in module.body:
        if isinstance(statement, ast.FunctionDef) and statement.name.startswith("test_"):
            own = (f for decorator in statement.decorator_list for f in _features_in(decorator, named, path))
            features = tuple(dict.fromkeys((*common, *own)))
            if features:
                proofs.append(Proof(path, statement.name, features))
    written = {feature for node in ast.walk(module) for feature in _features(node, path)}
    if unread := written - {f for proof in proofs for f in proof.features}:
        raise SupportError(
            f"{path}: expected supports(...) as a decorator of a test function or in pytestmark, got {sorted(unread)} "
            "elsewhere"
        )
    return proofs


def proofs(root: Path = ROOT) -> list[Proof]:
    """Every marked test of the repository."""
    found = []
    for folder in TESTS:
        for file in sorted((root / folder).rglob("test_*.py")):
            found += proofs_in(file.read_text(encoding="utf-8"), file.relative_to(root).as_posix())
    return found


# --------------------------------------------------------------------------------------------------------------- table
def complaints(found: list[Proof], features: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Features without a test where there has to be one, and markers of features that nobody listed."""
    proved = {(feature, proof.where) for proof in found for feature in proof.features}
    missing = [
        f"no test on {where} proves {feature!r}"
        for feature, places in features.items()
        for where in places
        if (feature, where) not in proved
    ]
    unknown = [
        f"{proof.path}: {proof.test} proves {feature!r}, which is not in FEATURES of tests/helpers/support.py"
        for proof in found
        for feature in proof.features
        if feature not in features
    ]
    return missing + unknown


def table(found: list[Proof], features: Mapping[str, tuple[str, ...]]) -> str:
    lines = ["| feature | CPU | CUDA | tests |", "|---|---|---|---|"]
    for feature in features:
        having = [proof for proof in found if feature in proof.features]
        status = [
            "tested" if any(proof.where == where for proof in having)
            else "as on the CPU" if where == CUDA else "does not apply"
            for where in BOTH
        ]  # fmt: skip
        by_file: dict[str, list[str]] = {}
        for proof in having:
            by_file.setdefault(proof.path, []).append(proof.test)
        tests = "; ".join(
            f"[{path.removeprefix('tests/')}](../{path}): "
            + ", ".join(f"`{name.removeprefix('test_')}`" for name in names)
            for path, names in by_file.items()
        )
        lines.append(f"| {feature} | {status[0]} | {status[1]} | {tests} |")
    return "\n".join(lines)


def filled(text: str, content: str) -> str:
    """The page with its table written anew."""
    if len(_BLOCK.findall(text)) != 1:
        raise SupportError("expected one block <!-- support: ... --> to <!-- end of support --> on the page")
    return _BLOCK.sub(lambda match: f"{match['begin']}\n{content}\n\n{match['end']}", text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where the page is not as it should be"
    )
    check = parser.parse_args(arguments).check
    found = proofs()
    wrong = complaints(found, FEATURES)
    now = PAGE.read_text(encoding="utf-8")
    wanted = filled(now, table(found, FEATURES))
    if not check:
        PAGE.write_text(wanted, encoding="utf-8")
    elif now != wanted:
        wrong.append("docs/torch.md is stale: run python -m tests.helpers.support")
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
