"""Triton's C modules, loaded by several threads (``gka_ops.triton.modules``)."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
from triton.runtime import build

from gka_ops.triton.modules import load_apart

pytestmark = pytest.mark.skipif(not (shutil.which("gcc") or shutil.which("cc")), reason="needs a C compiler")

SOURCE = """
#include <Python.h>
static PyObject *launch(PyObject *self, PyObject *args) {{ return PyLong_FromLong({number}); }}
static PyMethodDef methods[] = {{{{"launch", launch, METH_VARARGS, ""}}, {{NULL, NULL, 0, NULL}}}};
static struct PyModuleDef definition = {{PyModuleDef_HEAD_INIT, "__triton_launcher", NULL, -1, methods}};
PyMODINIT_FUNC PyInit___triton_launcher(void) {{ return PyModule_Create(&definition); }}
"""


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], ModuleType]]:
    """Builds, or loads again, the module whose ``launch`` returns a number."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    load_apart()
    interval = sys.getswitchinterval()
    yield lambda number: build.compile_module_from_src(src=SOURCE.format(number=number), name="__triton_launcher")
    sys.setswitchinterval(interval)
    sys.modules.pop("__triton_launcher", None)


def test_a_module_keeps_its_functions_while_another_is_loaded_again(load: Callable[[int], ModuleType]) -> None:
    load(1)
    last = load(2)
    assert load(1).launch() == 1
    assert last.launch() == 2


def test_threads_get_the_module_they_ask_for(load: Callable[[int], ModuleType]) -> None:
    numbers = range(4)
    for number in numbers:
        load(number)
    sys.setswitchinterval(1e-6)
    with ThreadPoolExecutor(len(numbers)) as threads:
        wrong = threads.map(lambda number: sum(load(number).launch() != number for _ in range(500)), numbers)
        assert sum(wrong) == 0
