"""The short convolution through the ``causal-conv1d`` package: a stand-in that refuses what the package refuses."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gka_ops.nn import conv
from gka_ops.nn.conv import Packing, ShortConvolution
from tests.helpers.layers import make_input, make_layer
from tests.helpers.problems import max_error, norm_error

CHANNELS = 16


class _Kernel(torch.autograd.Function):
    """Not differentiable twice, and silent about it, as a function of C++ without an autograd formula."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sequence: Tensor | None, before: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, sequence, before)
        return compute(x, weight, sequence, before)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, sequence, before = ctx.saved_tensors
        with torch.enable_grad():
            x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
            dx, dweight = torch.autograd.grad(compute(x, weight, sequence, before), (x, weight), dy.detach())
        return dx, dweight, None, None


def compute(x: Tensor, weight: Tensor, sequence: Tensor | None, before: Tensor | None) -> Tensor:
    """y [B, C, T] of x [B, C, T], in fp32, in the layout of x."""
    K, wide = weight.shape[1], torch.promote_types(x.dtype, torch.float32)
    history = x.new_zeros(*x.shape[:2], K - 1) if before is None else before
    padded = torch.cat((history, x), dim=2).to(wide)
    total = torch.zeros_like(x, dtype=wide)
    for i in range(K):
        shifted = padded[:, :, i : i + x.shape[2]]
        if sequence is not None:
            origin = F.pad(sequence, (K - 1, 0), value=-1)[:, i : i + x.shape[2]]
            shifted = shifted * (origin == sequence)[:, None]
        total = total + weight[:, i, None].to(wide) * shifted
    return F.silu(total).to(x.dtype).mT.contiguous().mT


class Package:
    """Stands for the package's function: counts its calls, and insists on what the kernels insist on."""

    def __init__(self) -> None:
        self.calls = 0

    def causal_conv1d_fn(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        seq_idx: Tensor | None = None,
        initial_states: Tensor | None = None,
        return_final_states: bool = False,
        final_states_out: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        B, C, T = x.shape
        assert not torch.compiler.is_compiling()
        assert x.dtype in (torch.bfloat16, torch.float16, torch.float32) and weight.dtype.is_floating_point
        assert x.stride(1) == 1 and x.stride(2) > 1 and C % 8 == x.stride(0) % 8 == x.stride(2) % 8 == 0
        assert weight.shape == (C, weight.shape[1]) and 2 <= weight.shape[1] <= 4
        assert bias is None and not return_final_states and final_states_out is None and activation == "silu"
        if seq_idx is not None:
            assert seq_idx.dtype == torch.int32 and seq_idx.shape == (B, T) and seq_idx.is_contiguous()
            assert initial_states is None
        if initial_states is not None:
            assert initial_states.dtype == x.dtype and initial_states.stride(1) == 1
            assert initial_states.shape == (B, C, weight.shape[1] - 1)
        self.calls += 1
        y: Tensor = _Kernel.apply(x, weight, seq_idx, initial_states)
        return y


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[Package]:
    """The package is installed, and runs here."""
    found, module = Package(), ModuleType("causal_conv1d")
    module.causal_conv1d_fn = found.causal_conv1d_fn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "causal_conv1d", module)
    monkeypatch.setattr(conv, "FUSED_DEVICE", "cpu")
    conv._causal_conv1d.cache_clear()
    yield found
    conv._causal_conv1d.cache_clear()


def make_convolution(kernel_size: int = 4, channels: int = CHANNELS, **options: Any) -> ShortConvolution:
    torch.manual_seed(0)
    return ShortConvolution(channels, kernel_size, **options)


