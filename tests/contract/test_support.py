"""The support table of docs/torch.md is what the markers say, and every feature has its tests."""

from __future__ import annotations

import pytest

from tests.helpers import support
from tests.helpers.support import CPU, CUDA, Proof, SupportError

MODULE = """
import pytest
LATER = pytest.mark.supports("b")
pytestmark = [pytest.mark.gpu, pytest.mark.supports("a")]

@LATER
@pytest.mark.parametrize("x", [1])
def test_one(x): ...

@pytest.mark.parametrize("x", [pytest.param(x, marks=pytest.mark.supports("c" if x else "d")) for x in (0, 1)])
def test_two(x): ...
"""


def test_the_page_has_the_table_that_the_markers_say() -> None:
    """``python -m tests.helpers.support`` writes it anew."""
    assert support.main(["--check"]) == 0


def test_every_feature_has_a_test_on_each_device_that_it_needs() -> None:
    assert support.complaints(support.proofs(), support.FEATURES) == []


def test_markers_are_read_from_the_source() -> None:
    assert support.proofs_in(MODULE, "tests/gpu/test_x.py") == [
        Proof("tests/gpu/test_x.py", "test_one", ("a", "b")),
        Proof("tests/gpu/test_x.py", "test_two", ("a", "c", "d")),
    ]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import pytest\n@pytest.mark.supports(f'a')\ndef test_x(): ...", "expected supports"),
        ("import pytest\nUNUSED = pytest.mark.supports('a')", r"got \['a'\] elsewhere"),
        ("import pytest\n@pytest.mark.supports('a')\ndef helper(): ...", r"got \['a'\] elsewhere"),
        ("import pytest\nx = pytest.param(1, marks=pytest.mark.supports('a'))", r"got \['a'\] elsewhere"),
    ],
)
def test_no_marker_is_overlooked(source: str, message: str) -> None:
    with pytest.raises(SupportError, match=message):
        support.proofs_in(source, "tests/contract/test_x.py")


def test_what_is_missing_or_unknown_is_said() -> None:
    found = support.proofs_in(MODULE, "tests/gpu/test_x.py")
    assert support.complaints(found, {"a": (CPU, CUDA), "b": (CUDA,), "d": (CUDA,), "e": (CPU,)}) == [
        "no test on CPU proves 'a'",
        "no test on CPU proves 'e'",
        "tests/gpu/test_x.py: test_two proves 'c', which is not in FEATURES of tests/helpers/support.py",
    ]


def test_the_table() -> None:
    found = support.proofs_in(MODULE, "tests/gpu/test_x.py")
    found += support.proofs_in(
        "import pytest\n@pytest.mark.supports('c')\ndef test_z(): ...", "tests/contract/test_y.py"
    )
    rows = support.table(found, {"b": (CUDA,), "c": (CPU, CUDA)}).splitlines()[2:]
    assert rows == [
        "| b | does not apply | tested | [gpu/test_x.py](../tests/gpu/test_x.py): `one` |",
        "| c | tested | tested | [gpu/test_x.py](../tests/gpu/test_x.py): `two`; "
        "[contract/test_y.py](../tests/contract/test_y.py): `z` |",
    ]
    page = "a\n<!-- support: x -->\nold\n<!-- end of support -->\nb\n"
    assert support.filled(page, "new") == "a\n<!-- support: x -->\n\nnew\n\n<!-- end of support -->\nb\n"
    with pytest.raises(SupportError, match="expected one block"):
        support.filled("a", "new")
