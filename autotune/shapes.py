"""What is tuned: shapes of calls, as texts, from a model's configuration, or those that tables are shipped for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gka_ops.autotune import choice, space
from gka_ops.autotune.device import Device
from gka_ops.autotune.key import DTYPES, OPTIONS, PASSES, Key, Problem, bucket

_SIZES = ("B", "T", "H", "Hkv", "D", "V")
_USUAL = frozenset({"alpha", "beta", "decay", "solve"})
_LAYER = frozenset({"alpha", "beta", "gate", "l2norm", "solve"})  # what GatedKalmaNet gives
_DTYPE_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_TRAINING, _PROMPT, _SEQUENCES = 8192, 8192, (1, 8, 64)  # of a model


@dataclass(frozen=True)
class Shape:
    """A call, as far as its configurations depend on it.

    Attributes:
        B, T: sequences and their tokens; with the option ``varlen`` one batch of T tokens.
        H, Hkv: query heads, and heads of keys and values.
        D, V: head dimensions; V = 0 for ``chunk_solve``.
        dtype: one of ``key.DTYPES``.
        passes: of ``key.PASSES``.
        options: of ``key.OPTIONS``, without ``gqa``.
    """

    B: int = 1
    T: int = 8192
    H: int = 32
    Hkv: int = 32
    D: int = 128
    V: int = 128
    dtype: str = "bf16"
    passes: tuple[str, ...] = ("forward",)
    options: frozenset[str] = _USUAL

    def __post_init__(self) -> None:
        for name in _SIZES:
            if getattr(self, name) < (name != "V"):
                raise ValueError(f"expected a positive {name}, got {getattr(self, name)}")
        if self.H % self.Hkv:
            raise ValueError(f"expected H to be a multiple of Hkv, got {self.H} and {self.Hkv}")
        if not 1 <= self.D <= 256:
            raise ValueError(f"expected D from 1 to 256, got {self.D}")
        for name, given, known in (
            ("dtype", {self.dtype}, DTYPES), ("passes", {*self.passes}, PASSES), ("options", self.options, OPTIONS)
        ):  # fmt: skip
            if not given <= {*known} or "gqa" in given or not (given or name == "options"):
                raise ValueError(f"expected {name} among {', '.join(known)}, got {', '.join(sorted(given)) or 'none'}")

    @classmethod
    def parse(cls, text: str) -> Shape:
        """The shape that a text says, its parts separated by commas.

        Sizes (``B2``, ``T8192``, ``H32``, ``Hkv8``, ``D128``, ``V128``), a dtype, passes (``forward+backward``), and
        options that are to be added (``l2norm``) or left out (``no-alpha``). Without it, Hkv is H and V is D; forward
        and backward are tuned; alpha, beta, decay and solve apply. Raises ``ValueError`` for anything else.
        """
        sizes: dict[str, int] = {}
        options, dtype = set(_USUAL), "bf16"
        passes: tuple[str, ...] = ("forward", "backward")
        for part in text.split(","):
            name = part.rstrip("0123456789")
            if name in _SIZES and name != part:
                sizes[name] = int(part[len(name) :])
            elif part in DTYPES:
                dtype = part
            elif {*part.split("+")} <= {*PASSES}:
                passes = tuple(part.split("+"))
            elif part in OPTIONS and part != "gqa":
                options.add(part)
            elif part.removeprefix("no-") in options:
                options.discard(part.removeprefix("no-"))
            else:
                raise ValueError(
                    f"expected sizes ({', '.join(_SIZES)}, each with a number), one of {', '.join(DTYPES)}, passes of "
                    f"{', '.join(PASSES)} (joined by +), options of {', '.join(OPTIONS)}, got {part[:40]!r}"
                )
        sizes = {"H": 32, "D": 128, **sizes}
        sizes = {"Hkv": sizes["H"], "V": sizes["D"], **sizes}
        return cls(**sizes, dtype=dtype, passes=passes, options=frozenset(options))


def from_model_config(config: Path | Mapping[str, Any]) -> list[Shape]:
    """The shapes of a model's training, prefill and decode, with GKA layers in the place of its attention.

    Args:
        config: as Hugging Face's ``config.json`` has it, or that file: ``num_attention_heads``,
            ``num_key_value_heads``, ``head_dim`` or ``hidden_size``, ``dtype`` or ``torch_dtype``.

    Raises:
        ValueError: something is missing or no number.
        OSError: the file cannot be read.
    """
    if isinstance(config, Path):
        try:
            config = json.loads(config.read_text())
        except ValueError as error:
            raise ValueError(f"expected JSON in {config}: {error}") from None
    if not isinstance(config, Mapping):
        raise ValueError(f"expected an object with a model's sizes, got {type(config).__name__}")
    H = _size(config, "num_attention_heads")
    Hkv = _size(config, "num_key_value_heads") if config.get("num_key_value_heads") is not None else H
    D = _size(config, "head_dim") if config.get("head_dim") is not None else _size(config, "hidden_size") // H
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if name not in _DTYPE_NAMES:
        raise ValueError(f"expected dtype among {', '.join(_DTYPE_NAMES)}, got {name[:40]!r}")

    def shape(B: int, T: int, *passes: str) -> Shape:
        return Shape(B, T, H, Hkv, D, D, _DTYPE_NAMES[name], passes, _LAYER)

    decode = [shape(B, 1, "decode") for B in _SEQUENCES]
    return [shape(1, _TRAINING, "forward", "backward"), shape(1, _PROMPT, "forward"), *decode]


def _size(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if type(value) is not int or value < 1:
        raise ValueError(f"expected {name} as a positive number, got {str(value)[:40]!r}")
    return value


def keys_of(shapes: Iterable[Shape], device: Device) -> list[Key]:
    """The keys of all kernels that calls of these shapes launch on a card, each once."""
    found: dict[Key, None] = {}
    for shape in shapes:
        options = shape.options | ({"gqa"} if shape.Hkv < shape.H else set())
        for when in shape.passes:
            kernel = "recurrent" if when == "decode" else "state"
            config = choice.heuristic_config(kernel, shape.dtype, shape.D, shape.V, shape.T)
            problem = Problem(
                when, shape.dtype, shape.D, shape.V, getattr(config, "chunk", 1), bucket(shape.T),
                bucket(shape.B * shape.H), options if shape.V else options - {"alpha"},
            )  # fmt: skip
            found |= {space.KERNELS[k].key(problem): None for k in space.kernels_of(problem, config, device)}
    return list(found)


_BOTH = ("forward", "backward")
DEFAULT = (
    Shape(B=2, passes=_BOTH),
    Shape(B=2, passes=_BOTH, options=_USUAL - {"solve"}),
    Shape(B=2, passes=_BOTH, options=_LAYER),
    Shape(B=64, T=1, passes=("decode",), options=_LAYER),
    Shape(B=2, V=0),
    Shape(Hkv=8),
    *(Shape(B=B, T=1, Hkv=8, passes=("decode",)) for B in (1, 64, 256)),
    Shape(T=32768, H=8, Hkv=8),
    Shape(B=2, D=64, V=64),
    Shape(T=2048, H=8, Hkv=8, D=256, V=256),
    Shape(dtype="fp32"),
    Shape(T=32768, passes=_BOTH),  # and longer ones: the nearest bucket
)
"""The calls that ``gka_ops_perf.bars`` measures, and the layer's; tables are shipped for them."""
