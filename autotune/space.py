"""What may be tuned: every kernel's parameters with their values, and which combinations are left out and why.

An entry of a table is used only if it lies in here, whoever wrote the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import TypeVar

from gka_ops.autotune.config import ChunkConfig, KernelConfig, RecurrentConfig
from gka_ops.autotune.device import Device
from gka_ops.autotune.key import Key, Problem, bucket

Parameters = Mapping[str, int | None]
"""A value for each of a kernel's parameters. ``max_registers`` may be ``None``: as many as the compiler likes."""

Config = TypeVar("Config", ChunkConfig, RecurrentConfig)

_LAUNCH = ("num_warps", "num_stages", "max_registers")
_REGISTERS = 2**16  # of a multiprocessor
_MOST_REGISTERS = 255  # of a thread
_TOKENS = ("beta", "decay", "gate", "gqa", "l2norm", "varlen")  # what changes how tokens are read
_TOKEN_GRADIENTS = ("backward_key", "backward_value")
_RIDGE = ("ridge_head", "ridge_offset", "ridge_token")


@dataclass(frozen=True)
class Kernel:
    """A kernel, and what may be said about its launch.

    Attributes:
        name: its field in :class:`~gka_ops.autotune.config.ChunkConfig`; ``recurrent`` for decoding.
        source: file and function below ``gka_ops/triton/kernels``.
        when: the passes in which it is looked up.
        options: those of ``key.OPTIONS`` that change its code.
        values: whether V changes it.
        axes: every value of every parameter, in order.
        near: how many steps along the axes lead from the heuristic to what is tried by default.
    """

    name: str
    source: tuple[str, str]
    when: tuple[str, ...]
    options: tuple[str, ...]
    values: bool
    axes: tuple[tuple[str, tuple[int | None, ...]], ...]
    near: int = 2

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.axes)

    def key(self, problem: Problem) -> Key:
        """What the kernel is looked up by."""
        return Key(
            self.name, problem.when, problem.dtype, problem.D, problem.V if self.values else 0, problem.C,
            bucket(problem.T), bucket(problem.N), tuple(sorted(problem.options.intersection(self.options))),
        )  # fmt: skip


def _kernel(
    name: str, when: tuple[str, ...], options: tuple[str, ...], *, values: bool, file: str = "", function: str = "",
    near: int = 2, **axes: tuple[int | None, ...],
) -> Kernel:  # fmt: skip
    stem = f"chunk_{name}"
    source = (f"{file or stem}.py", f"{function or file or stem}_kernel")
    return Kernel(name, source, when, tuple(sorted(options)), values, tuple(axes.items()), near)


_FORWARD, _BACKWARD = ("forward",), ("backward",)
_CAPS = (128, 168, None)

KERNELS = {
    kernel.name: kernel
    for kernel in (
        _kernel(
            "state", ("forward", "backward"), (*_TOKENS, "solve"), values=True, num_warps=(2, 4, 8),
            num_stages=(1, 2, 3, 4), max_registers=(None,), block_state=(16, 32, 64, 128),
        ),
        _kernel(
            "solve", _FORWARD, (*_TOKENS, *_RIDGE), values=False, num_warps=(2, 4, 8), num_stages=(1,),
            max_registers=_CAPS,
        ),
        _kernel(
            "solve_hopper", _FORWARD, (*_TOKENS, *_RIDGE), values=False, num_warps=(4,), num_stages=(1,),
            max_registers=_CAPS,
        ),
        _kernel(
            "readout", _FORWARD, ("alpha", *_TOKENS, "solve"), values=True, num_warps=(2, 4, 8),
            num_stages=(1, 2, 3), max_registers=_CAPS,
        ),
        _kernel(
            "backward_readout", _BACKWARD, ("alpha", *_TOKENS, "solve"), values=True, num_warps=(2, 4, 8),
            num_stages=(1, 2, 3), max_registers=_CAPS,
        ),
        _kernel(
            "backward_solve", _BACKWARD, ("alpha", *_TOKENS, *_RIDGE), values=True, num_warps=(2, 4, 8),
            num_stages=(1,), max_registers=_CAPS,
        ),
        _kernel(
            "backward_solve_hopper", _BACKWARD, ("alpha", *_TOKENS, *_RIDGE), values=True, num_warps=(4,),
            num_stages=(1,), max_registers=_CAPS,
        ),
        _kernel(
            "backward_state", _BACKWARD, ("alpha", *_TOKENS, "solve"), values=True, num_warps=(2, 4, 8),
            num_stages=(1, 2, 3), max_registers=(96, 128, None), increment_columns=(16, 32, 64, 128, 256),
        ),
        _kernel(
            "backward_scan", _BACKWARD, ("decay", "gate", "solve", "varlen"), values=True, num_warps=(2, 4, 8),
            num_stages=(1,), max_registers=(64, 80, 128, None), scan_entries=(1024, 2048, 4096, 8192),
            file="chunk_backward_state", function="chunk_backward_scan",
        ),
        _kernel(
            "backward_value", _BACKWARD, ("alpha", *_TOKENS, "solve"), values=True, num_warps=(2, 4, 8),
            num_stages=(1, 2, 3), max_registers=_CAPS,
        ),
        _kernel(
            "backward_value_hopper", _BACKWARD, ("alpha", *_TOKENS, "solve"), values=True, num_warps=(4,),
            num_stages=(1,), max_registers=_CAPS,
        ),
        _kernel(
            "backward_key", _BACKWARD, (*_TOKENS, "solve"), values=True, num_warps=(2, 4, 8), num_stages=(1,),
            max_registers=_CAPS, block_s=(16, 32, 64, 128, 256),
        ),
        _kernel(
            "backward_key_hopper", _BACKWARD, (*_TOKENS, "solve"), values=True, num_warps=(4,), num_stages=(1,),
            max_registers=_CAPS,
        ),
        _kernel(
            "recurrent", ("decode",), ("alpha", *_TOKENS[:-1], *_RIDGE, "solve"), values=True,
            num_warps=(1, 2, 4, 8, 16), num_stages=(1,), max_registers=(96, 128, 168, None),
            block_v=(16, 32, 64, 128), width=(1, 2, 4), chains=(1, 2, 4), file="recurrent", near=1,
        ),
    )
}  # fmt: skip


