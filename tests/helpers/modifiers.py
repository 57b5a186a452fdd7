"""What modified operators are measured against: the definition, token by token, with an exact solve and autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gka_ops.types import GKAState

RidgeMod = Callable[[Any, Tensor, Tensor, Tensor], Any]


def exact_gka(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, alpha: Tensor, beta: Tensor, ridge_mod: RidgeMod, scale: float
) -> tuple[Tensor, Tensor, GKAState]:
    """o [B, T, H, V], x [B, T, H, D] and the states after the last token, in the dtype of q; Hkv divides H."""
    B, T, H, D = q.shape
    group = H // k.shape[2]
    k, v = (beta[..., None] * rows.repeat_interleave(group, dim=2) for rows in (k, v))
    b, h = torch.arange(B)[:, None], torch.arange(H)
    kk, kv = q.new_zeros(B, H, D, D), q.new_zeros(B, H, D, v.shape[-1])
    outputs, solutions = [], []
    for t in range(T):
        decay = log_decay[:, t].exp()[..., None, None]
        kk = decay * kk + k[:, t, :, :, None] * k[:, t, :, None, :]
        kv = decay * kv + k[:, t, :, :, None] * v[:, t, :, None, :]
        ridge = ridge_mod(kk.square().sum((-1, -2)).sqrt(), b, h, torch.tensor(t))
        system = kk + torch.as_tensor(ridge, dtype=q.dtype).expand(B, H)[..., None, None] * torch.eye(D, dtype=q.dtype)
        x = torch.linalg.solve(system, q[:, t])
        mix = q[:, t] + alpha[:, t, :, None] * (x - q[:, t])
        outputs.append(scale * (mix[..., None, :] @ kv)[..., 0, :])
        solutions.append(x)
    return torch.stack(outputs, 1), torch.stack(solutions, 1), GKAState(kk, kv)
