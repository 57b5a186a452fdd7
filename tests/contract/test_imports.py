"""Who imports whom (docs/design.md, "Layers"), and what ``import gka_ops`` loads."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

from tests.helpers.import_arrows import Rule, imports, modules, violations

ROOT = Path(__file__).resolve().parents[2]
OWN = ("gka_ops", "reference", "autotune", "tests", "perf", "gka_ops_perf", "examples", "tools")

NUMERICS = "gka_ops.numerics"
PUBLIC = (
    "gka_ops", "gka_ops.nn", "gka_ops.hf", "gka_ops.activation_checkpoint", "gka_ops.checkpoint", "gka_ops.distributed",
    "gka_ops.flops", "gka_ops.types", NUMERICS,
)  # fmt: skip
TORCH = ("torch",)
AUTOTUNE = (
    "choice", "config", "device", "fingerprint", "key", "miss", "report", "screen", "shapes", "space", "table", "tuner",
    "worker",
)  # fmt: skip

# The first rule that matches a module decides. Nobody may import tests, perf or examples from outside these, nor the
# folder names reference and autotune (they are gka_ops.reference and gka_ops.autotune).
RULES = (
    Rule(NUMERICS),
    Rule("gka_ops._version"),
    Rule(
        "gka_ops",
        ours=("gka_ops._version", "gka_ops.api", "gka_ops.flops", "gka_ops.types", "gka_ops.validation", NUMERICS),
        lazy=("gka_ops.nn",),
    ),
    Rule(
        "gka_ops.api",
        ours=(
            "gka_ops.kernel_options",
            "gka_ops.modifiers",
            "gka_ops.ops",
            "gka_ops.recall",
            "gka_ops.validation",
            "gka_ops.types",
            NUMERICS,
        ),
        third_party=TORCH,
    ),
    Rule(
        "gka_ops.kernel_options",
        ours=("gka_ops.validation",),
        lazy=("gka_ops.autotune.choice", "gka_ops.autotune.space"),
    ),
    Rule("gka_ops.activation_checkpoint", ours=("gka_ops.ops",), third_party=TORCH),
    Rule("gka_ops.flops", ours=(NUMERICS,), third_party=TORCH),
    Rule("gka_ops.modifiers", third_party=TORCH),
    Rule("gka_ops.recall", third_party=TORCH),
    Rule("gka_ops.types", ours=(NUMERICS,), third_party=TORCH),
    Rule("gka_ops.validation", ours=("gka_ops.types", NUMERICS), third_party=TORCH),
    Rule(
        "gka_ops.ops",
        ours=("gka_ops.kernel_options", "gka_ops.recall", "gka_ops.validation", NUMERICS),
        lazy=("gka_ops.triton.*", "gka_ops.reference.backend", "gka_ops.reference.double_backward"),
        third_party=TORCH,
    ),
    Rule(
        "gka_ops.nn*",
        ours=("gka_ops.api", "gka_ops.types", "gka_ops.validation", "gka_ops.nn.*", NUMERICS),
        third_party=("torch", "causal_conv1d"),
    ),
    Rule("gka_ops.checkpoint", ours=("gka_ops.nn",), third_party=("torch", "safetensors")),
    Rule("gka_ops.hf*", ours=("gka_ops.hf.*", "gka_ops.nn", "gka_ops.nn.conv"), third_party=("torch", "transformers")),
    Rule(
        "gka_ops.distributed*",
        ours=("gka_ops.nn", "gka_ops.ops"),
        third_party=TORCH,
    ),
    Rule(
        "gka_ops.triton.kernels*",
        ours=("gka_ops.triton.primitives", "gka_ops.triton.primitives_hopper", NUMERICS),
        third_party=("triton",),
    ),
    Rule("gka_ops.triton.primitives_hopper", ours=("gka_ops.triton.primitives", NUMERICS), third_party=("triton",)),
    Rule("gka_ops.triton.primitives", ours=(NUMERICS,), third_party=("triton",)),
    Rule("gka_ops.triton.checks", ours=("gka_ops.validation", "gka_ops.types", NUMERICS), third_party=TORCH),
    Rule(
        "gka_ops.triton*",  # launch, and what it may be split into
        ours=(
            "gka_ops.triton.*",
            "gka_ops.modifiers",
            "gka_ops.recall",
            "gka_ops.autotune.choice",
            "gka_ops.autotune.config",
            "gka_ops.autotune.device",
            "gka_ops.autotune.key",
            "gka_ops.autotune.space",
            NUMERICS,
        ),
        third_party=("torch", "triton"),
    ),
    Rule("gka_ops.reference.backend", ours=("gka_ops.modifiers", "gka_ops.reference.*", NUMERICS), third_party=TORCH),
    Rule("gka_ops.reference*", ours=("gka_ops.reference.*", NUMERICS), third_party=TORCH),
    Rule(
        "gka_ops.autotune.measure",
        ours=(*PUBLIC, "gka_ops.triton.*", "gka_ops.autotune.*"),
        third_party=TORCH,
    ),
    Rule(
        "gka_ops.autotune*",
        ours=(*(f"gka_ops.autotune.{m}" for m in AUTOTUNE), NUMERICS),
        lazy=("gka_ops.autotune.measure",),
        third_party=("torch", "filelock", "platformdirs", "rich"),
    ),
    Rule(
        "examples*",
        ours=(*PUBLIC, "gka_ops.reference*", "examples.*"),
        third_party=("torch", "filelock", "fla", "matplotlib", "rich", "tabulate"),
    ),
    Rule(
        "gka_ops_perf.offline",
        ours=("gka_ops.triton.launch", "gka_ops.autotune.config"),
        third_party=("torch", "triton"),
    ),
    Rule(
        "gka_ops_perf*",
        ours=(*PUBLIC, "gka_ops.reference*", "gka_ops.autotune*", "gka_ops_perf.*"),
        third_party=("torch", "triton", "matplotlib", "pytest", "pytest_benchmark", "rich", "tabulate", "fla"),
    ),
)


def library_modules() -> dict[str, Path]:
    package_dir = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    return modules(ROOT, package_dir | {"examples": "examples"})


def test_imports_follow_the_arrows() -> None:
    known = library_modules()
    assert {"gka_ops.ops", "gka_ops.reference.backend", "gka_ops.autotune"} <= known.keys()
    found = violations(known, RULES, OWN)
    assert not found, "imports against the arrows of docs/design.md:\n" + "\n".join(found)


def test_triton_is_imported_only_below_gka_ops_triton() -> None:
    known = library_modules()
    users = {
        name for name, path in known.items() for i in imports(name, path, known) if i.target.split(".")[0] == "triton"
    }
    assert all(name.startswith(("gka_ops.triton.", "gka_ops_perf")) for name in users), sorted(users)


def test_every_package_is_listed_for_installation() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    known = modules(ROOT, settings["package-dir"])
    packages = {name for name, path in known.items() if path.name == "__init__.py"}
    assert packages == set(settings["packages"])


# ------------------------------------------------------------------------------------------------- the checker itself
SYNTHETIC_RULES = (
    Rule("lib.constants"),
    Rule("lib.low", ours=("lib.constants",), third_party=("torch",)),
    Rule("lib", ours=("lib.low",), lazy=("lib.heavy*",)),
    Rule("lib.heavy*", ours=("lib.heavy.*",)),
)


def synthetic_violations(tmp_path: Path, changed: dict[str, str]) -> list[str]:
    """The violations of a small clean tree in which ``changed`` files are replaced or added."""
    files = {
        "lib/__init__.py": "import os\nfrom lib import low\n\ndef f():\n    import lib.heavy.inner\n",
        "lib/constants.py": "import math\n",
        "lib/low.py": "import torch.nn\nfrom lib.constants import X\n",
        "lib/heavy/__init__.py": "from .inner import g\n",
        "lib/heavy/inner.py": "",
    } | changed
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return violations(modules(tmp_path, {"lib": "lib"}), SYNTHETIC_RULES, ("lib", "tests"))


def test_checker_accepts_a_clean_tree(tmp_path: Path) -> None:
    assert synthetic_violations(tmp_path, {}) == []


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("lib/constants.py", "import torch\n", "lib.constants:1: may not import torch at the top"),
        ("lib/constants.py", "from lib import low\n", "lib.constants:1: may not import lib.low at the top"),
        ("lib/low.py", "\nfrom lib import heavy\n", "lib.low:2: may not import lib.heavy at the top"),
        ("lib/low.py", "from .heavy import inner\n", "lib.low:1: may not import lib.heavy.inner at the top"),
        ("lib/low.py", "from . import heavy\n", "lib.low:1: may not import lib.heavy at the top"),
        ("lib/low.py", "def f():\n    import lib.heavy\n", "lib.low:2: may not import lib.heavy inside a function"),
        ("lib/low.py", "__import__('lib.heavy')\n", "lib.low:1: may not import lib.heavy at the top"),
        ("lib/low.py", "\nlib.import_module('lib.heavy')\n", "lib.low:2: may not import lib.heavy at the top"),
        ("lib/__init__.py", "import lib.heavy\n", "lib:1: may not import lib.heavy at the top"),
        ("lib/__init__.py", "if True:\n    import lib.heavy\n", "lib:2: may not import lib.heavy at the top"),
        ("lib/heavy/inner.py", "from lib.low import f\n", "lib.heavy.inner:1: may not import lib.low at the top"),
        ("lib/heavy/inner.py", "from .. import low\n", "lib.heavy.inner:1: may not import lib.low at the top"),
        ("lib/heavy/inner.py", "import tests.helpers\n", "lib.heavy.inner:1: may not import tests.helpers at the top"),
        ("lib/new.py", "", "lib.new: no rule says what it may import"),
    ],
)
def test_checker_reports_a_planted_violation(tmp_path: Path, file: str, text: str, message: str) -> None:
    assert synthetic_violations(tmp_path, {file: text}) == [message]


def test_checker_takes_type_checking_imports_for_lazy(tmp_path: Path) -> None:
    guarded = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import lib.heavy\n"
    assert synthetic_violations(tmp_path, {"lib/__init__.py": guarded}) == []
    planted = synthetic_violations(tmp_path, {"lib/__init__.py": guarded + "else:\n    import lib.heavy\n"})
    assert planted == ["lib:5: may not import lib.heavy at the top"]


@pytest.mark.parametrize(
    ("module", "line", "target"),
    [
        ("gka_ops.triton.kernels.planted", "import torch", "torch"),
        ("gka_ops.triton.kernels.planted", "from gka_ops.autotune import config", "gka_ops.autotune"),
        ("gka_ops.reference.planted", "import numpy", "numpy"),
        ("gka_ops.reference.planted", "from gka_ops.validation import check_impl", "gka_ops.validation"),
        ("gka_ops.nn.planted", "import triton", "triton"),
        ("gka_ops.nn.planted", "from transformers import Cache", "transformers"),
        ("gka_ops.nn.planted", "def f():\n    from gka_ops.hf import GKAModel", "gka_ops.hf"),
        ("gka_ops", "def f():\n    import gka_ops.hf", "gka_ops.hf"),
        ("gka_ops.hf.planted", "from gka_ops.api import chunk_gka", "gka_ops.api"),
        ("gka_ops.checkpoint", "import transformers", "transformers"),
        ("gka_ops.nn.planted", "from gka_ops.triton import launch", "gka_ops.triton"),
        ("gka_ops.ops", "from gka_ops.reference import backend", "gka_ops.reference"),
        ("gka_ops.ops", "def f():\n    from gka_ops.nn import GatedKalmaNet", "gka_ops.nn"),
        ("gka_ops.triton.launch", "from gka_ops.autotune.cli import main", "gka_ops.autotune.cli"),
        ("gka_ops.triton.launch", "def f():\n    from gka_ops.autotune.tuner import tune", "gka_ops.autotune.tuner"),
        ("gka_ops.autotune.planted", "import triton", "triton"),
        ("gka_ops.autotune.tuner", "from gka_ops.autotune.measure import Bench", "gka_ops.autotune.measure"),
        ("gka_ops.autotune.choice", "def f():\n    from gka_ops.triton import launch", "gka_ops.triton"),
        ("gka_ops.numerics", "import torch", "torch"),
        ("gka_ops.api", "from tests.helpers import import_arrows", "tests.helpers"),
        ("examples.planted", "from gka_ops.triton.launch import chunk_gka", "gka_ops.triton.launch"),
    ],
)
def test_rules_refuse_a_planted_import(tmp_path: Path, module: str, line: str, target: str) -> None:
    path = tmp_path / "planted.py"
    path.write_text(line + "\n")
    (found,) = violations({module: path}, RULES, OWN)
    assert f"may not import {target} " in found


# ------------------------------------------------------------------------------------------------------ fresh processes
def run_fresh(code: str) -> str:
    """Runs ``code`` in a new interpreter, without Triton's interpreter mode, and returns what it printed."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env=inherited | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


