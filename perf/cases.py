"""The registry: every case that the suite measures on a card. Shapes are those of real models.

A case is one way (``provider``) to do one job (``group``). Names are made of the parts, so that ``--select`` finds
them: ``chunk_gka forward 7B T8192 [sdpa]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from gka_ops.numerics import DEFAULT_RIDGE, iterations_for
from gka_ops_perf import costs
from gka_ops_perf.costs import Cost, Shape

Stage = Literal["forward", "forward + backward", "decode", "training step"]
Suite = Literal["quick", "full"]

GKA, VANILLA = "gka", "gka num_iter=0"
ATTENTION = ("sdpa", "flex_attention")
FLASH_LINEAR = ("fla simple_gla", "fla gated_delta_rule", "fla mesa_net")
COMPILED_PEERS = ("flex_attention", *FLASH_LINEAR)  # half of a run goes into compiling them: for one family

CONTEXT = 8192  # tokens that attention has behind it where it decodes
TOKENS = 16384  # of a call, unless one sequence is longer
LONGEST_FLEX = 32768  # tokens; beyond, it would take another minute beside SDPA, which does the same
DECODE_ITERATIONS = 30
SWEEP = (2, 4, 8, 12, 16, 19, 24, 30)  # iterations, for accuracy against time


class Family(NamedTuple):
    """The heads of a model."""

    H: int
    Hkv: int
    D: int


FAMILIES = {"7B": Family(32, 8, 128), "32B": Family(64, 8, 128), "small": Family(16, 16, 64)}


@dataclass(frozen=True)
class Case:
    """One way to do one job."""

    op: str
    stage: Stage
    family: str
    shape: Shape
    provider: str
    suites: frozenset[Suite] = frozenset({"full"})
    num_iter: int | None = None  # of the solve; ``None`` is the library's default
    label: str = field(default="", compare=False)  # instead of the length, in the name

    @property
    def group(self) -> str:
        length = self.label or (f"N{self.shape.B}" if self.stage == "decode" else f"T{self.shape.T}")
        return f"{self.op} {self.stage} {self.family} {length}"

    @property
    def name(self) -> str:
        return f"{self.group} [{self.provider}]"

    @property
    def iterations(self) -> int:
        """Of the solve, as the operator makes them."""
        if self.num_iter is not None:
            return self.num_iter
        return 0 if self.provider == VANILLA else iterations_for(DEFAULT_RIDGE)

    @property
    def cost(self) -> Cost | None:
        """``None`` where nobody has counted."""
        if self.provider in ATTENTION and self.op == "chunk_gka":
            return {
                "forward": costs.attention_forward,
                "forward + backward": costs.attention_forward_backward,
            }[self.stage](self.shape)
        if self.provider in ATTENTION and self.stage == "decode":
            return costs.attention_decode(self.shape, CONTEXT)
        if not self.provider.startswith(GKA):
            return None
        counted = {
            ("chunk_gka", "forward"): costs.gka_forward,
            ("chunk_gka", "forward + backward"): costs.gka_forward_backward,
            ("chunk_solve", "forward"): costs.solve_forward,
            ("recurrent_gka", "decode"): costs.gka_decode,
        }.get((self.op, self.stage))
        return counted(self.shape, self.iterations) if counted else None

    @property
    def parameters(self) -> Mapping[str, str | int]:
        shape = self.shape._asdict()
        return {"op": self.op, "stage": self.stage, "family": self.family, **shape, "num_iter": self.iterations}


def _of(family: str, T: int, B: int | None = None) -> Shape:
    H, Hkv, D = FAMILIES[family]
    return Shape(max(1, TOKENS // T) if B is None else B, T, H, Hkv, D, D)


def _sequences() -> Iterable[Case]:
    lengths = {"7B": (2048, 8192, 32768, 131072), "32B": (8192, 32768), "small": (8192, 32768)}
    for family, found in lengths.items():
        for T in found:
            quick = frozenset[Suite](["quick", "full"] if (family, T) == ("7B", 8192) else ["full"])
            for stage in ("forward", "forward + backward"):
                for provider in (GKA, VANILLA, *ATTENTION, *FLASH_LINEAR):
                    if provider in COMPILED_PEERS and (
                        family != "7B" or (provider == "flex_attention" and T > LONGEST_FLEX)
                    ):
                        continue
                    yield Case("chunk_gka", stage, family, _of(family, T), provider, quick)


def _decoding() -> Iterable[Case]:
    for family, N in (("7B", 1), ("7B", 8), ("7B", 64), ("7B", 512), ("32B", 64), ("small", 64)):
        shape = _of(family, 1, N)
        quick = frozenset[Suite](["quick", "full"] if (family, N) == ("7B", 64) else ["full"])
        yield Case("recurrent_gka", "decode", family, shape, GKA, quick, DECODE_ITERATIONS)
        yield Case("recurrent_gka", "decode", family, shape, VANILLA, quick)
        yield Case("recurrent_gka", "decode", family, shape, "sdpa", quick)


def _layers() -> Iterable[Case]:
    shape = _of("7B", 8192)
    for provider in (GKA, VANILLA):
        yield Case("layer", "forward", "7B", shape, provider)
        yield Case("layer", "training step", "7B", shape, provider)
    for provider in (GKA, VANILLA, "sdpa"):
        yield Case("model", "training step", "7B", shape, provider)


def _sweep() -> Iterable[Case]:
    for n in SWEEP:
        yield Case("chunk_gka", "forward", "7B", _of("7B", 8192), GKA, num_iter=n, label=f"num_iter={n}")


def cases(suite: Suite = "full", select: str = "") -> list[Case]:
    """Those of a suite whose name has ``select`` in it, case by case of a group after the other."""
    every = [
        *_sequences(),
        Case("chunk_solve", "forward", "7B", _of("7B", 8192), GKA, frozenset[Suite](["quick", "full"])),
        *_decoding(), *_layers(), *_sweep(),
    ]  # fmt: skip
    return [case for case in every if suite in case.suites and select in case.name]


def groups(found: Iterable[Case]) -> dict[str, list[Case]]:
    by_group: dict[str, list[Case]] = {}
    for case in found:
        by_group.setdefault(case.group, []).append(case)
    return by_group