def kernels_of(problem: Problem, config: ChunkConfig | RecurrentConfig, device: Device | None) -> tuple[str, ...]:
    """The kernels that a call launches, as far as arguments' shapes and dtypes decide it.

    A backward that has to solve anew, for want of what the forward saved, does so as the heuristics say.
    """
    if isinstance(config, RecurrentConfig):
        return ("recurrent",)
    solve, values = "solve" in problem.options, problem.V > 0
    solve_async = config.solve_async and device is not None and device.is_hopper
    if problem.when == "forward":
        solves = ("solve_hopper" if solve_async else "solve",) if solve else ()
        return ("state", *solves, *(("readout",) if values else ()))
    block_d = padded(problem.D)
    copied = solve_async and config.token_gradients_async and solve and values and block_d == problem.D
    value_copied = copied and problem.D == problem.V and problem.dtype == "bf16"
    found = ["state", "backward_state", "backward_scan"]
    if solve:
        found.append("backward_solve_hopper" if solve_async and values else "backward_solve")
    if values:
        found += ["backward_readout", "backward_value_hopper" if value_copied else "backward_value"]
    if solve or not values:
        found.append("backward_key_hopper" if copied else "backward_key")
    return tuple(found)


def padded(size: int) -> int:
    """Extent of a tile for so many columns."""
    return max(16, bucket(size))


# ---------------------------------------------------------------------------------------- parameters in a configuration
def parameters_of(kernel: str, config: ChunkConfig | RecurrentConfig) -> dict[str, int | None]:
    """What a configuration says about a kernel."""
    launch = config.kernel if isinstance(config, RecurrentConfig) else getattr(config, kernel)
    return {name: getattr(launch if name in _LAUNCH else config, name) for name in KERNELS[kernel].parameters}


def with_parameters(kernel: str, config: Config, parameters: Parameters) -> Config:
    """The configuration with what is said about a kernel in its place."""
    of_launch = {name: value for name, value in parameters.items() if name in _LAUNCH}
    others = {name: value for name, value in parameters.items() if name not in _LAUNCH}
    field = "kernel" if isinstance(config, RecurrentConfig) else kernel
    launch: KernelConfig = getattr(config, field)
    return replace(config, **{field: replace(launch, **of_launch)}, **others)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------- candidates
@dataclass(frozen=True)
class Pruned:
    """A combination that is not tried."""

    parameters: Parameters
    reason: str


def candidates(
    kernel: str, key: Key, device: Device, around: Parameters | None = None
) -> tuple[list[Parameters], list[Pruned]]:
    """What can be tried, and what is left out and why; of what is near ``around`` if that is given."""
    tried, pruned = [], []
    for parameters in _combinations(KERNELS[kernel]):
        if around is not None and steps(kernel, parameters, around) > KERNELS[kernel].near:
            continue
        reason = excluded(kernel, key, parameters, device)
        if reason is None:
            tried.append(parameters)
        else:
            pruned.append(Pruned(parameters, reason))
    return tried, pruned


def steps(kernel: str, parameters: Parameters, other: Parameters) -> int:
    """How many steps along the axes lead from one combination to another."""
    return sum(abs(values.index(parameters[name]) - values.index(other[name])) for name, values in KERNELS[kernel].axes)


def _combinations(kernel: Kernel) -> Iterator[Parameters]:
    for values in product(*(values for _, values in kernel.axes)):
        yield dict(zip(kernel.parameters, values, strict=True))


