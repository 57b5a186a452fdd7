"""Modifiers: what they compute, by whichever implementation; how they compile; what they refuse."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import gka_ops
from examples import modifiers as examples
from gka_ops import GKAState, Ridge, modifiers
from tests.helpers.modifiers import RidgeMod, exact_gka

B, T, H, HKV, D, V = 2, 70, 4, 2, 16, 24
NUM_ITER = 120
INPUTS = ("q", "k", "v", "log_decay", "alpha", "beta")
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter, chosen where there is no card"
)


def make_tensors(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Inputs of ``chunk_gka``, and what the modifiers below use."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)

    tensors = {
        "q": unit(B, T, H, D), "k": unit(B, T, HKV, D), "v": unit(B, T, HKV, V), "log_decay": -0.1 * rand(B, T, H),
        "alpha": rand(B, T, H), "beta": rand(B, T, H), "per_head": rand(H), "per_token": rand(B, T), "weight": rand(1),
    }  # fmt: skip
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}


RIDGE_MODS: dict[str, Callable[[dict[str, Tensor]], RidgeMod]] = {
    "numbers": lambda c: lambda fro, b, h, t: 0.03 * fro + 0.02,
    "constant": lambda c: lambda fro, b, h, t: 0.4,
    "tensor": lambda c: lambda fro, b, h, t: 0.1 + c["per_head"][h],
    "floor": lambda c: lambda fro, b, h, t: torch.maximum(0.05 * fro, 0.3 * c["per_head"][h]),
    "captures": lambda c: (
        lambda fro, b, h, t: (
            c["weight"] * 0.1 * fro.sqrt() + c["per_token"][b, t] * torch.sigmoid(fro) * c["per_head"][h]
        )
    ),
    "positions": lambda c: lambda fro, b, h, t: fro * (0.02 + 0.001 * t) + 0.01 * h,
    "functions": lambda c: (
        lambda fro, b, h, t: (
            0.1
            + 0.02 * torch.exp(-fro) * torch.tanh(fro)
            + torch.where(fro > 1, torch.log(1 + fro), fro**2) / (2 + F.softplus(c["weight"] * fro))
            - 0.01 * torch.clamp(fro, 0.1, 2.0).rsqrt()
            + abs(1 - fro) ** 1.5 * 0.01
        )
    ),
}
KINDS = list(RIDGE_MODS)


def calls(t: dict[str, Tensor], mod: RidgeMod, **options: Any) -> dict[str, Tensor]:
    """Outputs of the differentiable operators."""
    options = {"ridge_mod": mod, "num_iter": NUM_ITER, **options}
    q, k, v, log_decay, alpha, beta = (t[name] for name in INPUTS)
    output, state = gka_ops.chunk_gka(q, k, v, log_decay, alpha, beta, output_final_state=True, **options)
    x, _ = gka_ops.chunk_solve(q, k, log_decay, beta, **options)
    assert state is not None
    return {"output": output, "kk": state.kk, "x": x}


def exactly(t: dict[str, Tensor], mod: RidgeMod) -> dict[str, Tensor]:
    output, x, state = exact_gka(*(t[name] for name in INPUTS), mod, D**-0.5)
    return {"output": output, "kk": state.kk, "x": x}


def with_gradients(run: Callable[..., dict[str, Tensor]], t: dict[str, Tensor], mod: RidgeMod) -> dict[str, Tensor]:
    """Outputs, and the gradients of a weighted sum of them by name."""
    found = run(t, mod)
    loss: Any = sum((tensor * torch.linspace(-1, 1, tensor.shape[-1]).to(tensor)).sum() for tensor in found.values())
    gradients = torch.autograd.grad(loss, list(t.values()), allow_unused=True)
    return found | {f"d_{name}": g for name, g in zip(t, gradients, strict=True) if g is not None}


def assert_close(found: dict[str, Tensor], exact: dict[str, Tensor], most: float) -> None:
    assert found.keys() == exact.keys()
    with torch.no_grad():
        errors = {n: float((found[n].double() - exact[n]).norm() / exact[n].norm()) for n in exact}
    assert max(errors.values()) < most, errors


@pytest.mark.supports("modifiers")
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_definition(kind: str) -> None:
    t = make_tensors()
    mod = RIDGE_MODS[kind](t)
    assert_close(with_gradients(calls, t, mod), with_gradients(exactly, t, mod), 1e-11)


@pytest.mark.supports("modifiers")
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_to_the_same(kind: str) -> None:
    t = make_tensors()
    mod = RIDGE_MODS[kind](t)
    compiled = torch.compile(lambda t: calls(t, mod), fullgraph=True, backend="aot_eager")
    eager = with_gradients(calls, t, mod)
    assert_close(with_gradients(lambda t, _: compiled(t), t, mod), eager, 1e-12)
    torch._dynamo.reset()


@interpreted
@pytest.mark.parametrize("kind", ["constant", "captures", "functions"])
def test_kernels_equal_the_reference(kind: str) -> None:
    t = {name: tensor[:1, :37] if name in INPUTS else tensor for name, tensor in make_tensors(torch.float32).items()}
    mod = RIDGE_MODS[kind](t)
    reference, kernels = (
        with_gradients(lambda t, mod, impl=impl: calls(t, mod, num_iter=25, impl=impl), t, mod)
        for impl in ("reference", "triton")
    )
    assert_close(kernels, {name: tensor.double() for name, tensor in reference.items()}, 2e-5)


def decode(t: dict[str, Tensor], mod: RidgeMod, tokens: int, **options: Any) -> dict[str, Tensor]:
    state = GKAState(*(torch.zeros(B, H, D, size, dtype=t["q"].dtype) for size in (D, V)))
    inputs = [t[name].detach()[:, :tokens] for name in INPUTS]
    with torch.no_grad():
        return {"output": gka_ops.recurrent_gka(*inputs, state=state, ridge_mod=mod, **options)}


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_equals_the_definition(kind: str) -> None:
    t = make_tensors()
    mod, tokens = RIDGE_MODS[kind](t), 7
    exact, _, _ = exact_gka(*(t[name][:, :tokens] for name in INPUTS), mod, D**-0.5)
    assert_close(decode(t, mod, tokens, num_iter=NUM_ITER), {"output": exact}, 1e-11)


@interpreted
@pytest.mark.parametrize("kind", KINDS)
def test_the_decoding_kernel_equals_the_reference(kind: str) -> None:
    t = make_tensors(torch.float32)
    reference, kernel = (decode(t, RIDGE_MODS[kind](t), 3, num_iter=6, impl=impl) for impl in ("reference", "triton"))
    assert_close(kernel, {"output": reference["output"].double()}, 1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_the_built_in_ridge_as_a_modifier(packed: bool) -> None:
    """It gives the same, with empty keys first, where ‖H‖ = 0, and in packed sequences."""
    t = make_tensors()
    with torch.no_grad():
        t["k"][:, :3] = 0
    options: dict[str, Any] = {"num_iter": 40}
    if packed:
        t = {name: tensor.detach()[:1] if name in INPUTS else tensor.detach() for name, tensor in t.items()}
        t = {name: tensor.requires_grad_() for name, tensor in t.items()}
        options["cu_seqlens"] = torch.tensor([0, 30, 30, T])
    inputs = [t[name] for name in INPUTS]
    plain = gka_ops.chunk_gka(*inputs, **options).output
    modified = gka_ops.chunk_gka(*inputs, ridge_mod=lambda fro, b, h, t: 0.02 * fro, **options).output
    assert torch.equal(plain, modified)
    ones = torch.ones_like(plain)
    for a, b in zip(torch.autograd.grad(plain, inputs, ones), torch.autograd.grad(modified, inputs, ones), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


def test_debug_mode_takes_any_leaf() -> None:
    """A ridge may not be negative; what a modifier computes it from may."""
    t = {name: tensor.detach() for name, tensor in make_tensors().items()}
    inputs, negative = [t[name] for name in INPUTS], -t["per_head"]

    def ridge_mod(fro: Any, b: Tensor, h: Tensor, t: Tensor) -> Any:
        return 0.1 * fro - negative[h]

    expected = calls(t, ridge_mod)
    with gka_ops.debug_mode():
        found = calls(t, ridge_mod)
        decode(t, ridge_mod, 3, num_iter=5)
        with pytest.raises(ValueError, match="beta in"):
            gka_ops.chunk_gka(*inputs[:5], inputs[5] - 1, ridge_mod=ridge_mod)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_without_a_solve_there_is_no_ridge() -> None:
    t = make_tensors()
    inputs = [t[name] for name in INPUTS]
    mod = RIDGE_MODS["floor"](t)
    assert torch.equal(
        gka_ops.chunk_gka(*inputs, num_iter=0, ridge_mod=mod).output, gka_ops.chunk_gka(*inputs, num_iter=0).output
    )


# ------------------------------------------------------------------------------------------- decays, queries and keys
@pytest.mark.supports("modifiers")
def test_decay_query_and_key() -> None:
    """They say what the operator sees, with the gate's decay as the decay."""
    t = make_tensors()
    q, k, v, raw, alpha, beta = (t[name] for name in INPUTS)
    gate = gka_ops.DecayGate(t["per_head"], t["per_head"] - 1)
    seen: dict[str, tuple[torch.Size, ...]] = {}

    def note(name: str, x: Tensor, *indices: Tensor) -> None:
        seen[name] = x.shape, torch.broadcast_shapes(*(i.shape for i in indices))

    def decay_mod(g: Tensor, b: Tensor, h: Tensor, t: Tensor) -> Tensor:
        note("decay", g, b, h, t)
        return g - 0.01 * (h + 1) * (t % 3 == 0) * (b + 1)

    def query_mod(q: Tensor, b: Tensor, h: Tensor, t: Tensor) -> Tensor:
        note("query", q, b, h, t)
        return q * (1 + h)

    def key_mod(k: Tensor, b: Tensor, h: Tensor, t: Tensor) -> Tensor:
        note("key", k, b, h, t)
        return torch.where(t < 5, 0.5 * k, k) * (1 + h)

    mods: dict[str, Any] = {"decay_mod": decay_mod, "query_mod": query_mod, "key_mod": key_mod}
    found = gka_ops.chunk_gka(q, k, v, raw, alpha, beta, gate=gate, num_iter=60, **mods).output
    b, h, token = torch.arange(B)[:, None, None], torch.arange(H), torch.arange(T)[:, None]
    g = -t["per_head"].exp() * F.softplus(raw + t["per_head"] - 1) - 0.01 * (h + 1) * (token % 3 == 0) * (b + 1)
    heads = 1 + torch.arange(HKV)[:, None]
    keys = torch.where(token[..., None] < 5, 0.5 * k, k) * heads
    expected = gka_ops.chunk_gka(q * (1 + h[:, None]), keys, v, g, alpha, beta, num_iter=60).output
    assert_close({"output": found}, {"output": expected}, 1e-12)
    assert seen == {
        "decay": (torch.Size([B, T, H]), torch.Size([B, T, H])),
        "query": (torch.Size([B, T, H, D]), torch.Size([B, T, H, 1])),
        "key": (torch.Size([B, T, HKV, D]), torch.Size([B, T, HKV, 1])),
    }
    x = gka_ops.chunk_solve(q, k, raw, beta, gate=gate, num_iter=60, **mods).x
    expected = gka_ops.chunk_solve(q * (1 + h[:, None]), keys, g, beta, num_iter=60).x
    assert_close({"x": x}, {"x": expected}, 1e-12)
    no_decay = gka_ops.chunk_gka(q, k, v, decay_mod=lambda g, b, h, t: g - 0.1, num_iter=60).output
    assert torch.equal(
        no_decay, gka_ops.chunk_gka(q, k, v, torch.full((B, T, H), -0.1, dtype=q.dtype), num_iter=60).output
    )


