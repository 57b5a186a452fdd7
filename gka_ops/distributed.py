"""Operators on ``DTensor``, sharded over batch and heads, and a tensor-parallel plan for :class:`GatedKalmaNet`.

Importing this module tells PyTorch how to shard the ``torch.ops.gka`` operators (``register_sharding``); ``import
gka_ops`` does not, because ``torch.distributed.tensor`` takes far longer to import. See ``docs/distributed.md``.

NOTE [Shardings]
  Sequences and heads are independent, so a rank runs the operator on its own of them and nothing is communicated; what
  all sequences share (A_log, dt_bias, a ridge per head) gets a gradient that is a sum over ranks. Along T runs the
  recurrence, along D and V every token's solve: an input sharded there is an error, because to gather it silently would
  cost more than the operator. So is a number of key/value heads that the ranks cannot share evenly: a query head and
  its key/value head must meet on one rank. One key/value head is the exception: every rank has it.

  A DTensor whose placement merely differs from the others' is redistributed by PyTorch, at the least cost. Three kinds
  of argument must stay where they are. A decode step writes to its state; redistributed, it would write to a copy. The
  Triton implementation's residuals at slab starts (``boundary_kk``, ``boundary_kv``) are as many as the local problem
  needs: their global shape means nothing, and they go back to the rank they came from. And x and ‖H‖ (``fro``) with
  them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from gka_ops import ops
from gka_ops.nn import GatedKalmaNet

__all__ = ["tensor_parallel_plan"]

Kind: TypeAlias = Literal["batch", "heads"]
"""What a mesh dimension divides; ``None`` stands for nothing."""

_KINDS: tuple[Kind, Kind] = ("batch", "heads")

_TOKENS = {"batch": 0, "heads": 2}
_PER_HEAD = {"heads": 0}
_STATES = {"batch": 0, "heads": 1}
_DIMS: dict[str, dict[str, int]] = {
    **dict.fromkeys(("q", "k", "v", "log_decay", "alpha", "beta", "x", "x_scale", "x_query", "fro", "output"), _TOKENS),
    **dict.fromkeys(("A_log", "dt_bias"), _PER_HEAD),
    **dict.fromkeys(("initial_kk", "initial_kv", "final_kk", "final_kv", "kk", "kv"), _STATES),
    "boundary_kk": {"batch": 0, "heads": 0},  # ranks' own: the first will do
    "boundary_kv": {"batch": 0, "heads": 0},
    "cu_seqlens": {},
    "state_indices": {},
}
"""The dimension that each kind divides, by the names of the operators' arguments and outputs; a ridge's depends on its
shape."""

_RIDGE = ("ridge_scale_tensor", "ridge_offset_tensor")
_UPSTREAM = {"dx": "x", "d_output": "output", "d_final_kk": "final_kk", "d_final_kv": "final_kv"}
_LOCAL = ("fro", "boundary_kv")
"""Residuals that show which sharding the forward ran with."""


class _Call:
    """The tensors of one call by name, as PyTorch's specifications of shape and placements."""

    def __init__(self, op: str, args: tuple[Any, ...]) -> None:
        self.op = op
        schema = getattr(torch.ops.gka, op).default._schema
        self.arguments = [a.name for a in schema.arguments]
        self.outputs = [r.name for r in schema.returns]
        if op == "recurrent_gka":
            self.outputs = ["output"]
        self.values = dict(zip(self.arguments, args, strict=True))
        self.specs = {name: v for name, v in self.values.items() if hasattr(v, "placements")}
        self.mesh = self.specs["q"].mesh
        self.heads, self.kv_heads = self.specs["q"].shape[2], self.specs["k"].shape[2]

    def dims(self, name: str) -> dict[str, int]:
        """Which dimension of a tensor each kind divides."""
        name = _UPSTREAM.get(name, name)
        if name in _RIDGE:
            dims = _PER_HEAD if len(self.specs[name].shape) == 1 else _TOKENS
        else:
            dims = _DIMS[name]
        if name in ("k", "v") and self.kv_heads == 1:
            return {"batch": dims["batch"]}
        return dims

    def exists(self, name: str) -> bool:
        """Whether there is such a tensor and it has elements."""
        return name in self.specs and math.prod(self.specs[name].shape) > 0

    def kind(self, name: str, mesh_dim: int) -> Kind | None:
        """What an argument's placement divides, ``None`` where it is on every rank."""
        placement = self.specs[name].placements[mesh_dim]
        if not placement.is_shard() or not self.exists(name):
            return None
        for kind, dim in self.dims(name).items():
            if placement.dim == dim:
                return kind  # type: ignore[return-value]
        return None

    def kinds(self, names: Iterable[str]) -> list[set[Kind]]:
        """What the placements of some arguments divide, a set for each dimension of the mesh."""
        names = [name for name in names if name in self.specs]
        found: list[set[Kind]] = []
        for i in range(self.mesh.ndim):
            found.append({kind for name in names if (kind := self.kind(name, i)) is not None})
        return found

    # ------------------------------------------------------------------------------------------------------- checks
    def check_placements(self) -> None:
        """Nothing is sharded along a dimension that cannot be."""
        for name, spec in self.specs.items():
            allowed = self.dims(name)
            for placement in spec.placements:
                if placement.is_shard() and placement.dim not in allowed.values():
                    raise ValueError(
                        f"{self.op}: expected {name} {list(spec.shape)} to be {_wanted(allowed)}, got "
                        f"Shard({placement.dim}); call {name}.redistribute(placements=[Replicate()]) first, or shard "
                        "batch or heads instead"
                    )

    def check_batch(self, kinds: list[set[Kind]]) -> None:
        for name in ("cu_seqlens", "state_indices"):
            if name in self.specs and any("batch" in some for some in kinds):
                raise ValueError(
                    f"{self.op}: expected no argument sharded over the batch with {name}, which counts over all of it, "
                    "got one; give each rank sequences of its own as plain tensors, or shard over heads"
                )
        self._check_even("batch", kinds, "batch rows", self.specs["q"].shape[0])

    def check_heads(self, kinds: list[set[Kind]]) -> None:
        """Ranks share heads in whole groups."""
        if self.kv_heads == 1:
            self._check_even("heads", kinds, "query heads", self.heads)
        else:
            self._check_even("heads", kinds, f"key/value heads (of {self.heads} query heads)", self.kv_heads)

    def _check_even(self, kind: Kind, kinds: list[set[Kind]], what: str, count: int) -> None:
        ranks = math.prod(self.mesh.size(i) for i, some in enumerate(kinds) if kind in some)
        if count % ranks != 0:
            raise ValueError(
                f"{self.op}: expected a number of {what} that the {ranks} ranks can share evenly to shard over "
                f"{kind}, got {count}; use a mesh whose size divides it, or redistribute to Replicate()"
            )

    def check_exact(self, fixed: str, names: Iterable[str]) -> None:
        """No other argument asks for a sharding that would move ``fixed``, which must stay where it is."""
        for name in names:
            if name not in self.specs:
                continue
            for i in range(self.mesh.ndim):
                wanted, got = self.kind(fixed, i), self.kind(name, i)
                if got is not None and got != wanted:
                    raise ValueError(
                        f"{self.op}: expected {name} to be sharded as {fixed} is, over {wanted or 'nothing'} in "
                        f"dimension {i} of the mesh, or replicated, because {fixed} stays where it is, got {got}; "
                        f"redistribute {name} first"
                    )

    # --------------------------------------------------------------------------------------------------- strategies
    def input(self, name: str, kind: Kind | None) -> Placement | None:
        if name not in self.specs:
            return None
        dim = self.dims(name).get(kind) if kind is not None and self.exists(name) else None
        return Replicate() if dim is None else Shard(dim)

    def output(self, name: str, kind: Kind | None) -> Placement:
        if kind is None or not self._returns(name):
            return Replicate()
        if self.op.endswith("_backward"):
            placement = self.input(_input_of(name), kind)
            return placement if isinstance(placement, Shard) else Partial()
        return Shard(_DIMS[name][kind])

    def _returns(self, name: str) -> bool:
        """Whether an output has elements: NOTE [Operator conventions] in ``ops``."""
        if self.op.endswith("_backward"):
            return _input_of(name) in self.specs
        if name in ("final_kk", "final_kv"):
            return bool(self.values["output_final_state"])
        if name == "output" or self.op != "chunk_gka":
            return True
        saves, solves = bool(self.values["save_x"]), self.values["num_iter"] > 0
        q = self.specs["q"].tensor_meta
        if name in ("x", "fro"):
            return saves and solves
        if name in ("x_scale", "x_query"):
            return saves and solves and ops.residual_dtype(q.dtype) == torch.float16
        triton = ops.runs_triton(self.mesh.device_type, q.dtype, q.shape[-1], self.values["impl"])
        return saves and triton and (name == "boundary_kv" or solves or bool(self.values["output_final_state"]))

    def strategy(self, kind: Kind | None) -> tuple[list[Placement], list[Placement | None]]:
        """Placements of outputs and inputs where one dimension of the mesh divides ``kind``."""
        return [self.output(n, kind) for n in self.outputs], [self.input(n, kind) for n in self.arguments]