BLOCK_TRITON = """
import sys
from importlib.abc import MetaPathFinder

class Blocked(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
"""


def test_import_loads_neither_triton_nor_implementations() -> None:
    loaded = run_fresh("""
        import sys
        import torch
        before = set(sys.modules)
        import gka_ops
        print(*sorted(set(sys.modules) - before))
    """).split()
    ours = {name for name in loaded if name.split(".")[0] == "gka_ops"}
    expected = {
        "gka_ops",
        *(
            f"gka_ops.{m}"
            for m in (
                "_version",
                "api",
                "flops",
                "kernel_options",
                "modifiers",
                "numerics",
                "ops",
                "recall",
                "types",
                "validation",
            )
        ),
    }
    assert ours == expected
    outside = {name.split(".")[0] for name in loaded} - {"gka_ops", "torch"}
    assert outside <= set(sys.stdlib_module_names), sorted(outside - set(sys.stdlib_module_names))


def test_import_registers_the_operators_and_the_layer_loads_on_demand() -> None:
    printed = run_fresh("""
        import sys
        import gka_ops, torch
        print(torch.ops.gka.chunk_gka.default.namespace, "gka_ops.nn" in sys.modules)
        gka_ops.GatedKalmaNet
        print("gka_ops.nn" in sys.modules, "triton" in sys.modules, all(hasattr(gka_ops, n) for n in gka_ops.__all__))
    """)
    assert printed.split() == ["gka", "False", "True", "False", "True"]


