"""Runs kernels: compiles the unknown ones side by side, and repeats a known call without working it out again.

NOTE [Record and replay] (docs/adr/0008)
  What an operator allocates and launches follows from its arguments' shapes, dtypes, devices and scalars alone. So the
  first call with given ones is recorded, and later ones are replayed: the outputs are allocated, the temporaries are
  carved out of one workspace, and the compiled kernels are launched with new addresses.

  * Nothing need be declared. The recorder is a dispatch mode: it sees every PyTorch operation of the call. Allocations
    and views can be replayed; any other operation makes the call one that always takes the ordinary path.
  * Triton specialises a kernel by its arguments' dtypes, by its integers and by which pointers are multiples of 16.
    Dtypes and integers are in the key. A call is replayed only if all its pointers are multiples of 16 and its tensors
    contiguous, and recorded for that only if they were then.
  * While kernels of a recorded call are being compiled, its launches wait, and so do all that follow; an operation that
    is neither allocation nor view first lets them go. The order on the stream is that of the program.
  * A plan holds no tensor. Its workspace comes from PyTorch's allocator at every call, so that CUDA graphs can capture
    a replay and streams are respected.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate
from operator import itemgetter, or_
from typing import Any, NamedTuple, TypeAlias

import torch
import triton
from torch import Tensor
from torch._C._dynamo.guards import _empty_strided_cuda  # type: ignore[attr-defined]
from torch.autograd import profiler
from torch.utils._python_dispatch import TorchDispatchMode
from triton import AsyncCompileMode, FutureKernel, knobs
from triton.runtime import JITFunction, driver

from gka_ops.recall import Recall, Replay
from gka_ops.triton.modules import load_apart

Grid: TypeAlias = tuple[int, ...]

POINTER_ALIGNMENT = 16  # Triton compiles for pointers that are multiples of it, or for any
_BUFFER_ALIGNMENT = 512  # PyTorch's caching allocator's
_MAX_BYTES = 2**28  # a call that allocates more is bound by the card, and gains from what it frees on its way
_MAX_PLANS = 1024

_ALLOCATIONS = frozenset(
    {
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.empty_strided.default,
        torch.ops.aten.new_empty.default,
        torch.ops.aten.new_empty_strided.default,
    }
)


# ------------------------------------------------------------------------------------------------------------ replay
class _Launch(NamedTuple):
    """A compiled kernel, and which of the plan's values ``start`` is given.

    Those are the grid, the stream, what Triton wants besides, and from ``first_argument`` on the kernel's arguments.
    """

    kernel: Any
    grid: tuple[int, int, int]
    start: Callable[..., Any]
    given: Callable[[list[Any]], tuple[Any, ...]]
    first_argument: int
    function: Any


def _starter(kernel: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What starts a compiled kernel, and what it is given between the stream and the kernel's arguments.

    Triton's launcher object allocates scratch memory where a kernel wants some and then calls a function in C. Where
    there is none to allocate, that function is called, in the Triton whose order of arguments is known.
    """
    run, metadata = kernel.run, kernel.packed_metadata
    if (
        triton.__version__.startswith("3.6.")
        and type(run).__name__ == "CudaLauncher"
        and run.global_scratch_size == run.profile_scratch_size == 0
    ):
        flags = (run.launch_cooperative_grid, run.launch_pdl, None, None)
        return run.launch, (kernel.function, *flags, metadata, None, None, None)
    return run, (kernel.function, metadata, None, None, None)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a call allocates, launches and returns.

    Its values are constants, the stream, and addresses: of the tensor arguments, of the outputs that have elements, of
    the workspace, and of what lies at an offset (in bytes) from one of these.
    """

    device: torch.device
    ordinal: int
    constants: list[Any]
    extents: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]  # sizes, strides of outputs with elements
    empty_outputs: list[Tensor]  # to be copied: no operation of PyTorch makes a tensor without elements as fast
    result: Callable[[list[Tensor]], Any]  # of the outputs, those with elements first
    workspace: int
    parts: list[tuple[int, int]]
    launches: list[_Launch]
    current_stream: Callable[[int], int]  # of a device, by its ordinal

    def launch(self, pointers: list[int]) -> list[Tensor]:
        """Does what the call does to tensor arguments at these addresses. Returns the outputs that have elements."""
        if _current_device() != self.ordinal:
            with torch.cuda.device(self.device):
                return self.launch(pointers)
        outputs = [_empty_strided(*extent) for extent in self.extents]
        stream = self.current_stream(self.ordinal)
        values = [*self.constants, stream, *pointers, *map(_data_ptr, outputs)]
        if self.workspace:
            workspace = _empty_strided((self.workspace,), (1,), torch.uint8)
            values.append(workspace.data_ptr())
        else:
            values.append(0)
        values += [values[place] + offset for place, offset in self.parts]
        if _hooked():
            for kernel, grid, _, given, first, function in self.launches:
                with _range(function):
                    kernel[grid](*given(values)[first:], stream=stream)
        elif profiler._is_profiler_enabled:
            for _, _, start, given, _, function in self.launches:
                with _range(function):
                    start(*given(values))
        else:
            for _, _, start, given, _, _ in self.launches:
                start(*given(values))
        return outputs

    def run(self, pointers: list[int]) -> Any:
        """As :meth:`launch`. Returns what the call returns."""
        outputs = self.launch(pointers)
        return self.result(outputs + [empty.data for empty in self.empty_outputs])


_data_ptr: Callable[[Tensor], int] = Tensor.data_ptr
_empty_strided: Callable[..., Tensor] = _empty_strided_cuda  # on the current device; Inductor's, without the dispatcher
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


def _hooked() -> bool:
    """Whether someone, a profiler say, wants to hear of launches."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _range(function: Any) -> contextlib.AbstractContextManager[object]:
    """Says on the timeline of a profiler, or of NVTX, which stage of a call launches, by its kernel's name:
    ``gka::chunk_state``. Nothing where nobody listens."""
    if not profiler._is_profiler_enabled:
        return _NO_RANGE
    return _RecordFunctionFast(f"gka::{function.fn.__name__.removesuffix('_kernel')}")