def _input_of(gradient: str) -> str:
    """The argument that an output of a backward is the gradient of."""
    name = gradient.removeprefix("d_") if gradient.startswith("d_") else gradient[1:]
    return f"{name}_tensor" if name.startswith("ridge") else name


def _wanted(dims: dict[str, int]) -> str:
    options = [f"Shard({dim}) ({kind})" for kind, dim in dims.items()]
    return " or ".join([*options, "Replicate()"])


def _sharding(op: str, *args: Any) -> list[tuple[list[Placement], list[Placement | None]]]:
    """The ways to shard a call: NOTE [Shardings]."""
    call = _Call(op, args)
    own = [name for name in call.specs if name not in _UPSTREAM]
    kinds = call.kinds(own)
    if not op.endswith("_backward"):
        call.check_placements()
    call.check_batch(kinds)
    call.check_heads(kinds)
    asked: list[Kind | None] = [None, *(kind for kind in _KINDS if any(kind in some for some in kinds))]
    fixed = "kk" if op == "recurrent_gka" else next((name for name in _LOCAL if call.exists(name)), None)
    if fixed is not None:
        stays = [call.kind(fixed, i) for i in range(call.mesh.ndim)]
        asked = [kind for kind in asked if kind in stays]
        if op == "recurrent_gka":
            call.check_exact(fixed, own)
            _check_same_placements(call)
        elif call.mesh.ndim > 1 and call.exists("boundary_kv"):
            call.check_exact(fixed, _UPSTREAM)
    return [call.strategy(kind) for kind in asked]


