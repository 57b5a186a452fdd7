"""GKA layers in place of attention blocks of a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gka_ops.hf.attention import GKAAttention
from gka_ops.nn.conv import ShortConvolution

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def replace_attention(model: PreTrainedModel, layers: Sequence[int], **options: Any) -> list[GKAAttention]:
    r"""Replaces attention blocks of ``model`` **in place** by GKA layers that start from their projections.

    For priming: train the new layers, for instance against the hidden states of the original model. Blocks of Llama,
    Qwen3, Mistral and whatever is built like them can be replaced. Forward, backward, gradient checkpointing,
    ``generate`` and padding work as before, with the layers mixed; only sequences packed into one row, which attention
    tells apart by ``position_ids``, need ``cu_seq_lens_q`` for the new layers.

    ``model.config`` does not know of the change, so ``from_pretrained`` does not repeat it: load a trained state dict
    after calling this on the original again, or, for Qwen3, into a :class:`GKAForCausalLM` whose ``layer_types`` name
    the same layers.

    What a new layer starts from:

    * ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj`` are copies, with as many key/value heads. Weights of RMSNorms on
      queries and keys (Qwen3) are multiplied into the rows of ``q_proj`` and ``k_proj``; the layer divides both by
      their ℓ2 norms itself. Rotary embeddings are dropped: order comes from decay and convolutions.
    * Convolutions pass the current token: 1 at its tap, 0 before.
    * The decay does not depend on the input (``a_proj`` is 0) and is slow: A = 1, so that with the layer's own
      ``dt_bias`` heads forget within 10 to 1000 tokens. Mamba-2's A of up to 16 is for training from scratch; the
      projections come from a block that forgets nothing.
    * α and β are ½ for every token (``alpha_proj``, ``b_proj`` are 0), where the sigmoid is steepest. A constant β
      changes no solved read-out, as H and U scale alike.
    * ``g_proj`` is 0, and with SiLU(0) the block's output: the residual stream starts undisturbed, as behind any
      zero-initialised branch, rather than with values under random signs. In the first step only ``g_proj`` has a
      gradient, from then on every parameter.

    Args:
        model: a model with ``get_decoder().layers[i].self_attn``.
        layers: indices of the layers to replace; negative ones count from the end. At least one attention block has to
            remain, from which ``transformers`` takes the length of a cache.
        **options: keyword arguments of :class:`gka_ops.GatedKalmaNet`, for instance ``num_iter``.

    Returns:
        The new layers, in the order of ``layers``, with dtype, device and mode (training or not) of those replaced.

    Raises:
        ValueError: an index is out of range or there twice, no attention would remain, or a block cannot be expressed:
            it has biases, or its projections have other shapes than head_dim says.
        TypeError: a block is not an attention block with the four projections as ``nn.Linear``, or has a norm of
            another kind on queries and keys.

    No block is replaced where one cannot be.
    """
    decoder_layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(decoder_layers, nn.ModuleList):
        raise TypeError(
            f"replace_attention: expected a model with a list of decoder layers, got {type(model).__name__}"
        )
    count = len(decoder_layers)
    for index in layers:
        if not -count <= index < count:
            raise ValueError(f"replace_attention: expected layers in [{-count}, {count}), got {index}")
    chosen = [index % count for index in layers]
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"replace_attention: expected each layer once, got {list(layers)}")
    remaining = [i for i in range(count) if i not in chosen and not isinstance(_block(decoder_layers, i), GKAAttention)]
    if not remaining:
        raise ValueError(f"replace_attention: expected an attention block to remain, got all {count} layers")
    replacements = [from_attention(_block(decoder_layers, index), index, **options) for index in chosen]
    for index, replacement in zip(chosen, replacements, strict=True):
        decoder_layers[index].self_attn = replacement
    return replacements


def _block(decoder_layers: nn.ModuleList, index: int) -> nn.Module:
    block = getattr(decoder_layers[index], "self_attn", None)
    if not isinstance(block, nn.Module):
        raise TypeError(
            f"replace_attention: expected layer {index} to have an attention block self_attn, got "
            f"{type(decoder_layers[index]).__name__}"
        )
    return block


@torch.no_grad()
def from_attention(block: nn.Module, layer_idx: int, **options: Any) -> GKAAttention:
    """The GKA layer that starts from one attention block; arguments and errors as for :func:`replace_attention`."""
    where = f"replace_attention: layer {layer_idx}"
    projections = {name: getattr(block, name, None) for name in PROJECTIONS}
    for name, projection in projections.items():
        if not isinstance(projection, nn.Linear) or not projection.weight.is_floating_point():
            raise TypeError(
                f"{where}: expected {name} to be an nn.Linear with floating-point weights, got "
                f"{type(projection).__name__} in {type(block).__name__}"
            )
        if projection.bias is not None:
            raise ValueError(
                f"{where}: expected projections without bias, as a GKA layer has none, got a bias in {name}"
            )
    weights: dict[str, Tensor] = {name: p.weight for name, p in projections.items() if p is not None}
    D = getattr(block, "head_dim", None)
    if not isinstance(D, int):
        raise TypeError(f"{where}: expected an integer head_dim, got {D!r} in {type(block).__name__}")
    hidden_size = weights["q_proj"].shape[1]
    H, Hkv = weights["q_proj"].shape[0] // D, weights["k_proj"].shape[0] // D
    expected = {
        "q_proj": (H * D, hidden_size),
        "k_proj": (Hkv * D, hidden_size),
        "v_proj": (Hkv * D, hidden_size),
        "o_proj": (hidden_size, H * D),
    }
    for name, shape in expected.items():
        if weights[name].shape != shape:
            raise ValueError(
                f"{where}: expected {name}.weight of shape {list(shape)} at head_dim = {D}, got "
                f"{list(weights[name].shape)}"
            )
    like = weights["q_proj"]
    layer = GKAAttention(hidden_size, D, H, Hkv, layer_idx=layer_idx, device=like.device, dtype=like.dtype, **options)
    for name, weight in weights.items():
        layer.get_parameter(f"{name}.weight").copy_(weight)
    for projection, norm in ((layer.q_proj, "q_norm"), (layer.k_proj, "k_norm")):
        if getattr(block, norm, None) is not None:
            scale = _norm_weight(getattr(block, norm), projection.weight, D, where)
            projection.weight.copy_(projection.weight * scale[:, None])
    for module in layer.modules():
        if isinstance(module, ShortConvolution):
            nn.init.zeros_(module.weight)
            nn.init.ones_(module.weight[..., -1])
    for gate in (layer.a_proj, layer.b_proj, layer.alpha_proj, layer.g_proj):
        for parameter in () if gate is None else gate.parameters():
            nn.init.zeros_(parameter)
    if layer.A_log is not None:
        nn.init.zeros_(layer.A_log)
    return layer.train(block.training)


def _norm_weight(norm: nn.Module, like: Tensor, D: int, where: str) -> Tensor:
    """[H·D]: what an RMSNorm over one head, or over all, multiplies each channel of ``like`` [H·D, hidden] with."""
    weight = getattr(norm, "weight", None)
    if "RMSNorm" not in type(norm).__name__ or not isinstance(weight, Tensor):
        raise TypeError(f"{where}: expected q_norm and k_norm to be RMSNorms, got {type(norm).__name__}")
    channels = weight.numel()
    if channels not in (D, like.shape[0]):
        raise ValueError(f"{where}: expected a norm of {D} or {like.shape[0]} channels, got {channels}")
    # A row of ones has root mean square 1. Asking the norm gives its weight however it is stored (Gemma stores w - 1).
    ones = torch.ones(channels, dtype=torch.float32, device=like.device)
    scale: Tensor = norm(ones)
    return scale.repeat(like.shape[0] // channels)