def test_the_shipped_examples(capsys: pytest.CaptureFixture[str]) -> None:
    examples.main()
    printed = capsys.readouterr().out
    rows = [line.rsplit(maxsplit=1) for line in printed.splitlines()[2:7]]
    assert len(rows) == 5 and all(0 < float(change) < 3 for _, change in rows)
    torch._dynamo.reset()


@pytest.mark.supports("modifiers")
def test_the_documentation() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "modifiers.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(block, {})
    torch._dynamo.reset()


def test_a_document_does_not_see_the_one_before() -> None:
    t = {name: tensor.detach() for name, tensor in make_tensors().items()}
    inputs = [t[name] for name in INPUTS]
    starts = torch.zeros(B, T, dtype=torch.bool)
    starts[:, 30] = True
    found = gka_ops.chunk_gka(*inputs, decay_mod=examples.reset_at(starts)).output[:, 30:]
    alone = gka_ops.chunk_gka(*(tensor[:, 30:] for tensor in inputs)).output
    assert torch.allclose(found, alone, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------------------------- compilation
class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.least = torch.nn.Parameter(torch.full((H,), 0.1))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def ridge_mod(fro: Any, b: Tensor, h: Tensor, t: Tensor) -> Any:
            return torch.maximum(0.02 * fro, self.least.exp()[h] - 1)

        return gka_ops.chunk_gka(q, k, v, ridge_mod=ridge_mod).output


@pytest.mark.supports("modifiers")
def test_one_graph_for_other_values_and_lengths() -> None:
    """A captured tensor with other values needs no other graph, nor do other lengths after the first two."""
    layer = Layer()
    compiles = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=compiles)
    for length in (33, 50, 64, 71):
        q, k, v = (torch.randn(B, length, n, D) / 4 for n in (H, HKV, HKV))
        compiled(q, k, v).sum().backward()
        with torch.no_grad():
            layer.least += 0.1
        assert torch.allclose(compiled(q, k, v), layer(q, k, v), atol=1e-5)
    assert compiles.frame_count == 2
    torch._dynamo.reset()


