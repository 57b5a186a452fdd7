"""Shapes: as texts, from a model's configuration, and the keys that they stand for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from gka_ops.autotune import shapes, space
from gka_ops.autotune.key import Key
from gka_ops.autotune.shapes import Shape
from tests.helpers.autotune import CONSUMER, H100

USUAL = frozenset({"alpha", "beta", "decay", "solve"})


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("B2,T8192", Shape(B=2, passes=("forward", "backward"))),
        ("T64,H8,D64,fp32,forward", Shape(T=64, H=8, Hkv=8, D=64, V=64, dtype="fp32")),
        ("H8,Hkv2,D80,V0,decode", Shape(H=8, Hkv=2, D=80, V=0, passes=("decode",))),
        ("forward,no-solve,no-alpha,varlen", Shape(options=frozenset({"beta", "decay", "varlen"}))),
        ("forward,l2norm", Shape(options=USUAL | {"l2norm"})),
    ],
)
def test_a_shape_is_read(text: str, shape: Shape) -> None:
    assert Shape.parse(text) == shape


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got ''"),
        ("B2,X3", "got 'X3'"),
        ("B", "got 'B'"),
        ("B0", "positive B, got 0"),
        ("H8,Hkv3", "multiple of Hkv, got 8 and 3"),
        ("D257", "D from 1 to 256, got 257"),
        ("gqa", "got 'gqa'"),
        ("no-gate", "got 'no-gate'"),
        ("forward+sideways", "got 'forward\\+sideways'"),
    ],
)
def test_other_texts_are_no_shapes(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shape.parse(text)


MODEL = {"num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096, "torch_dtype": "float16"}


def test_shapes_of_a_model(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MODEL))
    found = shapes.from_model_config(path)
    assert found == shapes.from_model_config(MODEL)
    assert {(s.H, s.Hkv, s.D, s.V, s.dtype) for s in found} == {(32, 8, 128, 128, "fp16")}
    assert {p for s in found for p in s.passes} == {"forward", "backward", "decode"}
    (wide,) = {s.D for s in shapes.from_model_config({**MODEL, "head_dim": 64, "dtype": "bfloat16"})}
    assert wide == 64


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_attention_heads": None}, "expected num_attention_heads as a positive number, got 'None'"),
        ({"num_key_value_heads": "8"}, "expected num_key_value_heads as a positive number, got '8'"),
        ({"hidden_size": True}, "expected hidden_size"),
        ({"torch_dtype": "float8"}, "expected dtype among bfloat16, float16, float32, got 'float8'"),
        ({"num_key_value_heads": 5}, "multiple of Hkv"),
    ],
)
def test_a_model_that_says_too_little(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shapes.from_model_config({**MODEL, **changed})


@pytest.mark.parametrize("content", ["[1]", "{", "null"])
def test_a_file_that_is_no_model(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="expected"):
        shapes.from_model_config(path)


def test_keys_are_those_of_all_kernels_that_are_launched() -> None:
    forward = shapes.keys_of([Shape(B=2), Shape(B=2, T=8000)], H100)
    assert [key.kernel for key in forward] == ["state", "solve_hopper", "readout"], "one bucket of T, each key once"
    assert {key.N for key in forward} == {64}
    assert [key.kernel for key in shapes.keys_of([Shape(B=2)], CONSUMER)] == ["state", "solve", "readout"]
    grouped = shapes.keys_of([Shape(Hkv=8)], H100)
    assert all("gqa" in key.options for key in grouped)
    (decode,) = shapes.keys_of([Shape(T=1, passes=("decode",))], H100)
    assert (decode.kernel, decode.T, decode.C) == ("recurrent", 1, 1)
    alone = shapes.keys_of([Shape(V=0, passes=("forward", "backward"))], H100)
    assert all(key.V == 0 and "alpha" not in key.options for key in alone)


def test_what_tables_are_shipped_for() -> None:
    found = shapes.keys_of(shapes.DEFAULT, H100)
    assert len(set(found)) == len(found) <= 60, "eight minutes are enough"
    longest = shapes.keys_of([Shape(T=131072, passes=("forward", "backward"))], H100)
    assert {dataclasses.replace(key, T=32768) for key in longest} <= {*found}
    assert all(Key.parse(str(key)) == key for key in found)
    assert {key.kernel for key in found} == space.KERNELS.keys() - {"backward_solve", "backward_key"}