def _check_same_placements(call: _Call) -> None:
    kk, kv = (tuple(call.specs[name].placements) for name in ("kk", "kv"))
    if kk != kv or any(placement.is_partial() for placement in kk):
        raise ValueError(
            f"{call.op}: expected state.kk and state.kv with the same placements, Shard or Replicate, because they are "
            f"written in place, got {kk} and {kv}"
        )


def _register(op: str) -> None:
    """Registers :func:`_sharding`, and that the answer depends on which optional tensors are absent.

    PyTorch keeps answers by an operator's tensors and by what follows its first integer. Without more, a call with α
    alone and one with β alone would share one.
    """
    overload = getattr(torch.ops.gka, op).default
    register_sharding(overload)(partial(_sharding, op))
    propagator = DTensor._op_dispatcher.sharding_propagator
    strategy = propagator.op_strategy_funcs[overload]
    propagator.register_op_strategy(overload, strategy, RuntimeSchemaInfo(static_argnum=0, needs_pytree=True))


for _name in ops.SCHEMAS:
    _register(_name)


# ---------------------------------------------------------------------------------------------------- tensor parallel
class _Placed(ParallelStyle):
    """The module's own parameters with one placement."""

    def __init__(self, placement: Placement) -> None:
        super().__init__()
        self.placement = placement

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def place(name: str, part: nn.Module, mesh: DeviceMesh) -> None:
            for key, parameter in part.named_parameters(recurse=False):
                placed = distribute_tensor(parameter, mesh, [self.placement])
                part.register_parameter(key, nn.Parameter(placed, requires_grad=parameter.requires_grad))

        return distribute_module(module, device_mesh, place)


