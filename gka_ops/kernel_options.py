"""``kernel_options``: launch configurations that a call brings along, as FlexAttention's callers know them.

An operator is given them as a text behind the name of the implementation, ``"auto readout.num_warps=8"``: so they are
constants of a graph that holds the call, other ones make another graph, and its backward has them too.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from typing import Any, TypeAlias

from gka_ops import validation

KernelOptions: TypeAlias = Mapping[str, Mapping[str, int | None]]
"""Kernel → parameter → value, as ``gka-autotune show`` lists them: ``{"readout": {"num_warps": 8}}``."""

_NO_CAP = "none"


def with_options(op: str, impl: object, options: KernelOptions) -> str:
    """``impl`` with ``options`` behind it.

    Raises:
        ValueError: there is no such kernel, no such parameter of it, or the value is not in its space.
        TypeError: ``options`` is no mapping of mappings.
    """
    from gka_ops.autotune import space

    validation.check_impl(op, impl)
    _check(op, options)
    said = []
    for kernel, parameters in options.items():
        values = dict(space.KERNELS[kernel].axes)
        for name, given in parameters.items():
            value = values[name][values[name].index(given)]  # a constant, where Dynamo made a symbol of what is given
            said.append(f"{kernel}.{name}={_NO_CAP if value is None else value}")
    return " ".join([str(impl), *sorted(said)])


def bare(impl: str) -> str:
    """The implementation of what :func:`with_options` made."""
    return impl.partition(" ")[0]


def forcing(op: str, impl: str) -> contextlib.AbstractContextManager[None]:
    """Launches in a block of it take the options behind ``impl``."""
    from gka_ops.autotune.choice import forcing

    return forcing(_read(op, impl.partition(" ")[2]))


def _check(op: str, options: Any) -> None:
    from gka_ops.autotune import space

    if not isinstance(options, Mapping):
        raise TypeError(f"{op}: expected kernel_options to be a mapping of kernels, got {type(options).__name__}")
    for kernel, parameters in options.items():
        if kernel not in space.KERNELS:
            raise ValueError(
                f"{op}: expected kernel_options of kernels among {', '.join(space.KERNELS)}, got {kernel!r}"
            )
        if not isinstance(parameters, Mapping):
            raise TypeError(
                f"{op}: expected kernel_options[{kernel!r}] to be a mapping of parameters, got "
                f"{type(parameters).__name__}"
            )
        if reason := space.outside(kernel, dict(parameters), some=True):
            raise ValueError(f"{op}: kernel_options[{kernel!r}]: {reason}")


@functools.cache
def _read(op: str, text: str) -> KernelOptions:
    options: dict[str, dict[str, int | None]] = {}
    for said in text.split():
        place, _, value = said.partition("=")
        kernel, _, name = place.partition(".")
        if not value.isdecimal() and value != _NO_CAP:
            raise ValueError(f"{op}: expected kernel options such as readout.num_warps=8 behind impl, got {said!r}")
        options.setdefault(kernel, {})[name] = None if value == _NO_CAP else int(value)
    _check(op, options)
    return options
