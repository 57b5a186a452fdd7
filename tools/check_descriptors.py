"""Compares the addresses that ptxas gave to the operands of Hopper's products with those that Triton asked for.

    python tools/check_descriptors.py                        a grid of head dimensions, in both passes (20 minutes)
    python tools/check_descriptors.py --shape 128,32,bf16    one shape: D, V and dtype
    python tools/check_descriptors.py --config block_v=32    as if config.py said so

A ``wgmma`` reads shared memory through descriptors, 64-bit numbers that are all but constant. Some versions of ptxas
compile the arithmetic on them wrongly (NOTE [Hopper miscompile] in autotune/config.py), and the product then reads
whatever lies elsewhere. Here the descriptors are worked out twice, from the PTX and from the machine code, by carrying
constants through the instructions. One that cannot be worked out is counted as unknown. No card is needed.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

from rich.console import Console
from rich.progress import track
from tabulate import tabulate

from gka_ops_perf.offline import Compiled, compile_for_hopper, disassembled, launches

_SHARED = 0x400  # where a program's shared memory begins: the first KiB is the system's

Value: TypeAlias = "int | str | None"
UNDEFINED = "undefined"
"""Read before it was written. ``None`` is unknown."""


class Product(NamedTuple):
    """A ``wgmma``: m64nNkK, and the descriptors of its operands; ``""`` for a left one in registers."""

    shape: str
    left: Value
    right: Value


# ----------------------------------------------------------------------------------------------------------------- PTX
_PTX: dict[str, tuple[int, Callable[..., int]]] = {
    "mov": (1, lambda a: a),
    "cvt": (1, lambda a: a),
    "shfl": (4, lambda a, *_: a),  # of what the warp agrees on
    "add": (2, lambda a, b: a + b),
    "sub": (2, lambda a, b: a - b),
    "or": (2, lambda a, b: a | b),
    "and": (2, lambda a, b: a & b),
    "xor": (2, lambda a, b: a ^ b),
    "shl": (2, lambda a, b: a << b),
    "shr": (2, lambda a, b: a >> b),
    "bfe": (3, lambda a, b, c: a >> b & (1 << c) - 1),
}


def products_of_ptx(ptx: str) -> list[Product]:
    """The products of a kernel's first warpgroup."""
    values: dict[str, int] = {"global_smem": _SHARED, "%tid.x": 0}

    def value(operand: str) -> int | None:
        operand = operand.strip()
        return int(operand, 0) if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", operand) else values.get(operand)

    found = []
    for line in ptx.split("\n"):
        line = line.strip().rstrip(";")
        if line.startswith("wgmma.mma_async"):
            shape = re.search(r"m64n\d+k\d+", line)
            operands = re.sub(r"\{[^}]*\}", "{}", line.split(maxsplit=1)[1]).split(",")
            left: Value = "" if operands[1].strip() == "{}" else value(operands[1])
            found.append(Product(shape[0] if shape else "", left, value(operands[2])))
            continue
        written = re.match(r"(@!?%p\d+\s+)?([a-z]+)(\S*)\s+(%\w+)(?:\|%\w+)?,\s*(.*)$", line)
        if written is None:
            continue
        predicate, operation, suffix, target, operands_ = written.groups()
        known = [value(operand) for operand in operands_.split(",")]
        values.pop(target, None)
        arity, function = _PTX.get(operation, (0, None))
        if function is not None and predicate is None and None not in known and len(known) == arity:
            values[target] = function(*known) & (2**64 - 1 if suffix.endswith("64") else 2**32 - 1)
    return found


# -------------------------------------------------------------------------------------------------------- machine code
def products_of_sass(sass: str) -> list[Product]:
    """The same from machine code, whose instructions are followed in the order in which they stand."""
    machine = _Machine()
    for line in sass.split("\n"):
        instruction = re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:(@\S+)\s+)?(\S+)\s*(.*?)\s*;", line)
        if instruction is not None:
            predicate, operation, operands = instruction.groups()
            machine.step(
                predicate, operation, [o.strip().replace(".reuse", "") for o in re.split(r",(?![^\[]*\])", operands)]
            )
    return machine.products


