"""What raises, with which words; what debug mode checks; and how far a NaN spreads.

The table holds one bad argument a row, on top of the good ones of ``arguments``. Messages are compared whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import gka_ops
from gka_ops import DecayGate, GKAState, Ridge
from gka_ops.numerics import DEFAULT_RIDGE
from gka_ops.validation import DEBUG_VARIABLE
from tests.helpers.problems import Problem, gate_of, make_problem, make_state, norm_error, ridge_of

OPERATORS: dict[str, Callable[..., Any]] = {
    "chunk_gka": gka_ops.chunk_gka,
    "chunk_solve": gka_ops.chunk_solve,
    "recurrent_gka": gka_ops.recurrent_gka,
}
CHUNKED = ("chunk_gka", "chunk_solve")
READING = ("chunk_gka", "recurrent_gka")
DECODE = ("recurrent_gka",)

B, T, H, HKV, D, V = 2, 3, 4, 2, 8, 6
PACKED = torch.tensor([0, 1, T])


def arguments(op: str) -> dict[str, Any]:
    """Good arguments of an operator, all of fp32."""
    p = make_problem(B=B, T=T, H=H, Hkv=HKV, D=D, V=V, dtype=torch.float32)
    good = {name: getattr(p, name) for name in ("q", "k", "v", "log_decay", "alpha", "beta")}
    if op == "chunk_solve":
        del good["v"], good["alpha"]
    if op == "recurrent_gka":
        good["state"] = states(B)
    return good


def states(count: int, **options: Any) -> GKAState:
    """Good states of ``count`` sequences."""
    kk, kv = make_state(count, H, D, V, torch.Generator().manual_seed(0))
    return GKAState(kk.to(torch.float32).to(**options), kv.to(torch.float32).to(**options))


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*shape, **options)


@dataclass(frozen=True)
class Bad:
    """One row: what is wrong, the arguments that make it so, and what is raised by each of ``ops``.

    ``message`` is what follows the operator's name.
    """

    name: str
    changes: dict[str, Any]
    error: type[Exception]
    message: str
    ops: tuple[str, ...] = tuple(OPERATORS)


Q, K, VALUES = (B, T, H, D), (B, T, HKV, D), (B, T, HKV, V)
GATE = DecayGate(zeros(H), zeros(H))

TABLE = (
    # ------------------------------------------------------------------------------------------------- q, k, v
    Bad("q not a tensor", {"q": 1.0}, TypeError, "expected q to be a torch.Tensor, got float"),
    Bad("k missing", {"k": None}, TypeError, "expected k to be a torch.Tensor, got NoneType"),
    Bad("q of rank 3", {"q": zeros(B, T, D)}, ValueError, "expected q of shape [B, T, H, D], got [2, 3, 8]"),
    Bad("k of rank 5", {"k": zeros(*K, 1)}, ValueError, "expected k of shape [B, T, Hkv, D], got [2, 3, 2, 8, 1]"),
    Bad(
        "v of rank 3",
        {"v": zeros(B, T, V)},
        ValueError,
        "expected v of shape [B, T, Hkv, V], got [2, 3, 6]",
        READING,
    ),
    Bad(
        "q of integers",
        {"q": zeros(*Q, dtype=torch.int64)},
        TypeError,
        "expected q to be bfloat16, float16, float32 or float64, got torch.int64",
    ),
    Bad(
        "q complex",
        {"q": zeros(*Q, dtype=torch.complex64)},
        TypeError,
        "expected q to be bfloat16, float16, float32 or float64, got torch.complex64",
    ),
    Bad(
        "k of another dtype",
        {"k": zeros(*K, dtype=torch.float64)},
        TypeError,
        "expected k to have the dtype of q, torch.float32, got torch.float64",
    ),
    Bad(
        "v of another dtype",
        {"v": zeros(*VALUES, dtype=torch.bfloat16)},
        TypeError,
        "expected v to have the dtype of q, torch.float32, got torch.bfloat16",
        READING,
    ),
    Bad("k elsewhere", {"k": zeros(*K, device="meta")}, ValueError, "expected k on the device of q, cpu, got meta"),
    Bad(
        "v elsewhere",
        {"v": zeros(*VALUES, device="meta")},
        ValueError,
        "expected v on the device of q, cpu, got meta",
        READING,
    ),
    *(
        Bad(f"k of another {name}", {"k": zeros(*shape)}, ValueError, message)
        for name, shape, message in (
            ("B", (3, T, HKV, D), "expected k of shape [B, T, Hkv, D] = [2, 3, Hkv, 8], got [3, 3, 2, 8]"),
            ("T", (B, 5, HKV, D), "expected k of shape [B, T, Hkv, D] = [2, 3, Hkv, 8], got [2, 5, 2, 8]"),
            ("D", (B, T, HKV, 7), "expected k of shape [B, T, Hkv, D] = [2, 3, Hkv, 8], got [2, 3, 2, 7]"),
        )
    ),
    *(
        Bad(f"v of another {name}", {"v": zeros(*shape)}, ValueError, message, READING)
        for name, shape, message in (
            ("B", (1, T, HKV, V), "expected v of shape [B, T, Hkv, V] = [2, 3, 2, V], got [1, 3, 2, 6]"),
            ("T", (B, 4, HKV, V), "expected v of shape [B, T, Hkv, V] = [2, 3, 2, V], got [2, 4, 2, 6]"),
            ("Hkv", (B, T, H, V), "expected v of shape [B, T, Hkv, V] = [2, 3, 2, V], got [2, 3, 4, 6]"),
        )
    ),
    Bad(
        "Hkv not a divisor of H",
        {"k": zeros(B, T, 3, D), "v": zeros(B, T, 3, V)},
        ValueError,
        "expected the number of key/value heads to divide the 4 query heads, got 3",
    ),
    *(
        Bad(name, changes, ValueError, f"expected at least one head and non-empty head dimensions, got {got}", ops)
        for name, changes, got, ops in (
            ("no query heads", {"q": zeros(B, T, 0, D)}, "q [2, 3, 0, 8], k [2, 3, 2, 8]", ("chunk_solve",)),
            ("no key heads", {"k": zeros(B, T, 0, D)}, "q [2, 3, 4, 8], k [2, 3, 0, 8]", ("chunk_solve",)),
            (
                "D = 0",
                {"q": zeros(B, T, H, 0), "k": zeros(B, T, HKV, 0)},
                "q [2, 3, 4, 0], k [2, 3, 2, 0], v [2, 3, 2, 6]",
                READING,
            ),
            ("V = 0", {"v": zeros(B, T, HKV, 0)}, "q [2, 3, 4, 8], k [2, 3, 2, 8], v [2, 3, 2, 0]", READING),
        )
    ),
    # --------------------------------------------------------------------------------------------------- gates
    *(
        Bad(f"{name} {problem}", {name: value}, error, f"expected {name} {message}", ops)
        for name, ops in (("log_decay", tuple(OPERATORS)), ("alpha", READING), ("beta", tuple(OPERATORS)))
        for problem, value, error, message in (
            ("a number", 0.5, TypeError, "to be a torch.Tensor, got float"),
            ("of rank 2", zeros(B, T), ValueError, "of shape [B, T, H] = [2, 3, 4], got [2, 3]"),
            ("of Hkv heads", zeros(B, T, HKV), ValueError, "of shape [B, T, H] = [2, 3, 4], got [2, 3, 2]"),
            (
                "of integers",
                zeros(B, T, H, dtype=torch.int32),
                TypeError,
                "to have a floating-point dtype, got torch.int32",
            ),
            ("elsewhere", zeros(B, T, H, device="meta"), ValueError, "on the device of q, cpu, got meta"),
        )
    ),
    Bad(
        "gate without log_decay",
        {"gate": GATE, "log_decay": None},
        ValueError,
        "expected log_decay to hold the raw gate projection when gate is given, got None",
    ),
    Bad("gate a tuple", {"gate": tuple(GATE)}, TypeError, "expected gate to be a DecayGate or None, got tuple"),
    *(
        Bad(f"{name} {problem}", {"gate": make(value)}, error, f"expected gate.{name} {message}")
        for name, make in (
            ("A_log", lambda value: DecayGate(value)),
            ("dt_bias", lambda value: DecayGate(zeros(H), value)),
        )
        for problem, value, error, message in (
            ("a number", 1.0, TypeError, "to be a torch.Tensor, got float"),
            ("of another H", zeros(HKV), ValueError, "of shape [H] = [4], got [2]"),
            ("per token", zeros(B, T, H), ValueError, "of shape [H] = [4], got [2, 3, 4]"),
            ("of integers", zeros(H, dtype=torch.int64), TypeError, "to have a floating-point dtype, got torch.int64"),
            ("elsewhere", zeros(H, device="meta"), ValueError, "on the device of q, cpu, got meta"),
        )
    ),
    # --------------------------------------------------------------------------------------------------- ridge
    Bad("ridge a string", {"ridge": "0.02"}, TypeError, "expected ridge to be a number or a Ridge, got str"),
    Bad("ridge a bool", {"ridge": True}, TypeError, "expected ridge to be a number or a Ridge, got bool"),
    Bad("ridge a tuple", {"ridge": (0.02, 0.0)}, TypeError, "expected ridge to be a number or a Ridge, got tuple"),
    Bad(
        "ridge a tensor",
        {"ridge": torch.tensor(0.02)},
        TypeError,
        "expected ridge to be a number or a Ridge, got Tensor; a tensor goes into Ridge(scale=...)",
    ),
    Bad(
        "ridge of None",
        {"ridge": Ridge(None)},  # type: ignore[arg-type]
        TypeError,
        "expected ridge.scale to be a number, got NoneType",
    ),
    *(
        Bad(f"ridge {value}", {"ridge": value}, ValueError, f"expected a finite ridge.scale >= 0, got {value}")
        for value in (-0.02, math.nan, math.inf)
    ),
    *(
        Bad(
            f"ridge.offset {value}",
            {"ridge": Ridge(0.02, value)},
            ValueError,
            f"expected a finite ridge.offset >= 0, got {value}",
        )
        for value in (-1e-9, math.nan, math.inf)
    ),
    *(
        Bad(f"ridge.{name} {problem}", {"ridge": make(value)}, error, f"expected ridge.{name} {message}")
        for name, make in (
            ("scale", lambda value: Ridge(value, min_scale=0.02)),
            ("offset", lambda value: Ridge(0.02, value)),
        )
        for problem, value, error, message in (
            ("of rank 0", torch.tensor(0.02), ValueError, "of shape [H] or [B, T, H], got []"),
            ("of rank 2", zeros(B, T), ValueError, "of shape [H] or [B, T, H], got [2, 3]"),
            ("of another H", zeros(HKV), ValueError, "of shape [H] = [4], got [2]"),
            ("of another T", zeros(B, 1, H), ValueError, "of shape [B, T, H] = [2, 3, 4], got [2, 1, 4]"),
            ("of integers", zeros(H, dtype=torch.int64), TypeError, "to have a floating-point dtype, got torch.int64"),
            ("elsewhere", zeros(H, device="meta"), ValueError, "on the device of q, cpu, got meta"),
        )
    ),
    *(
        Bad(
            f"ridge.min_scale {value}",
            {"ridge": Ridge(zeros(H), min_scale=value)},
            ValueError,
            f"expected a finite ridge.min_scale > 0, got {value}",
        )
        for value in (0.0, -1.0, math.nan, math.inf)
    ),
    Bad(
        "ridge.min_scale a string",
        {"ridge": Ridge(zeros(H), min_scale="0.02")},  # type: ignore[arg-type]
        TypeError,
        "expected ridge.min_scale to be a number, got str",
    ),
    # ---------------------------------------------------------------------------------------------- iterations
    Bad("num_iter negative", {"num_iter": -1}, ValueError, "expected num_iter >= 0, got -1"),
    *(
        Bad(
            f"num_iter {value!r}",
            {"num_iter": value},
            TypeError,
            f'expected num_iter to be an int or "auto", got {value!r}',
        )
        for value in (True, "ten", 24.0, None)
    ),
    Bad(
        "auto with a tensor ridge",
        {"ridge": Ridge(zeros(H))},
        ValueError,
        "expected an int num_iter, or Ridge(..., min_scale=...) from which to take it, because "
        'num_iter="auto" cannot read the smallest value of a tensor ridge scale',
    ),
    Bad(
        "auto with ridge 0",
        {"ridge": 0.0},
        ValueError,
        'expected a ridge scale > 0 with num_iter="auto" (the count grows without bound as it goes to 0), got 0.0',
    ),
    *(
        Bad(f"tol {value}", {"tol": value}, ValueError, f"expected 0 < tol < 1, got {value}")
        for value in (0.0, 1.0, -1e-3, math.nan)
    ),
    Bad("tol a string", {"tol": "1e-3"}, TypeError, "expected tol to be a number, got str"),
    Bad("tol wrong, and not needed", {"tol": 2, "num_iter": 3}, ValueError, "expected 0 < tol < 1, got 2"),
    # ------------------------------------------------------------------------------------------- packed batches
    Bad(
        "cu_seqlens a list",
        {"cu_seqlens": [0, T]},
        TypeError,
        "expected cu_seqlens to be a torch.Tensor, got list",
        CHUNKED,
    ),
    Bad(
        "cu_seqlens of floats",
        {"cu_seqlens": PACKED.float()},
        TypeError,
        "expected cu_seqlens to be int32 or int64, got torch.float32",
        CHUNKED,
    ),
    Bad(
        "cu_seqlens of rank 2",
        {"cu_seqlens": PACKED[None]},
        ValueError,
        "expected cu_seqlens of shape [N + 1] with N >= 1, got [1, 3]",
        CHUNKED,
    ),
    Bad(
        "cu_seqlens of length 1",
        {"cu_seqlens": PACKED[:1]},
        ValueError,
        "expected cu_seqlens of shape [N + 1] with N >= 1, got [1]",
        CHUNKED,
    ),
    Bad(
        "cu_seqlens elsewhere",
        {"cu_seqlens": PACKED.to("meta")},
        ValueError,
        "expected cu_seqlens on the device of q, cpu, got meta",
        CHUNKED,
    ),
    Bad(
        "cu_seqlens with B = 2",
        {"cu_seqlens": PACKED},
        ValueError,
        "expected a packed batch of size B = 1 with cu_seqlens, got B = 2",
        CHUNKED,
    ),
    # -------------------------------------------------------------------------------------------- other options
    *(
        Bad(f"impl {value!r}", {"impl": value}, ValueError, f"expected impl to be one of {known}, got {value!r}")
        for value in ("cuda", None, "")
        for known in ("'auto', 'triton', 'reference'",)
    ),
    Bad("qk_l2norm an int", {"qk_l2norm": 1}, TypeError, "expected qk_l2norm to be a bool, got int"),
    Bad(
        "output_final_state None",
        {"output_final_state": None},
        TypeError,
        "expected output_final_state to be a bool, got NoneType",
        CHUNKED,
    ),
    Bad("scale a string", {"scale": "1"}, TypeError, "expected scale to be a number, got str", READING),
    Bad("scale a tensor", {"scale": torch.ones(())}, TypeError, "expected scale to be a number, got Tensor", READING),
    # ------------------------------------------------------------------------------------------- initial states
    Bad(
        "initial_state a tuple",
        {"initial_state": tuple(states(B))},
        TypeError,
        "expected initial_state to be a GKAState, got tuple",
        ("chunk_gka",),
    ),
    Bad(
        "initial_state of both parts",
        {"initial_state": states(B)},
        TypeError,
        "expected initial_state to be a torch.Tensor, got GKAState",
        ("chunk_solve",),
    ),
    *(
        Bad(f"H_0 {problem}", {"initial_state": state.kk}, error, f"expected initial_state {message}", ("chunk_solve",))
        for problem, state, error, message in (
            ("in bf16", states(B, dtype=torch.bfloat16), TypeError, "to be torch.float32, got torch.bfloat16"),
            ("of other sequences", states(3), ValueError, "of shape [N, H, D, D] = [2, 4, 8, 8], got [3, 4, 8, 8]"),
            ("elsewhere", states(B, device="meta"), ValueError, "on the device of q, cpu, got meta"),
        )
    ),
    *(
        Bad(f"{argument} {problem}", {argument: state}, error, f"expected {argument}{message}", ops)
        for argument, ops in (("initial_state", ("chunk_gka",)), ("state", DECODE))
        for problem, state, error, message in (
            ("kk missing", GKAState(None, states(B).kv), TypeError, ".kk to be a torch.Tensor, got NoneType"),  # type: ignore[arg-type]
            ("kv missing", GKAState(states(B).kk, None), TypeError, ".kv to be a torch.Tensor, got NoneType"),  # type: ignore[arg-type]
            ("in fp64", states(B, dtype=torch.float64), TypeError, ".kk to be torch.float32, got torch.float64"),
            (
                "of other sequences",
                states(3),
                ValueError,
                ".kk of shape [N, H, D, D] = [2, 4, 8, 8], got [3, 4, 8, 8]",
            ),
            (
                "kk not square",
                GKAState(states(B).kv, states(B).kv),
                ValueError,
                ".kk of shape [N, H, D, D] = [2, 4, 8, 8], got [2, 4, 8, 6]",
            ),
            (
                "kv of another V",
                GKAState(states(B).kk, states(B).kk),
                ValueError,
                ".kv of shape [N, H, D, V] = [2, 4, 8, 6], got [2, 4, 8, 8]",
            ),
            ("elsewhere", states(B, device="meta"), ValueError, ".kk on the device of q, cpu, got meta"),
        )
    ),
    # ---------------------------------------------------------------------------------------------- decode alone
    Bad("state None", {"state": None}, TypeError, "expected state to be a GKAState, got None", DECODE),
    Bad(
        "state a tuple",
        {"state": tuple(states(B))},
        TypeError,
        "expected state to be a GKAState, got tuple",
        DECODE,
    ),
    Bad(
        "state.kk transposed",
        {"state": GKAState(states(B).kk.mT, states(B).kv)},
        ValueError,
        "expected a contiguous state.kk, got strides [256, 64, 1, 8]",
        DECODE,
    ),
    Bad(
        "state.kv every second slot",
        {"state": GKAState(states(B).kk, states(4).kv[::2])},
        ValueError,
        "expected a contiguous state.kv, got strides [384, 48, 6, 1]",
        DECODE,
    ),
    Bad(
        "a pool of two sizes",
        {"state": GKAState(states(5).kk, states(4).kv), "state_indices": torch.arange(B)},
        ValueError,
        "expected state.kv of shape [N, H, D, V] = [5, 4, 8, 6], got [4, 4, 8, 6]",
        DECODE,
    ),
    *(
        Bad(f"state_indices {problem}", {"state_indices": indices}, error, f"expected state_indices {message}", DECODE)
        for problem, indices, error, message in (
            ("a list", [0, 1], TypeError, "to be a torch.Tensor, got list"),
            ("of floats", zeros(B), TypeError, "to be int32 or int64, got torch.float32"),
            ("of rank 2", zeros(B, 1, dtype=torch.int32), ValueError, "of shape [B] = [2], got [2, 1]"),
            ("of another B", zeros(3, dtype=torch.int32), ValueError, "of shape [B] = [2], got [3]"),
            ("elsewhere", zeros(B, dtype=torch.int32, device="meta"), ValueError, "on the device of q, cpu, got meta"),
        )
    ),
)  # fmt: skip


def rows() -> Iterator[Any]:
    for bad in TABLE:
        for op in bad.ops:
            yield pytest.param(op, bad, id=f"{op}: {bad.name}")


@pytest.mark.parametrize(("op", "bad"), list(rows()))
def test_bad_argument(op: str, bad: Bad) -> None:
    good = arguments(op)
    changes = {name: value for name, value in bad.changes.items() if name != "v" or op in READING}
    before = [part.clone() for part in good.get("state", ())]
    with pytest.raises(bad.error) as raised:
        OPERATORS[op](**good | changes)
    assert type(raised.value) is bad.error
    assert str(raised.value) == f"{op}: {bad.message}"
    for part, was in zip(good.get("state", ()), before, strict=True):
        assert torch.equal(part, was), "a failed call changed the state"


@pytest.mark.parametrize("op", OPERATORS)
def test_good_arguments_are_good(op: str) -> None:
    """Every row of the table fails for its own reason: without the change, the call passes."""
    OPERATORS[op](**arguments(op))
    OPERATORS[op](**arguments(op), gate=GATE, ridge=Ridge(zeros(H) + 0.1, zeros(B, T, H), min_scale=0.1))


@pytest.mark.parametrize("op", OPERATORS)
def test_state_is_required_only_where_there_is_one(op: str) -> None:
    good = arguments(op)
    if good.pop("state", None) is None:
        OPERATORS[op](**good)
        return
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'state'"):
        OPERATORS[op](**good)


@pytest.mark.parametrize("op", OPERATORS)
def test_too_many_iterations(op: str) -> None:
    with pytest.raises(ValueError, match="iterations_for") as raised:
        OPERATORS[op](**arguments(op), ridge=1e-7)
    assert str(raised.value) == (
        "iterations_for: ridge 1e-07 with tol 0.002 needs 10922 iterations, more than 1000; "
        "use a larger ridge or a larger tol"
    )


# --------------------------------------------------------------------------------------------- values of cu_seqlens
def packed_arguments(op: str, offsets: list[int]) -> dict[str, Any]:
    good = {name: t[:1] for name, t in arguments(op).items()}
    return good | {"cu_seqlens": torch.tensor(offsets, dtype=torch.int32)}


@pytest.mark.parametrize("raw", [False, True], ids=["api", "torch.ops"])
@pytest.mark.parametrize("op", CHUNKED)
@pytest.mark.parametrize(
    "offsets",
    [[1, T], [0, 2, 1, T], [0, 1], [0, T + 1], [-1, T]],
    ids=["not from 0", "decreasing", "short of T", "beyond T", "from below 0"],
)
def test_cu_seqlens_values(op: str, offsets: list[int], raw: bool) -> None:
    bad = packed_arguments(op, offsets)
    call = OPERATORS[op]
    if raw:
        names = ["q", "k", "v"] if op == "chunk_gka" else ["q", "k"]
        absent = [None] * (9 if op == "chunk_gka" else 7)
        flags = [1.0, False, False, False] if op == "chunk_gka" else [False, False]
        operands = [*(bad[name] for name in names), *absent, bad["cu_seqlens"], 0.02, 0.0, 3, *flags, "", "reference"]
        call, bad = getattr(torch.ops.gka, op), {}
        with pytest.raises(ValueError, match="cu_seqlens") as raised:
            call(*operands)
    else:
        with pytest.raises(ValueError, match="cu_seqlens") as raised:
            call(**bad)
    assert str(raised.value) == f"{op}: expected cu_seqlens to rise from 0 to T = 3 without decreasing, got {offsets}"


@pytest.mark.parametrize("op", CHUNKED)
def test_initial_state_counts_the_packed_sequences(op: str) -> None:
    good = packed_arguments(op, [0, 1, 1, T])
    state = states(2) if op == "chunk_gka" else states(2).kk
    with pytest.raises(ValueError, match="initial_state") as raised:
        OPERATORS[op](**good, initial_state=state)
    name = "initial_state.kk" if op == "chunk_gka" else "initial_state"
    assert str(raised.value) == f"{op}: expected {name} of shape [N, H, D, D] = [3, 4, 8, 8], got [2, 4, 8, 8]"
    state = states(3) if op == "chunk_gka" else states(3).kk
    OPERATORS[op](**good, initial_state=state)


# -------------------------------------------------------------------------------------------------- implementations
def raw_call(op: str, impl: str) -> Any:
    """The operator itself, past the checks of ``gka_ops.api``."""
    good = arguments(op)
    q, k, v = good["q"], good["k"], good.get("v")
    if op == "chunk_gka":
        return torch.ops.gka.chunk_gka(q, k, v, *[None] * 10, 0.02, 0.0, 3, 1.0, False, False, False, "", impl)
    if op == "chunk_solve":
        return torch.ops.gka.chunk_solve(q, k, *[None] * 8, 0.02, 0.0, 3, False, False, "", impl)
    state = good["state"]
    return torch.ops.gka.recurrent_gka(q, k, v, *[None] * 7, *state, None, 0.02, 0.0, 3, 1.0, False, "", impl)


@pytest.mark.parametrize("op", OPERATORS)
def test_unknown_implementation_of_the_operator_itself(op: str) -> None:
    with pytest.raises(ValueError, match="impl") as raised:
        raw_call(op, "cuda")
    assert str(raised.value) == f"{op}: expected impl to be one of 'auto', 'triton', 'reference', got 'cuda'"


@pytest.mark.parametrize("raw", [False, True], ids=["api", "torch.ops"])
@pytest.mark.parametrize("op", OPERATORS)
def test_triton_on_the_cpu_without_the_interpreter(op: str, raw: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="impl") as raised:
        raw_call(op, "triton") if raw else OPERATORS[op](**arguments(op), impl="triton")
    assert str(raised.value) == (
        f'{op}: expected CUDA tensors with impl="triton", got cpu '
        "(on the CPU it runs only under Triton's interpreter, TRITON_INTERPRET=1)"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/conftest.py sets the interpreter only without a card")
@pytest.mark.parametrize("op", OPERATORS)
def test_triton_on_the_cpu_with_the_interpreter(op: str) -> None:
    pytest.importorskip("triton")
    result = OPERATORS[op](**arguments(op), impl="triton", num_iter=3)
    expected = OPERATORS[op](**arguments(op), impl="reference", num_iter=3)
    actual, expected = (r if isinstance(r, Tensor) else r[0] for r in (result, expected))
    # Two orders of summation of the same fp32 iteration: a rounding error a term, times the condition number.
    assert norm_error(actual, expected) <= (1 + DEFAULT_RIDGE) / DEFAULT_RIDGE * D * torch.finfo(torch.float32).eps


# --------------------------------------------------------------------------------------------------- a failed call
@pytest.mark.parametrize(
    "changes",
    [
        {"v": torch.full(VALUES, math.nan)},
        {"log_decay": torch.ones(B, T, H)},
        {"state_indices": torch.tensor([1, 1])},
        {"state_indices": torch.tensor([0, B])},
    ],
    ids=["NaN", "positive log decay", "a slot twice", "a slot beyond the pool"],
)
def test_a_failed_value_check_leaves_the_state(changes: dict[str, Tensor]) -> None:
    good = arguments("recurrent_gka")
    before = [part.clone() for part in good["state"]]
    with gka_ops.debug_mode(), pytest.raises(ValueError, match="recurrent_gka: expected"):
        gka_ops.recurrent_gka(**good | changes)
    for part, was in zip(good["state"], before, strict=True):
        assert torch.equal(part, was)


# ------------------------------------------------------------------------------------------------------- debug mode
def debug_problem(op: str, gate: bool = True) -> Problem:
    """A problem with every optional argument; its states are the pool of ``recurrent_gka``."""
    return make_problem(
        B=B, T=T, H=H, Hkv=HKV, D=D, V=V, ridge="token" if op == "chunk_gka" else "head", ridge_offset=0.1, gate=gate,
        state=True, dtype=torch.float32,
    )  # fmt: skip


def call(op: str, p: Problem, **options: Any) -> Any:
    """Any of the three operators."""
    assert p.initial_kk is not None
    assert p.initial_kv is not None
    options = {"ridge": ridge_of(p)._replace(min_scale=0.02), "gate": gate_of(p), "num_iter": 3} | options
    state = GKAState(p.initial_kk, p.initial_kv)
    if op == "chunk_solve":
        return gka_ops.chunk_solve(p.q, p.k, p.log_decay, p.beta, initial_state=state.kk, **options)
    if op == "chunk_gka":
        return gka_ops.chunk_gka(p.q, p.k, p.v, p.log_decay, p.alpha, p.beta, initial_state=state, **options)
    state = GKAState(state.kk.clone(), state.kv.clone())
    return gka_ops.recurrent_gka(p.q, p.k, p.v, p.log_decay, p.alpha, p.beta, state=state, **options)


def operator_name(op: str, name: str) -> str:
    """What the operator calls the field ``name`` of a problem."""
    renamed = {"ridge_scale": "ridge_scale_tensor", "ridge_offset": "ridge_offset_tensor"}
    if op == "recurrent_gka":
        renamed |= {"initial_kk": "kk", "initial_kv": "kv"}
    return renamed.get(name, name)


def spoiled(p: Problem, name: str, value: float) -> Problem:
    """The problem with the last element of one tensor replaced."""
    tensor = getattr(p, name).clone()
    tensor.view(-1)[-1] = value
    return p.replace({name: tensor})


def debug_cases() -> Iterator[Any]:
    for op in OPERATORS:
        p = debug_problem(op)
        unused = ("v", "alpha", "initial_kv") if op == "chunk_solve" else ()
        for name in p.leaves():
            if name in unused:
                continue
            for value in (math.nan, math.inf):
                message = f"expected finite values in {operator_name(op, name)}, got NaN or infinity"
                yield pytest.param(op, spoiled(p, name, value), message, id=f"{op}: {name} {value}")
            if name in ("alpha", "beta"):
                for value in (-1e-3, 1 + 1e-3):
                    message = f"expected {name} in [0, 1], got a value outside"
                    yield pytest.param(op, spoiled(p, name, value), message, id=f"{op}: {name} {value}")
            if name in ("ridge_scale", "ridge_offset"):
                message = f"expected {operator_name(op, name)} >= 0, got a negative value"
                yield pytest.param(op, spoiled(p, name, -1e-3), message, id=f"{op}: {name} negative")
        message = "expected log_decay <= 0 (natural logarithm of a decay), got a positive value"
        yield pytest.param(
            op, spoiled(debug_problem(op, gate=False), "log_decay", 1e-3), message, id=f"{op}: log_decay"
        )
        assert p.initial_kk is not None
        kk = p.initial_kk.clone()
        kk[0, 0, 0, 1] += 1e-3 * kk[0, 0].abs().max()
        message = (
            f"expected {operator_name(op, 'initial_kk')} to be symmetric, got a state that differs from its transpose"
        )
        yield pytest.param(op, p.replace({"initial_kk": kk}), message, id=f"{op}: asymmetric kk")


@pytest.mark.parametrize(("op", "problem", "message"), list(debug_cases()))
def test_debug_mode_raises(op: str, problem: Problem, message: str) -> None:
    call(op, problem)  # nothing is read outside debug mode
    with gka_ops.debug_mode(), pytest.raises(ValueError, match="expected") as raised:
        call(op, problem)
    assert str(raised.value) == f"{op}: {message}"
    call(op, problem)


@pytest.mark.parametrize("gate", [False, True], ids=["log_decay", "gate"])
@pytest.mark.parametrize("op", OPERATORS)
def test_debug_mode_passes_what_is_good(op: str, gate: bool) -> None:
    """Among it a positive raw gate projection, and a state that is symmetric up to rounding."""
    p = debug_problem(op, gate)
    assert p.log_decay is not None
    assert p.initial_kk is not None
    assert not gate or bool((p.log_decay > 0).any())
    kk = p.initial_kk.clone()
    kk[0, 0, 0, 1] += torch.finfo(torch.float32).eps * kk[0, 0].abs().max()
    assert not torch.equal(kk, kk.mT)
    with gka_ops.debug_mode():
        call(op, p.replace({"initial_kk": kk}))


def test_debug_mode_nests() -> None:
    bad = spoiled(debug_problem("chunk_gka"), "v", math.nan)
    with gka_ops.debug_mode():
        with gka_ops.debug_mode():
            pass
        with pytest.raises(ValueError, match="finite values in v"):
            call("chunk_gka", bad)
    call("chunk_gka", bad)


@pytest.mark.parametrize("op", OPERATORS)
def test_debug_variable_is_read_at_each_call(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = spoiled(debug_problem(op), "q", math.nan)
    for value, raises in ((None, False), ("1", True), ("0", False), ("yes", True), ("", False)):
        monkeypatch.delenv(DEBUG_VARIABLE, raising=False)
        if value is not None:
            monkeypatch.setenv(DEBUG_VARIABLE, value)
        if raises:
            with pytest.raises(ValueError, match="finite values in q"):
                call(op, bad)
        else:
            call(op, bad)


@pytest.mark.parametrize("op", OPERATORS)
def test_debug_mode_reaches_a_compiled_graph(op: str) -> None:
    """The checks run inside the operator, so one graph serves with and without them."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda p: call(op, p), backend="aot_eager", fullgraph=True)
    good = debug_problem(op)
    compiled(good)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(spoiled(good, "q", math.nan))
        with gka_ops.debug_mode():
            compiled(good)
            with pytest.raises(ValueError, match=f"{op}: expected finite values in q, got NaN or infinity"):
                compiled(spoiled(good, "q", math.nan))


