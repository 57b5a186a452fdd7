"""Remembers what was worked out for calls, and finds it again for like ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, ClassVar, NamedTuple, TypeAlias
from weakref import WeakSet

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards

Replay: TypeAlias = Callable[[tuple[Tensor, ...]], list[Tensor] | None]
"""Repeats a call, given the tensors of a like one, without asking what it does. Returns the outputs that have elements,
or ``None``, with nothing done, where these tensors' addresses or a change of configuration forbid it."""

_MAX_ENTRIES = 8  # they are tried one after the other
_TensorGuards: Any = TensorGuards  # its stub knows less than it takes
_PLAIN = (Tensor, torch.nn.Parameter)


def _selects(positions: Sequence[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    if len(positions) > 1:
        return itemgetter(*positions)
    return lambda args: tuple(args[i] for i in positions)


class _Entry(NamedTuple):
    """A call, its tensors by their metadata alone."""

    types: tuple[type, ...]
    others_of: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    others: tuple[Any, ...]
    tensors_of: Callable[[tuple[Any, ...]], tuple[Tensor, ...]]
    tensors_match: Callable[..., bool]
    value: Any


class Recall:
    """The values of the last few calls with different arguments, given as flat tuples.

    Calls are alike if the arguments' types are the same, those that are no tensors are equal, and the tensors have the
    same sizes, strides, dtypes, devices, dispatch keys and need of a gradient. For tensors that is decided by what
    ``torch.compile`` guards its graphs with, many times faster than by a key made of them. No tensor is held. A call
    that gives one tensor twice, or a tuple, is not kept.

    A value is found only where one was kept, so types are compared before anything else: True is not 1 here, and a
    fake tensor not a tensor. Entries are replaced as a whole: threads need no lock.
    """

    _every: ClassVar[WeakSet[Recall]] = WeakSet()

    def __init__(self) -> None:
        self._entries: tuple[_Entry, ...] = ()
        self._every.add(self)

    def find(self, args: tuple[Any, ...]) -> tuple[Any, tuple[Tensor, ...]] | None:
        """What was kept for a like call, and the tensors among the arguments."""
        types = tuple(map(type, args))
        for types_, others_of, others, tensors_of, tensors_match, value in self._entries:
            if types_ == types and others_of(args) == others:
                tensors = tensors_of(args)
                if tensors_match(*tensors):
                    return value, tensors
        return None

    def keep(self, args: tuple[Any, ...], value: Any) -> None:
        types = tuple(map(type, args))
        tensors = [i for i, kind in enumerate(types) if issubclass(kind, Tensor)]
        if any(types[i] not in _PLAIN for i in tensors):
            return
        if any(issubclass(kind, tuple) for kind in types):  # it may hold tensors, which do not compare
            return
        if len({id(args[i]) for i in tensors}) < len(tensors):  # no call with a tensor given twice is found
            return
        others_of, tensors_of = _selects([i for i in range(len(args)) if i not in tensors]), _selects(tensors)
        guards = _TensorGuards(
            *tensors_of(args),
            dynamic_dims_sizes=[list(args[i].shape) for i in tensors],
            dynamic_dims_strides=[list(args[i].stride()) for i in tensors],
        )
        entry = _Entry(types, others_of, others_of(args), tensors_of, guards.check, value)
        self._entries = (entry, *self._entries[: _MAX_ENTRIES - 1])

    @classmethod
    def forget_all(cls) -> None:
        for recall in list(cls._every):
            recall._entries = ()