def test_works_on_the_cpu_without_triton() -> None:
    printed = run_fresh(
        BLOCK_TRITON
        + textwrap.dedent("""
        try:
            import triton
        except ImportError as error:
            print(error)
        import torch
        import gka_ops

        torch.manual_seed(0)
        q, k, v = (torch.randn(1, 70, 2, 16, requires_grad=True) for _ in range(3))
        log_decay = -torch.rand(1, 70, 2)
        output, state = gka_ops.chunk_gka(q, k, v, log_decay, qk_l2norm=True, output_final_state=True)
        output.square().sum().backward()
        step = gka_ops.recurrent_gka(
            *(x.detach()[:, :1] for x in (q, k, v)), log_decay[:, :1], qk_l2norm=True,
            state=gka_ops.GKAState(*(s.detach().clone() for s in state)),
        )
        print(all(bool(x.grad.abs().sum() > 0) for x in (q, k, v)), bool(step.isfinite().all()))
        print("triton" in sys.modules)
    """)
    )
    assert printed.splitlines() == ["triton is blocked", "True True", "False"]


def test_triton_request_without_triton_fails_loudly() -> None:
    printed = run_fresh(
        BLOCK_TRITON
        + textwrap.dedent("""
        import torch
        import gka_ops

        try:
            gka_ops.chunk_gka(*(torch.randn(1, 16, 1, 16) for _ in range(3)), impl="triton")
        except ValueError as error:
            print(error)
    """)
    )
    assert 'expected CUDA tensors with impl="triton"' in printed