class _Layer(ParallelStyle):
    """The layer itself: its decay gate over heads, and its input, the same on every rank, as a DTensor."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _check_layer(module, device_mesh)
        for name in ("A_log", "dt_bias"):
            parameter = getattr(module, name)
            if parameter is not None:
                placed = distribute_tensor(parameter, device_mesh, [Shard(0)])
                module.register_parameter(name, nn.Parameter(placed, requires_grad=parameter.requires_grad))
        module.register_forward_pre_hook(partial(_replicated_input, device_mesh), with_kwargs=True)
        return module


def _replicated_input(
    mesh: DeviceMesh, layer: nn.Module, args: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x, *others = (*args, *options.values()) if args else (options.get("x"), *options.values())
    if any(other is not None and other is not x for other in others):
        raise ValueError(
            "GatedKalmaNet: expected x alone for a tensor-parallel layer, which has no cache, cu_seqlens or "
            "state_indices, got more"
        )
    if isinstance(x, DTensor):
        return (x.redistribute(placements=[Replicate()]),), {}
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"GatedKalmaNet: expected x to be a torch.Tensor, got {type(x).__name__}")
    return (DTensor.from_local(x, mesh, [Replicate()], run_check=False),), {}


def _check_layer(layer: nn.Module, mesh: DeviceMesh) -> None:
    if not isinstance(layer, GatedKalmaNet):
        raise TypeError(
            f"tensor_parallel_plan: expected a GatedKalmaNet to apply the plan to, got {type(layer).__name__}"
        )
    if mesh.ndim != 1:
        raise ValueError(
            f"tensor_parallel_plan: expected a mesh of one dimension, got {mesh.ndim}; pass the one that divides "
            'heads, such as mesh["tp"]'
        )
    shared = layer.num_kv_heads == layer.num_v_heads == 1
    heads = {"num_heads": layer.num_heads}
    if not shared:
        heads |= {"num_kv_heads": layer.num_kv_heads, "num_v_heads": layer.num_v_heads}
    for name, count in heads.items():
        if count % mesh.size() != 0:
            raise ValueError(
                f"tensor_parallel_plan: expected {name} to be a multiple of the mesh's {mesh.size()} ranks, got "
                f"{count}; use a smaller mesh, or num_kv_heads = 1, which every rank keeps"
            )


def tensor_parallel_plan(layer: GatedKalmaNet) -> dict[str, ParallelStyle]:
    """The plan with which ``parallelize_module(layer, mesh, plan)`` divides the layer's heads among a mesh's ranks.

    The projections of q, k, v, the gates and the ridge are column-wise, ``o_proj`` is row-wise, convolutions and the
    decay gate go with their heads, and the output norm is on every rank. So a forward communicates once, the sum behind
    ``o_proj``, and a backward once, the sum of the input's gradient. Where all query heads share one key and value
    head, every rank keeps that one. Input and output are plain tensors, the same on every rank. Parameters become
    DTensors of their global shapes, as ``torch.distributed.checkpoint`` wants them.

    In the plan of a whole model, put the layer's name before each key (the key "" is the layer itself)::

        plan = {f"layers.{i}.mixer.{name}".rstrip("."): style for name, style in tensor_parallel_plan(mixer).items()}

    Raises (in ``parallelize_module``):
        ValueError: the mesh has several dimensions, or a number of heads is no multiple of its ranks.
        TypeError: the plan is applied to another module.
    """
    shared = layer.num_kv_heads == layer.num_v_heads == 1
    plan: dict[str, ParallelStyle] = {"": _Layer(), "o_norm": _Placed(Replicate()), "o_proj": RowwiseParallel()}
    for name, child in layer.named_children():
        everywhere = shared and name[0] in "kv"
        if isinstance(child, nn.Linear) and name != "o_proj":
            plan[name] = _Placed(Replicate()) if everywhere else ColwiseParallel(use_local_output=False)
        elif name.endswith("_conv1d"):
            plan[name] = _Placed(Replicate() if everywhere else Shard(0))
    return plan
