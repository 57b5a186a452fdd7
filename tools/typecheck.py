"""Type-checks the installed package layout: ``python tools/typecheck.py [mypy options]``.

``pyproject.toml`` maps ``reference/`` and ``autotune/`` to ``gka_ops.reference`` and ``gka_ops.autotune``. mypy does
not read that map, so this builds the package tree as links under ``build/typecheck``, runs ``mypy -p gka_ops`` on it,
and prints the messages with the paths of the working tree.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FARM = ROOT / "build" / "typecheck"
CACHE = "build/mypy_cache"  # its own: a cache filled by mypy runs on another layout of the tree misleads this one


def link_packages() -> dict[str, str]:
    """Builds the link farm. Returns, per linked folder of the farm, the folder of the working tree behind it."""
    package_dir = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    shutil.rmtree(FARM, ignore_errors=True)
    origin = {}
    for package in sorted(package_dir):  # parents sort before their children
        source, target = ROOT / package_dir[package], FARM.joinpath(*package.split("."))
        target.mkdir(parents=True)
        for entry in source.iterdir():
            if entry.name != "__pycache__":
                (target / entry.name).symlink_to(os.path.relpath(entry, target))
        origin[str(target.relative_to(ROOT))] = package_dir[package]
    return origin


def main(options: list[str]) -> int:
    origin = link_packages()
    command = [sys.executable, "-m", "mypy", "--cache-dir", CACHE, "-p", "gka_ops", "-p", "gka_ops_perf", *options]
    environment = os.environ | {"MYPYPATH": str(FARM.relative_to(ROOT))}
    result = subprocess.run(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, check=False)
    longest_first = sorted(origin, key=len, reverse=True)
    pattern = re.compile("|".join(re.escape(folder) for folder in longest_first))
    print(pattern.sub(lambda match: origin[match[0]], result.stdout), end="")
    return result.returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
