"""The check of Hopper's descriptors finds what ptxas 12.8 does to narrow blocks, and nothing in what is launched."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

triton = pytest.importorskip("triton")

TOOL = Path(__file__).parents[2] / "tools" / "check_descriptors.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    pytest.importorskip("rich")
    spec = importlib.util.spec_from_file_location("check_descriptors", TOOL)
    assert spec is not None and spec.loader is not None
    module = sys.modules["check_descriptors"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(*options: str) -> subprocess.CompletedProcess[str]:
    """The tool on the read-out at D = 64 and V = 32 in bf16; in a process of its own, without the interpreter."""
    command = [sys.executable, str(TOOL), "--shape", "64,32,bf16", "--kernel", "readout", *options]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=TOOL.parents[1])


def test_the_read_out_reads_what_it_should() -> None:
    result = check()
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if "chunk_readout_kernel" in line]
    assert len(rows) == 2
    assert all(int(products) > 0 and unknown == "0" for *_, products, unknown, _ in rows)


def test_narrow_blocks_are_found_out() -> None:
    version = subprocess.run([triton.knobs.nvidia.ptxas.path, "--version"], capture_output=True, text=True).stdout
    if "release 12.8" not in version:
        pytest.skip(f"another ptxas: {version.splitlines()[-2]}")
    result = check("--config", "block_v=32")
    assert result.returncode == 1, result.stderr
    assert "undefined descriptor" in result.stdout


PTX = """
	mov.b32 	%r1, global_smem;
	add.s32 	%r2, %r1, 4096;
	bfe.u32 	%r3, %r2, 4, 14;
	cvt.u64.u32 	%rd1, %r3;
	or.b64 	%rd2, %rd1, 4611686293305294848;
	wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r9,%r10,%r11,%r12}, {%r13,%r14,%r15,%r16}, %rd2, 0, 1, 1, 1;
	add.s64 	%rd3, %rd2, 2;
	wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r9,%r10,%r11,%r12}, %rd2, %rd3, 1, 1, 1;
"""
SASS = """
        /*0000*/                   S2UR UR5, SR_CgaCtaId ;
        /*0010*/                   UMOV UR4, 0x400 ;
        /*0020*/                   ULEA UR5, UR5, UR4, 0x18 ;
        /*0030*/                   UIADD3 UR5, UR5, 0x1000, URZ ;
        /*0040*/                   USHF.R.U32.HI UR6, URZ, 0x4, UR5 ;
        /*0050*/                   USGXT.U32 UR6, UR6, 0xe ;
        /*0060*/                   UMOV UR14, UR6 ;
        /*0070*/                   UMOV UR15, 0x40000040 ;
        /*0080*/                   HGMMA.64x8x16.F32 R24, R56, gdesc[UR12], RZ, !UPT ;
        /*0090*/                   UIADD3 UR18, UP0, UR14, 0x2, URZ ;
        /*00a0*/                   UIADD3.X UR19, UR15, URZ, URZ, UP0, !UPT ;
        /*00a8*/                   UIADD3.64 UR20, UR18, -0x2, URZ ;
        /*00ac*/                   UIADD3.64 UR18, UR18, -UR20, URZ ;
        /*00ae*/                   UIADD3.64 UR18, UR18, UR20, URZ ;
        /*00b0*/                   UMOV UR16, UR14 ;
        /*00c0*/                   UMOV UR17, UR15 ;
        /*00d0*/                   HGMMA.64x8x16.F32 R24, gdesc[UR16], R24, gsb0 ;
"""


def test_both_sides_come_to_the_same_descriptors(tool: ModuleType) -> None:
    first = (0x40000040 << 32) | (0x1400 >> 4)
    expected = [("m64n8k16", "", first), ("m64n8k16", first, first + 2)]
    assert tool.products_of_ptx(PTX) == expected
    assert tool.products_of_sass(SASS) == expected


@pytest.mark.parametrize(
    ("old", "new"), [("UIADD3 UR18, UP0, UR14", "UIADD3 UR18, UP0, UR7"), ("UMOV UR17, UR15", "UMOV UR33, UR15")]
)
def test_a_register_that_nothing_wrote_is_noticed(tool: ModuleType, old: str, new: str) -> None:
    products = tool.products_of_sass(SASS.replace(old, new))
    assert tool.UNDEFINED in products[1]