POOL = 4


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0, POOL], "expected state_indices < 4 (the pool's slots), got a larger one"),
        ([3, 3], "expected each slot at most once in state_indices, got a slot twice"),
        ([3, 0], None),
        ([-1, 3], None),
        ([-1, -1], None),
        ([-1, -7], None),
    ],
    ids=["beyond the pool", "twice", "good", "padding", "all padding", "padding of two kinds"],
)
def test_debug_mode_on_state_indices(indices: list[int], message: str | None) -> None:
    good = arguments("recurrent_gka") | {"state": states(POOL), "state_indices": torch.tensor(indices)}
    with gka_ops.debug_mode():
        if message is None:
            gka_ops.recurrent_gka(**good)
            return
        with pytest.raises(ValueError, match="expected") as raised:
            gka_ops.recurrent_gka(**good)
    assert str(raised.value) == f"recurrent_gka: {message}"


def test_debug_mode_leaves_out_free_slots_and_padding() -> None:
    good = arguments("recurrent_gka") | {"state": states(POOL), "state_indices": torch.tensor([2, -1])}
    for part in good["state"]:
        part[:2] = math.nan
    for name in ("q", "k", "v", "log_decay", "alpha", "beta"):
        good[name][1] = math.nan
    with gka_ops.debug_mode():
        output = gka_ops.recurrent_gka(**good)
        assert output.isfinite().all()
        good["state"].kk[2] = math.nan
        with pytest.raises(ValueError, match="finite values in kk"):
            gka_ops.recurrent_gka(**good)


