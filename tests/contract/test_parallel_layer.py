"""Layers under tensor parallelism and FSDP2, in two real processes over gloo."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module

import gka_ops
from gka_ops.distributed import tensor_parallel_plan
from gka_ops.nn import GatedKalmaNet
from tests.helpers.layers import HIDDEN, KINDS, gradients, make_input, make_layer
from tests.helpers.problems import norm_error
from tests.helpers.processes import run_together

PAGE = Path(__file__).resolve().parents[2] / "docs" / "distributed.md"
WORLD = 2
ROUNDING = 1e-11
"""Sums over ranks in another order, in fp64, times the condition of the solve."""

DIVISIBLE = {"heads": {"num_heads": 4}} | {
    name: options for name, options in KINDS.items() if name not in ("heads", "three numbers of heads")
}


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def layer_of(kind: str) -> GatedKalmaNet:
    return make_layer(**{"num_iter": 6} | DIVISIBLE[kind])


def tensor_parallel(kind: str, compiled: bool = False) -> None:
    layer, x = layer_of(kind), make_input(2, 5)
    expected, output = gradients(layer, x, layer), layer(x)
    mesh = init_device_mesh("cpu", (WORLD,))
    parallelize_module(layer, mesh, tensor_parallel_plan(layer))
    run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    y = run(x)
    assert not isinstance(y, DTensor)
    assert norm_error(y, output) <= ROUNDING
    for name, gradient in gradients(layer, x, run).items():
        assert norm_error(whole(gradient), expected[name]) <= ROUNDING, name
    assert layer.q_proj.weight.placements == (Shard(0),)  # type: ignore[attr-defined]
    assert layer.q_proj.weight.to_local().shape[0] * WORLD == layer.q_proj.weight.shape[0]  # type: ignore[attr-defined]
    for name in ("A_log", "dt_bias"):
        if getattr(layer, name) is not None:
            assert getattr(layer, name).placements == (Shard(0),)
    assert layer.o_norm.weight.placements == (Replicate(),)  # type: ignore[attr-defined]


def tensor_parallel_refuses() -> None:
    mesh = init_device_mesh("cpu", (WORLD,))
    odd = make_layer(num_heads=3)
    with pytest.raises(ValueError, match="expected num_heads to be a multiple of the mesh's 2 ranks, got 3"):
        parallelize_module(odd, mesh, tensor_parallel_plan(odd))
    odd = make_layer(num_heads=6, num_kv_heads=2, num_v_heads=3)
    with pytest.raises(ValueError, match="expected num_v_heads to be a multiple of the mesh's 2 ranks, got 3"):
        parallelize_module(odd, mesh, tensor_parallel_plan(odd))
    layer = make_layer(num_heads=4)
    plan, square = tensor_parallel_plan(layer), init_device_mesh("cpu", (1, WORLD))
    with pytest.raises(ValueError, match="expected a mesh of one dimension, got 2"):
        plan[""]._apply(layer, square)
    with pytest.raises(TypeError, match="expected a GatedKalmaNet to apply the plan to, got Linear"):
        plan[""]._apply(nn.Linear(2, 2), mesh)
    parallelize_module(layer, mesh, tensor_parallel_plan(layer))
    with pytest.raises(ValueError, match="expected x alone for a tensor-parallel layer"):
        layer(make_input(1, 5), None, torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="expected x alone for a tensor-parallel layer"):
        layer(make_input(1, 5), cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(TypeError, match=r"expected x to be a torch.Tensor, got list"):
        layer([1.0])
    assert torch.equal(layer(x=make_input(1, 5)), layer(make_input(1, 5)))


class Block(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.mixer = make_layer(**{"num_iter": 6} | options)
        self.mlp = nn.Linear(HIDDEN, HIDDEN, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(x)
        return x + self.mlp(x)


def model_of(**options: Any) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(Block(num_heads=4, num_kv_heads=2), Block(num_heads=2, ridge_range=(0.005, 0.5), **options))


def fsdp(compiled: bool = False) -> None:
    """Every rank has a half of the batch and of every parameter; two steps of SGD."""
    model, sharded = model_of(), model_of()
    x, rank = make_input(2 * WORLD, 5), dist.get_rank()
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in sharded:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    run = torch.compile(sharded, backend="aot_eager") if compiled else sharded
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, sharded)]
    for _ in range(2):
        y, own = model(x), run(x[2 * rank : 2 * rank + 2])
        assert norm_error(own, y[2 * rank : 2 * rank + 2]) <= ROUNDING
        y.square().mean().backward()
        own.square().mean().backward()
        for (name, p), (_, q) in zip(model.named_parameters(), sharded.named_parameters(), strict=True):
            assert isinstance(q, DTensor)
            assert p.grad is not None and q.grad is not None, name
            assert norm_error(whole(q.grad), p.grad) <= ROUNDING, name
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for name, t in get_model_state_dict(sharded).items():
        assert norm_error(whole(t), model.state_dict()[name]) <= ROUNDING, name


def fsdp_of_tensor_parallel() -> None:
    """Two dimensions of a mesh: FSDP2 over a layer that is tensor parallel, as far as two processes go."""
    for shape in ((1, WORLD), (WORLD, 1)):
        layer, x = layer_of("grouped"), make_input(2, 5)
        expected = gradients(layer, x, layer)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
        parallelize_module(layer, mesh["tp"], tensor_parallel_plan(layer))
        fully_shard(layer, mesh=mesh["dp"])
        y = layer(x)
        upstream = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        (y * upstream).sum().backward()
        for name, p in layer.named_parameters():
            assert p.grad is not None
            assert norm_error(whole(p.grad), expected[name]) <= ROUNDING, name


def documented() -> None:
    """The page's examples, one after the other."""
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
    q, k, v = (names[n].detach() for n in "qkv")
    assert norm_error(whole(names["output"]).detach(), gka_ops.chunk_gka(q, k, v, qk_l2norm=True).output) <= 1e-5
    torch.manual_seed(0)
    layer = GatedKalmaNet(hidden_size=64, head_dim=16, num_heads=4, num_kv_heads=2)
    assert norm_error(names["y"].detach(), layer(names["x"]).detach()) <= 1e-5
    assert all(p.grad is not None for p in names["model"].parameters())


CASES: dict[str, Callable[[], None]] = {
    f"tensor parallel, {kind}": partial(tensor_parallel, kind) for kind in DIVISIBLE
}
CASES |= {
    "tensor parallel, compiled": partial(tensor_parallel, "grouped", compiled=True),
    "tensor parallel, refused": tensor_parallel_refuses,
    "tensor parallel, documented": documented,
    "FSDP2": fsdp,
    "FSDP2, compiled": partial(fsdp, compiled=True),
    "FSDP2 of tensor parallel": fsdp_of_tensor_parallel,
}


@pytest.fixture(scope="module")
def failures() -> dict[str, str | None]:
    """All cases in one group of processes: to start them takes longer than the cases."""
    return dict(zip(CASES, run_together(WORLD, list(CASES.values())), strict=True))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(name, marks=pytest.mark.supports("FSDP2" if name.startswith("FSDP2") else "tensor parallel"))
        for name in CASES
    ],
)
def test_in_two_processes(failures: dict[str, str | None], case: str) -> None:
    assert failures[case] is None, failures[case]