class Boundaries(TorchDispatchMode):
    """Collects what ``searchsorted`` looks in."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.searchsorted:
            self.found.append(args[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packing_names_the_sequence_of_every_token(dtype: torch.dtype) -> None:
    lengths = torch.tensor([0, 3, 0, 0, 1, 7, 0], dtype=dtype)
    packing = Packing.of(F.pad(lengths.cumsum(0, dtype=dtype), (1, 0)), 11)
    assert torch.equal(packing.lengths, lengths)
    assert packing.sequence.tolist() == [1] * 3 + [4] + [5] * 7
    assert packing.position.tolist() == [0, 1, 2, 0, *range(7)]


def test_packing_searches_no_view() -> None:
    """Inductor of PyTorch 2.11 on CUDA ignores the offset of one: off by a sequence (pytorch/pytorch#182343)."""
    cu_seqlens = torch.tensor([0, 0, 3, 4, 11])
    for boundaries in (cu_seqlens, cu_seqlens[1:]):
        with Boundaries() as mode:
            Packing.of(boundaries, 11)
        (searched,) = mode.found
        assert searched.storage_offset() == 0
        assert searched.untyped_storage().data_ptr() != cu_seqlens.untyped_storage().data_ptr()


def calls(
    module: ShortConvolution, x: Tensor, *arguments: Any, package: Package, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor, int]:
    """What the package makes of a call, what the torch path makes of it, and how often the package was asked."""
    before = package.calls
    y = module(x, *arguments)
    asked = package.calls - before
    with monkeypatch.context() as patch:
        patch.setattr(conv, "FUSED_DEVICE", "none")
        return y, module(x, *arguments), asked


@pytest.mark.parametrize("kernel_size", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["whole", "packed", "continued", "one token"])
def test_is_what_the_torch_path_computes(
    kernel_size: int, dtype: torch.dtype, how: str, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make_convolution(kernel_size)  # fp32 weights, as under autocast
    x = torch.randn(1 if how == "packed" else 2, 1 if how == "one token" else 11, CHANNELS).to(dtype)
    tail = torch.randn(2, CHANNELS, kernel_size - 1) if how in ("continued", "one token") else None
    packing = Packing.of(torch.tensor([0, 3, 3, 4, 11]), 11) if how == "packed" else None
    y, expected, asked = calls(module, x, tail, packing, package=package, monkeypatch=monkeypatch)
    assert asked == 1
    assert y.dtype == dtype and y.shape == x.shape and y.is_contiguous()
    assert max_error(y.detach(), expected.detach()) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("frozen", [None, "x", "weight"])
def test_gradients_are_those_of_the_torch_path(
    frozen: str | None, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make_convolution()
    x = torch.randn(2, 11, CHANNELS).requires_grad_(frozen != "x")
    module.weight.requires_grad_(frozen != "weight")
    leaves = [leaf for leaf in (x, module.weight) if leaf.requires_grad]
    y, expected, asked = calls(module, x, package=package, monkeypatch=monkeypatch)
    assert asked == 1
    upstream = torch.randn_like(y)
    found, wanted = (torch.autograd.grad(result, leaves, upstream) for result in (y, expected))
    for gradient, reference in zip(found, wanted, strict=True):
        assert norm_error(gradient, reference) < 1e-6


def test_second_derivatives_raise(package: Package) -> None:
    """The package has none, and by itself would leave them out without a word."""
    x = torch.randn(2, 11, CHANNELS, requires_grad=True)
    (dx,) = torch.autograd.grad(make_convolution()(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("options", "shape", "dtype"),
    [
        ({"kernel_size": 5}, (2, 11, CHANNELS), torch.float32),
        ({"kernel_size": 1}, (2, 11, CHANNELS), torch.float32),
        ({"channels": 12}, (2, 11, 12), torch.float32),
        ({"dtype": torch.float64}, (2, 11, CHANNELS), torch.float64),
        ({}, (2, 0, CHANNELS), torch.float32),
    ],
    ids=["too many taps", "one tap", "channels", "fp64", "no tokens"],
)
def test_the_torch_path_runs_what_the_package_cannot(
    options: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype, package: Package
) -> None:
    x = torch.randn(shape, dtype=dtype)
    assert make_convolution(**options)(x).shape == x.shape
    assert package.calls == 0


def test_the_torch_path_runs_other_layouts_and_continued_packed_sequences(package: Package) -> None:
    module, tail = make_convolution(), torch.randn(2, CHANNELS, 3)
    module(torch.randn(2, CHANNELS, 11).mT)
    module(torch.randn(1, 11, CHANNELS), tail, Packing.of(torch.tensor([0, 4, 11]), 11))
    assert package.calls == 0


def test_transforms_take_the_torch_path(package: Package) -> None:
    module, x = make_convolution(), torch.randn(2, 11, CHANNELS)
    derivative = torch.func.grad(lambda x: module(x).square().sum())(x)
    assert package.calls == 0
    x.requires_grad_()
    assert norm_error(derivative, torch.autograd.grad(module(x).square().sum(), x)[0]) < 1e-6
    assert package.calls == 2  # and once more in the backward


def test_compiled_graphs_hold_the_torch_path(package: Package) -> None:
    module, x = make_convolution(), torch.randn(2, 11, CHANNELS, requires_grad=True)
    torch._dynamo.reset()
    y = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    y.sum().backward()
    assert package.calls == 0
    assert max_error(y.detach(), module(x).detach()) < 1e-6


def test_runs_on_no_other_device(monkeypatch: pytest.MonkeyPatch, package: Package) -> None:
    monkeypatch.undo()  # the package, and where it runs
    monkeypatch.setitem(sys.modules, "causal_conv1d", ModuleType("causal_conv1d"))
    assert conv.FUSED_DEVICE == "cuda"
    make_convolution()(torch.randn(2, 11, CHANNELS))
    assert package.calls == 0


@pytest.mark.parametrize("broken", [None, ModuleType("causal_conv1d")], ids=["missing", "without the function"])
def test_works_without_the_package(
    broken: ModuleType | None, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "causal_conv1d", broken)
    conv._causal_conv1d.cache_clear()
    x = torch.randn(2, 11, CHANNELS)
    assert make_convolution()(x).shape == x.shape
    assert package.calls == 0


def test_a_layer_trains_prefills_and_decodes_through_it(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = make_layer(torch.float32, tol=2e-3), make_input(2, 9, torch.float32)
    layer(x).sum().backward()
    assert package.calls == 6
    gradient = layer.q_conv1d.weight.grad
    found = []
    for device in ("cpu", "none"):
        monkeypatch.setattr(conv, "FUSED_DEVICE", device)
        cache = layer.init_cache(2)
        with torch.no_grad():
            found.append(torch.cat([layer(piece, cache) for piece in x.split([6, 2, 1], dim=1)], dim=1))
    assert package.calls == 6 + 9
    assert max_error(*found) < 1e-5
    layer.zero_grad()
    layer(x).sum().backward()
    assert norm_error(gradient, layer.q_conv1d.weight.grad) < 1e-4
