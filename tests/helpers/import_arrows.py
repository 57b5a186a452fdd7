"""Reads the imports of a source tree with ``ast`` and checks them against rules: who may import whom.

Nothing is executed. An import inside a function, or under ``if TYPE_CHECKING``, is *lazy*; all others are *eager*.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path


@dataclass(frozen=True)
class Import:
    """One imported module: its name as found, resolved to a module of the tree where it is one."""

    target: str
    lazy: bool
    line: int


@dataclass(frozen=True)
class Rule:
    """What the modules matching ``module`` may import; patterns are those of ``fnmatch``, and ``*`` spans dots.

    Attributes:
        module: pattern of the importing modules; the first rule of a list that matches a module decides about it.
        ours: patterns of modules of the tree that it may import, at any place.
        lazy: patterns of modules of the tree that it may also import inside functions.
        third_party: top-level packages from outside it may import; the standard library is always allowed.
    """

    module: str
    ours: tuple[str, ...] = ()
    lazy: tuple[str, ...] = ()
    third_party: tuple[str, ...] = ()


def modules(root: Path, folders: Mapping[str, str]) -> dict[str, Path]:
    """Module name → file, for ``folders`` of package name → folder below ``root`` (missing folders are skipped)."""
    found = {}
    for package, folder in folders.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            found[".".join((package, *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
    return found


def _is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def _statements(node: ast.AST, lazy: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        inside = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(node, ast.If) and _is_type_checking(node.test) and child in node.body:
            inside = True
        yield child, inside
        yield from _statements(child, inside)


def _dynamic_target(call: ast.Call) -> str | None:
    """The module of ``importlib.import_module("...")``, ``import_module("...")`` or ``__import__("...")``."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", None)
    if name in ("import_module", "__import__") and call.args:
        argument = call.args[0]
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            return argument.value
    return None


def imports(name: str, path: Path, known: Mapping[str, Path]) -> list[Import]:
    """All imports of module ``name``; ``from package import x`` counts as ``package.x`` where that is a module."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = []
    for node, lazy in _statements(ast.parse(path.read_text(), str(path)), False):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, lazy, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                submodule = f"{source}.{alias.name}"
                found.append(Import(submodule if submodule in known else source, lazy, node.lineno))
        elif isinstance(node, ast.Call) and (target := _dynamic_target(node)):
            found.append(Import(target, lazy, node.lineno))
    return found


def _matches(target: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(target, pattern) for pattern in patterns)


def violations(known: Mapping[str, Path], rules: Sequence[Rule], own: Sequence[str]) -> list[str]:
    """One line per import that no rule allows, or per module without a rule.

    Args:
        known: the modules of the tree, from :func:`modules`.
        rules: the first that matches a module decides.
        own: top-level packages of the tree; imports of these are judged by ``ours`` and ``lazy``, all others by
            ``third_party``.
    """
    found = []
    for name, path in known.items():
        rule = next((rule for rule in rules if fnmatchcase(name, rule.module)), None)
        if rule is None:
            found.append(f"{name}: no rule says what it may import")
            continue
        for item in imports(name, path, known):
            top = item.target.split(".")[0]
            if top in own:
                allowed = _matches(item.target, rule.ours) or (item.lazy and _matches(item.target, rule.lazy))
            else:
                allowed = top in sys.stdlib_module_names or top in rule.third_party
            if not allowed:
                where = "inside a function" if item.lazy else "at the top"
                found.append(f"{name}:{item.line}: may not import {item.target} {where}")
    return found
