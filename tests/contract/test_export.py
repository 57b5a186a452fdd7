"""AOTInductor: a package runs in a process that has imported the package's name alone, for every length."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import packaged

pytestmark = [pytest.mark.supports("AOTInductor"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packaged.make(tmp_path_factory.mktemp("package"), "cpu")


@pytest.mark.slow
def test_a_package_runs_in_a_process_that_imports_the_operators(package: Path) -> None:
    printed = packaged.run(package, "import gka_ops")
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout.split() == ["ran", str(len(packaged.SIZES)), "False"]


@pytest.mark.slow
def test_without_them_the_error_names_the_operator(package: Path) -> None:
    """Operators that are implemented in Python cannot be in a package: it holds their names, which PyTorch looks up."""
    printed = packaged.run(package, "")
    assert printed.returncode != 0
    assert "gka::chunk_gka" in printed.stderr.strip().splitlines()[-1]