_NO_RANGE = contextlib.nullcontext()
_RecordFunctionFast: Any = torch._C._profiler._RecordFunctionFast  # no operator, which a recorder would see


# ------------------------------------------------------------------------------------------------------------ record
class _Compiler(ThreadPoolExecutor):
    """Compiles a kernel in a thread of its own, and loads it there: for that, Triton 3.6 runs the C compiler."""

    def __init__(self, device: torch.device) -> None:
        load_apart()
        super().__init__(max_workers=os.cpu_count(), thread_name_prefix="gka_ops_compile")
        self._device = device

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        def compile_and_load() -> Any:
            with torch.cuda.device(self._device):
                kernel = fn(*args, **kwargs)
                kernel.run  # noqa: B018  (a property that loads)
            return kernel

        return super().submit(compile_and_load)


class _Step(NamedTuple):
    """A launch as the operator asked for it, and its kernel, perhaps still being compiled."""

    function: Any
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]  # in the kernel's own order
    kernel: Any


class _Recorder(TorchDispatchMode):
    """Sees what one call does. See NOTE [Record and replay]."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[_Step] = []
        self.launched = 0
        self.buffers: list[Tensor] = []
        self.bytes = 0
        self.replayable = True

    def give_up(self) -> None:
        """There will be no plan: hold no more than launches that wait."""
        self.replayable = False
        self.buffers.clear()
        del self.steps[: self.launched]
        self.launched = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.see(func, args, kwargs or {})

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in _ALLOCATIONS:
            buffer = func(*args, **kwargs)
            self.bytes += buffer.nbytes
            if self.bytes > _MAX_BYTES:
                self.give_up()
            if self.replayable:
                self.buffers.append(buffer)
            return buffer
        if not func.is_view:
            self.launch_pending()
            self.give_up()
        return func(*args, **kwargs)

    def launch(self, function: Any, grid: Grid, arguments: dict[str, Any]) -> None:
        if not isinstance(function, JITFunction):  # interpreted
            self.give_up()
            with _range(function):
                function[grid](**arguments)
            return
        kernel = function.warmup(grid=grid, **arguments)
        values = tuple(arguments.get(parameter.name, parameter.default) for parameter in function.params)
        x, y, z, *_ = (*grid, 1, 1)
        self.steps.append(_Step(function, (x, y, z), values, kernel))
        if not any(isinstance(step.kernel, FutureKernel) for step in self.steps[self.launched :]):
            self.launch_pending()

    def launch_pending(self) -> None:
        for i, step in enumerate(self.steps[self.launched :], self.launched):
            kernel = step.kernel.result() if isinstance(step.kernel, FutureKernel) else step.kernel
            self.steps[i] = step._replace(kernel=kernel)
            self.launched = i + 1
            if kernel is not None:  # a compilation hook may have refused it
                with _range(step.function):
                    kernel[step.grid](*step.arguments)
        if not self.replayable:
            self.give_up()

    def plan(self, arguments: list[Tensor], result: Tensor | tuple[Tensor, ...]) -> _Plan | None:
        """The plan of the recorded call, or ``None`` where it cannot be repeated."""
        if not self.replayable:
            return None
        buffers = {_address(buffer): buffer for buffer in self.buffers if buffer.numel()}
        returned = [result] if isinstance(result, Tensor) else list(result)
        outputs = {_address(output): output for output in returned if output.numel()}
        empty = [output for output in returned if not output.numel()]
        sizes = {
            address: -(-buffer.nbytes // _BUFFER_ALIGNMENT) * _BUFFER_ALIGNMENT
            for address, buffer in buffers.items() if address not in outputs
        }  # fmt: skip
        if (
            len(outputs) + len(empty) != len(returned)
            or not all(_same_extent(output, buffers.get(address)) for address, output in outputs.items())
            or any(step.kernel is None or step.function.pre_run_hooks for step in self.steps)
        ):
            return None

        starters = [_starter(step.kernel) for step in self.steps]
        constants: list[Any] = [0]  # the address of a tensor without elements
        for step, (_, between) in zip(self.steps, starters, strict=True):
            constants += [*step.grid, *between, *(v for v in step.arguments if not isinstance(v, Tensor))]
        next_constant = iter(range(1, len(constants)))
        stream = len(constants)
        place_of_argument = {id(tensor): stream + 1 + i for i, tensor in enumerate(arguments)}
        first_output = stream + 1 + len(arguments)
        workspace = first_output + len(outputs)
        place_of_buffer = {address: (first_output + i, 0) for i, address in enumerate(outputs)}
        for address, offset in zip(sizes, accumulate(sizes.values(), initial=0), strict=False):  # the last is the end
            place_of_buffer[address] = (workspace, offset)
        parts: dict[tuple[int, int], int] = {}

        def place_of(value: object) -> int | None:
            if not isinstance(value, Tensor):
                return next(next_constant)
            if not value.numel():
                return 0
            if id(value) in place_of_argument:
                return place_of_argument[id(value)]
            address = _address(value)
            if address not in buffers:
                return None
            place, offset = place_of_buffer[address]
            offset += value.data_ptr() - address
            return parts.setdefault((place, offset), workspace + 1 + len(parts)) if offset else place

        launches = []
        for step, (start, between) in zip(self.steps, starters, strict=True):
            grid = [next(next_constant) for _ in step.grid]
            leading = [*grid, stream, *(next(next_constant) for _ in between)]
            places = [place_of(value) for value in step.arguments]
            if None in places:
                return None
            given = itemgetter(*leading, *places)
            launches.append(_Launch(step.kernel, step.grid, start, given, len(leading), step.function))
        order = {id(output): i for i, output in enumerate((*outputs.values(), *empty))}
        with torch.inference_mode(False):  # as autograd may want to save them
            copied = [output.new_empty(output.shape) for output in empty]
        allocated = [(tuple(output.shape), output.stride(), output.dtype) for output in outputs.values()]
        return _Plan(
            arguments[0].device, arguments[0].get_device(), constants, allocated, copied,
            itemgetter(*(order[id(output)] for output in returned)), sum(sizes.values()), list(parts), launches,
            driver.active.get_current_stream,
        )  # fmt: skip


def _address(tensor: Tensor) -> int:
    """Where the tensor's memory begins, of which it may be a part."""
    return tensor.untyped_storage().data_ptr()


