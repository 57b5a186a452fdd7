"""Layers of every kind that ``GatedKalmaNet`` offers, and a transcription of it in fp64, token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gka_ops.nn import GatedKalmaNet
from gka_ops.numerics import NORM_EPS

HIDDEN, HEAD_DIM = 24, 16
TIGHT = 1e-12
"""Tolerance of the solve with which an fp64 layer is compared with an exact one."""

KINDS: dict[str, dict[str, Any]] = {
    "heads": {"num_heads": 3},
    "grouped": {"num_heads": 4, "num_kv_heads": 2},
    "more key/value heads": {"num_heads": 2, "num_kv_heads": 4},
    "more value heads": {"num_heads": 2, "num_v_heads": 4},
    "three numbers of heads": {"num_heads": 6, "num_kv_heads": 2, "num_v_heads": 3},
    "wide values": {"num_kv_heads": 1, "head_v_dim": 24},
    "no convolution": {"conv_size": 1},
    "no convolution of values": {"use_v_conv": False},
    "no forgetting gate": {"use_forgetting_gate": False},
    "no beta gate": {"use_beta_gate": False},
    "no alpha connection": {"use_alpha_connection": False},
    "no output gate": {"use_output_gate": False},
    "learned ridge": {"ridge_range": (0.005, 0.5)},
    "no solve": {"num_iter": 0},
    "nothing optional": {
        "conv_size": 1,
        "use_v_conv": False,
        "use_forgetting_gate": False,
        "use_beta_gate": False,
        "use_alpha_connection": False,
        "use_output_gate": False,
    },
}


def make_layer(dtype: torch.dtype = torch.float64, **options: Any) -> GatedKalmaNet:
    """A layer whose every parameter is away from its neutral value."""
    torch.manual_seed(0)
    layer = GatedKalmaNet(HIDDEN, HEAD_DIM, **({"num_heads": 2, "tol": TIGHT} | options), dtype=dtype)
    with torch.no_grad():
        layer.o_norm.weight.uniform_(0.5, 1.5)
        if layer.A_log is not None:
            layer.A_log.uniform_(-3, 0)  # remembers tens of tokens, unlike the initial values
        if layer.ridge_proj is not None:
            layer.ridge_proj.weight.uniform_(-1, 1)
    return layer


def make_input(B: int, T: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(B, T, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operator_norm(x: Tensor) -> Tensor:
    """What ``chunk_gka`` divides q and k by."""
    return x.norm(dim=-1, keepdim=True).clamp(min=NORM_EPS)


def published_norm(x: Tensor) -> Tensor:
    """What the published layer divides them by."""
    return x.norm(dim=-1, keepdim=True) + 1e-6


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def definition(layer: GatedKalmaNet, x: Tensor, norm: Callable[[Tensor], Tensor] = operator_norm) -> Tensor:
    """The layer for x [B, T, hidden], written out in fp64 from the definitions, one token and tap at a time.

    It knows the layer by its sizes, scalars and parameters: what has no parameters is left out.
    """
    p = {name: parameter.double() for name, parameter in layer.named_parameters()}
    x = x.double()
    B, T, _ = x.shape
    D, V, ridge_range = layer.head_dim, layer.head_v_dim, layer.ridge_range
    H = max(layer.num_heads, layer.num_kv_heads, layer.num_v_heads)

    def project(name: str) -> Tensor:
        y = x @ p[f"{name}_proj.weight"].T
        return y + p[f"{name}_proj.bias"] if f"{name}_proj.bias" in p else y

    def heads(name: str, count: int, size: int) -> Tensor:
        rows = project(name)
        if f"{name}_conv1d.weight" in p:
            projected, weight = rows, p[f"{name}_conv1d.weight"]
            K, convolved = weight.shape[2], []
            for t in range(T):
                row = torch.zeros_like(projected[:, 0])
                for i in range(K):
                    source = t - (K - 1) + i
                    if source >= 0:
                        row = row + weight[:, 0, i] * projected[:, source]
                convolved.append(row * sigmoid(row))
            rows = torch.stack(convolved, dim=1)
        group = H // count
        return torch.stack([rows[..., h // group * size : (h // group + 1) * size] for h in range(H)], dim=2)

    q, k, v = heads("q", layer.num_heads, D), heads("k", layer.num_kv_heads, D), heads("v", layer.num_v_heads, V)
    q, k = q / norm(q), k / norm(k)
    if "b_proj.weight" in p:
        beta = sigmoid(project("b"))[..., None] + 1e-6
        k, v = beta * k, beta * v
    one = x.new_ones(B, T, H)
    decay, alpha, ridge = one, one, layer.ridge * one
    if "A_log" in p:
        decay = torch.exp(-p["A_log"].exp() * torch.log1p(torch.exp(project("a") + p["dt_bias"])))
    if "alpha_proj.weight" in p:
        alpha = sigmoid(project("alpha"))
    if ridge_range is not None:
        low, high = ridge_range
        ridge = low * (high / low) ** sigmoid(project("ridge"))

    kk, kv, outputs = x.new_zeros(B, H, D, D), x.new_zeros(B, H, D, V), []
    for t in range(T):
        fade = decay[:, t, :, None, None]
        kk = fade * kk + k[:, t, :, :, None] * k[:, t, :, None, :]
        kv = fade * kv + k[:, t, :, :, None] * v[:, t, :, None, :]
        mixed = q[:, t]
        if layer.num_iter != 0:
            strength = ridge[:, t] * kk.square().sum((-2, -1)).sqrt()
            system = kk + strength[..., None, None] * torch.eye(D, dtype=x.dtype)
            solved = torch.linalg.solve(system, q[:, t, :, :, None])[..., 0]
            mixed = (1 - alpha[:, t, :, None]) * q[:, t] + alpha[:, t, :, None] * solved
        outputs.append(D**-0.5 * (mixed[..., None, :] @ kv)[..., 0, :])
    o = torch.stack(outputs, dim=1)
    o = o / torch.sqrt((o * o).mean(-1, keepdim=True) + layer.o_norm.eps) * p["o_norm.weight"]
    if "g_proj.weight" in p:
        gate = project("g").reshape(B, T, H, V)
        o = o * gate * sigmoid(gate)
    return o.reshape(B, T, H * V) @ p["o_proj.weight"].T


def gradients(layer: GatedKalmaNet, x: Tensor, run: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Gradients of a random projection of ``run(x)`` with respect to x and every parameter."""
    x = x.detach().requires_grad_()
    y = run(x)
    upstream = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    names, parameters = zip(*layer.named_parameters(), strict=True)
    found = torch.autograd.grad((y * upstream).sum(), (x, *parameters), materialize_grads=True)
    return dict(zip(("x", *names), found, strict=True))
