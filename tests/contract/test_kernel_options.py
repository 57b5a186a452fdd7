"""``kernel_options``: what reaches the launches of a call and of its backward, compiled or not; what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import gka_ops
from gka_ops import autotune
from gka_ops.autotune import choice
from gka_ops.autotune.choice import Overrides
from gka_ops.kernel_options import bare, with_options
from gka_ops.reference import backend

pytestmark = pytest.mark.supports("kernel_options")

OPTIONS = {"readout": {"num_warps": 8}, "backward_value": {"num_stages": 2, "max_registers": None}}
FORCED: Overrides = (
    ("backward_value", (("max_registers", None), ("num_stages", 2))),
    ("readout", (("num_warps", 8),)),
)


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, object]]]:
    """Which operators ran, and what was forced upon their launches then."""
    seen: list[tuple[str, object]] = []
    for name in ("chunk_gka", "chunk_gka_backward", "chunk_solve", "recurrent_gka"):
        function = getattr(backend, name)

        def call(*args: Any, name: str = name, function: Any = function) -> Any:
            seen.append((name, choice.state()[1]))
            return function(*args)

        monkeypatch.setattr(backend, name, call)
    yield seen
    assert choice.state()[1] == ()
    torch._dynamo.reset()


def tensors(T: int = 9) -> list[Tensor]:
    return [torch.randn(1, T, 2, 8, requires_grad=True) for _ in range(3)]


def test_the_call_and_its_backward(forced: list[tuple[str, object]]) -> None:
    inputs = tensors()
    for _ in range(3):  # known calls, too
        gka_ops.chunk_gka(*inputs, kernel_options=OPTIONS).output.sum().backward()
    assert forced == [("chunk_gka", FORCED), ("chunk_gka_backward", FORCED)] * 3
    forced.clear()
    gka_ops.chunk_gka(*inputs).output.sum().backward()
    gka_ops.chunk_solve(*inputs[:2], kernel_options=OPTIONS)
    state = gka_ops.GKAState(torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 8, 8))
    with torch.no_grad():
        for _ in range(2):
            gka_ops.recurrent_gka(*tensors(1), state=state, kernel_options=OPTIONS)
    assert forced == [
        ("chunk_gka", ()), ("chunk_gka_backward", ()), ("chunk_solve", FORCED), *[("recurrent_gka", FORCED)] * 2,
    ]  # fmt: skip


def test_results_are_those_without() -> None:
    inputs = tensors()
    for left, right in zip(
        torch.autograd.grad(gka_ops.chunk_gka(*inputs, kernel_options=OPTIONS).output.square().sum(), inputs),
        torch.autograd.grad(gka_ops.chunk_gka(*inputs).output.square().sum(), inputs),
        strict=True,
    ):
        assert torch.equal(left, right)


def test_compiled(forced: list[tuple[str, object]]) -> None:
    """Constants of the graph; other options make another one, and no options are a third."""
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def run(options: Any, *inputs: Tensor) -> Tensor:
        return gka_ops.chunk_gka(*inputs, kernel_options=options).output

    inputs = tensors()
    for options, wanted, graphs in (
        (OPTIONS, FORCED, 1),
        (OPTIONS, FORCED, 1),
        ({"readout": {"num_warps": 2}}, (("readout", (("num_warps", 2),)),), 2),
        (None, (), 3),
    ):
        forced.clear()
        run(options, *inputs).sum().backward()
        assert forced == [("chunk_gka", wanted), ("chunk_gka_backward", wanted)]
        assert counter.frame_count == graphs


def test_within_an_override(forced: list[tuple[str, object]]) -> None:
    """What the call says comes before what the block says; the rest of the block stays, in the backward as well."""
    first, second = tensors(), tensors()
    with autotune.override("readout", num_warps=4, num_stages=1), autotune.override("state", block_state=32):
        both = [
            gka_ops.chunk_gka(*t, kernel_options={"readout": {"num_warps": 8}}).output.sum() for t in (first, second)
        ]
        sum(both).backward()  # type: ignore[union-attr]
    wanted = (("readout", (("num_stages", 1), ("num_warps", 8))), ("state", (("block_state", 32),)))
    assert forced == [("chunk_gka", wanted)] * 2 + [("chunk_gka_backward", wanted)] * 2


def test_they_reach_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    from gka_ops.triton import launch

    launched: dict[str, dict[str, Any]] = {}
    monkeypatch.setattr(launch, "launch", lambda kernel, grid, /, **given: launched.update({kernel.fn.__name__: given}))
    inputs = [torch.randn(1, 70, 2, 64) for _ in range(3)]
    options = {"readout": {"num_warps": 2}, "state": {"block_state": 32}}
    gka_ops.chunk_gka(*inputs, impl="triton", kernel_options=options)
    assert launched["chunk_readout_kernel"]["num_warps"] == 2
    assert launched["chunk_state_kernel"]["BLOCK_N"] == 32


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (8, TypeError, "expected kernel_options to be a mapping of kernels, got int"),
        ({"num_warps": 8}, ValueError, "expected kernel_options of kernels among state, .* got 'num_warps'"),
        ({"readout": 8}, TypeError, r"expected kernel_options\['readout'\] to be a mapping of parameters, got int"),
        ({"readout": {"warps": 8}}, ValueError, r"kernel_options\['readout'\]: expected parameters num_warps, "),
        ({"readout": {"num_warps": 3}}, ValueError, r"expected num_warps among \(2, 4, 8\), got 3"),
        ({"readout": {"num_warps": True}}, ValueError, "expected num_warps among"),
        ({"readout": {"num_warps": "8"}}, ValueError, "expected num_warps among"),
    ],
)
def test_what_is_refused(options: Any, error: type[Exception], message: str) -> None:
    q, k, v = (t.detach() for t in tensors())
    state = gka_ops.GKAState(torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 8, 8))
    for call in (
        lambda: gka_ops.chunk_gka(q, k, v, kernel_options=options),
        lambda: gka_ops.chunk_solve(q, k, kernel_options=options),
        lambda: gka_ops.recurrent_gka(q, k, v, state=state, kernel_options=options),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("text", ["auto readout", "auto readout.num_warps=x", "auto a=1", "auto readout.num_warps=3"])
def test_an_operator_refuses_a_text_that_is_none(text: str) -> None:
    q, k, v = (t.detach() for t in tensors())
    args = (q, k, v, *[None] * 10, 0.02, 0.0, 5, 1.0, False, False, False, "")
    with pytest.raises(ValueError, match=r"chunk_gka: .*expected"):
        torch.ops.gka.chunk_gka(*args, text)
    with pytest.raises(ValueError, match="expected impl to be one of"):
        gka_ops.chunk_gka(q, k, v, impl=text)  # type: ignore[arg-type]


def test_the_text() -> None:
    text = with_options(
        "op", "triton", {"solve": {"max_registers": None}, "readout": {"num_warps": 8, "num_stages": 2}}
    )
    assert text == "triton readout.num_stages=2 readout.num_warps=8 solve.max_registers=none"
    assert bare(text) == "triton" and with_options("op", "auto", {}) == "auto" == bare("auto")
    with pytest.raises(ValueError, match="expected impl to be one of"):
        with_options("op", "cuda", OPTIONS)