# ------------------------------------------------------------------------------------------------------- NaN policy
TOKEN, CHUNK = 150, 64
"""The spoiled token, in the third chunk of the reference; and its chunk size."""

SPREADING = ("k", "v", "log_decay", "beta")
"""What enters the states: a NaN there stays for all later tokens. One in q, alpha or the ridge is its row's own."""


def outputs(p: Problem) -> dict[str, Tensor]:
    """Of ``chunk_gka`` and ``chunk_solve`` by the reference."""
    state = None if p.initial_kk is None or p.initial_kv is None else GKAState(p.initial_kk, p.initial_kv)
    options: dict[str, Any] = {
        "ridge": Ridge(p.ridge_scale, p.ridge_offset),
        "num_iter": 24,
        "output_final_state": True,
        "cu_seqlens": p.cu_seqlens,
        "impl": "reference",
    }
    output, final = gka_ops.chunk_gka(p.q, p.k, p.v, p.log_decay, p.alpha, p.beta, initial_state=state, **options)
    x, kk = gka_ops.chunk_solve(p.q, p.k, p.log_decay, p.beta, initial_state=p.initial_kk, **options)
    assert final is not None
    assert kk is not None
    return {"output": output, "x": x, "final_kk": kk, "final_kv": final.kv}


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["NaN", "infinity"])
@pytest.mark.parametrize("name", ["q", "k", "v", "log_decay", "alpha", "beta", "ridge_scale", "ridge_offset"])
def test_a_bad_token_stays_in_its_sequence_and_head(name: str, value: float) -> None:
    p = make_problem(B=2, T=200, H=4, Hkv=2, D=8, ridge="token", ridge_offset=0.1, dtype=torch.float32)
    head = 1  # of the tensor itself: a key/value head reaches both its query heads
    reached = [2, 3] if name in ("k", "v") else [head]
    tensor = getattr(p, name).clone()
    tensor[1, TOKEN, head] = value
    clean, spoilt = outputs(p), outputs(p.replace({name: tensor}))

    elsewhere = torch.ones(2, 4, dtype=torch.bool)
    elsewhere[1, reached] = False
    first = TOKEN // CHUNK * CHUNK
    for part in ("output", "x"):
        assert clean[part].isfinite().all()
        assert torch.equal(spoilt[part].transpose(1, 2)[elsewhere], clean[part].transpose(1, 2)[elsewhere])
        assert torch.equal(spoilt[part][1, :first], clean[part][1, :first])
    for part in ("final_kk", "final_kv"):
        assert torch.equal(spoilt[part][elsewhere], clean[part][elsewhere])

    later = slice(TOKEN, None) if name in SPREADING else slice(TOKEN, TOKEN + 1)
    assert not spoilt["output"][1, later, reached].isfinite().any()


