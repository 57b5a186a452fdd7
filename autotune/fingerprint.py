"""A hash of a kernel's code and of all that it calls, by which entries of a table are known to be stale.

It reads source files and imports nothing, so it is the same with and without a card, Triton or its interpreter, and in
every version of Python. Comments, docstrings and line numbers do not count.
"""

from __future__ import annotations

import ast
import hashlib
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path

from gka_ops import numerics
from gka_ops.autotune import space

_PACKAGE = Path(numerics.__file__).resolve().parent
_AUTOTUNE = Path(space.__file__).resolve().parent  # beside the package in a checkout, below it where it is installed
_IGNORED = frozenset({tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER})
_ANNOTATIONS = ("annotation", "returns")  # what they name says what is passed, and is not run
_LAYOUT = {tokenize.NEWLINE: "\n", tokenize.INDENT: ">", tokenize.DEDENT: "<"}


@cache
def fingerprint(kernel: str) -> str:
    """Of a kernel of ``space.KERNELS``: its code and its space."""
    file, function = space.KERNELS[kernel].source
    try:
        code = "".join(_closure(_PACKAGE / "triton" / "kernels" / file, function).values())
        rules = "".join(_closure(_AUTOTUNE / "space.py", "excluded").values())
    except (OSError, KeyError, SyntaxError):  # installed without its source, say: no entry fits
        code, rules = "unknown", "unknown"
    return hashlib.sha256("\0".join((code, rules, repr(space.KERNELS[kernel]))).encode()).hexdigest()[:16]


@cache
def triton_version() -> str:
    """The release that is installed, without importing it; empty where there is none."""
    for distribution in ("triton", "pytorch-triton"):
        try:
            return metadata.version(distribution).split("+")[0]
        except metadata.PackageNotFoundError:
            continue
    return ""


@dataclass
class _Module:
    """A file's text, its top-level definitions, and where imported names come from."""

    lines: list[str]
    defined: dict[str, ast.stmt] = field(default_factory=dict)
    imported: dict[str, tuple[Path, str]] = field(default_factory=dict)


@cache
def _module(path: Path) -> _Module:
    source = path.read_text(encoding="utf-8")
    module = _Module(source.splitlines(keepends=True))
    for statement in ast.parse(source).body:
        names: list[str] = []
        match statement:
            case ast.FunctionDef() | ast.ClassDef():
                names = [statement.name]
            case ast.Assign():
                names = [target.id for target in statement.targets if isinstance(target, ast.Name)]
            case ast.AnnAssign(target=ast.Name(id=name)):
                names = [name]
            case ast.ImportFrom(module=str(origin)) if origin.startswith("gka_ops."):
                file = _file(origin)
                module.imported |= {alias.asname or alias.name: (file, alias.name) for alias in statement.names}
        module.defined |= dict.fromkeys(names, statement)
    return module


def _file(module: str) -> Path:
    """Where a module of the package has its source."""
    _, *folders, name = module.split(".")
    root = _AUTOTUNE.joinpath(*folders[1:]) if folders[:1] == ["autotune"] else _PACKAGE.joinpath(*folders)
    return root / f"{name}.py"


@cache
def _definition(path: Path, name: str) -> tuple[str, frozenset[str]]:
    """A definition's code, and the names that it uses."""
    module = _module(path)
    statement = module.defined[name]
    return _normalised(module.lines, statement), frozenset(_names(statement))


def _names(node: ast.AST) -> Iterator[str]:
    """The names that running it uses."""
    if isinstance(node, ast.Name):
        yield node.id
    for field_, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if field_ not in _ANNOTATIONS and isinstance(child, ast.AST):
                yield from _names(child)


def _normalised(source: list[str], statement: ast.stmt) -> str:
    """The statement's tokens. Not its syntax tree, whose form depends on the version of Python."""
    decorators = statement.decorator_list if isinstance(statement, (ast.FunctionDef, ast.ClassDef)) else []
    first = min([statement.lineno, *(decorator.lineno for decorator in decorators)])
    lines = source[first - 1 : statement.end_lineno]
    docstrings = {
        (node.body[0].lineno - first + 1, node.body[0].col_offset)
        for node in ast.walk(statement)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node, clean=False) is not None
    }
    tokens = _with_whole_strings(tokenize.generate_tokens(io.StringIO("".join(lines)).readline), lines)
    words = [
        _LAYOUT.get(token.type, token.string)
        for token in tokens
        if token.type not in _IGNORED and not (token.type == tokenize.STRING and token.start in docstrings)
    ]
    return " ".join(words)


def _with_whole_strings(tokens: Iterator[tokenize.TokenInfo], lines: list[str]) -> Iterator[tokenize.TokenInfo]:
    """The tokens with an f-string as one of them, which it is before Python 3.12 and is not since."""
    opening, closing = getattr(tokenize, "FSTRING_START", None), getattr(tokenize, "FSTRING_END", None)
    depth, start = 0, (0, 0)
    for token in tokens:
        if token.type == opening:
            start = start if depth else token.start
            depth += 1
        elif token.type == closing:
            depth -= 1
            if not depth:
                yield tokenize.TokenInfo(tokenize.STRING, _between(lines, start, token.end), start, token.end, "")
        elif not depth:
            yield token


def _between(lines: list[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    rows = lines[start[0] - 1 : end[0]]
    rows[-1] = rows[-1][: end[1]]
    rows[0] = rows[0][start[1] :]
    return "".join(rows)


def _closure(path: Path, name: str) -> dict[tuple[str, str], str]:
    """The definition of ``name`` and, in an order that depends on names alone, of what it uses of this package."""
    found: dict[tuple[str, str], str] = {}
    waiting = [(path, name)]
    while waiting:
        file, name = waiting.pop()
        module = _module(file)
        if (file.name, name) in found:
            continue
        found[file.name, name], uses = _definition(file, name)
        for used in uses:
            if used in module.defined:
                waiting.append((file, used))
            elif used in module.imported and module.imported[used][0].is_file():
                waiting.append(module.imported[used])
    return dict(sorted(found.items()))
