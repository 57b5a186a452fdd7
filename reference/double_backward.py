"""Second derivatives: the backward operators differentiated through the specification, by plain autograd.

A backward operator maps inputs and upstream gradients to the gradients of the inputs. Here that map is the
vector-Jacobian product of :mod:`gka_ops.reference.exact`, differentiated once more. The result is that of the exact
solve, in fp64, token by token, and slow: meant for gradient penalties and Hessian-vector products of small problems. It
is itself made of differentiable PyTorch operations, so derivatives of any order follow.

Like the operators, it takes the gradient of an initial ``kk`` as the symmetric one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from gka_ops.reference import exact

Tensors: TypeAlias = Sequence[Tensor | None]
Gradients: TypeAlias = tuple[Tensors, Tensors]


def _differentiate(
    function: Callable[[Tensors], tuple[Tensor, ...]], inputs: Tensors, upstream: Tensors, cotangents: Tensors
) -> Gradients:
    """Gradients of ⟨cotangents, vector-Jacobian product of ``function`` at ``inputs`` with ``upstream``⟩.

    Args:
        function: from tensors like ``inputs`` to as many outputs as ``upstream`` has entries.
        inputs: ``None`` for an absent one.
        upstream: gradients of the outputs, ``None`` for zero.
        cotangents: one for each input; those of absent inputs are not read.

    Returns:
        (gradients of ``upstream``, gradients of ``inputs``), ``None`` where there is no tensor.
    """
    given = [i for i, t in enumerate(inputs) if t is not None]
    reached = [i for i, t in enumerate(upstream) if t is not None]

    def placed(places: Sequence[int], tensors: Sequence[Tensor], length: int) -> list[Tensor | None]:
        found = dict(zip(places, tensors, strict=True))
        return [found.get(i) for i in range(length)]

    def outputs(*tensors: Tensor) -> tuple[Tensor, ...]:
        results = function(placed(given, tensors, len(inputs)))
        return tuple(results[i] for i in reached)

    def gradients(incoming: Sequence[Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        vjp = torch.func.vjp(outputs, *tensors)[1]
        return vjp(tuple(d.to(torch.float64) for d in incoming))

    vjp = torch.func.vjp(gradients, [upstream[i] for i in reached], *(inputs[i] for i in given))[1]
    d_upstream, *d_inputs = vjp(tuple(cotangents[i] for i in given))
    return placed(reached, d_upstream, len(upstream)), placed(given, d_inputs, len(inputs))


def chunk_gka(
    cotangents: Tensors,
    upstream: Tensors,
    inputs: Tensors,
    cu_seqlens: Tensor | None,
    ridge_scale: float,
    ridge_offset: float,
    num_iter: int,
    scale: float,
    qk_l2norm: bool,
) -> Gradients:
    """The vector-Jacobian product of ``chunk_gka_backward``.

    Args:
        cotangents: gradients of its outputs (dq, ..., d_initial_kv).
        upstream: its arguments (d_output, d_final_kk, d_final_kv).
        inputs: its arguments (q, k, v, log_decay, alpha, beta, ridge_scale_tensor, ridge_offset_tensor, A_log, dt_bias,
            initial_kk, initial_kv).
        cu_seqlens: of the operator, like all that follow.
        ridge_scale: r, where there is no tensor.
        ridge_offset: b, where there is no tensor.
        num_iter: 0 for no solve, anything else for the exact one.
        scale: s of the read-out.
        qk_l2norm: normalise q and k first.

    Returns:
        (gradients of ``upstream``, gradients of ``inputs``), ``None`` where there is no tensor.
    """

    def function(tensors: Tensors) -> tuple[Tensor, ...]:
        q, k, v, log_decay, alpha, beta, r, b, A_log, dt_bias, kk, kv = tensors
        assert q is not None
        assert k is not None
        assert v is not None
        if kk is None and kv is not None:
            kk = kv.new_zeros(*kv.shape[:2], q.shape[-1], q.shape[-1])
        if kv is None and kk is not None:
            kv = kk.new_zeros(*kk.shape[:3], v.shape[-1])
        output, (final_kk, final_kv) = exact.chunk_gka(
            q,
            k,
            v,
            log_decay,
            alpha,
            beta,
            ridge=(ridge_scale if r is None else r, ridge_offset if b is None else b),
            num_iter=num_iter,
            scale=scale,
            qk_l2norm=qk_l2norm,
            gate=None if A_log is None else (A_log, dt_bias),
            initial_state=None if kk is None or kv is None else ((kk + kk.mT) / 2, kv),
            cu_seqlens=cu_seqlens,
        )
        return output, final_kk, final_kv

    return _differentiate(function, inputs, upstream, cotangents)


def chunk_solve(
    cotangents: Tensors,
    upstream: Tensors,
    inputs: Tensors,
    cu_seqlens: Tensor | None,
    ridge_scale: float,
    ridge_offset: float,
    num_iter: int,
    qk_l2norm: bool,
) -> Gradients:
    """The vector-Jacobian product of ``chunk_solve_backward``, as :func:`chunk_gka`.

    Args:
        cotangents: gradients of its outputs (dq, ..., d_initial_kk).
        upstream: its arguments (dx, d_final_kk).
        inputs: its arguments (q, k, log_decay, beta, ridge_scale_tensor, ridge_offset_tensor, A_log, dt_bias,
            initial_kk).
        cu_seqlens: of the operator, like all that follow.
        ridge_scale: r, where there is no tensor.
        ridge_offset: b, where there is no tensor.
        num_iter: 0 for no solve, anything else for the exact one.
        qk_l2norm: normalise q and k first.

    Returns:
        (gradients of ``upstream``, gradients of ``inputs``), ``None`` where there is no tensor.
    """

    def function(tensors: Tensors) -> tuple[Tensor, ...]:
        q, k, log_decay, beta, r, b, A_log, dt_bias, kk = tensors
        assert q is not None
        assert k is not None
        return exact.chunk_solve(
            q,
            k,
            log_decay,
            beta,
            ridge=(ridge_scale if r is None else r, ridge_offset if b is None else b),
            num_iter=num_iter,
            qk_l2norm=qk_l2norm,
            gate=None if A_log is None else (A_log, dt_bias),
            initial_state=None if kk is None else (kk + kk.mT) / 2,
            cu_seqlens=cu_seqlens,
        )

    return _differentiate(function, inputs, upstream, cotangents)
