"""The short convolution through the ``causal-conv1d`` package itself, where it is installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("causal_conv1d", reason="needs causal-conv1d: pip install gka-ops[conv]")

from gka_ops import GatedKalmaNet
from gka_ops.nn import conv
from gka_ops.nn.conv import Packing, ShortConvolution
from tests.helpers.problems import norm_error

pytestmark = pytest.mark.gpu

CHANNELS = 96


def results(module: ShortConvolution, x: Tensor, *arguments: Any) -> list[Tensor]:
    """The output and the gradients of input and taps."""
    leaf = x.detach().requires_grad_()
    y = module(leaf, *arguments)
    upstream = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y).to(y.dtype)
    return [y, *torch.autograd.grad(y, (leaf, module.weight), upstream)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("what", ["plain", "continued", "packed"])
@pytest.mark.parametrize("kernel_size", [2, 4])
def test_the_package_computes_what_torch_does(
    dtype: torch.dtype, what: str, kernel_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module = ShortConvolution(CHANNELS, kernel_size, device="cuda", dtype=dtype)
    x = torch.randn(1 if what == "packed" else 3, 200, CHANNELS, device="cuda", dtype=dtype)
    arguments: tuple[Any, ...] = ()
    if what == "continued":
        arguments = (torch.randn(3, CHANNELS, kernel_size - 1, device="cuda", dtype=dtype),)
    elif what == "packed":
        arguments = (None, Packing.of(torch.tensor([0, 70, 70, 71, 200], device="cuda", dtype=torch.int32), 200))
    assert conv._can_fuse(x, module.weight[:, 0], *(*arguments, None, None)[:2])
    fused = results(module, x, *arguments)
    monkeypatch.setattr(conv, "_causal_conv1d", lambda: None)
    bar = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for actual, expected in zip(fused, results(module, x, *arguments), strict=True):
        assert actual.dtype == expected.dtype and norm_error(actual, expected) < bar


def test_a_layer_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training and a continued prefill of a whole layer, with the package and without."""
    torch.manual_seed(0)
    layer = GatedKalmaNet(256, 64, 4, 2, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(2, 100, 256, device="cuda", dtype=torch.bfloat16)
    calls: list[int] = []
    package = conv._causal_conv1d()
    assert package is not None

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return package(*arguments, **options)

    def run() -> list[Tensor]:
        y = layer(x)
        gradients = torch.autograd.grad(y.float().square().sum(), list(layer.parameters()))
        with torch.no_grad():
            cache = layer.init_cache(2)
            parts = torch.cat((layer(x[:, :60], cache), layer(x[:, 60:], cache)), 1)
        return [y, parts, *gradients]

    monkeypatch.setattr(conv, "_causal_conv1d", lambda: counted)
    fused = run()
    assert len(calls) >= 3 + 3 + 3
    monkeypatch.setattr(conv, "_causal_conv1d", lambda: None)
    for actual, expected in zip(fused, run(), strict=True):
        assert norm_error(actual, expected) < 2e-2
