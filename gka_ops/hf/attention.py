"""A GKA layer with the call signature of the attention blocks in ``transformers``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from gka_ops.hf.cache import cache_layer, extended, restore
from gka_ops.nn import GatedKalmaNet, GatedKalmaNetCache


class GKAAttention(GatedKalmaNet):
    """:class:`gka_ops.GatedKalmaNet` where a decoder layer of ``transformers`` expects its ``self_attn``.

    Padding never enters the memory, wherever it stands: the tokens that are not padding are gathered, and every
    sequence runs packed and on its own. Shapes do not depend on the mask, so this compiles, and waits for no card.

    Args:
        *sizes: as for :class:`gka_ops.GatedKalmaNet`.
        layer_idx: index of the layer in the model, and so in its cache.
        **options: as for :class:`gka_ops.GatedKalmaNet`.
    """

    def __init__(self, *sizes: int, layer_idx: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.layer_idx = layer_idx

    def forward(  # type: ignore[override]  # the signature of an attention block
        self,
        hidden_states: Tensor,
        position_embeddings: object = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Mixes tokens.

        Args:
            hidden_states: [B, T, hidden_size].
            position_embeddings: has no effect; the order of tokens comes from decay and convolutions.
            attention_mask: ``None``, or [B, S] with S ≥ T, whose last T columns are 0 or false at padding, or the
                [B, 1, T, S] mask made for attention (boolean, or 0 where attended), from which only padding is read.
                Without effect for T = 1, as a decoded token is never padding.
            past_key_values, cache: one cache under either of its names in ``transformers``; advanced **in place**.
                A forward that records gradients runs without it, and the cache cannot be continued afterwards.
            **kwargs: ``cu_seq_lens_q`` [N + 1], boundaries of N sequences packed along T (then B = 1, there is no mask,
                and a cache gets N rows); the others have no effect, position_ids neither.

        Returns:
            ([B, T, hidden_size], ``None``): the second stands for attention weights.

        Raises:
            TypeError: the mask is no tensor (``flex_attention`` makes such).
            ValueError: the mask has another shape, comes with ``cu_seq_lens_q``, or the cache is another model's.
            RuntimeError: the cache does not hold all tokens so far, or is continued while gradients are recorded.
        """
        cache = past_key_values if cache is None else cache
        B, T, _ = hidden_states.shape
        cu_seqlens = kwargs.get("cu_seq_lens_q")
        sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        memory = None if cache is None else cache_layer(cache, self.layer_idx, self, sequences)
        buffers, past = None, None
        if memory is not None:
            past = memory.cumulative_length
            if memory.has_previous_state[0] and (torch.is_grad_enabled() or not memory.complete):
                raise RuntimeError(
                    "GKAAttention: expected torch.no_grad() or torch.inference_mode() around every call with a cache "
                    "that is continued, which carries no gradient, got a call with gradients enabled"
                )
            memory.complete = not torch.is_grad_enabled()
            buffers = memory.buffers() if memory.complete else None
        real = None if T == 1 else _real_tokens(attention_mask, T, past)
        if memory is not None:
            memory.count(T)
        if real is None:
            return super().forward(hidden_states, buffers, cu_seqlens), None
        if cu_seqlens is not None:
            raise ValueError("GKAAttention: expected cu_seq_lens_q without an attention_mask, got both")
        return self._without_padding(hidden_states, buffers, real), None

    def _without_padding(self, x: Tensor, buffers: GatedKalmaNetCache | None, real: Tensor) -> Tensor:
        """``x`` [B, T, hidden] of which only the tokens with ``real`` [B, T] count; anything elsewhere.

        All padding becomes one more sequence behind the B others, so that shapes are static.
        """
        order = torch.argsort(~real.flatten(), stable=True)
        boundaries = torch.cat((real.new_zeros(1, dtype=torch.int64), real.sum(1).cumsum(0)))
        cu_seqlens = torch.cat((boundaries, torch.full_like(boundaries[:1], real.numel())))
        memory = None if buffers is None else extended(buffers)
        packed = super().forward(x.flatten(0, 1)[order][None], memory, cu_seqlens)
        if buffers is not None and memory is not None:
            restore(buffers, memory)
        return packed[0][torch.argsort(order)].view_as(x)


def _real_tokens(mask: object, T: int, past: Tensor | None) -> Tensor | None:
    """[B, T], false at padding, of the T tokens that follow ``past`` others; ``None`` where there is no mask."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"GKAAttention: expected attention_mask to be a torch.Tensor or None, got {type(mask).__name__}; "
            'attn_implementation="sdpa" makes tensors'
        )
    S = mask.shape[-1]
    if mask.ndim == 2 and S >= T:
        return mask[:, -T:].bool()
    if mask.ndim != 4 or mask.shape[1:3] != (1, T) or S < T:
        raise ValueError(
            f"GKAAttention: expected attention_mask of shape [B, S] or [B, 1, T, S] with S >= T = {T}, got "
            f"{list(mask.shape)}"
        )
    # A token sees itself unless it is padding. Caches of fixed size have room behind the new tokens.
    start = 0 if past is None else past.clamp(max=S - T)
    columns = (torch.arange(T, device=mask.device) + start).view(1, T, 1).expand(mask.shape[0], T, 1)
    own = mask[:, 0].gather(-1, columns)[..., 0]
    return own if own.dtype == torch.bool else own == 0