def _same_extent(output: Tensor, buffer: Tensor | None) -> bool:
    """Whether the output is a whole, contiguous buffer."""
    return (
        buffer is not None
        and output.is_contiguous()
        and output.data_ptr() == buffer.data_ptr()
        and output.nbytes == buffer.nbytes
    )


class _UntracedRecorder(_Recorder):
    """A recorder for a process without Dynamo, which PyTorch imports to keep it from tracing a mode's methods: seconds
    of a first call."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.see(func, args, kwargs or {})


_recorder: ContextVar[_Recorder | None] = ContextVar("gka_ops_recorder", default=None)


@contextlib.contextmanager
def _recording(device: torch.device) -> Iterator[_Recorder]:
    recorder = _Recorder() if "torch._dynamo" in sys.modules else _UntracedRecorder()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.cuda.device(device))
        compiler = stack.enter_context(_Compiler(device))
        with contextlib.suppress(RuntimeError):  # the caller compiles asynchronously already: in that mode, then
            stack.enter_context(AsyncCompileMode(compiler))
        stack.enter_context(recorder)
        token = _recorder.set(recorder)
        try:
            yield recorder
            recorder.launch_pending()
        finally:
            _recorder.reset(token)


def launch(kernel: Any, grid: Grid, /, **arguments: Any) -> None:
    """``kernel[grid](**arguments)``, recorded where a call is being recorded."""
    recorder = _recorder.get()
    if recorder is None:
        with _range(kernel):
            kernel[grid](**arguments)
    else:
        recorder.launch(kernel, grid, arguments)


# ------------------------------------------------------------------------------------------------------------- plans
_UNKNOWN: Any = object()
_SEEN: Any = object()
_plans: OrderedDict[Hashable, _Plan | None] = OrderedDict()
_lock = threading.Lock()


def _find(key: Hashable) -> _Plan | None:
    with _lock:
        plan = _plans.get(key, _UNKNOWN)
        if plan is not _UNKNOWN:
            _plans.move_to_end(key)
    return plan


def _keep(key: Hashable, plan: _Plan | None) -> None:
    with _lock:
        _plans[key] = plan
        if len(_plans) > _MAX_PLANS:
            _plans.popitem(last=False)


def forget() -> None:
    """Forgets every recorded call, as is needed where something else that kernels depend on has changed."""
    with _lock:
        _plans.clear()
    Recall.forget_all()


def _replayable(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _aligned(pointers: Iterable[int]) -> bool:
    return functools.reduce(or_, pointers) % POINTER_ALIGNMENT == 0


def _key(operator: Any, configuration: Hashable, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[int], bool]:
    """What a call's plan depends on, the addresses of its tensors, and whether they allow for a plan."""
    key: list[Any] = [operator, configuration]
    pointers = []
    contiguous = True
    for a in args:
        if a is not None and isinstance(a, Tensor):
            key += (a.shape, a.dtype, a.get_device())
            pointers.append(a.data_ptr())
            contiguous = contiguous and a.is_contiguous()
        else:
            key.append(a)
    regular = contiguous and _aligned(pointers)
    return (*key, regular), pointers, regular


