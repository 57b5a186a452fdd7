"""What each way of giving an operator its gradient costs, and what it supports: the table of docs/adr/0004.

``python tools/measure_autograd_boundary.py``: a trivial operator of ``chunk_gka``'s own signature on small CPU tensors.
Times are those of a call less those of its implementation, as median and quartiles over rounds in which all ways take
turns.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate  # type: ignore[import-untyped]
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction
from torch.library import opcheck

from gka_ops.ops import SCHEMAS

ROUNDS, CALLS = 41, 500
SCHEMA = SCHEMAS["chunk_gka"]
library = torch.library.Library("boundary", "DEF")


def implementation(*args: Any) -> tuple[Tensor, ...]:
    """Twice the values, and six empty tensors for the outputs that do not apply."""
    return 2 * args[2], *(args[0].new_empty(0) for _ in range(6))


def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(*inputs[:13], *output[3:])


def backward(ctx: Any, d_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return None, None, 2 * d_output, *[None] * 18


def define(name: str) -> Any:
    library.define(name + SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, implementation, "CPU")
    torch.library.register_fake(f"boundary::{name}", implementation, lib=library)
    return getattr(torch.ops.boundary, name).default


def registered() -> tuple[Any, Callable[..., Any]]:
    op = define("registered")
    torch.library.register_autograd("boundary::registered", backward, setup_context=setup_context, lib=library)
    return op, op


def function_outside() -> tuple[Any, Callable[..., Any]]:
    op = define("function_outside")

    class Outside(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Any:
            return op(*args)

    Outside.setup_context, Outside.backward = staticmethod(setup_context), staticmethod(backward)  # type: ignore[method-assign]
    return op, Outside.apply


def custom_op() -> tuple[Any, Callable[..., Any]]:
    op = torch.library.custom_op("boundary::custom_op", implementation, mutates_args=(), schema=SCHEMA)
    op.register_fake(implementation)
    op.register_autograd(backward, setup_context=setup_context)
    return op._opoverload, op


def own_kernel() -> tuple[Any, Callable[..., Any]]:
    """As in ``gka_ops.ops``."""
    op = define("own_kernel")

    def below(keyset: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    class Node(_SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
            with torch.set_grad_enabled(torch._C._are_functorch_transforms_active()):
                output = below(keyset, *args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return None, *backward(ctx, *gradients)

    apply = Node.apply  # type: ignore[attr-defined]

    def kernel(keyset: Any, *args: Any) -> Any:
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return below(keyset, *args)
        if not torch._C._are_functorch_transforms_active():
            return apply(keyset, *args)
        with enable_single_level_autograd_function():
            return apply(keyset, *args)

    library.impl("own_kernel", kernel, "Autograd", with_keyset=True)
    return op, op


WAYS = {
    "define/impl + register_autograd": registered,
    "define/impl in an outer autograd.Function": function_outside,
    "torch.library.custom_op": custom_op,
    "define/impl + Autograd kernel of our own": own_kernel,
}


def arguments(grad: bool) -> list[Any]:
    """Those of ``chunk_gka`` with q, k, v, gates and an α."""
    q, k, v = (torch.ones(1, 2, 1, 4, requires_grad=grad) for _ in range(3))
    gates = [torch.ones(1, 2, 1, requires_grad=grad) for _ in range(3)]
    return [q, k, v, *gates, *[None] * 7, 0.02, 0.0, 24, 0.5, False, False, True, "auto"]


def seconds(function: Callable[..., Any], args: list[Any]) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        function(*args)
    return (time.perf_counter() - start) / CALLS


def summary(times: list[float], base: list[float]) -> str:
    lower, median, upper = statistics.quantiles([1e6 * (t - b) for t, b in zip(times, base, strict=True)], n=4)
    return f"{median:.1f} ({lower:.1f} to {upper:.1f})"


def attempt(run: Callable[[], Tensor], expected: Tensor) -> str:
    try:
        return "right" if torch.equal(run(), expected) else "**wrong**"
    except Exception as error:
        return f"raises {type(error).__name__}"


def supports(op: Any, call: Callable[..., Any]) -> dict[str, str]:
    results: dict[str, Any] = opcheck(op, tuple(arguments(True)), raise_exception=False)
    failed = [name for name, result in results.items() if result != "SUCCESS"]
    args = arguments(False)

    def loss(v: Tensor) -> Tensor:
        return call(*args[:2], v, *args[3:])[0].square().sum()

    def gradient(v: Tensor) -> Tensor:
        return torch.func.grad(loss)(v)

    v = args[2]
    torch._dynamo.reset()
    compiled = torch.compile(gradient, backend="aot_eager")
    raw = torch.compile(torch.func.grad(lambda v: op(*args[:2], v, *args[3:])[0].square().sum()), backend="aot_eager")
    return {
        "opcheck fails": ", ".join(failed) or "nothing",
        "func.grad": attempt(lambda: gradient(v), 8 * v),
        "compiled func.grad": attempt(lambda: compiled(v), 8 * v),
        "of the raw operator": attempt(lambda: raw(v), 8 * v),
        "vmap of func.grad": attempt(lambda: torch.func.vmap(gradient)(v[None]), 8 * v[None]),
    }


def main() -> None:
    warnings.simplefilter("ignore")
    ways = {name: make() for name, make in WAYS.items()}
    calls: dict[str, Callable[..., Any]] = {"implementation": implementation}
    calls |= {name: call for name, (_, call) in ways.items()}
    times: dict[bool, dict[str, list[float]]] = {}
    for grad in (True, False):
        args = arguments(grad)
        times[grad] = {name: [] for name in calls}
        for i in range(ROUNDS + 1):
            # The implementation alone runs below autograd, as it does under the operators.
            for name, function in calls.items():
                with torch.set_grad_enabled(grad and name != "implementation"):
                    taken = seconds(function, args)
                if i > 0:
                    times[grad][name].append(taken)
    rows = [
        {
            "way": name,
            **{
                f"µs, {'with' if grad else 'no'} gradient": summary(times[grad][name], times[grad]["implementation"])
                for grad in (True, False)
            },
            **supports(op, call),
        }
        for name, (op, call) in ways.items()
    ]
    print(f"torch {torch.__version__}, {len(arguments(True))} arguments, 7 outputs")
    print(f"median (quartiles) over {ROUNDS} rounds of {CALLS} calls, less the implementation\n")
    print(tabulate(rows, headers="keys", tablefmt="github"))


if __name__ == "__main__":
    main()