@pytest.mark.supports("modifiers")
def test_opcheck() -> None:
    t = make_tensors(torch.float32)
    program, leaves = modifiers.ridge_program("chunk_gka", RIDGE_MODS["captures"](t), t["q"])
    leaves = leaves.detach().requires_grad_() if leaves is not None else None
    inputs = [t[name] for name in INPUTS]
    none = [None] * 6
    args = (*inputs, leaves, *none, 0.02, 0.0, 3, 0.5, False, True, True, program, "reference")
    torch.library.opcheck(torch.ops.gka.chunk_gka.default, args)
    solve = (
        inputs[0],
        inputs[1],
        inputs[3],
        inputs[5],
        leaves,
        *none[:5],
        0.02,
        0.0,
        3,
        False,
        True,
        program,
        "reference",
    )
    torch.library.opcheck(torch.ops.gka.chunk_solve.default, solve)


@pytest.mark.supports("modifiers")
@pytest.mark.supports("torch.export")
def test_export_needs_no_callable() -> None:
    """The program is in the graph."""
    t = {name: tensor.detach() for name, tensor in make_tensors(torch.float32).items()}
    layer = Layer()
    inputs = t["q"], t["k"], t["v"]
    exported = torch.export.export(layer, inputs)
    assert "(maximum (mul 0.02 F) a0)" in exported.graph_module.code
    assert torch.allclose(exported.module()(*inputs), layer(*inputs))