def replays(configuration: Callable[[], Hashable]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates an operator whose arguments, all positional, are a tensor and then tensors and scalars.

    ``configuration()`` is what its launches depend on besides them. The result has an attribute ``replay_of``.
    """

    def decorate(operator: Callable[..., Any]) -> Callable[..., Any]:
        recall = Recall()

        @functools.wraps(operator)
        def run(*args: Any) -> Any:
            if not _replayable(args[0]):
                return operator(*args)
            current = configuration()
            found = recall.find((current, *args))
            if found is not None:
                plan, tensors = found
                pointers = [tensor.data_ptr() for tensor in tensors]
                if _aligned(pointers):
                    return plan.run(pointers)
            known, pointers, regular = _key(operator, current, args)
            plan = _find(known)
            if plan is _UNKNOWN:
                # The kernels do not depend on the number of tokens: likely they exist, and this one may not come again.
                family = tuple(part[2:] if isinstance(part, torch.Size) else part for part in known)
                plan = None if _find(family) is _SEEN else _SEEN
                _keep(family, _SEEN)
                if plan is None:
                    _keep(known, _SEEN)
            if plan is None:
                return operator(*args)
            if plan is _SEEN:
                plan, result = _record(operator, args, regular)
                _keep(known, plan)
                return result
            if found is None:
                recall.keep((current, *args), plan)
            return plan.run(pointers)

        def replay_of(args: tuple[Any, ...], outputs: int, mutated: slice) -> Replay | None:
            """What repeats calls like ``operator(*args)``, if its plan is known and has so many outputs with elements.

            ``mutated`` are those of its tensors whose versions count.
            """
            if not _replayable(args[0]):
                return None
            _, first, *rest = _key(operator, configuration(), args)[0]

            def plan_for(current: Hashable) -> _Plan | None:
                plan = _find((operator, current, *rest))
                return plan if isinstance(plan, _Plan) and len(plan.extents) == outputs else None

            plan = plan_for(first)
            if plan is None:
                return None
            known = first, plan

            def replay(tensors: tuple[Tensor, ...]) -> list[Tensor] | None:
                nonlocal known
                pointers = list(map(_data_ptr, tensors))
                current, (recorded, plan) = configuration(), known
                if current is not recorded:
                    other = plan_for(current)
                    if other is None:
                        return None
                    known, plan = (current, other), other
                if not _aligned(pointers):
                    return None
                if written := tensors[mutated]:
                    torch._C._increment_version(written)
                return plan.launch(pointers)

            return replay

        run.replay_of = replay_of  # type: ignore[attr-defined]
        return run

    return decorate


def _record(operator: Callable[..., Any], args: tuple[Any, ...], regular: bool) -> tuple[_Plan | None, Any]:
    own = [a.detach() if isinstance(a, Tensor) else a for a in args]  # one object an argument, even where two are one
    tensors = [a for a in own if isinstance(a, Tensor)]
    device = tensors[0].device
    with _recording(device) as recorder:
        result = operator(*own)
    replayable = regular and all(t.device == device for t in tensors)
    return recorder.plan(tensors, result) if replayable else None, result