@pytest.mark.parametrize("name", ["q", "k", "v", "log_decay", "alpha", "beta"])
def test_a_bad_token_stays_in_its_packed_sequence(name: str) -> None:
    """Also where the next sequence begins in the same block of 64 tokens of the batch."""
    p = make_problem(seq_lengths=[70, 30, 0, 100], H=2, D=8, dtype=torch.float32)
    tensor = getattr(p, name).clone()
    tensor[:, 75] = math.nan  # in the second sequence, tokens 70 to 99
    clean, spoilt = outputs(p), outputs(p.replace({name: tensor}))
    for part in ("output", "x"):
        assert torch.equal(spoilt[part][:, :70], clean[part][:, :70])
        assert torch.equal(spoilt[part][:, 100:], clean[part][:, 100:])
    for part in ("final_kk", "final_kv"):
        assert torch.equal(spoilt[part][[0, 2, 3]], clean[part][[0, 2, 3]])
    assert spoilt["output"][:, 75].isnan().all()


@pytest.mark.parametrize("name", ["initial_kk", "initial_kv"])
def test_a_bad_state_stays_in_its_sequence_and_head(name: str) -> None:
    p = make_problem(B=2, T=70, H=2, D=8, state=True, dtype=torch.float32)
    tensor = getattr(p, name).clone()
    tensor[1, 0] = math.nan
    clean, spoilt = outputs(p), outputs(p.replace({name: tensor}))
    elsewhere = torch.tensor([[True, True], [False, True]])
    for part in ("output", "x"):
        assert torch.equal(spoilt[part].transpose(1, 2)[elsewhere], clean[part].transpose(1, 2)[elsewhere])
    assert spoilt["output"][1, :, 0].isnan().all()