def outside(kernel: str, parameters: object, *, some: bool = False) -> str | None:
    """Why these are not values of the kernel's parameters (of all, or of ``some``); ``None`` if they are."""
    axes = dict(KERNELS[kernel].axes)
    if not isinstance(parameters, dict) or not (parameters.keys() <= axes.keys()):
        return f"expected parameters {', '.join(axes)}"
    if not some and parameters.keys() != axes.keys():
        return f"expected all of the parameters {', '.join(axes)}"
    for name, value in parameters.items():
        if type(value) not in (int, type(None)) or value not in axes[name]:
            return f"expected {name} among {axes[name]}, got {str(value)[:40]}"
    return None


def excluded(kernel: str, key: Key, parameters: Parameters, device: Device) -> str | None:
    """Why a combination is not tried on this card, and not taken from a table; ``None`` if it may be."""
    warps = parameters["num_warps"] or 0
    registers = parameters["max_registers"]
    if registers is not None and registers * 32 * warps > _REGISTERS:
        return f"{warps} warps of {registers} registers a thread exceed a multiprocessor's {_REGISTERS}"
    needed = shared_memory(kernel, key, parameters)
    if needed > device.shared_memory:
        return f"about {needed} bytes of shared memory exceed the card's {device.shared_memory}"
    held = accumulators(kernel, key, parameters)
    if held > _MOST_REGISTERS:
        return f"a state takes {held} registers a thread of {_MOST_REGISTERS}"
    if kernel in _TOKEN_GRADIENTS and key.C == 64 and padded(key.D) <= 128 and warps > 4:
        return "eight warps repeat each other's work in products of 64 rows"
    if kernel == "backward_key" and device.is_hopper and padded(key.D) <= 32 and warps == 4:
        return "gives wrong dk on an H100: NOTE [Hopper miscompile] in config.py"
    return _misfit(kernel, key, parameters)


def _misfit(kernel: str, key: Key, parameters: Parameters) -> str | None:
    """Why a kernel cannot be launched with pieces of these sizes."""
    block_d = padded(key.D)
    for name in ("block_s", "increment_columns"):
        size = parameters.get(name)
        if size is not None and size > block_d:
            return f"{name} exceeds the {block_d} columns there are"
    entries = parameters.get("scan_entries")
    if entries is not None and entries < block_d:
        return f"scan_entries are fewer than a row's {block_d}"
    if kernel == "recurrent":
        block_v, chains = parameters["block_v"] or 0, parameters["chains"] or 1
        config = RecurrentConfig(
            block_v, parameters["width"] or 1, chains, KernelConfig(parameters["num_warps"] or 1, 1)
        )
        if block_v > padded(key.V):
            return f"block_v exceeds the {padded(key.V)} columns there are"
        for columns in (block_d, block_v):
            lanes = config.lanes(columns)
            rows = block_d // lanes
            if rows < 4 or rows % chains:
                return f"a thread's {rows} rows of a column do not divide into {chains} chains, or are fewer than four"
            if 32 * config.width // lanes > columns:
                return f"a warp would hold more than the {columns} columns there are"
    return None


def shared_memory(kernel: str, key: Key, parameters: Parameters) -> int:
    """About how many bytes of shared memory a program needs, where it grows with what is tuned; 0 elsewhere.

    The state pass has the rows of keys and values of as many chunks on their way as it has stages, with two scalars a
    token, and one chunk's rows as operands. Of U it holds a whole block_v at least, which is C in every heuristic.
    """
    if kernel != "state":
        return 0
    stages, block = parameters["num_stages"] or 1, parameters["block_state"] or 0
    columns = padded(key.D) + max(min(padded(key.D), block), min(padded(key.V), max(block, key.C)) if key.V else 0)
    return key.C * (columns * (stages + 1) * (4 if key.dtype == "fp32" else 2) + 8 * (stages - 1))


def accumulators(kernel: str, key: Key, parameters: Parameters) -> int:
    """fp32 numbers of a state that a thread holds throughout; 0 where none is held so."""
    threads = 32 * (parameters["num_warps"] or 1)
    if kernel == "state":
        return padded(key.D) * (parameters["block_state"] or 0) // threads
    if kernel == "recurrent":
        return padded(key.D) ** 2 // threads
    return 0


def fitted(kernel: str, key: Key, parameters: Parameters, device: Device) -> Parameters:
    """The nearest to ``parameters`` that fits into the card's shared memory: fewer stages, or else narrower blocks."""
    if shared_memory(kernel, key, parameters) <= device.shared_memory:
        return parameters
    axes = dict(KERNELS[kernel].axes)
    blocks = [b for b in axes["block_state"] if b is not None and b <= (parameters["block_state"] or 0)]
    stages = [s for s in axes["num_stages"] if s is not None and s <= (parameters["num_stages"] or 0)]
    narrower: Parameters = parameters
    for block, stage in product(reversed(blocks), reversed(stages)):
        narrower = {**parameters, "block_state": block, "num_stages": stage}
        if shared_memory(kernel, key, narrower) <= device.shared_memory:
            break
    return narrower