class _Machine:
    """Registers as far as they are known. A uniform register that nothing wrote is undefined; others are unknown."""

    def __init__(self) -> None:
        self.registers: dict[str, Value] = {}
        self.carries: dict[str, Value] = {}
        self.stack: dict[str, Value] = {}
        self.products: list[Product] = []

    def value(self, operand: str) -> Value:
        name = operand.lstrip("-~")
        found: Value
        if name in ("RZ", "URZ"):
            found = 0
        elif re.fullmatch(r"0x[0-9a-f]+|\d+", name):
            found = int(name, 0)
        else:
            found = self.registers.get(name, UNDEFINED if re.fullmatch(r"UR\d+", name) else None)
        if isinstance(found, int) and name != operand:
            found = (-found if operand[0] == "-" else ~found) & 2**32 - 1
        return found

    def pair(self, name: str) -> Value:
        low, high = self.value(name), self.value(_following(name, 1))
        return _of(lambda a, b: b << 32 | a, [low, high])

    def _wide(self, operand: str) -> Value:
        """A 64-bit operand, whose sign is not that of its lower half."""
        name = operand.lstrip("-")
        found = self.pair(name) if re.fullmatch(r"UR\d+", name) else self.value(name)
        return -found if isinstance(found, int) and name != operand else found

    def step(self, predicate: str | None, operation: str, operands: list[str]) -> None:
        if operation.startswith("HGMMA"):
            self._product(operation, operands)
            return
        if operation.startswith("STL"):
            for i, name in enumerate(_registers(operands[1], _width(operation))):
                self.stack[_slot(operands[0], i)] = self.value(name)
            return
        if re.fullmatch(r"!?U?P[0-9T]", operands[0]):  # a predicate comes first, then what is shuffled or compared
            self.carries[operands[0]] = None
            operands = operands[1:]
        if not operands or not re.fullmatch(r"U?R\d+", operands[0]):
            return
        target = operands[0]
        results: list[Value] = [self._result(operation, target, operands[1:])]
        if operation == "UIADD3.64":
            total = results[0]
            results = [total & 2**32 - 1, total >> 32 & 2**32 - 1] if isinstance(total, int) else [total, total]
        elif operation.startswith("LDL"):
            results = [self.stack.get(_slot(operands[1], i)) for i in range(_width(operation))]
        else:
            results += [None] * (_width(operation) - 1)
        for name, result in zip(_registers(target, len(results)), results, strict=True):
            self.registers[name] = None if predicate else result & 2**32 - 1 if isinstance(result, int) else result

    def _product(self, operation: str, operands: list[str]) -> None:
        shape = re.search(r"64x(\d+)x(\d+)", operation)
        place = re.search(r"gdesc\[(UR\d+)\]", " ".join(operands))
        assert shape is not None and place is not None, operation
        left: Value = "" if re.fullmatch(r"R\d+", operands[1]) else self.pair(place[1])
        self.products.append(Product(f"m64n{shape[1]}k{shape[2]}", left, self.pair(_following(place[1], 2))))
        for name in _registers(operands[0], int(shape[1]) // 2):
            self.registers[name] = None

    def _result(self, operation: str, target: str, operands: list[str]) -> Value:
        carries = [o for o in operands if re.fullmatch(r"!?U?P[0-9T]", o)]
        if operation == "UIADD3.64":
            return _of(_sum, [self._wide(operand) for operand in operands if operand not in carries])
        name = operation.removeprefix("U")
        values = [self.value(o) for o in operands if o not in carries]
        if name in ("S2R", "S2UR") or operation == "S2UR":
            return 0 if "CgaCtaId" in operands[0] or "TID.X" in operands[0] else None
        if name in ("IADD3", "IADD3.X", "VIADD"):
            if name == "IADD3.X":
                values += [self.carries.get(c) for c in carries if c.lstrip("!") not in ("PT", "UPT")]
            total = _of(_sum, values)
            if name == "IADD3" and carries:
                self.carries[carries[0]] = total >> 32 if isinstance(total, int) else total
            return total
        if name == "LOP3.LUT":
            table = values[3]
            ignored = [isinstance(table, int) and all(table >> i & 1 == table >> (i ^ bit) & 1 for i in range(8))
                       for bit in (4, 2, 1)]  # fmt: skip
            values = [0 if skip else value for skip, value in zip(ignored, values, strict=False)] + [table]
            return _of(_logic, values)
        if name in _SASS and len(values) >= _SASS[name][0]:
            return _of(_SASS[name][1], values[: _SASS[name][0]])
        return None


_SASS: dict[str, tuple[int, Callable[..., int]]] = {
    "MOV": (1, lambda a: a),
    "R2UR": (1, lambda a: a),
    "2UR": (1, lambda a: a),
    "IMAD.MOV.U32": (3, lambda a, b, c: a * b + c),
    "IMAD.IADD": (3, lambda a, b, c: a * b + c),
    "IMAD.SHL.U32": (2, lambda a, b: a * b),
    "IMAD": (3, lambda a, b, c: a * b + c),
    "LEA": (3, lambda a, b, c: (a << (c & 31)) + b),
    "SHF.R.U32.HI": (3, lambda low, shift, high: high >> (shift & 31)),
    "SHF.L.U32": (2, lambda low, shift: low << (shift & 31)),
    "SGXT.U32": (2, lambda a, bits: a & (1 << bits) - 1),
}


def _of(function: Callable[..., int], values: list[Value]) -> Value:
    if UNDEFINED in values:
        return UNDEFINED
    return None if None in values else function(*values)


def _sum(*numbers: int) -> int:
    return sum(numbers)


def _logic(a: int, b: int, c: int, table: int) -> int:
    """Bit by bit the truth table's entry for the three."""
    chosen = (i for i in range(8) if table >> i & 1)
    return sum((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c) & 2**32 - 1 for i in chosen)


def _width(operation: str) -> int:
    """Registers that an instruction writes, or stores."""
    if operation.startswith(("LDSM", "HMMA")) or ".128" in operation:
        return 4
    return 2 if ".64" in operation or "WIDE" in operation else 1


def _following(name: str, steps: int) -> str:
    kind, number = re.fullmatch(r"(U?R)(\d+)", name).groups()  # type: ignore[union-attr]
    return f"{kind}{int(number) + steps}"


def _registers(first: str, number: int) -> Iterator[str]:
    return (first if first in ("RZ", "URZ") else _following(first, i) for i in range(number))


def _slot(address: str, i: int) -> str:
    offset = re.fullmatch(r"\[R1(?:\+(0x[0-9a-f]+))?\]", address)
    return f"{int(offset[1] or '0', 16) + 4 * i}" if offset else address


# ---------------------------------------------------------------------------------------------------------- comparison
class Report(NamedTuple):
    kernel: str
    products: int
    unknown: int
    wrong: list[str]


def compare(kernel: Compiled) -> Report:
    """Products with descriptors that machine code and PTX do not agree on; their order is ptxas's business."""
    asked, given = products_of_ptx(kernel.ptx), products_of_sass(disassembled(kernel.cubin))
    sides = [(p, q) for p, q in zip(asked, given, strict=False) for _ in range(2)]
    unknown = sum(None in (p[1 + i % 2], q[1 + i % 2]) for i, (p, q) in enumerate(sides))
    wrong = [f"{p.shape}: {UNDEFINED} descriptor" for p in given if UNDEFINED in p]
    if not wrong and len(asked) != len(given):
        wrong = [f"{len(given)} products instead of {len(asked)}"]
    if not wrong and not unknown:
        surplus = Counter(given) - Counter(asked)
        wrong = [f"{p.shape}: descriptors {p.left!r}, {p.right!r}, which nobody asked for" for p in surplus]
    return Report(kernel.name, len(given), unknown, wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", metavar="D,V,DTYPE", help="repeatable; by default a grid")
    parser.add_argument("--kernel", default="", help="kernels whose name contains this")
    parser.add_argument("--config", action="append", default=[], metavar="FIELD=VALUE", help="repeatable")
    arguments = parser.parse_args()
    grid = itertools.product((16, 32, 64, 128, 256), (16, 32, 64, 128), ("bf16", "fp32"))
    shapes = [shape.split(",") for shape in arguments.shape] if arguments.shape else list(grid)
    config = {name: int(value) for name, value in (pair.split("=") for pair in arguments.config)}
    rows = []
    for D, V, dtype in track(shapes, "compiling", console=Console(stderr=True)):
        for num_iter in (30, 0):
            for kernel, given in launches(int(D), int(V), dtype, num_iter, **config):
                if arguments.kernel in kernel.fn.__name__:
                    report = compare(compile_for_hopper(kernel, given))
                    verdict = "; ".join(sorted(set(report.wrong))) or "right"
                    rows.append((D, V, dtype, num_iter, *report[:3], verdict))
    print(tabulate(rows, headers=("D", "V", "dtype", "iterations", "kernel", "products", "unknown", "descriptors")))
    return any(row[-1] != "right" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
