"""What a configuration is looked up by."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

PASSES = ("forward", "backward", "decode")
DTYPES = ("bf16", "fp16", "fp32")
OPTIONS = (
    "alpha",
    "beta",
    "decay",  # log decays are given
    "gate",  # raw projections are given, and A_log
    "gqa",
    "l2norm",
    "ridge_offset",  # λ = r‖H‖ + b with b ≠ 0
    "ridge_head",  # a tensor [H]
    "ridge_token",  # a tensor [B, T, H]
    "solve",
    "varlen",
)
_MOST = {"D": 256, "V": 2**16, "C": 256, "T": 2**40, "N": 2**40}
_PATTERN = re.compile(
    r"(?P<kernel>[a-z_]{1,40})/(?P<when>[a-z]{1,10})/(?P<dtype>[a-z0-9]{1,5})/D(?P<D>\d{1,13})/V(?P<V>\d{1,13})"
    r"/C(?P<C>\d{1,13})/T(?P<T>\d{1,13})/N(?P<N>\d{1,13})/(?P<options>[a-z0-9_+]{0,120})",
    re.ASCII,
)


def bucket(size: int) -> int:
    """The power of two that a number of tokens or of programs counts as: the next one."""
    return 1 << max(0, size - 1).bit_length()


class Problem(NamedTuple):
    """What the configuration of one call may depend on, beside the card.

    Attributes:
        when: the pass, one of PASSES.
        dtype: of the inputs, one of DTYPES.
        V: 0 for the solve alone.
        C: tokens a chunk; 1 in decoding.
        T: tokens of a sequence, or of all of a packed batch.
        N: sequences times query heads.
        options: of OPTIONS, those that apply.
    """

    when: str
    dtype: str
    D: int
    V: int
    C: int
    T: int
    N: int
    options: frozenset[str]


@dataclass(frozen=True)
class Key:
    """A kernel and what its code and its best configuration depend on; T and N are buckets. See :class:`Problem`."""

    kernel: str
    when: str
    dtype: str
    D: int
    V: int
    C: int
    T: int
    N: int
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        sizes = "/".join(f"{name}{getattr(self, name)}" for name in _MOST)
        return f"{self.kernel}/{self.when}/{self.dtype}/{sizes}/{'+'.join(self.options)}"

    @classmethod
    def parse(cls, text: str) -> Key:
        """The key that was written as ``text``. Raises ``ValueError`` for anything else."""
        found = _PATTERN.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise ValueError(f"expected KERNEL/PASS/DTYPE/D_/V_/C_/T_/N_/OPTIONS, got {str(text)[:200]!r}")
        sizes = {name: int(found[name]) for name in _MOST}
        options = tuple(option for option in found["options"].split("+") if option)
        key = cls(found["kernel"], found["when"], found["dtype"], **sizes, options=options)
        known = key.when in PASSES and key.dtype in DTYPES and set(options) <= set(OPTIONS)
        sized = all(1 <= sizes[name] <= most for name, most in _MOST.items() if name != "V")
        bucketed = all(sizes[name] == bucket(sizes[name]) for name in ("T", "N"))
        if not (known and sized and bucketed and sizes["V"] <= _MOST["V"] and str(key) == text) or options != tuple(
            sorted(set(options))
        ):
            raise ValueError(f"expected known names, sizes in range and buckets of T and N, got {text!r}")
        return key

    def distance(self, other: Key) -> tuple[int, int] | None:
        """How far apart the buckets of N and of T are, in powers of two; ``None`` if anything else differs."""
        same = all(getattr(self, name) == getattr(other, name) for name in ("kernel", "when", "dtype", "D", "V", "C"))
        if not same or self.options != other.options:
            return None
        return (
            abs(self.N.bit_length() - other.N.bit_length()),
            abs(self.T.bit_length() - other.T.bit_length()),
        )
