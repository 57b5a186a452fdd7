"""When the public functions repeat a known call without calling the operator (``ops``, NOTE [Beside the dispatcher]).

On a stand-in card, with stand-ins for the implementations: what matters is by which way they are reached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from triton import knobs

import gka_ops
from gka_ops import DecayGate, GKAOutput, GKAState, Ridge, ops
from gka_ops.triton import launcher
from gka_ops.triton.launcher import launch, replays
from gka_ops.validation import DEBUG_VARIABLE
from tests.helpers.card import kernel, log, stand_in

B, T, H, D = 1, 2, 2, 4
OPERATORS = torch.ops.gka.chunk_gka.default, torch.ops.gka.recurrent_gka.default


class Implementation:
    """In place of ``gka_ops.triton.launch``. Every tensor is read, states are doubled, and the output is 3·q."""

    def __init__(self) -> None:
        self.configuration: Any = "one"
        self.chunk_gka = replays(lambda: self.configuration)(self._chunk_gka)
        self.recurrent_gka = replays(lambda: self.configuration)(self._recurrent_gka)

    @staticmethod
    def _output(args: tuple[Any, ...]) -> Tensor:
        q = args[0]
        output, buffer = torch.empty_like(q), q.new_empty(2)
        for tensor in args:
            if isinstance(tensor, Tensor):
                launch(kernel, (1,), x=tensor, y=buffer, factor=1.0, count=0, N=2)
        launch(kernel, (1,), x=q, y=output, factor=3.0, count=0, N=q.nbytes // 4)
        return output

    def _chunk_gka(self, *args: Any) -> tuple[Tensor, ...]:
        q, output_final_state = args[0], args[18]
        final = [q.new_empty(1, H, D, D) if output_final_state else q.new_empty(0) for _ in range(2)]
        for tensor in final if output_final_state else ():
            launch(kernel, (1,), x=q, y=tensor, factor=2.0, count=1, N=q.numel())
        return self._output(args), *final, *(q.new_empty(0) for _ in range(6))

    def _recurrent_gka(self, *args: Any) -> Tensor:
        for state in args[10:12]:
            launch(kernel, (1,), x=state, y=state, factor=2.0, count=0, N=state.numel())
        return self._output(args)


class Calls:
    """Calls of the public functions on fresh tensors, and how many of them reached the operators."""

    def __init__(self) -> None:
        self.dispatched = 0
        self.implementation = Implementation()

    def backend(self, *_: Any) -> Implementation:
        self.dispatched += 1
        return self.implementation

    def beside(self, run: Callable[[], Any]) -> bool:
        """Whether the call was made, without the operator."""
        before = self.dispatched
        launches = len(log)
        run()
        return self.dispatched == before and len(log) > launches


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    stand_in(monkeypatch)
    calls = Calls()
    monkeypatch.setattr(ops, "_backend", calls.backend)
    monkeypatch.setattr(ops, "_module", lambda *_: calls.implementation)
    launcher.forget()
    yield calls
    launcher.forget()


def tokens(requires_grad: bool = False) -> list[Tensor]:
    return [torch.randint(-9, 9, (B, T, H, D)).float().requires_grad_(requires_grad) for _ in range(3)]


def new_state() -> GKAState:
    return GKAState(torch.eye(D).expand(1, H, D, D).contiguous(), torch.rand(1, H, D, D))


def chunk(**options: Any) -> GKAOutput:
    q, k, v = tokens()
    result = gka_ops.chunk_gka(q, k, v, **options)
    assert torch.equal(result.output, 3 * q)
    return result


def decode(**options: Any) -> Tensor:
    (q, k, v), state = tokens(), new_state()
    before = state.kv.clone()
    output = gka_ops.recurrent_gka(q, k, v, state=state, **options)
    assert torch.equal(output, 3 * q) and torch.equal(state.kv, 2 * before)
    return output


@pytest.fixture(params=[chunk, decode], ids=["chunk_gka", "recurrent_gka"])
def run(request: pytest.FixtureRequest, calls: Calls) -> Callable[..., Any]:
    """A function whose next call with no options is known."""
    function: Callable[..., Any] = request.param
    assert [calls.beside(function) for _ in range(3)] == [False, True, True]
    return function


# --------------------------------------------------------------------------------------------------------------- taken
def test_outputs(calls: Calls) -> None:
    for output_final_state in (False, True, False):
        for _ in range(3):
            result = chunk(output_final_state=output_final_state)
            assert isinstance(result, GKAOutput) and (result.final_state is not None) == output_final_state
            if result.final_state is not None:
                assert [t.shape for t in result.final_state] == [(1, H, D, D)] * 2
                for tensor in result.final_state:
                    assert torch.equal(tensor.view(-1)[: B * T * H * D], result.output.view(-1) / 3 * 2 + 1)
    assert calls.beside(chunk) and calls.beside(lambda: chunk(output_final_state=True))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_in_other_contexts(run: Callable[..., Any], calls: Calls, context: Callable[[], Any]) -> None:
    with context():
        run()
        assert calls.beside(run)
        output = run() if run is decode else run().output
    assert calls.beside(run)
    assert output.is_inference() == (context is torch.inference_mode)


def test_every_tensor_in_its_place(calls: Calls) -> None:
    per_token = [-torch.rand(B, T, H), torch.rand(B, T, H), torch.rand(B, T, H)]
    ridge, gate = Ridge(torch.rand(B, T, H), torch.rand(H), 0.1), DecayGate(torch.rand(H), torch.rand(H))
    indices = torch.tensor([0])
    for run, state_name, reads in (
        (gka_ops.chunk_gka, "initial_state", 0),
        (gka_ops.recurrent_gka, "state", 2),
    ):
        for beside in (False, True):
            (q, k, v), state = tokens(), new_state()
            options = {"state_indices": indices} if reads else {}
            expected = [q, k, v, *per_token, *ridge[:2], *gate, *state, *options.values(), q]
            log.clear()
            call = lambda: run(q, k, v, *per_token, ridge=ridge, gate=gate, **{state_name: state}, **options)  # noqa: B023, E731
            assert calls.beside(call) == beside
            assert [entry.addresses[0] for entry in log[reads:]] == [tensor.data_ptr() for tensor in expected]


def test_versions_of_states_count(run: Callable[..., Any], calls: Calls) -> None:
    (q, k, v), state = tokens(), new_state()
    if run is chunk:
        assert calls.beside(lambda: gka_ops.chunk_gka(q, k, v))
        assert [t._version for t in (q, k, v)] == [0, 0, 0]
        return
    weight = torch.rand(D, requires_grad=True)
    saved = (weight * state.kk).sum()
    versions = [t._version for t in state]
    assert calls.beside(lambda: gka_ops.recurrent_gka(q, k, v, state=state))
    assert [t._version for t in state] == [version + 1 for version in versions]
    assert [t._version for t in (q, k, v)] == [0, 0, 0]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()
    with torch.inference_mode():
        for count, beside in ((2, False), (3, True)):
            assert calls.beside(lambda: gka_ops.recurrent_gka(q, k, v, state=state)) == beside
            assert [t._version for t in state] == [version + count for version in versions]


def test_launch_hooks_hear(run: Callable[..., Any], calls: Calls) -> None:
    heard: list[Any] = []
    knobs.runtime.launch_enter_hook.add(heard.append)
    try:
        assert calls.beside(run)
    finally:
        knobs.runtime.launch_enter_hook.remove(heard.append)
    assert len(heard) > 1


# ----------------------------------------------------------------------------------------------------------- not taken
class DispatchMode(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class FunctionMode(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(getattr(func, "default", func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [DispatchMode, FunctionMode])
def test_modes_see_operators(run: Callable[..., Any], calls: Calls, mode: Callable[[], Any]) -> None:
    for _ in range(2):
        with mode() as active:
            assert not calls.beside(run)
        assert any(func in OPERATORS for func in active.seen)
        assert calls.beside(run)


@pytest.mark.supports("profiler and NVTX ranges")
def test_profilers_see_operators(run: Callable[..., Any], calls: Calls) -> None:
    for profile in (torch.profiler.profile, torch.autograd.profiler.profile):
        with profile() as active:
            assert not calls.beside(run)
        names = {event.key for event in active.key_averages()}
        assert names & {"gka::chunk_gka", "gka::recurrent_gka"}
        assert calls.beside(run)


def test_values_are_checked(run: Callable[..., Any], calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tokens()
    q[0, 0, 0, 0] = torch.nan
    state = {"state": new_state()} if run is decode else {}
    function = gka_ops.recurrent_gka if run is decode else gka_ops.chunk_gka
    bad = lambda: function(q, k, v, **state)  # type: ignore[operator]  # noqa: E731
    assert calls.beside(bad)
    with gka_ops.debug_mode(), pytest.raises(ValueError, match="finite values in q"):
        bad()
    monkeypatch.setenv(DEBUG_VARIABLE, "1")
    with pytest.raises(ValueError, match="finite values in q"):
        bad()
    monkeypatch.setenv(DEBUG_VARIABLE, "0")
    assert calls.beside(bad)


def test_forward_mode_is_refused(run: Callable[..., Any], calls: Calls) -> None:
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="reverse-mode"):
        run()
    assert calls.beside(run)


def test_gradients(run: Callable[..., Any], calls: Calls) -> None:
    q, k, v = tokens(requires_grad=True)
    if run is decode:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="not differentiable"):
                gka_ops.recurrent_gka(q, k, v, state=new_state())
    else:
        for _ in range(3):
            assert gka_ops.chunk_gka(q, k, v).output.requires_grad
    with torch.no_grad():
        options = {"state": new_state()} if run is decode else {}
        function = gka_ops.recurrent_gka if run is decode else gka_ops.chunk_gka
        call = lambda: function(q, k, v, **options)  # type: ignore[operator]  # noqa: E731
        assert [calls.beside(call) for _ in range(2)][-1]
    if run is chunk:
        assert gka_ops.chunk_gka(q, k, v).output.requires_grad


def test_transforms(calls: Calls) -> None:
    for _ in range(3):
        chunk()
    q, k, v = tokens()

    def output(q: Tensor) -> Tensor:
        return gka_ops.chunk_gka(q, k, v).output

    known = calls.dispatched
    batched = torch.stack([q, q + 1])
    assert torch.equal(torch.func.vmap(output)(batched), 3 * batched)
    assert calls.dispatched == known + 2
    torch.func.vmap(lambda x: output(q) + x)(torch.rand(2))  # nothing that the function gets is batched
    assert calls.dispatched == known + 3
    value = torch.func.functionalize(output)(q)
    assert torch.equal(value, 3 * q) and calls.dispatched == known + 4
    torch.func.vjp(output, q)
    assert calls.dispatched == known + 5


def test_graphs_contain_operators(run: Callable[..., Any], calls: Calls) -> None:
    q, k, v = tokens()
    state = new_state()

    def function(q: Tensor) -> Tensor:
        if run is decode:
            return gka_ops.recurrent_gka(q, k, v, state=state)
        return gka_ops.chunk_gka(q, k, v).output

    assert calls.beside(lambda: function(q))
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(function, backend=backend, fullgraph=True)
    for _ in range(2):
        assert not calls.beside(lambda: compiled(q))
    graphs.append(make_fx(function)(q))
    for graph in graphs:
        assert any(getattr(node.target, "default", node.target) in OPERATORS for node in graph.graph.nodes)
    assert len(graphs) == 2 and calls.beside(lambda: function(q))


def test_fake_tensors_and_subclasses(run: Callable[..., Any], calls: Calls) -> None:
    class Subclass(Tensor):
        seen = 0

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            cls.seen += getattr(func, "default", func) in OPERATORS
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))

    def function(q: Tensor, k: Tensor, v: Tensor) -> Any:
        state = GKAState(*(q.new_zeros(1, H, D, D) for _ in range(2)))
        return gka_ops.recurrent_gka(q, k, v, state=state) if run is decode else gka_ops.chunk_gka(q, k, v).output

    with FakeTensorMode():
        for _ in range(2):
            assert not calls.beside(lambda: function(*tokens()))
    for i in range(1, 3):
        q, k, v = tokens()
        assert not calls.beside(lambda q=q, k=k, v=v: function(q.as_subclass(Subclass), k, v))
        assert Subclass.seen == i
    assert calls.beside(run)


def test_a_kernel_that_someone_registered(calls: Calls) -> None:
    heard = []

    def select(keys: torch._C.DispatchKeySet, *args: Any) -> Any:
        heard.append(keys)
        return OPERATORS[0].redispatch(keys.remove(torch._C.DispatchKey.BackendSelect), *args)

    with torch.library._scoped_library("gka", "IMPL") as library:
        library.impl("chunk_gka", select, "BackendSelect", with_keyset=True)
        assert not any(calls.beside(chunk) for _ in range(3))
    assert len(heard) == 3


@pytest.mark.supports("autocast")
def test_autocast_casts_known_calls(run: Callable[..., Any], calls: Calls) -> None:
    """What autocast has to cast never goes beside it, also where the same call was known before; what it has not, does,
    in the dtype of the moment."""
    q, k, v = tokens()
    half = [tensor.to(torch.bfloat16) for tensor in (q, k, v)]
    state = new_state()

    def call(*operands: Tensor) -> Tensor:
        if run is decode:
            return gka_ops.recurrent_gka(*operands, state=state)
        return gka_ops.chunk_gka(*operands).output

    assert calls.beside(lambda: call(q, k, v))
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(4):
            assert not calls.beside(lambda: call(q, k, v))
            assert call(q, k, v).dtype == torch.bfloat16
            assert not calls.beside(lambda: call(half[0], k, half[2]))
        call(*half)
        assert calls.beside(lambda: call(*half))
    for _ in range(3):
        call(*half)
    assert calls.beside(lambda: call(*half))
    with torch.autocast("cpu", torch.bfloat16):
        assert calls.beside(lambda: call(*half))
        with torch.autocast("cpu", torch.float16):
            assert not calls.beside(lambda: call(*half))
            assert call(*half).dtype == torch.float16
        with torch.autocast("cpu", enabled=False):
            assert calls.beside(lambda: call(q, k, v))
            assert call(q, k, v).dtype == torch.float32


def test_negative_views(calls: Calls) -> None:
    q, k, v = tokens()
    for _ in range(3):
        assert not calls.beside(lambda: gka_ops.chunk_gka(torch._neg_view(q), k, v))
    assert torch.equal(gka_ops.chunk_gka(torch._neg_view(q), k, v).output, -3 * q)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace", "ignore::torch.jit.TracerWarning")
def test_jit_traces_contain_operators(run: Callable[..., Any], calls: Calls) -> None:
    q, k, v = tokens()
    options = {"state": new_state()} if run is decode else {}

    def function(q: Tensor) -> Tensor:
        if run is decode:
            return gka_ops.recurrent_gka(q, k, v, **options)
        return gka_ops.chunk_gka(q, k, v).output

    assert calls.beside(lambda: function(q))
    assert "gka::" in str(torch.jit.trace(function, (q,), check_trace=False).graph)


def test_other_addresses_and_layouts(calls: Calls) -> None:
    storage, (_, k, v) = torch.rand(B * T * H * D + 1), tokens()
    off, strided = storage[1:].view(B, T, H, D), torch.rand(B, H, T, D).transpose(1, 2)
    aligned = storage[:-1].view(B, T, H, D)
    for q, beside in ((aligned, True), (off, False), (aligned, True), (strided, False), (strided, False)):
        for _ in range(2):
            result = gka_ops.chunk_gka(q, k, v).output
            assert q is strided or torch.equal(result, 3 * q)
        assert calls.beside(lambda q=q: gka_ops.chunk_gka(q, k, v)) == beside


def test_another_configuration(run: Callable[..., Any], calls: Calls) -> None:
    """Each is recorded once; then calls are known under all of them."""
    calls.implementation.configuration = "two"
    assert [calls.beside(run) for _ in range(2)] == [False, True]
    calls.implementation.configuration = "one"
    assert calls.beside(run)
    calls.implementation.configuration = "two"
    assert calls.beside(run)


def test_forgotten(run: Callable[..., Any], calls: Calls) -> None:
    launcher.forget()
    assert [calls.beside(run) for _ in range(3)] == [False, True, True]


def test_first_known_while_watched(calls: Calls) -> None:
    with DispatchMode():
        for _ in range(20):
            chunk()
    chunk()
    assert calls.beside(chunk)


def test_tensors_that_the_signature_hides(calls: Calls) -> None:
    class Other(Ridge):
        pass

    ridge = Other(torch.rand(H), 0.0, 0.1)
    q, k, v = tokens()
    assert not any(calls.beside(lambda: gka_ops.chunk_gka(q, k, v, ridge=ridge)) for _ in range(4))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_reference_is_called(impl: Any) -> None:
    q, k, v = tokens()
    expected = gka_ops.chunk_gka(q, k, v, impl=impl).output
    for _ in range(3):
        assert torch.equal(gka_ops.chunk_gka(q, k, v, impl=impl).output, expected)