# ------------------------------------------------------------------------------------------------------------ errors
@pytest.mark.supports("modifiers")
@pytest.mark.parametrize(
    ("mod", "error", "message"),
    [
        (lambda fro, b, h, t: fro if fro > 0 else 0.1, TypeError, "use torch.where"),
        (lambda fro, b, h, t: fro[0], TypeError, "other tokens"),
        (lambda fro, b, h, t: torch.cumsum(fro, 0), TypeError, "expected one of abs, .* got .*cumsum"),
        (lambda fro, b, h, t: fro.mean(), AttributeError, "expected one of abs, .* got mean"),
        (lambda fro, b, h, t: fro + "1", TypeError, "expected tensors and numbers beside ‖H‖, got str"),
        (lambda fro, b, h, t: fro + float("inf"), ValueError, "expected finite numbers, got inf"),
        (lambda fro, b, h, t: fro ** fro, TypeError, "exponent"),
        (lambda fro, b, h, t: float(fro), TypeError, "no value here"),
        (lambda fro, b, h, t: fro + torch.ones(3), ValueError, r"broadcast to \[B, T, H\] = \[2, 70, 4\], got \[3\]"),
        (lambda fro, b, h, t: sum((fro * (h + i) for i in range(9)), 0.0), ValueError, "at most 8 tensors .* got 9"),
        (lambda fro, b, h, t: torch.maximum(fro, h, out=None), TypeError, "expected one of"),
    ],
)  # fmt: skip
def test_what_a_ridge_mod_may_not_do(mod: Any, error: type[Exception], message: str) -> None:
    t = make_tensors()
    with pytest.raises(error, match=message):
        gka_ops.chunk_gka(t["q"], t["k"], t["v"], ridge_mod=mod)


def test_what_else_is_refused() -> None:
    t = make_tensors()
    q, k, v = t["q"], t["k"], t["v"]
    with pytest.raises(ValueError, match="expected ridge to be a number where ridge_mod says what λ is"):
        gka_ops.chunk_gka(q, k, v, ridge=Ridge(0.02, 0.1), ridge_mod=RIDGE_MODS["numbers"](t))
    with pytest.raises(
        ValueError, match=r"expected decay_mod to return a tensor like its first argument, \[2, 70, 4\]"
    ):
        gka_ops.chunk_gka(q, k, v, decay_mod=lambda g, b, h, t: g.sum(1))
    with pytest.raises(TypeError, match="expected query_mod to return a tensor, got float"):
        gka_ops.chunk_gka(q, k, v, query_mod=lambda q, b, h, t: 1.0)
    with pytest.raises(ValueError, match="expected q of shape"):
        gka_ops.chunk_gka(q[0], k, v, decay_mod=lambda g, b, h, t: g)
    output = gka_ops.chunk_gka(q, k, v, ridge_mod=RIDGE_MODS["floor"](t)).output
    (dq,) = torch.autograd.grad(output.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives alone with a ridge_mod"):
        dq.sum().backward()


@pytest.mark.parametrize(
    "program", ["", "F)", "(add F", "(add F F F)", "(open F)", "b0", "(exp F) F", "__import__", "(add F nope)"]
)
def test_only_programs_are_run(program: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        modifiers.parse(program)
