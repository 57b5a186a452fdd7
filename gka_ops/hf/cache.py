"""Decoding memory of GKA layers inside the caches of ``transformers``."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import LinearAttentionCacheLayerMixin, LinearAttentionLayer

from gka_ops.nn import GatedKalmaNet, GatedKalmaNetCache


class GKACacheLayer(LinearAttentionLayer):
    """What one GKA layer remembers: the buffers of a :class:`gka_ops.nn.GatedKalmaNetCache`, as recurrent states.

    ``transformers`` reorders, resets and offloads them as it does for its own linear-attention layers.

    Args:
        layer: the layer whose memory it is.
        batch_size: number of sequences.

    Attributes:
        cumulative_length: tokens seen, padding included, as attention layers count them; a tensor on the device of the
            buffers, so that neither ``torch.compile`` nor a CUDA graph takes it for a constant.
        complete: whether every token seen went into the buffers; false after a forward that recorded gradients.
    """

    def __init__(self, layer: GatedKalmaNet, batch_size: int) -> None:
        buffers, self._structure = pytree.tree_flatten(layer.init_cache(batch_size))
        super().__init__(number_of_states=len(buffers))
        self.device = buffers[0].device  # where reordering moves its indices
        self.batch_size = batch_size
        self.cumulative_length = torch.zeros((), dtype=torch.int64, device=self.device)
        self.complete = True
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.cumulative_length)
        for index, buffer in enumerate(buffers):
            self.lazy_initialization(recurrent_states=buffer, state_idx=index)

    def buffers(self) -> GatedKalmaNetCache:
        """The tensors themselves, for :meth:`gka_ops.GatedKalmaNet.forward` to advance in place."""
        states = [self.recurrent_states[index] for index in range(self.number_of_states)]
        return cast(GatedKalmaNetCache, pytree.tree_unflatten(states, self._structure))

    def count(self, tokens: int) -> None:
        """Records that ``tokens`` more tokens of every sequence were seen."""
        self.cumulative_length.add_(tokens)
        self.has_previous_state = dict.fromkeys(range(self.number_of_states), True)

    def reset(self) -> None:
        super().reset()
        self.cumulative_length.zero_()
        self.complete = True

    def crop(self, tokens_to_remove: int) -> None:
        """Refuses: a recurrent state does not know what it was before a token.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "GKACacheLayer: expected decoding that never takes tokens back, got crop(), as from assisted generation"
        )


class GKACache(DynamicCache):
    """The cache of a model without attention: a ``DynamicCache`` whose GKA layers tell how many tokens they have seen.

    ``transformers`` asks attention layers for that, so a model with some takes ``DynamicCache(config=model.config)``.
    ``generate`` and :class:`gka_ops.hf.GKAModel` create the right one; make one to prefill and decode by hand.

    Args:
        config: the model's configuration.
        compileable: whether ``generate`` may compile the model by itself, as ``cache_implementation="static"`` asks.
            The buffers have fixed sizes and addresses in any case.

    Raises:
        ValueError: a layer is attention.
    """

    def __init__(self, config: PretrainedConfig, compileable: bool = False) -> None:
        super().__init__(config=config)
        self._compileable = compileable
        if not all(isinstance(layer, LinearAttentionLayer) for layer in self.layers):
            raise ValueError(
                "GKACache: expected a model without attention, got one with; DynamicCache(config=model.config) suits it"
            )

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile the model by itself."""
        return self._compileable

    @property
    def is_linear(self) -> list[bool]:
        """Which layers cannot tell the length: none."""
        return [False] * len(self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int | Tensor:
        """Tokens seen so far, padding included; a tensor, as from a ``StaticCache``, once there are any."""
        layer = self.layers[layer_idx]
        return layer.cumulative_length if isinstance(layer, GKACacheLayer) else 0


def cache_layer(cache: Cache, index: int, layer: GatedKalmaNet, batch_size: int) -> GKACacheLayer:
    """Layer ``index`` of ``cache``, put there in place of the empty one that ``transformers`` made.

    Raises:
        ValueError: that layer already holds something else, such as keys and values of attention.
    """
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    found = cache.layers[index]
    if isinstance(found, GKACacheLayer):
        return found
    if isinstance(found, LinearAttentionCacheLayerMixin):
        used = any(found.has_previous_state.values())
    else:
        used = int(found.get_seq_length()) > 0
    if used:
        raise ValueError(
            f"GKAAttention: expected layer {index} of the cache to be empty or to belong to a GKA layer, got a "
            f"{type(found).__name__} that was filled by another model"
        )
    cache.layers[index] = GKACacheLayer(layer, batch_size)
    return cast(GKACacheLayer, cache.layers[index])


def extended(buffers: GatedKalmaNetCache) -> GatedKalmaNetCache:
    """A copy with a row of zeros appended to every buffer: an empty sequence after the others."""
    return cast(GatedKalmaNetCache, pytree.tree_map(lambda b: torch.cat((b, torch.zeros_like(b[:1]))), buffers))


def restore(buffers: GatedKalmaNetCache, source: GatedKalmaNetCache) -> None:
    """Copies all rows of ``source`` but the last into ``buffers``."""
    for buffer, values in zip(pytree.tree_leaves(buffers), pytree.tree_leaves(source), strict=True):
        buffer.copy_(values[:-1])
