"""A model as an AOTInductor package, and processes that load it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gka_ops
from gka_ops import DecayGate, GKAState

SIZES = ((2, 70), (3, 50), (4, 129))
"""(B, T) that a package is run with; the first is the one that is exported."""

H, HKV, D, V, SLOTS = 2, 1, 16, 16, 6


class Model(torch.nn.Module):
    """A prompt, and a token after it with slots of a pool that are advanced in place."""

    def __init__(self) -> None:
        super().__init__()
        self.A_log = torch.nn.Parameter(torch.zeros(H))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, a: Tensor, kk: Tensor, kv: Tensor, slots: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        gate = DecayGate(self.A_log)
        q = 2 * q  # pointwise work, which Inductor compiles
        result = gka_ops.chunk_gka(q, k, v, a, qk_l2norm=True, gate=gate, output_final_state=True)
        assert result.final_state is not None
        last = (t[:, -1:].contiguous() for t in (q, k, v, a))
        token = gka_ops.recurrent_gka(*last, state=GKAState(kk, kv), state_indices=slots, qk_l2norm=True, gate=gate)
        return result.output, result.final_state.kv, token


def inputs(B: int, T: int, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(T)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tokens = [random(B, T, heads, n).to(device, dtype) for heads, n in ((H, D), (HKV, D), (HKV, V))]
    pool = [torch.zeros(SLOTS, H, D, n, device=device) for n in (D, V)]
    return *tokens, random(B, T, H).to(device), *pool, torch.arange(B, device=device) + 1


def make(folder: Path, device: str, dtype: torch.dtype = torch.float32) -> Path:
    """Exports a model with symbolic B and T, packages it, and stores what it has to return for every size."""
    model = Model().to(device)
    B, T = torch.export.Dim("B", max=SLOTS - 1), torch.export.Dim("T")
    tokens: dict[int, Any] = {0: B, 1: T}
    with torch.no_grad():
        program = torch.export.export(
            model, inputs(*SIZES[0], device, dtype), dynamic_shapes=(*[tokens] * 4, None, None, {0: B})
        )
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
        cases = []
        for size in SIZES:
            given = inputs(*size, device, dtype)
            outputs = model(*given)
            cases.append((inputs(*size, device, dtype), (*outputs, *given[4:6])))
    torch.save(cases, folder / "cases.pt")
    return folder


SCRIPT = """
import sys
from pathlib import Path
import torch
{first}
folder = Path(sys.argv[1])
cases = torch.load(folder / "cases.pt")
model = torch._inductor.aoti_load_package(str(folder / "model.pt2"))
for given, expected in cases:
    for one, other in zip((*model(*given), *given[4:6]), expected, strict=True):
        assert other.any() and torch.equal(one, other), (one - other).abs().max()
print("ran", len(cases), "gka_ops.nn" in sys.modules)
"""


def run(folder: Path, first: str) -> subprocess.CompletedProcess[str]:
    """A process that loads the package after the statement ``first`` and compares, bit for bit."""
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(first=first), str(folder)], capture_output=True, text=True
    )
