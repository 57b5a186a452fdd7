"""The operators' schemas are a contract (exported graphs name them): they change only together with the golden file.

After a deliberate change, regenerate it with ``.venv/bin/python -m tests.contract.test_schemas``, and say so in
CHANGELOG.md.
"""

from __future__ import annotations

from pathlib import Path

import torch

import gka_ops  # noqa: F401  (registers torch.ops.gka)

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "schemas.txt"
OPERATORS = ("chunk_solve", "chunk_solve_backward", "chunk_gka", "chunk_gka_backward", "recurrent_gka")


def current_schemas() -> str:
    return "".join(f"{getattr(torch.ops.gka, name).default._schema}\n" for name in OPERATORS)


def test_schemas_are_those_of_the_golden_file() -> None:
    assert current_schemas() == GOLDEN.read_text(), (
        f"a schema differs from {GOLDEN.name}; if that is meant, run: .venv/bin/python -m tests.contract.test_schemas"
    )


def test_golden_file_lists_every_operator() -> None:
    registered = {
        name.removeprefix("gka::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("gka::")
    }
    assert registered == set(OPERATORS)


if __name__ == "__main__":
    GOLDEN.write_text(current_schemas())
    print(f"wrote {GOLDEN}")
