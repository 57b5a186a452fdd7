"""A decoder of GKA and attention layers for ``transformers``."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, Qwen3Config, Qwen3ForCausalLM, Qwen3Model, StaticCache
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.qwen3.modeling_qwen3 import Qwen3PreTrainedModel

from gka_ops.hf.attention import GKAAttention
from gka_ops.hf.cache import GKACache
from gka_ops.nn import GatedKalmaNet
from gka_ops.nn.conv import ShortConvolution

GKA_LAYER, ATTENTION_LAYER = "linear_attention", "full_attention"
"""Entries of ``layer_types``, in the words of ``transformers``."""

CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(Qwen3Model.forward).parameters else "past_key_values"
"""What the installed ``transformers`` calls the cache in the arguments of its models."""


class GKAConfig(Qwen3Config):
    """Configuration of :class:`GKAModel`: that of Qwen3, whose attention blocks are GKA where ``layer_types`` says so.

    GKA layers take ``hidden_size``, ``head_dim``, ``num_attention_heads`` and ``num_key_value_heads`` from it, too.

    Args:
        layer_types: ``"linear_attention"`` (GKA) or ``"full_attention"`` for every layer; ``None`` makes all GKA.
        gka_options: further keyword arguments of :class:`gka_ops.GatedKalmaNet`, for instance ``{"num_iter": 30}``.
        **kwargs: as for ``transformers.Qwen3Config``.

    Raises:
        ValueError: ``layer_types`` has another length than ``num_hidden_layers``, or another entry.
    """

    model_type = "gka"
    # Neither the convolutions nor the state of a GKA layer are split over devices.
    base_model_tp_plan = None
    base_model_pp_plan = None

    layer_types: list[str] | None = None
    gka_options: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.layer_types is None:
            self.layer_types = [GKA_LAYER] * self.num_hidden_layers
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"GKAConfig: expected layer_types for num_hidden_layers = {self.num_hidden_layers} layers, got "
                f"{len(self.layer_types)}"
            )
        unknown = sorted(set(self.layer_types or ()) - {GKA_LAYER, ATTENTION_LAYER})
        if unknown:
            raise ValueError(
                f"GKAConfig: expected layer_types to hold {GKA_LAYER!r} or {ATTENTION_LAYER!r}, got "
                f"{', '.join(map(repr, unknown))}"
            )
        super().__post_init__(**kwargs)

    @property
    def attention_layers(self) -> list[int]:
        """Indices of the layers that are attention."""
        return [index for index, layer_type in enumerate(self.layer_types or ()) if layer_type == ATTENTION_LAYER]


class GKAPreTrainedModel(Qwen3PreTrainedModel):
    """Initialisation, loading and saving."""

    config: GKAConfig
    config_class = GKAConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ShortConvolution):
            module.reset_parameters()
        elif isinstance(module, GatedKalmaNet) and not all(
            getattr(parameter, "_is_hf_initialized", False) for parameter in module.parameters(recurse=False)
        ):
            module._reset_gates()


class GKAModel(GKAPreTrainedModel, Qwen3Model):
    """The decoder without a head: Qwen3's, with :class:`GKAAttention` in the layers that ``layer_types`` names.

    Args:
        config: sizes and layers.
    """

    def __init__(self, config: GKAConfig) -> None:
        super().__init__(config)
        for index, layer_type in enumerate(config.layer_types or ()):
            if layer_type == GKA_LAYER:
                self.layers[index].self_attn = GKAAttention(
                    config.hidden_size,
                    config.head_dim,
                    config.num_attention_heads,
                    config.num_key_value_heads,
                    layer_idx=index,
                    **(config.gka_options or {}),
                )
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Any] | None = None,
        position_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of the last layer.

        Args:
            input_ids: [B, T], or ``inputs_embeds`` [B, T, hidden_size] in its place.
            attention_mask: [B, S], 0 at padding, over the T tokens and, with a cache, those before them.
            position_ids: [B, T] or [1, T], for the rotary embeddings of attention layers; ``None`` counts on from the
                cache.
            use_cache: whether to return a cache; ``None`` takes it from the configuration.
            **kwargs: the cache, ``past_key_values`` or ``cache``, advanced in place; ``cu_seq_lens_q`` for sequences
                packed along T; and whatever else ``Qwen3Model.forward`` takes.

        Raises:
            TypeError: no layer is attention, and the cache is no :class:`GKACache`.
            ValueError: ``attention_mask`` has another number of dimensions, or positions start anew within T without
                ``cu_seq_lens_q``, which is needed to keep packed sequences apart.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("GKAModel: expected either input_ids or inputs_embeds, got both or neither")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        T = inputs_embeds.shape[1]
        cache = _pop_cache(kwargs)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if not self.config.attention_layers:
            if cache is None and use_cache and not (self.gradient_checkpointing and self.training):
                cache = GKACache(self.config)
            if cache is not None and not isinstance(cache, GKACache):
                raise TypeError(
                    f"GKAModel: expected a GKACache, as no layer is attention that could tell a cache's length, got a "
                    f"{type(cache).__name__}"
                )
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length()
            position_ids = (torch.arange(T, device=inputs_embeds.device) + past)[None]
        elif attention_mask is None and cache is None and "cu_seq_lens_q" not in kwargs:
            _check_unpacked(position_ids)
        if isinstance(attention_mask, Tensor) and attention_mask.ndim != 2:
            raise ValueError(f"GKAModel: expected attention_mask of shape [B, S], got {list(attention_mask.shape)}")
        if not isinstance(attention_mask, dict):
            attention_mask = create_masks_for_generate(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{CACHE_ARGUMENT: cache},
            )
        return super().forward(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **{CACHE_ARGUMENT: cache},
            **kwargs,
        )


class GKAForCausalLM(GKAPreTrainedModel, Qwen3ForCausalLM):
    """:class:`GKAModel` with a language-model head: logits, the loss of ``labels``, and ``generate``.

    Args:
        config: sizes and layers; ``tie_word_embeddings=True`` makes the head the embedding.
    """

    def __init__(self, config: GKAConfig) -> None:
        super(Qwen3ForCausalLM, self).__init__(config)  # Qwen3ForCausalLM's would build a Qwen3Model first
        self.model = GKAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        given = model_kwargs.get(CACHE_ARGUMENT)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        made = model_kwargs.get(CACHE_ARGUMENT)
        if given is None and made is not None and not self.config.attention_layers:
            model_kwargs[CACHE_ARGUMENT] = GKACache(self.config, compileable=isinstance(made, StaticCache))


def _pop_cache(kwargs: dict[str, Any]) -> Cache | None:
    caches = [kwargs.pop(name, None) for name in ("cache", "past_key_values")]
    return next((cache for cache in caches if cache is not None), None)


def _check_unpacked(position_ids: Tensor) -> None:
    if not torch.compiler.is_compiling() and bool((position_ids.diff(dim=-1) != 1).any()):
        raise ValueError(
            "GKAModel: expected cu_seq_lens_q with sequences packed into a row, as from "
            "DataCollatorWithFlattening(return_flash_attn_kwargs=True), got position_ids that do not rise by one"
        )
