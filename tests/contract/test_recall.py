"""Which calls count as alike (``gka_ops.recall``), and that none slips past the checks of the public functions."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gka_ops
from gka_ops import DecayGate, GKAState, Ridge
from gka_ops.recall import _MAX_ENTRIES, Recall

LIKE: dict[str, Callable[[], Tensor]] = {
    "another tensor": lambda: torch.randn(2, 3),
    "another offset": lambda: torch.randn(3, 3)[1:],
}
UNLIKE: dict[str, Callable[[], Any]] = {
    "size": lambda: torch.randn(3, 3),
    "rank": lambda: torch.randn(2, 3, 1),
    "strides": lambda: torch.randn(3, 2).T,
    "dtype": lambda: torch.randn(2, 3, dtype=torch.float64),
    "device": lambda: torch.randn(2, 3, device="meta"),
    "gradient": lambda: torch.randn(2, 3, requires_grad=True),
    "parameter": lambda: torch.nn.Parameter(torch.randn(2, 3)),
    "none": lambda: None,
}


@pytest.fixture
def recall() -> Recall:
    recall = Recall()
    recall.keep((torch.randn(2, 3), None, 1, True), "kept")
    return recall


@pytest.mark.parametrize("name", LIKE)
def test_like_calls(recall: Recall, name: str) -> None:
    tensor = LIKE[name]()
    found = recall.find((tensor, None, 1, True))
    assert found is not None and found[0] == "kept" and found[1][0] is tensor


@pytest.mark.parametrize("name", UNLIKE)
def test_unlike_tensors(recall: Recall, name: str) -> None:
    assert recall.find((UNLIKE[name](), None, 1, True)) is None


@pytest.mark.parametrize(
    "others", [(None, 2, True), (None, 1.0, True), (None, True, True), (None, 1, 1), (torch.randn(2, 3), 1, True)]
)
def test_unlike_values(recall: Recall, others: tuple[Any, ...]) -> None:
    assert recall.find((torch.randn(2, 3), *others)) is None


def test_bounded_and_holds_no_tensor(recall: Recall) -> None:
    tensor = torch.randn(7)
    alive = weakref.ref(tensor)
    recall.keep((tensor, 0), "held?")
    del tensor
    gc.collect()
    assert alive() is None
    for i in range(_MAX_ENTRIES + 2):
        recall.keep((torch.randn(2, 3), i), i)
    assert recall.find((torch.randn(2, 3), 1)) is None
    assert recall.find((torch.randn(2, 3), 2)) is not None
    assert len(recall._entries) == _MAX_ENTRIES


def test_calls_that_are_never_found_displace_none(recall: Recall) -> None:
    tensor = torch.randn(2, 3)
    for args in ((tensor, tensor, 1), (tensor, (tensor, None), 1)):
        for _ in range(_MAX_ENTRIES):
            recall.keep(args, "found?")
            assert recall.find(args) is None
    assert recall.find((tensor, None, 1, True)) is not None


def test_tuples_of_other_types() -> None:
    """Those that the public functions take apart are of the exact types; others are checked each time."""

    class State(GKAState):
        pass

    class Scale(Ridge):
        pass

    class Gate(DecayGate):
        pass

    for _ in range(3):
        q, k, v = (torch.randn(1, 2, 2, 4) for _ in range(3))
        state = State(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4))
        options: dict[str, Any] = {"ridge": Scale(torch.ones(2)), "gate": Gate(torch.ones(2)), "num_iter": 1}
        gka_ops.chunk_gka(q, k, v, -torch.rand(1, 2, 2), **options, initial_state=state)
        gka_ops.recurrent_gka(q, k, v, -torch.rand(1, 2, 2), **options, state=state)


def test_under_vmap_is_another_call(recall: Recall) -> None:
    found = []

    def look(x: Tensor) -> Tensor:
        found.append(recall.find((x, None, 1, True)))
        return x

    torch.func.vmap(look)(torch.randn(5, 2, 3))
    assert found == [None]


ONE = torch.ones(2)


def tokens(T: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(1, T, 2, 4), torch.randn(1, T, 2, 4), torch.randn(1, T, 2, 4)


BAD: dict[str, dict[str, Any]] = {
    "flag": {"qk_l2norm": 0},
    "count": {"num_iter": True},
    "tensor as a ridge": {"ridge": ONE},
    "tensor as a gate": {"gate": ONE},
    "tuple as a gate": {"gate": (ONE, None)},
    "scale": {"scale": True},
    "tolerance": {"tol": 1.0},
    "implementation": {"impl": "other"},
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_call_after_a_good_one_raises(name: str) -> None:
    qkv = tokens(2)
    state = GKAState(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4))
    good: dict[str, Any] = {"log_decay": -torch.rand(1, 2, 2), "num_iter": 1, "scale": 1.0, "qk_l2norm": False}
    for ridge in (0.02, Ridge(ONE)):
        for gate in (None, DecayGate(torch.ones(2))):
            for _ in range(2):
                gka_ops.chunk_gka(*qkv, **good, ridge=ridge, gate=gate)
                gka_ops.recurrent_gka(*qkv, **good, ridge=ridge, gate=gate, state=state)
    options = {**good, **BAD[name]}
    if name == "tolerance":
        options["num_iter"] = "auto"
    with pytest.raises((TypeError, ValueError)):
        gka_ops.chunk_gka(*qkv, **options)
    with pytest.raises((TypeError, ValueError)):
        gka_ops.recurrent_gka(*qkv, **options, state=state)


def test_decode_notices_that_gradients_are_enabled() -> None:
    q, k, v = tokens(1)
    q.requires_grad_()
    state = GKAState(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4))
    with torch.no_grad():
        for _ in range(2):
            gka_ops.recurrent_gka(q, k, v, state=state)
    with pytest.raises(RuntimeError, match="not differentiable"):
        gka_ops.recurrent_gka(q, k, v, state=state)


def test_gradients_flow_after_calls_without() -> None:
    q, k, v = tokens(2)
    q.requires_grad_()
    with torch.no_grad():
        for _ in range(2):
            gka_ops.chunk_gka(q, k, v)
    (gradient,) = torch.autograd.grad(gka_ops.chunk_gka(q, k, v).output.sum(), q)
    assert gradient.abs().sum() > 0
