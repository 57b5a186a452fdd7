"""Compiles the kernels for a Hopper card without one, to look at their machine code.

Counts of instructions and registers do not depend on the machine that counts them, only on Triton's version.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from gka_ops.autotune.config import chunk_config
from gka_ops.triton import launch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HOPPER, MULTIPROCESSORS = 90, 132


class Compiled(NamedTuple):
    name: str
    ptx: str
    cubin: bytes


def launches(
    D: int, V: int, dtype: str, num_iter: int, ridge_mod: str = "", leaves: int = 0, **config: Any
) -> list[tuple[Any, dict[str, Any]]]:
    """The kernels that ``chunk_gka`` and its backward launch on a Hopper card, with their arguments.

    ``ridge_mod``: a modifier's program, and its number of leaves. ``config``: fields of
    :class:`~gka_ops.autotune.config.ChunkConfig` that are not to be what the heuristic says.
    """
    found: dict[str, tuple[Any, dict[str, Any]]] = {}

    def noted(kernel: Any, grid: Any, /, **arguments: Any) -> None:
        found.setdefault(kernel.fn.__name__, (kernel, arguments))

    B, T, H = 1, 256, 4
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.rand(B, T, H, *shape, generator=generator)

    q, k, v = (randn(size).to(DTYPES[dtype]) for size in (D, D, V))
    of_ridge = randn(leaves) if leaves else None
    inputs = (q, k, v, -randn(), randn(), randn(), of_ridge, *[None] * 5)
    options = (0.02, 0.0, num_iter, D**-0.5, True)
    with mock.patch.multiple(
        launch,
        launch=noted,
        chunk_config=lambda *key: replace(chunk_config(*key), **config),
        _on_hopper=lambda p: p.config.solve_async,
        _multiprocessors=lambda q: MULTIPROCESSORS,
    ):
        forward: Any = launch.chunk_gka
        backward: Any = launch.chunk_gka_backward
        output, _, _, *saved = forward.__wrapped__(*inputs, None, *options, False, True, ridge_mod)
        backward.__wrapped__(torch.ones_like(output), None, None, *inputs, None, *saved, *options, ridge_mod)
    return list(found.values())


def compile_for_hopper(kernel: Any, arguments: dict[str, Any]) -> Compiled:
    """What Triton makes of a launch with aligned pointers."""
    types = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64"}
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        specialised = type(value) is int and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and value == 1):
            signature[parameter.name], constants[i,] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = types[value.dtype]
        else:
            signature[parameter.name] = "i1" if isinstance(value, bool) else "i32" if type(value) is int else "fp32"
        if isinstance(value, torch.Tensor) or (specialised and value % 16 == 0):
            attributes[i,] = [["tt.divisibility", 16]]
    options = {name: arguments[name] for name in ("num_warps", "num_stages", "maxnreg") if name in arguments}
    source = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    built = triton.compile(
        source(kernel, signature, constants, attributes), target=GPUTarget("cuda", HOPPER, 32), options=options
    )
    return Compiled(kernel.fn.__name__, built.asm["ptx"], built.asm["cubin"])


def disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class MachineCode(NamedTuple):
    """What a kernel is made of; ``stack`` are the bytes that a thread spills to memory."""

    instructions: int
    registers: int
    stack: int


def machine_code(cubin: bytes) -> MachineCode:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    instructions = sum("/*" in line and ";" in line for line in disassembled(cubin).splitlines())
    return MachineCode(instructions, registers, stack)
